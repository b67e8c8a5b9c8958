"""Cut layers from a model so that what is left is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from overparam.models import blocks, sharing_copy


def truncate(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Keep the first `keep_layers` blocks of `model`, or the blocks whose indices are given.

    Changes `model` in place and keeps its configuration consistent (number of layers, per-layer lists such as
    ``layer_types``), so that ``save_pretrained`` and ``AutoModel.from_pretrained`` give the same model again.

    Args:
        model: A text encoder or a decoder without its head.
        keep_layers: How many leading blocks stay, a count in 1…L; or the increasing indices (from 0) of those
            that stay.

    Returns:
        The same model.

    Raises:
        TypeError: If `keep_layers` is a fraction or another kind of value.
        ValueError: If it is out of range, or indices repeat or decrease.
    """
    stack = blocks(model)
    kept = kept_indices(keep_layers, len(stack.layers))
    config = model.config.get_text_config()
    if getattr(config, "global_attn_every_n_layers", None) and kept != list(range(len(kept))):
        raise ValueError(
            f"{type(model).__name__} ties attention kinds to positions: keep leading layers only"
        )
    parent = model.get_submodule(stack.path.rpartition(".")[0]) if "." in stack.path else model
    setattr(parent, stack.path.rpartition(".")[2], nn.ModuleList(stack.layers[index] for index in kept))
    for position, layer in enumerate(blocks(model).layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]  # caches are indexed by it
    total = len(stack.layers)
    for name, value in list(vars(config).items()):
        if (
            isinstance(value, list)
            and len(value) == total
            and name.startswith(("layer", "mlp_layer", "no_rope"))
        ):
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    return model


def truncated(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Return a truncated copy of `model` that shares its weights, so that it takes no memory of its own.

    For encoding and saving; train a copy of it. Arguments and errors are those of `truncate`.
    """
    return truncate(sharing_copy(model), keep_layers)


def kept_indices(keep_layers: int | Sequence[int], total: int) -> list[int]:
    """Turn a count or a list of indices into the list of indices that stay, checked against `total`."""
    if isinstance(keep_layers, bool | float | str):
        raise TypeError(
            f"keep_layers must be a count in 1..{total} or a list of layer indices, got {keep_layers!r}"
        )
    if isinstance(keep_layers, int):
        if not 1 <= keep_layers <= total:
            raise ValueError(f"keep_layers must be in 1..{total}, got {keep_layers}")
        return list(range(keep_layers))
    kept = [int(index) for index in keep_layers]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(f"kept layers must be increasing indices in 0..{total - 1}, got {kept}")
    return kept
