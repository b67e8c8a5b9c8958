"""Take experts out of a model: slices of its tensors, and every number that counts them."""

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

    Changes `model` in place: the expert dimension of every parameter, bias and buffer of experts and router is
    sliced, never masked, so that memory falls at once; tensor by tensor, so that the peak is the model and one
    tensor. The result equals the model with the router logits of all other experts at minus infinity; that is
    proved on its layers first (`prove`), once for each architecture and configuration in a process.

    The configuration stays consistent. Where all layers keep equally many, its ordinary field holds the new count
    and ``save_pretrained`` makes a standard checkpoint. Where they differ, ``num_local_experts_per_layer`` lists
    the counts (one a mixture-of-experts layer), the ordinary field holds the largest, ``output_router_logits`` is
    off (the auxiliary loss of transformers adds up layers of one width), and `save_pruned` writes the checkpoint.
    Do not save such a model with plain ``save_pretrained``: no loader builds it again, and one that is told to
    ``ignore_mismatched_sizes`` fills its layers with random weights.

    Args:
        model: A mixture of experts, see `layers`.
        keep: Ids of the kept experts of each mixture-of-experts layer (dense layers have no entry). They keep
            the order given.
        lower_top_k: Let a layer keep fewer experts than it routes a token to: its top-k becomes what it can
            still choose from. Without it that is an error, since the function of the layer changes.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is dense or unknown, there is not one list a layer, or a list has repeated ids, ids
            out of range, fewer than top-k, or, for routers that choose among groups, unequal groups. The model is
            then unchanged.
        NotExactError: If the proof fails. The model is then unchanged.
    """
    found = layers(model)
    if len(keep) != len(found):
        raise ValueError(
            f"keep must have one list of experts for each of the {len(found)} mixture-of-experts layers, "
            f"got {len(keep)}"
        )
    kept = [[int(expert) for expert in each] for each in keep]
    top_ks = [
        _checked(position, layer, each, lower_top_k)
        for position, (layer, each) in enumerate(zip(found, kept, strict=True))
    ]
    _check_fields(model, found, top_ks)
    prove(model)
    for layer, each, top_k in zip(found, kept, top_ks, strict=True):
        shrink(layer, each, top_k)
    describe(model, found, [len(each) for each in kept], top_ks)
    return model


def describe(
    model: PreTrainedModel, before: Sequence[MoeLayer], counts: Sequence[int], top_ks: Sequence[int]
) -> None:
    """Make the configuration and the cached counts of `model` say what its layers hold.

    Args:
        model: The model, its layers sliced.
        before: Its layers as they were described before that.
        counts: Experts of each layer now.
        top_ks: Experts that a token uses in each.
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


def count_fields(config: PretrainedConfig, found: Sequence[MoeLayer]) -> list[str]:
    """The fields of `config` that hold the number of experts of these layers."""
    most = max(layer.n_experts for layer in found)
    return [field for field in fields_of(config, COUNT_FIELDS) if getattr(config, field) == most]


def is_uniform(values: Sequence[int]) -> bool:
    """Whether all layers have the same number."""
    return len(set(values)) == 1


def _check_fields(model: PreTrainedModel, found: Sequence[MoeLayer], top_ks: Sequence[int]) -> None:
    """Raise where the configuration could not say what the pruned layers hold."""
    config = decoder_of(model).config
    if not count_fields(config, found):
        raise ValueError(
            f"the configuration of {type(model).__name__} has no field with the number of its experts, "
            f"{max(layer.n_experts for layer in found)} (looked for {', '.join(COUNT_FIELDS)}): a pruned model "
            "could not be saved"
        )
    own = all(hasattr(layer.router, "top_k") or hasattr(layer.block, "top_k") for layer in found)
    if not (own or is_uniform(top_ks)):
        raise ValueError(
            f"the routers of {type(model).__name__} read top-k from the configuration, one for all layers, so that it "
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
            f"{name} must keep at least {layer.group_top} experts{' a group' if layer.groups > 1 else ''}, "
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
            f"{name}: the router chooses {layer.top_groups} of {layer.groups} groups of consecutive experts, so that "
            f"every group must keep equally many, in order; got {counts}. "
            f"select(scores, counts, groups={layer.groups}) keeps such sets"
        )
    return counts[0]
