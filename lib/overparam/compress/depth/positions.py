"""Configurations that refer to layers by position, rewritten for the kept layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from overparam.models.proof import NotExactError

# Fields that count leading layers of one kind: the new value is how many of these are kept.
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
_TRAILING = ("num_kv_shared_layers",)  # the same, for trailing layers
_NOT_LAYERS = ("token", "lang", "architectures", "label", "keys")  # lists that never have one entry per layer


def shortened(
    config: PreTrainedConfig, counts: Sequence[str], kept: Sequence[int], total: int
) -> PreTrainedConfig:
    """Return the configuration of the layers `kept` of `total`, as it is read back after saving.

    Lists with an entry per layer keep the entries of kept layers, lists of layer indices are renumbered, leading or
    trailing layers of one kind are counted again, and repeating patterns are written out. The caller must prove, on
    the model built from it, that this configuration describes the kept layers.

    Args:
        config: Configuration of a text model.
        counts: The fields that hold the number of layers.
        kept: Increasing indices from 0.
        total: The number of layers.

    Raises:
        NotExactError: If the architecture refuses such a configuration.
    """
    fields = _stored(config, use_diff=False)
    fields |= {name: _rewritten(name, value, kept, total) for name, value in fields.items()}
    fields |= _spelled_out(config, kept, total)
    fields |= dict.fromkeys(counts, len(kept))
    try:
        changed = type(config).from_dict(fields)
        again = type(config).from_dict(_stored(changed, use_diff=True))
    except Exception as error:
        raise NotExactError(
            f"the configuration of {config.model_type!r} cannot describe only layers {list(kept)} of {total}: {error}"
        ) from error
    again._attn_implementation = config._attn_implementation
    return again


def adopt(config: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Copy the values of `new` to `config`, which all modules of a model share."""
    for name, value in vars(new).items():
        ours = (
            not name.startswith("_") and name != "dtype"
        )  # the dtype is the model's; here it is read as text
        if (ours or name == "_heterogeneity_spec") and vars(config).get(name) != value:
            vars(config)[name] = value


def _stored(config: PreTrainedConfig, *, use_diff: bool) -> dict[str, Any]:
    """The fields of a configuration as they are read after saving."""
    read: dict[str, Any] = type(config)._decode_special_floats(
        json.loads(config.to_json_string(use_diff=use_diff))
    )
    return read


def _rewritten(name: str, value: Any, kept: Sequence[int], total: int) -> Any:
    if name == "per_layer_config" and isinstance(value, dict):  # overrides of single layers, by index
        ours = {int(layer): fields for layer, fields in value.items()}
        return {str(position): ours[layer] for position, layer in enumerate(kept) if layer in ours}
    if isinstance(value, int) and not isinstance(value, bool):
        if name in _LEADING:
            return sum(index < value for index in kept)
        if name in _TRAILING:
            return sum(index >= total - value for index in kept)
        if name == "moe_layer_end_index":
            return sum(index <= value for index in kept) - 1
    if not isinstance(value, list) or any(word in name for word in _NOT_LAYERS):
        return value
    if _are_indices(name, value, total):
        return [position for position, index in enumerate(kept) if index in value]
    return [value[index] for index in kept] if len(value) == total else value


def _are_indices(name: str, value: list[Any], total: int) -> bool:
    """Whether a list names layers by increasing indices, as ``mlp_only_layers`` does."""
    return (
        any(word in name for word in ("layer", "idx", "indices", "ids"))
        and all(isinstance(index, int) and not isinstance(index, bool) for index in value)
        and value == sorted(set(value))
        and (not value or (value[0] >= 0 and value[-1] < total))
    )


def _spelled_out(config: PreTrainedConfig, kept: Sequence[int], total: int) -> dict[str, Any]:
    """Patterns that repeat every few layers, written out for the kept layers."""
    if list(kept) == list(range(len(kept))):
        return {}
    fields: dict[str, Any] = {}
    if hasattr(config, "block_types"):  # recurrent_gemma
        pattern = config.block_types
        fields["block_types"] = [pattern[index % len(pattern)] for index in kept]
    step = getattr(config, "decoder_sparse_step", None)
    if isinstance(step, int) and isinstance(getattr(config, "mlp_only_layers", None), list):
        dense = [index for index in range(total) if index in config.mlp_only_layers or (index + 1) % step]
        fields["mlp_only_layers"] = [position for position, index in enumerate(kept) if index in dense]
        fields["decoder_sparse_step"] = 1
    return fields
