"""The proof that one pass gives every depth: on a small batch, once per architecture and process."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from overparam.compress.depth.states import each_depth, first, no_cache
from overparam.compress.depth.truncation import cut
from overparam.models import blocks, proof, sharing_copy
from overparam.models.hooks import hooks
from overparam.models.proof import NotExactError, Probe

_FLOAT32_BLOCKS = 4
_FLOAT32_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Reading:
    """How every depth of a model is read from one pass.

    Attributes:
        tail: Paths of the modules after the last block, in order: a final norm, a projection, or nothing.
        padding_is_neutral: Whether padding leaves a text's states unchanged. If not, texts are batched by length.
    """

    tail: tuple[str, ...]
    padding_is_neutral: bool


_readings: dict[str, Reading] = {}  # by signature
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Reading]] = weakref.WeakKeyDictionary()


def reading(model: PreTrainedModel) -> Reading:
    """Find out how to read the depths of `model`, and prove it on a padded batch of unequal lengths.

    The modules after the last block are traced. Then the last depth must equal the model's own output, the first and
    a middle depth must equal the output of the truncated model, and padded texts are compared with the same texts
    alone. The proof runs once per `proof.signature` and process.

    Raises:
        ValueError: If the model has no stack of blocks.
        NotExactError: If one pass does not give what the truncated models give.
    """
    layers = blocks(model).layers
    state = (id(layers), len(layers), model.dtype, model.config._attn_implementation)
    known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    name = proof.signature(model)
    if name not in _readings:
        _readings[name] = _prove(model)
    _known[model] = (state, _readings[name])
    return _readings[name]


def apply_tail(model: PreTrainedModel, tail: Sequence[str], hidden: torch.Tensor) -> torch.Tensor:
    """Apply the modules after the last block to the states of any depth."""
    for path in tail:
        hidden = first(model.get_submodule(path)(hidden))
    return hidden


@proof.timed()
def _prove(model: PreTrainedModel) -> Reading:
    name, total = type(model).__name__, len(blocks(model).layers)
    batch = proof.probe(model)
    states: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), proof.evaluating(model):
        with each_depth(model, states.__setitem__):
            output, tail = _traced(model, batch)
        if len(states) != total + 1:
            raise NotExactError(f"{name} does not run each of its {total} blocks: its depths cannot be read")
        for depth in sorted({1, (total + 1) // 2, total}):
            expected = output if depth == total else _at_depth(model, depth, batch)
            row = apply_tail(model, tail, states[depth])[:, : batch.input_ids.shape[1]]
            error = proof.difference(row, expected, batch.attention_mask)
            if error > proof.tolerance(model.dtype):
                what = "its own output" if depth == total else f"the model truncated to {depth} blocks"
                raise NotExactError(
                    f"{name}: depth {depth} of {total}, read from one pass, differs from {what} by {error:.1g} of its "
                    "size; embed with truncated models instead"
                )
        return Reading(tail, _padding_is_neutral(model, batch))


def _at_depth(model: PreTrainedModel, depth: int, batch: Probe) -> torch.Tensor:
    """The output of the truncated model; if no configuration describes it, of the model with later blocks skipped."""
    try:
        return _forward(cut(sharing_copy(model), range(depth)), batch)
    except Exception:  # of any kind, if a part around the blocks depends on their number
        layers = blocks(model).layers[depth:]

    def pass_by(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return type(output)([given, *output[1:]]) if isinstance(output, tuple | list) else given

    with hooks(layer.register_forward_hook(pass_by, with_kwargs=True) for layer in layers):
        return _forward(model, batch)


def _traced(model: PreTrainedModel, batch: Probe) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Run `model`; return its last hidden states, and the modules between the last block's output and these."""
    stack = blocks(model)
    parents = [stack.path[: at.start()] for at in re.finditer(r"\.", stack.path)]  # modules around the blocks
    beside = [
        f"{parent}.{name}".lstrip(".")
        for parent in ("", *parents)
        for name, _ in model.get_submodule(parent).named_children()
    ]
    calls: list[tuple[str, Any, Any]] = []  # (path, its first argument, its first result)

    def record(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((path, args[0] if args else next(iter(kwargs.values()), None), first(output)))

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True)
        for path in beside
        if path not in parents and path != stack.path
    ]
    last = stack.layers[-1]
    handles.append(last.register_forward_hook(lambda _, __, out: calls.append(("", None, first(out)))))
    with hooks(handles):
        output = _forward(model, batch)
    after = max((at for at, (path, _, _) in enumerate(calls) if not path), default=None)
    if after is None:
        raise NotExactError(f"{type(model).__name__} does not call its last block: its depths cannot be read")
    current = calls[after][2]
    tail: list[str] = []
    for path, given, returned in calls[after + 1 :]:
        if _same(current, output):
            break
        if given is current:
            tail.append(path)
            current = returned
    if not _same(current, output):
        raise NotExactError(
            f"{type(model).__name__}: what follows its last block is more than a chain of modules "
            f"({', '.join(tail) or 'none'}), so other depths cannot be read in the same way as the last"
        )
    return output, tuple(tail)


def _same(states: Any, output: torch.Tensor) -> bool:
    """Whether these states are the output already, except for padding that the model adds and removes."""
    return isinstance(states, torch.Tensor) and torch.equal(states[:, : output.shape[1]], output)


def _forward(model: PreTrainedModel, batch: Probe) -> torch.Tensor:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **no_cache(model))
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != batch.input_ids.shape:
        raise NotExactError(f"{type(model).__name__} does not return a hidden state for each token")
    return torch.as_tensor(hidden)


def _padding_is_neutral(model: PreTrainedModel, batch: Probe) -> bool:
    """Whether the padded texts of the batch have the same states as each text alone, up to rounding."""
    model = _in_float32(model, batch)
    output, lengths = _forward(model, batch), batch.attention_mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        part = Probe(batch.input_ids[row : row + 1, :length], batch.attention_mask[row : row + 1, :length])
        if length < max(lengths) and not proof.is_rounding(
            output[row : row + 1, :length], _forward(model, part)
        ):
            return False
    return True


def _in_float32(model: PreTrainedModel, batch: Probe) -> PreTrainedModel:
    """A float32 copy of a half-precision model's first blocks, if it fits: half precision hides effects of padding."""
    if model.dtype == torch.float32:
        return model
    count = min(_FLOAT32_BLOCKS, len(blocks(model).layers))
    try:
        small = cut(sharing_copy(model), range(count))
        if 4 * sum(parameter.numel() for parameter in small.parameters()) > _FLOAT32_BYTES:
            return model
        small = copy.deepcopy(small).float()
        _forward(small, batch)
    except Exception:  # of any kind, if a part around the blocks depends on their number
        return model
    return small
