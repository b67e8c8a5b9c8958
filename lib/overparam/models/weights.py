"""Loading weights from disk: a model is refused unless the checkpoint holds all weights that it computes with."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from overparam.models.hooks import hooks
from overparam.models.proof import probe
from overparam.models.seeding import seeded
from overparam.models.source import read_json

_SHOWN = 4  # names listed in an error
_GROUPS = 8  # maximum number of parts that are first tested all at once
_MOST = 0.5  # share of the weights: a checkpoint that lacks more belongs to another model
_INTEGERS = ("I", "U")  # first letters of integer dtypes in safetensors: I8, U8, I32
_INSIDE = re.compile(r"^(?P<list>.+?)\.(?P<index>\d+)\.(?P<rest>.+)$")


def read(kind: Any, source: Path | str, **arguments: Any) -> PreTrainedModel:
    """Load a model with `from_pretrained`, and refuse it unless the checkpoint holds all weights that it uses.

    transformers fills missing weights with random numbers and only warns. Here missing weights are set to NaN for a
    small forward pass: a weight is in use if the hidden states or logits change. Unused weights (a pooler, when only
    hidden states are needed) may be missing; they are drawn with a fixed seed, so that two loads give the same model.
    The checkpoint may hold weights that the model has no place for (a head), but not extra weights of its blocks.

    Args:
        kind: A class of transformers, such as ``AutoModel``.
        source: A folder or hub id.
        arguments: Arguments of `from_pretrained`.

    Raises:
        ValueError: If weights that the model uses are missing or have another shape, or the checkpoint has extra
            weights of its blocks; the message names them and says what to do.
        OSError: If files are missing.
    """
    with seeded(0), _without_report():
        model, report = kind.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    model = cast(PreTrainedModel, model).eval()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{source} holds an adapter, not a whole model: merge it with merge_and_unload() of peft, save the result "
            "and load that"
        )
    shapes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in report["mismatched_keys"]}
    missing = sorted({*report["missing_keys"], *shapes})
    if missing and (used := _used(model, missing)):
        raise ValueError(_lacking(model, source, used, shapes))
    if left := _left_over(model, source, sorted(report["unexpected_keys"])):
        raise ValueError(left)
    if whole := _whole_numbers(model, source, set(report["unexpected_keys"])):
        raise ValueError(
            f"{source} stores {len(whole)} weights as whole numbers, such as {', '.join(whole[:_SHOWN])}, and its "
            "config.json has no quantization_config that defines their scale. Save the model again in floating "
            "point, or with its quantization_config."
        )
    return model


def _used(model: PreTrainedModel, missing: list[str]) -> list[str]:
    """Return those of the missing weights that the hidden states or logits depend on."""
    state = model.state_dict(keep_vars=True)
    sizes = {name: state[name].numel() for name in missing if name in state}
    if sum(sizes.values()) > _MOST * sum(tensor.numel() for tensor in state.values()):
        return missing
    called, outputs = _run(model)
    if outputs is None or not outputs.isfinite().any():  # cannot be tested: assume that all are used
        return missing
    sparse = {name for name in missing if _one_of_several(name, called)}
    lost = [name for name in missing if type(state.get(name)) not in (torch.Tensor, nn.Parameter)]
    groups: dict[str, list[str]] = {}
    for name in missing:
        if name not in sparse and name not in lost:
            groups.setdefault(_group(name), []).append(name)
    every = [state[name] for names in groups.values() for name in names]
    if not _same_without(model, every, outputs):
        several = len(groups) > _GROUPS
        for names in groups.values():
            if several or not _same_without(model, [state[name] for name in names], outputs):
                lost += names
    return sorted({*sparse, *lost})


def _run(model: PreTrainedModel) -> tuple[set[str], torch.Tensor | None]:
    """Names of the modules that a forward pass calls, and its outputs; see `_outputs`."""
    names: set[str] = set()
    with hooks(
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
    ):
        return names, _outputs(model)


def _outputs(model: PreTrainedModel) -> torch.Tensor | None:
    """Logits or hidden states of a small padded batch; None if the model needs more than tokens."""
    try:
        batch = probe(model)
        with torch.inference_mode():
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    except Exception:
        return None
    output = outputs.get("logits")
    output = outputs.get("last_hidden_state") if output is None else output
    return None if output is None else cast(torch.Tensor, output)[batch.attention_mask.bool()]


def _same_without(model: PreTrainedModel, tensors: list[torch.Tensor], outputs: torch.Tensor) -> bool:
    """Whether the outputs stay the same when these weights are NaN: then they are not used.

    NaN need not reach the outputs: a weight that only decides which expert is chosen changes their values.
    """
    chosen = [tensor for tensor in tensors if tensor.is_floating_point()]
    kept = [tensor.detach().clone() for tensor in chosen]
    try:
        with torch.no_grad():
            for tensor in chosen:
                tensor.fill_(torch.nan)
        changed = _outputs(model)
        return changed is not None and torch.equal(changed.nan_to_num(), outputs.nan_to_num())
    finally:
        with torch.no_grad():
            for tensor, value in zip(chosen, kept, strict=True):
                tensor.copy_(value)


def _one_of_several(name: str, called: set[str]) -> bool:
    """Whether a weight belongs to a list element that was not called although others were, such as an idle expert."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[: at + 1]) not in called:
            others = re.compile(re.escape(".".join(parts[:at])) + r"\.\d+$")
            return any(others.match(each) for each in called)
    return False


