"""Slicing of one mixture-of-experts layer: permanently, temporarily, or by a mask with the same effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from overparam.compress.experts.layout import ExpertTensor, MoeLayer

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "out_features")
_TOP_KS = ("top_k", "num_experts_per_tok", "num_experts")  # the last is openai_privacy_filter's name for it
_PRODUCTS = {
    *(nn.functional.linear, torch.mm, torch.matmul, torch.addmm),
    *(torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.addmm, torch.Tensor.__matmul__),
}


def shrink(layer: MoeLayer, kept: Sequence[int], top_k: int) -> None:
    """Slice the tensors of one layer and set its counts."""
    if list(kept) != list(range(layer.n_experts)):
        for tensor in layer.tensors:
            ids = torch.as_tensor(list(kept), dtype=torch.long, device=tensor.value.device)
            _replace(tensor, tensor.value.detach().index_select(tensor.dim, ids))
    for module in _counting(layer):
        for name, value in list(vars(module).items()):
            if type(value) is not int:
                continue
            if name in _COUNTS and value == layer.n_experts:
                setattr(module, name, len(kept))
            elif name in _TOP_KS and value == layer.top_k:
                setattr(module, name, top_k)


@contextmanager
def sliced(layer: MoeLayer, kept: Sequence[int]) -> Iterator[MoeLayer]:
    """Shrink a layer within the block, and yield its new description; needs memory for the kept experts."""
    tensors = [(tensor, tensor.value) for tensor in layer.tensors]
    counts = [
        (module, {k: v for k, v in vars(module).items() if type(v) is int}) for module in _counting(layer)
    ]
    try:
        shrink(layer, kept, layer.top_k)
        yield replace(layer, n_experts=len(kept))
    finally:
        for tensor, value in tensors:
            setattr(tensor.owner, tensor.name, value)
        for module, values in counts:
            vars(module).update(values)


@contextmanager
def masked(layer: MoeLayer, dropped: Sequence[int]) -> Iterator[None]:
    """Set the router's logits of `dropped` to minus infinity, and biases that are added later, within the block."""
    ids = torch.as_tensor(list(dropped), dtype=torch.long)
    inside = {id(module) for module in layer.experts.modules()}
    biases = [
        (each, each.value) for each in layer.tensors if "bias" in each.name and id(each.owner) not in inside
    ]
    own = vars(layer.router).get("forward")
    forward = layer.router.forward

    def without(*args: Any, **kwargs: Any) -> Any:
        with _Dropping(layer.n_experts, ids):
            return forward(*args, **kwargs)

    try:
        for tensor, value in biases:
            _replace(tensor, value.detach().index_fill(tensor.dim, ids.to(value.device), float("-inf")))
        layer.router.forward = without
        yield
    finally:
        del layer.router.forward
        if own is not None:
            layer.router.forward = own
        for tensor, value in biases:
            setattr(tensor.owner, tensor.name, value)


class _Dropping(TorchFunctionMode):
    """Sets the columns of dropped experts to minus infinity in every matrix product with one column per expert."""

    def __init__(self, count: int, dropped: torch.Tensor) -> None:
        super().__init__()
        self.count, self.dropped = count, dropped

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and result.shape[-1] == self.count:
            return result.index_fill(-1, self.dropped.to(result.device), float("-inf"))
        return result


def _counting(layer: MoeLayer) -> list[nn.Module]:
    """The modules that may hold counts as plain attributes."""
    return list(dict.fromkeys((layer.block, layer.experts, *layer.router.modules())))


def _replace(tensor: ExpertTensor, value: torch.Tensor) -> None:
    """Replace a tensor; the old one is freed unless something else refers to it."""
    old = tensor.value
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(tensor.owner, tensor.name, value)
