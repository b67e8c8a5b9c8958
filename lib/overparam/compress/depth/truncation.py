"""Cut layers from a model so that the rest is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from overparam.compress.depth.positions import adopt, shortened
from overparam.compress.depth.rebuilding import PLACES, check_rebuilt, lend_weights, rebuilt
from overparam.compress.depth.states import no_cache
from overparam.models import blocks, proof, sharing_copy
from overparam.models.proof import NotExactError
from overparam.models.structure import COUNTS

# (signature, kept layers) -> whether these run with a cache of keys and values
_proved: dict[tuple[str, tuple[int, ...]], bool] = {}


def truncate(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Keep the first `keep_layers` blocks of `model`, or the blocks with the given indices.

    Changes `model` in place and keeps its configuration consistent (number of layers, lists with an entry per layer
    such as ``layer_types``, counts such as ``first_k_dense_replace``), so that `save`, or ``save_pretrained`` and
    ``AutoModel.from_pretrained``, give the same model again. Before anything is changed, a model built from the new
    configuration is compared with the kept layers, once per architecture, choice and process. If no kept layer has
    attention, and the model then cannot count tokens in its cache, the new configuration has ``use_cache: false``.

    Args:
        model: A text encoder or a decoder without its head.
        keep_layers: How many leading blocks to keep, in 1…L; or increasing indices (from 0) of the blocks to keep.

    Returns:
        The same model.

    Raises:
        TypeError: If `keep_layers` is a fraction or another kind of value.
        ValueError: If it is out of range, or indices repeat or decrease.
        NotExactError: If no configuration of the architecture describes the kept layers; the model is unchanged.
    """
    total = len(blocks(model).layers)
    kept = kept_indices(keep_layers, total)
    if len(kept) == total:
        return model
    caches = _check(model, kept)
    cut(model, kept)
    if not caches:
        model.config.use_cache = False
    return model


def truncated(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Return a truncated copy of `model` that shares its weights and so needs no memory of its own.

    Use it for encoding and saving; train only a copy of it. Arguments and errors are those of `truncate`.
    """
    return truncate(sharing_copy(model), keep_layers)


def cut(model: PreTrainedModel, kept: Sequence[int], *, renumber: bool = True) -> PreTrainedModel:
    """Keep only the layers `kept` of `model`, in place, without a proof that it can be saved."""
    stack = blocks(model)
    config = shortened(model.config, stack.counts, kept, len(stack.layers))
    leading = list(kept) == list(range(len(kept)))
    layers = nn.ModuleList(stack.layers[index] for index in kept).train(stack.layers.training)
    if renumber and not leading:
        _renumber(layers, blocks(rebuilt(model, config)).layers)
    for module in layers.modules():
        for name in vars(module).keys() & set(COUNTS):
            if getattr(module, name) == len(stack.layers):
                setattr(module, name, len(kept))
    model.set_submodule(stack.path, layers)
    adopt(model.config, config)
    return model


def kept_indices(keep_layers: int | Sequence[int], total: int) -> list[int]:
    """Return the kept indices, given a count or a list of indices, checked against `total`."""
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


def _renumber(layers: nn.ModuleList, reference: nn.ModuleList) -> None:
    """Set every layer's own index as in the model built from the configuration; caches are indexed by it."""
    for layer, other in zip(layers, reference, strict=True):
        theirs = dict(other.named_modules())
        for path, module in layer.named_modules():
            for name in PLACES & vars(module).keys():
                setattr(module, name, getattr(theirs.get(path), name, getattr(module, name)))


@proof.timed()
def _check(model: PreTrainedModel, kept: Sequence[int]) -> bool:
    """Refuse a cut that cannot be saved, or whose layers compute something else in their new places.

    Returns:
        Whether the cut model runs with default arguments, that is with a cache if the model has one.
    """
    name = (proof.signature(model), tuple(kept))
    if name in _proved:
        return _proved[name]
    stack = blocks(model)
    if not stack.counts:
        raise NotExactError(
            f"{type(model).__name__} has {len(stack.layers)} layers, but no field of its configuration says so"
        )
    config = shortened(model.config, stack.counts, kept, len(stack.layers))
    built = rebuilt(model, config)
    equal = check_rebuilt(model, built, kept) and getattr(model, "hf_quantizer", None) is None
    _check_outputs(model, kept, built if equal else None)
    _proved[name] = _runs_by_default(model, kept)
    return _proved[name]


def _runs_by_default(model: PreTrainedModel, kept: Sequence[int]) -> bool:
    if not no_cache(model):
        return True
    batch = proof.probe(model)
    try:
        with torch.inference_mode():
            cut(sharing_copy(model), kept).eval()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            )
    except Exception:  # only layers without attention: their cache does not count tokens
        return False
    return True


def _check_outputs(model: PreTrainedModel, kept: Sequence[int], built: PreTrainedModel | None) -> None:
    """Compare outputs of the cut model, of the model built for it, and of layers that keep their old indices."""
    name, batch = type(model).__name__, proof.probe(model)

    def run(small: PreTrainedModel) -> torch.Tensor:
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} | no_cache(model)
        with torch.inference_mode():
            output: torch.Tensor = small.eval()(**arguments)[0]
        return output

    def differs(other: PreTrainedModel) -> bool:
        return proof.difference(run(other), expected, batch.attention_mask) > proof.tolerance(model.dtype)

    small = cut(sharing_copy(model), kept)
    try:
        expected = run(small)
        unlike = built is not None and differs(lend_weights(small, built))
    except Exception as error:
        raise NotExactError(f"{name} does not run with layers {list(kept)} alone: {error}") from error
    if unlike:
        raise NotExactError(
            f"{name}: layers {list(kept)} of {len(blocks(model).layers)} cannot be saved: a model that is built from "
            "their configuration computes something else with the same weights; keep another number of leading layers"
        )
    if list(kept) == list(range(len(kept))):
        return
    try:
        moved = differs(cut(sharing_copy(model), kept, renumber=False))
    except Exception:  # an old index is outside of the new model's lists
        return
    if moved:
        raise NotExactError(
            f"{name}: its layers compute with their own index, so layers {list(kept)} would compute something else in "
            "new places; keep leading layers"
        )
