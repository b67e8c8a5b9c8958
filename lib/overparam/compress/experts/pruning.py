"""Removing experts from a model: slicing its tensors, and updating every count of experts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedModel

from overparam.compress.experts.layout import (
    COUNT_FIELDS,
    TOP_K_FIELDS,
    MoeLayer,
    configs_of,
    decoder_of,
    fields_of,
    layers,
)
from overparam.compress.experts.proof import prove
from overparam.compress.experts.slicing import shrink

COUNTS_FIELD = "num_local_experts_per_layer"
TOP_KS_FIELD = "num_experts_per_tok_per_layer"


def prune(
    model: PreTrainedModel, keep: Sequence[Sequence[int]], *, lower_top_k: bool = False
) -> PreTrainedModel:
    """Keep only the listed experts of each mixture-of-experts layer.

    Changes `model` in place: the expert dimension of all parameters, biases and buffers of experts and router is
    sliced, never masked, so memory falls at once. Tensors are sliced one by one, so the peak is the model plus one
    tensor. The result equals the model with the router logits of all other experts at minus infinity. This is proved
    on the model's layers first (`prove`), once per architecture, configuration and process.

    The configuration stays consistent. If all layers keep the same number, its ordinary field holds the new count and
    ``save_pretrained`` writes a standard checkpoint. If the numbers differ, ``num_local_experts_per_layer`` lists the
    counts (one per mixture-of-experts layer), the ordinary field holds the largest, ``output_router_logits`` is off
    (transformers' auxiliary loss needs layers of equal width), and `save_pruned` writes the checkpoint. Do not save
    such a model with ``save_pretrained``: no loader can build it, and with ``ignore_mismatched_sizes`` a loader fills
    its layers with random weights.

    Args:
        model: A mixture of experts, see `layers`.
        keep: Ids of the kept experts of each mixture-of-experts layer (dense layers have no entry), in the order that
            they will have.
        lower_top_k: Let a layer keep fewer experts than it routes a token to: its top-k becomes the number it can
            still choose. Otherwise this is an error, because the function of the layer changes.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is dense or unknown, there is not one list per layer, or a list has repeated ids, ids
            out of range, fewer than top-k ids or, for routers that choose among groups, unequal groups. The model is
            then unchanged.
        NotExactError: If the proof fails. The model is then unchanged.
    """
    moe_layers = layers(model)
    if len(keep) != len(moe_layers):
        raise ValueError(
            f"keep must have one list of experts for each of the {len(moe_layers)} mixture-of-experts layers, "
            f"got {len(keep)}"
        )
    kept = [[int(expert) for expert in each] for each in keep]
    top_ks = [
        _checked(position, layer, each, lower_top_k)
        for position, (layer, each) in enumerate(zip(moe_layers, kept, strict=True))
    ]
    _check_fields(model, moe_layers, top_ks)
    prove(model)
    for layer, each, top_k in zip(moe_layers, kept, top_ks, strict=True):
        shrink(layer, each, top_k)
    describe(model, moe_layers, [len(each) for each in kept], top_ks)
    return model


def describe(
    model: PreTrainedModel, before: Sequence[MoeLayer], counts: Sequence[int], top_ks: Sequence[int]
) -> None:
    """Update the configuration and the cached counts of `model` to match its layers.

    Args:
        model: The model, after its layers were sliced.
        before: Descriptions of its layers before slicing.
        counts: Experts per layer now.
        top_ks: Experts per token in each layer.
    """
    for config in configs_of(model):
        for field in count_fields(config, before):
            setattr(config, field, max(counts))
        for field in fields_of(config, TOP_K_FIELDS):
            setattr(config, field, max(top_ks))
        for field, values in ((COUNTS_FIELD, counts), (TOP_KS_FIELD, top_ks)):
            if is_uniform(values):
                vars(config).pop(field, None)
            else:
                setattr(config, field, list(values))
        if not is_uniform(counts):
            config.output_router_logits = False
    for module in {model, decoder_of(model)}:
        for field, value in (("num_experts", max(counts)), ("num_experts_per_tok", max(top_ks))):
            if isinstance(getattr(module, field, None), int):
                setattr(module, field, value)


def count_fields(config: PretrainedConfig, moe_layers: Sequence[MoeLayer]) -> list[str]:
    """Return the fields of `config` that hold the number of experts of these layers."""
    most = max(layer.n_experts for layer in moe_layers)
    return [field for field in fields_of(config, COUNT_FIELDS) if getattr(config, field) == most]


def is_uniform(values: Sequence[int]) -> bool:
    """Whether all layers have the same number."""
    return len(set(values)) == 1


def _check_fields(model: PreTrainedModel, moe_layers: Sequence[MoeLayer], top_ks: Sequence[int]) -> None:
    """Raise if the configuration could not describe the pruned layers."""
    config = decoder_of(model).config
    if not count_fields(config, moe_layers):
        raise ValueError(
            f"the configuration of {type(model).__name__} has no field with the number of its experts, "
            f"{max(layer.n_experts for layer in moe_layers)} (looked for {', '.join(COUNT_FIELDS)}): a pruned model "
            "could not be saved"
        )
    own = all(hasattr(layer.router, "top_k") or hasattr(layer.block, "top_k") for layer in moe_layers)
    if not (own or is_uniform(top_ks)):
        raise ValueError(
            f"the routers of {type(model).__name__} read one top-k for all layers from the configuration, so it "
            f"cannot differ between layers, got {list(top_ks)}; keep at least top-k experts in each layer"
        )


def _checked(position: int, layer: MoeLayer, kept: Sequence[int], lower_top_k: bool) -> int:
    """Check the kept experts of one layer and return its top-k."""
    name = f"keep[{position}] (decoder layer {layer.index})"
    outside = [expert for expert in kept if not 0 <= expert < layer.n_experts]
    if outside:
        raise ValueError(f"{name} must hold ids in 0..{layer.n_experts - 1}, got {outside[0]}")
    repeated = sorted({expert for expert in kept if kept.count(expert) > 1})
    if repeated:
        raise ValueError(f"{name} lists expert {repeated[0]} more than once")
    per_group = _per_group(layer, kept, name)
    if per_group < layer.group_top:
        raise ValueError(
            f"{name} must keep at least {layer.group_top} experts{' per group' if layer.groups > 1 else ''}, "
            f"got {per_group}"
        )
    reachable = per_group * layer.top_groups
    if reachable >= layer.top_k:
        return layer.top_k
    if lower_top_k:
        return reachable
    within = f" within the {layer.top_groups} of {layer.groups} groups it chooses" if layer.groups > 1 else ""
    raise ValueError(
        f"{name} leaves {reachable} experts{within}, fewer than the {layer.top_k} (top-k) that a token is routed "
        "to; keep more, or pass lower_top_k=True"
    )


def _per_group(layer: MoeLayer, kept: Sequence[int], name: str) -> int:
    """How many experts each group keeps."""
    if layer.groups == 1:
        return len(kept)
    size = layer.n_experts // layer.groups
    counts = [sum(expert // size == group for expert in kept) for group in range(layer.groups)]
    if not is_uniform(counts) or [e // size for e in kept] != sorted(e // size for e in kept):
        raise ValueError(
            f"{name}: the router chooses {layer.top_groups} of {layer.groups} groups of consecutive experts, so "
            f"every group must keep the same number, in order; got {counts}. "
            f"select(scores, counts, groups={layer.groups}) keeps such sets"
        )
    return counts[0]