def _group(name: str) -> str:
    """The block of a weight, or its module if it is in no block."""
    inside = _INSIDE.match(name)
    return f"{inside['list']}.{inside['index']}" if inside else name.rpartition(".")[0]


def _lacking(
    model: PreTrainedModel,
    source: Path | str,
    used: list[str],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    """The error message about weights that are missing or have another shape."""
    cls, total = type(model).__name__, len(model.state_dict())
    wrong = [name for name in used if name in shapes]
    if wrong:
        parts = [
            f"{name} is {list(shapes[name][0])}, by its config.json {list(shapes[name][1])}"
            for name in wrong[:_SHOWN]
        ]
        gone = len(used) - len(wrong)
        also = f", and {gone} are missing" if gone else ""
        return (
            f"{source} has {len(wrong)} weights of other shapes than {cls} needs{also}: {'; '.join(parts)}"
            f"{_more(len(wrong))}. Correct its config.json, or save the whole model again."
        )
    head = model.get_output_embeddings()
    own = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    state = model.state_dict(keep_vars=True)
    outside = [name for name in used if not name.startswith(f"{model.base_model_prefix}.")]
    if len(used) > _MOST * total:
        advice = "It is another architecture's checkpoint, or its weights have other names."
    elif own and len(outside) == len(used) and any(id(state[name]) in own for name in used if name in state):
        advice = (
            "It was saved without its language-modelling head: load it with causal=False (as an encoder), "
            "or save the whole model."
        )
    elif beyond := _blocks_beyond(model, used):
        advice = f"{beyond} Correct its config.json, or save the whole model again."
    else:
        advice = "Save the whole model again, or correct its config.json."
    return (
        f"{source} lacks {len(used)} of the {total} weights that {cls} computes with: "
        f"{', '.join(used[:_SHOWN])}{_more(len(used))}. {advice}"
    )


def _blocks_beyond(model: PreTrainedModel, used: list[str]) -> str:
    """A sentence that says whole blocks at the end are missing; empty if that is not the reason."""
    matches = [_INSIDE.match(name) for name in used]
    lists = {match["list"] for match in matches if match}
    if None in matches or len(lists) != 1:
        return ""
    stored = min(int(match["index"]) for match in matches if match)
    size = len(cast(nn.ModuleList, model.get_submodule(lists.pop())))
    indices = {int(match["index"]) for match in matches if match}
    if indices != set(range(stored, size)):
        return ""
    return f"Its config.json says {size} blocks, the checkpoint holds {stored}."


def _left_over(model: PreTrainedModel, source: Path | str, unexpected: list[str]) -> str:
    """The error message about block weights that the model has no place for; empty if there are none."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    prefix = f"{model.base_model_prefix}."
    heads = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    beyond, inside = [], []
    for key in unexpected:
        for name in (key, key.removeprefix(prefix), prefix + key):
            match = _INSIDE.match(name)
            size = lists.get(match["list"]) if match else None
            if match and size is not None:
                index = int(match["index"])
                if index >= size + heads:  # extra blocks that predict further tokens follow the stack
                    beyond.append(key)
                elif index < size:
                    inside.append(key)
                break
    if beyond:
        wrong = beyond
        advice = (
            "Its config.json says fewer blocks than the checkpoint holds: correct it, or load the whole model and "
            "cut it with depth.truncate."
        )
    else:
        if getattr(
            model.config, "quantization_config", None
        ):  # scales and packed weights belong to the quantizer
            return ""
        wrong = [key for key in inside if _holds_numbers(source, key)]
        advice = "They would be ignored: this is another architecture, or its config.json is wrong."
    if not wrong:
        return ""
    return (
        f"{source} holds {len(wrong)} weights of blocks that {type(model).__name__} has no place for: "
        f"{', '.join(wrong[:_SHOWN])}{_more(len(wrong))}. {advice}"
    )


def _whole_numbers(model: PreTrainedModel, source: Path | str, unexpected: set[str]) -> list[str]:
    """Weights stored as integers that the model uses as floating-point numbers, without a scale."""
    if (read_json(source, "config.json") or {}).get("quantization_config"):
        return []
    state, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."
    integers = []
    for file in _files(source):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - it is no dictionary
                if key in unexpected or not str(stored.get_slice(key).get_dtype()).startswith(_INTEGERS):
                    continue
                ours = next(
                    (state[n] for n in (key, key.removeprefix(prefix), prefix + key) if n in state), None
                )
                if ours.is_floating_point() if ours is not None else key.endswith("weight"):
                    integers.append(key)
    return integers


def _holds_numbers(source: Path | str, key: str) -> bool:
    """Whether a stored tensor affects outputs: not a mask, not a table of frequencies, not all zero."""
    if key.endswith("inv_freq"):
        return False
    for file in _files(source):
        with safe_open(file, framework="pt") as stored:
            if key in stored.keys():  # noqa: SIM118 - it is no dictionary
                tensor = stored.get_tensor(key)
                return bool(tensor.is_floating_point() and tensor.ndim and tensor.count_nonzero())
    return True


def _files(source: Path | str) -> list[Path]:
    if isinstance(source, str) and not Path(source).is_dir():
        for name in ("model.safetensors", "model.safetensors.index.json"):
            cached = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if cached:
                source = Path(cached).parent
                break
    return sorted(Path(source).glob("*.safetensors"))


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' own report of missing and unexpected weights, which are checked here."""
    logger = logging.getLogger("transformers.modeling_utils")
    drop = lambda record: "LOAD REPORT" not in record.getMessage()  # noqa: E731 - a filter is a function
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
