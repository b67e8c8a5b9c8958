"""The proof that slicing a layer is exact, on the layer itself, before anything is changed.

One layer of each kind is called with its inputs from a small padded text: once with the logits of half of its experts
at minus infinity, and once sliced to the other half. This takes one short forward pass and the memory of half a layer.
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
from overparam.models.hooks import hooks
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
# Share of tokens that must choose the same experts. In half precision, experts are often rated equal, and which of them
# is chosen depends on how many there are; outputs of tokens with the same choice must still be equal.
_LEAST_SHARE = {torch.float16: 0.5, torch.bfloat16: 0.5}
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def prove(model: PreTrainedModel) -> None:
    """Check that sliced layers of `model` equal layers whose other experts cannot be chosen, and that routing is read.

    Runs once per `signature` and process. The model is not changed.

    Raises:
        NotExactError: If they differ, or the observed routing does not explain what the layer computes.
        ValueError: As for `layers`; or if the layer computes NaN.
        RuntimeError: If a router is never called, for example because another kernel computes the layer.
    """
    key = signature(model)
    if key in _proven:
        return
    kinds = {_kind(layer): layer for layer in reversed(layers(model))}  # the first layer of each
    one_of_each = sorted(kinds.values(), key=lambda layer: layer.index)
    decoder = decoder_of(model)
    text = probe(decoder)
    with timed(), torch.no_grad(), evaluating(model):
        for layer, call in zip(one_of_each, _calls(decoder, one_of_each, text), strict=True):
            _prove(model, layer, call, text.attention_mask.flatten().bool())
    _proven.add(key)


def _kind(layer: MoeLayer) -> tuple[object, ...]:
    shapes = tuple((tensor.name, tuple(tensor.value.shape)) for tensor in layer.tensors)
    return type(layer.block), type(layer.router), type(layer.experts), layer.top_k, shapes


def _calls(decoder: PreTrainedModel, moe_layers: Sequence[MoeLayer], text: Probe) -> list[_Call]:
    """The arguments of each block's call on the text."""
    calls: dict[int, _Call] = {}

    def record(index: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = copy.deepcopy((args, kwargs))  # also copies caches, which the block fills

        return before

    try:
        with hooks(
            layer.block.register_forward_pre_hook(record(layer.index), with_kwargs=True)
            for layer in moe_layers
        ):
            forward(decoder, text.input_ids, text.attention_mask)
    except (TypeError, IndexError, RuntimeError) as error:
        raise NotExactError(
            f"{type(decoder).__name__} cannot be run on a padded text alone, so its experts cannot be watched: {error}"
        ) from error
    for layer in moe_layers:
        if layer.index not in calls:
            raise not_called(layer)
    return [calls[layer.index] for layer in moe_layers]


@dataclass
class _Seen:
    """Outputs of a block and of its experts, and the chosen experts."""

    block: torch.Tensor
    experts: torch.Tensor
    indices: torch.Tensor


def _run(layer: MoeLayer, call: _Call, *, apart: bool = False) -> _Seen:
    """Call the block once; with `apart`, add up the experts' outputs one by one, as `collect` does."""
    routings: list[Routing] = []
    outputs: list[torch.Tensor] = []
    contributed = (lambda *_: None) if apart else None
    args, kwargs = copy.deepcopy(call)
    with watched(layer, routings.append, contributed):
        after = layer.experts.register_forward_hook(lambda _, __, output: outputs.append(output))
        with hooks([after]):
            result = layer.block(*args, **kwargs)
    if not routings:
        raise not_called(layer)
    block = next(each for each in _flat(result) if isinstance(each, torch.Tensor))
    return _Seen(block, outputs[-1], routings[-1].indices)


def _flat(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _prove(model: PreTrainedModel, layer: MoeLayer, call: _Call, real: torch.Tensor) -> None:
    """Prove one layer on the `real` tokens of the text. bool [tokens]."""
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
            actual = _run(small, call)
    except (RuntimeError, IndexError, ValueError) as error:
        raise _refusal(model, layer, f"the sliced layer fails ({error})") from error
    if bool((actual.indices >= len(kept)).any()):
        raise _refusal(model, layer, "the sliced router chooses experts that are not there")
    ids = torch.tensor(kept, device=actual.indices.device)
    chosen = ids[actual.indices].sort(dim=1).values == expected.indices.sort(dim=1).values
    alike = chosen.all(dim=1) & real.to(chosen.device)
    if alike.sum() < real.sum() * _LEAST_SHARE.get(expected.block.dtype, 1.0):
        raise _refusal(
            model, layer, "the sliced router does not choose the same of the kept experts as the whole router"
        )
    if not _agree(actual, expected, alike):
        raise _refusal(
            model, layer, "the sliced experts do not compute the same as the whole layer without the others"
        )


def _half(layer: MoeLayer) -> list[int]:
    """Half of the experts, or as many as the router needs, the same number in each group."""
    size = layer.n_experts // layer.groups
    count = min(size, max(size // 2, layer.group_top, math.ceil(layer.top_k / layer.top_groups)))
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].sort().values
    return [group * size + int(each) for group in range(layer.groups) for each in chosen]


def _agree(actual: _Seen, expected: _Seen, rows: torch.Tensor) -> bool:
    """Whether the outputs of the tokens in `rows` are equal up to rounding."""
    pairs = [(actual.block, expected.block)]
    if actual.experts.shape == expected.experts.shape:  # outputs of only the experts reveal more
        pairs.append((actual.experts, expected.experts))
    limit = tolerance(expected.block.dtype)
    return all(
        difference(one.reshape(len(rows), -1), other.reshape(len(rows), -1), rows) <= limit
        for one, other in pairs
    )


def _refusal(model: PreTrainedModel, layer: MoeLayer, why: str) -> NotExactError:
    return NotExactError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be pruned: in layer {layer.index} "
        f"({type(layer.block).__name__}) {why}, so the result would not be the model without some of its experts. "
        "The model is unchanged"
    )
