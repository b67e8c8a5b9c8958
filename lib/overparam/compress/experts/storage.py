"""Pruned models on disk: standard checkpoints if all layers are alike, and a marked format if they differ."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from overparam.compress.experts.layout import TOP_K_FIELDS, MoeLayer, decoder_of, fields_of, layers
from overparam.compress.experts.pruning import COUNTS_FIELD, TOP_KS_FIELD, count_fields, describe, is_uniform
from overparam.compress.experts.slicing import shrink
from overparam.models.proof import NotExactError
from overparam.support.files import new_folder

FORMAT = 1
FORMAT_FIELD = "overparam_expert_format"
MODEL_TYPE_PREFIX = "overparam_pruned_"


def save_pruned(model: PreTrainedModel, path: str | os.PathLike[str]) -> Path:
    """Save a pruned mixture of experts as safetensors, with the tensor names of its architecture.

    If all layers keep the same number of experts, the folder is a standard checkpoint that
    ``AutoModelForCausalLM.from_pretrained`` reads. If the numbers differ, no loader of transformers can build the
    model, and one that tried would fill layers with random weights. The folder is therefore marked so that other
    loaders refuse it, and `load_pruned` reads it. Its ``config.json`` then has

    - ``model_type`` with the prefix ``overparam_pruned_``, which ``AutoConfig`` and servers do not know;
    - ``per_layer_config``, transformers' own form for ``{decoder layer: {field: value}}``, so that a model class used
      directly refuses it too;
    - ``num_local_experts_per_layer``, a list of counts with one entry per mixture-of-experts layer (none for dense
      layers), and ``num_experts_per_tok_per_layer`` if top-k was lowered in some layers.

    The folder appears complete or not at all. The tokenizer is not saved.

    Args:
        model: A mixture of experts, see `layers`.
        path: A folder that does not exist yet, or is empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If the model is dense or its layout is unknown.
        NotExactError: If the configuration does not build the same tensors; nothing is written.
    """
    folder = Path(path)
    moe_layers = layers(model)
    _check_rebuilds(model, moe_layers)
    counts, top_ks = [layer.n_experts for layer in moe_layers], [layer.top_k for layer in moe_layers]
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        file = temporary / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config[FORMAT_FIELD] = FORMAT
        text = _of_decoder(model, config)
        if is_uniform(counts) and is_uniform(top_ks):
            if text["model_type"] == "qwen3_moe":
                text["num_experts"] = counts[0]  # what transformers 4 and older servers read
        else:
            own = decoder_of(model).config
            stored = [(field, "n_experts") for field in count_fields(own, moe_layers)]
            stored += [(field, "top_k") for field in fields_of(own, TOP_K_FIELDS)]
            config["model_type"] = MODEL_TYPE_PREFIX + config["model_type"]
            text[COUNTS_FIELD] = counts
            text["per_layer_config"] = {
                str(layer.index): {field: getattr(layer, name) for field, name in stored}
                for layer in moe_layers
            }
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load_pruned(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a model that `save_pruned` wrote, also if layers differ in their experts; weights are exactly those saved.

    Args:
        path: The folder.
        dtype: Dtype of the weights; by default as saved.
        device: Device of the model; the CPU by default.

    Returns:
        The model in evaluation mode, of its ordinary class.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder was not written by `save_pruned`, or by another version of its format; or if tensors
            are missing or have other shapes than its configuration says.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a checkpoint")
    config = json.loads(file.read_text(encoding="utf-8"), object_hook=_float)
    version = config.pop(FORMAT_FIELD, None)
    if version is None:
        raise ValueError(
            f"{folder} was not written by save_pruned; load it with models.load(..., causal=True)"
        )
    if version != FORMAT:
        raise ValueError(
            f"{folder} has version {version} of the format of pruned experts, this release reads version {FORMAT}; "
            "load it with the release that wrote it, or prune again"
        )
    config["model_type"] = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    nested = [each for each in config.values() if isinstance(each, dict)]
    text = next((each for each in (config, *nested) if COUNTS_FIELD in each), config)
    text.pop("per_layer_config", None)
    base = getattr(transformers, config["architectures"][0])
    cls = base if COUNTS_FIELD not in text else _shrinking(base, text[COUNTS_FIELD], text.get(TOP_KS_FIELD))
    model, report = cls.from_pretrained(
        folder,
        config=CONFIG_MAPPING[config["model_type"]].from_dict(config),
        dtype=dtype or "auto",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {wrong}")
    model.__class__ = base
    _release_file(model)
    loaded: PreTrainedModel = model.to(device or "cpu").eval()
    return loaded


def _float(part: dict[str, Any]) -> Any:
    """Read transformers' form for numbers that JSON lacks, such as ``{"__float__": "Infinity"}``."""
    return float(part["__float__"]) if set(part) == {"__float__"} else part


def _of_decoder(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, Any]:
    """The part of the stored configuration that describes the decoder."""
    kind = type(decoder_of(model).config)
    if type(model.config) is kind:
        return config
    name = next(name for name in model.config.sub_configs if type(getattr(model.config, name)) is kind)
    part: dict[str, Any] = config[name]
    return part


def _check_rebuilds(model: PreTrainedModel, moe_layers: Sequence[MoeLayer]) -> None:
    """Build the model again from its configuration, without weights, and compare the shapes of tensors."""
    if getattr(model.config, "quantization_config", None) is not None:
        return  # its tensors come from the checkpoint, not from the configuration
    counts, top_ks = [layer.n_experts for layer in moe_layers], [layer.top_k for layer in moe_layers]
    alike = is_uniform(counts) and is_uniform(top_ks)
    cls = type(model) if alike else _shrinking(type(model), counts, top_ks)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
    with torch.device("meta"):
        built = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
    wrong = sorted(name for name in {*expected, *built} if expected.get(name) != built.get(name))
    if wrong:
        shapes = [f"{name} {expected.get(name)} against {built.get(name)}" for name in wrong[:3]]
        raise NotExactError(
            f"{type(model).__name__} ({model.config.model_type}) is not saved: its configuration would build "
            f"{len(wrong)} other tensors than it has: {', '.join(shapes)}"
        )


def _shrinking(
    base: type[PreTrainedModel], counts: Sequence[int], top_ks: Sequence[int] | None
) -> type[PreTrainedModel]:
    """A class that builds the model of `base` and shrinks its layers before any weights are read."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        moe_layers = layers(self)
        if len(moe_layers) != len(counts):
            raise ValueError(f"{COUNTS_FIELD} lists {len(counts)} layers, the model has {len(moe_layers)}")
        wanted = top_ks or [layer.top_k for layer in moe_layers]
        for layer, count, top_k in zip(moe_layers, counts, wanted, strict=True):
            shrink(layer, range(count), top_k)
        describe(self, moe_layers, counts, wanted)

    # Name and module are those of `base`: transformers looks up conversions and recorded outputs by them.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _release_file(model: PreTrainedModel) -> None:
    """Copy the model's tensors out of the mapped checkpoint file, one after the other.

    Tensors that were not fused while loading point into the mapped file. Even one of them keeps the whole file in
    memory, in addition to the fused copies of the experts.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
