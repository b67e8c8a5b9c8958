"""What routing is worth: other numbers of experts per token, shuffled experts, random routers; each for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overparam.compress.experts.layout import layers


@contextmanager
def using_top_k(model: PreTrainedModel, top_k: int) -> Iterator[None]:
    """Let each token use `top_k` experts of every layer inside of the block.

    Raises:
        ValueError: There are not so many experts, or the model keeps the number elsewhere than in its routers.
    """
    found = layers(model)
    fewest = min(layer.n_experts for layer in found)
    if not 1 <= top_k <= fewest:
        raise ValueError(f"top_k must be in 1..{fewest}, the number of experts, got {top_k}")
    holders = [next((part for part in (x.router, x.block) if hasattr(part, "top_k")), None) for x in found]
    if None in holders:
        raise ValueError(f"{type(model).__name__} does not say in its routers how many experts a token uses")
    before = [holder.top_k for holder in holders]  # type: ignore[union-attr]
    try:
        for holder in holders:
            holder.top_k = top_k  # type: ignore[union-attr]
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.top_k = value  # type: ignore[union-attr]


@contextmanager
def shuffled_experts(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Give the experts of every layer each other's places inside of the block; routers choose as before.

    All weights are still there: what is lost is which tokens they belong to. No expert keeps its place.
    """
    random = torch.Generator().manual_seed(seed)
    changed: list[tuple[Tensor, Tensor]] = []
    for layer in layers(model):
        order = torch.randperm(layer.n_experts, generator=random)
        place = torch.empty_like(order)
        place[order] = order.roll(1)  # each expert moves to the place of the next one of a random order
        changed += [
            (tensor.value, tensor.value.detach().index_select(tensor.dim, place.to(tensor.value.device)))
            for tensor in layer.tensors
            if any(tensor.owner is part for part in layer.experts.modules())
        ]
    with _replaced(changed):
        yield


@contextmanager
def random_routers(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Replace the routers by random ones with rows as long as theirs inside of the block."""
    random = torch.Generator().manual_seed(seed)
    changed: list[tuple[Tensor, Tensor]] = []
    for layer in layers(model):
        for value in layer.router.parameters():
            new = torch.randn(value.shape, generator=random).to(value)
            changed.append((value, new * (value.detach().norm() / new.norm().clamp_min(1e-12))))
    with _replaced(changed):
        yield


@contextmanager
def _replaced(changed: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    before = [value.detach().clone() for value, _ in changed]
    try:
        for value, new in changed:
            value.data.copy_(new)
        yield
    finally:
        for (value, _), old in zip(changed, before, strict=True):
            value.data.copy_(old)
