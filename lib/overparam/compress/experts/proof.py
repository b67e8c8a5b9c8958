"""The proof that slicing a layer does what pruning promises, on the layer itself, before anything is changed.

One layer of each kind is called with what it gets from a small padded text: as it is with the logits of half of its
experts at minus infinity, and sliced to the other half. It takes one short forward pass and the memory of half a layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.experts.layout import MoeLayer, decoder_of, layers
from overparam.compress.experts.slicing import masked, sliced
from overparam.compress.experts.watching import Routing, forward, not_called, not_finite, watched
from overparam.models.proof import (
    NotExactError,
    Probe,
    difference,
    evaluating,
    probe,
    signature,
    timed,
    tolerance,
)

_proven: set[str] = set()
# Share of the tokens that must choose alike. Where numbers have few bits, experts are often rated equal, and which of
# them is chosen depends on how many there are; tokens that choose alike must be equal all the same.
_LEAST_SHARE = {torch.float16: 0.5, torch.bfloat16: 0.5}
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def prove(model: PreTrainedModel) -> None:
    """Check on `model` that a sliced layer equals one whose other experts cannot be chosen, and that routing is read.

    Once for each `signature` in a process. The model is left exactly as it was.

    Raises:
        NotExactError: If they differ, or the routing as read does not explain what the layer computes.
        ValueError: As `layers` does; or if the layer computes NaN.
        RuntimeError: If a router is never called, as when another kernel computes the layer.
    """
    key = signature(model)
    if key in _proven:
        return
    kinds = {_kind(layer): layer for layer in reversed(layers(model))}  # the first layer of each
    found = sorted(kinds.values(), key=lambda layer: layer.index)
    decoder = decoder_of(model)
    text = probe(decoder)
    with timed(), torch.no_grad(), evaluating(model):
        for layer, call in zip(found, _calls(decoder, found, text), strict=True):
            _prove(model, layer, call, text.attention_mask.flatten().bool())
    _proven.add(key)


def _kind(layer: MoeLayer) -> tuple[object, ...]:
    shapes = tuple((tensor.name, tuple(tensor.value.shape)) for tensor in layer.tensors)
    return type(layer.block), type(layer.router), type(layer.experts), layer.top_k, shapes


def _calls(decoder: PreTrainedModel, found: Sequence[MoeLayer], text: Probe) -> list[_Call]:
    """What each block is called with on the text."""
    calls: dict[int, _Call] = {}

    def record(index: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = copy.deepcopy((args, kwargs))  # also of caches, which the block fills

        return before

    handles = [
        layer.block.register_forward_pre_hook(record(layer.index), with_kwargs=True) for layer in found
    ]
    try:
        forward(decoder, text.input_ids, text.attention_mask)
    except (TypeError, IndexError, RuntimeError) as error:
        raise NotExactError(
            f"{type(decoder).__name__} cannot be run on a padded text alone, so that its experts cannot be watched: "
            f"{error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for layer in found:
        if layer.index not in calls:
            raise not_called(layer)
    return [calls[layer.index] for layer in found]


@dataclass
class _Seen:
    """Outputs of a block and of its experts, and the experts that were chosen."""

    block: torch.Tensor
    experts: torch.Tensor
    indices: torch.Tensor


def _run(layer: MoeLayer, call: _Call, *, apart: bool = False) -> _Seen:
    """Call the block once; with `apart`, add up the outputs of the experts one by one, as `collect` does."""
    routings: list[Routing] = []
    outputs: list[torch.Tensor] = []
    handle = None
    contributed = (lambda *_: None) if apart else None
    args, kwargs = copy.deepcopy(call)
    try:
        with watched(layer, routings.append, contributed):
            handle = layer.experts.register_forward_hook(lambda _, __, output: outputs.append(output))
            result = layer.block(*args, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    if not routings:
        raise not_called(layer)
    block = next(each for each in _flat(result) if isinstance(each, torch.Tensor))
    return _Seen(block, outputs[-1], routings[-1].indices)


def _flat(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _prove(model: PreTrainedModel, layer: MoeLayer, call: _Call, real: torch.Tensor) -> None:
    """Prove one layer, looking at the `real` tokens of the text. bool [tokens]."""
    kept = _half(layer)
    dropped = sorted(set(range(layer.n_experts)) - set(kept))
    plain = _run(layer, call)
    if not plain.block.isfinite().all():
        raise not_finite(layer)
    if len(plain.indices) != len(real):
        raise _refusal(model, layer, f"the experts see {len(plain.indices)} of {len(real)} tokens")
    if not _agree(_run(layer, call, apart=True), plain, real):
        raise _refusal(model, layer, "its experts, read one by one, do not add up to what the layer computes")
    with masked(layer, dropped):
        expected = _run(layer, call)
    if bool(torch.isin(expected.indices, torch.tensor(dropped, device=expected.indices.device)).any()):
        raise _refusal(model, layer, "the router chooses experts whose logits are minus infinity")
    try:
        with sliced(layer, kept) as small:
            found = _run(small, call)
    except (RuntimeError, IndexError, ValueError) as error:
        raise _refusal(model, layer, f"the sliced layer fails ({error})") from error
    if bool((found.indices >= len(kept)).any()):
        raise _refusal(model, layer, "the sliced router chooses experts that are not there")
    ids = torch.tensor(kept, device=found.indices.device)
    chosen = ids[found.indices].sort(dim=1).values == expected.indices.sort(dim=1).values
    alike = chosen.all(dim=1) & real.to(chosen.device)
    if alike.sum() < real.sum() * _LEAST_SHARE.get(expected.block.dtype, 1.0):
        raise _refusal(
            model, layer, "the sliced router does not choose as the whole one does among the kept experts"
        )
    if not _agree(found, expected, alike):
        raise _refusal(
            model, layer, "the sliced experts do not give what the whole layer gives without the others"
        )


def _half(layer: MoeLayer) -> list[int]:
    """Half of the experts, or as many as the router needs, alike in each group."""
    size = layer.n_experts // layer.groups
    count = min(size, max(size // 2, layer.group_top, math.ceil(layer.top_k / layer.top_groups)))
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].sort().values
    return [group * size + int(each) for group in range(layer.groups) for each in chosen]


def _agree(found: _Seen, expected: _Seen, rows: torch.Tensor) -> bool:
    """Whether the outputs of some tokens are equal but for rounding."""
    pairs = [(found.block, expected.block)]
    if found.experts.shape == expected.experts.shape:  # what comes of the experts alone is more telling
        pairs.append((found.experts, expected.experts))
    limit = tolerance(expected.block.dtype)
    return all(
        difference(one.reshape(len(rows), -1), other.reshape(len(rows), -1), rows) <= limit
        for one, other in pairs
    )


def _refusal(model: PreTrainedModel, layer: MoeLayer, why: str) -> NotExactError:
    return NotExactError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be pruned: in layer {layer.index} "
        f"({type(layer.block).__name__}) {why}, so that the result would not be the model without some of its experts. "
        "The model is unchanged"
    )
