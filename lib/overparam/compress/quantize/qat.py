"""Quantization-aware training by torchao: linear layers round their weights during training."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from overparam.compress.quantize import coverage
from overparam.models.proof import NotExactError

if TYPE_CHECKING:
    from torch import nn

GROUP_SIZE = 32


def reason_against(model: nn.Module, *, group_size: int = GROUP_SIZE) -> str | None:
    """Return why a model, or a part of one, cannot be trained with rounding; None if it can."""
    from torch import nn

    if reason := coverage.unreached(model, "torchao"):
        return reason
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % group_size:
            return f"groups of {group_size} do not divide the {module.in_features} columns of {name}"
    return coverage.failing(model, _config(8, group_size))


def prepare(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy whose linear layers compute with rounded weights; gradients pass through the rounding unchanged.

    Args:
        model: The model; it is not changed.
        bits: Bits of the weights, 2..8; symmetric, in groups.
        group_size: Neighbouring weights of a row that share a scale.

    Raises:
        NotExactError: Weights are not in linear layers (such as stacks of experts), or groups do not divide a layer's
            columns; see `reason_against`.
        ValueError: `bits` is out of range.
    """
    return _quantized(model, bits, group_size, "prepare")


def convert(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy of a model from `prepare`, after training, with integer weights. Arguments and errors as there."""
    return _quantized(model, bits, group_size, "convert")


def post_training(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy with integer weights, by the same rounding but without training.

    Arguments and errors are those of `prepare`.
    """
    return _quantized(model, bits, group_size, None)


def _quantized(model: nn.Module, bits: int, group_size: int, step: str | None) -> nn.Module:
    from torch import nn
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    if reason := reason_against(model, group_size=group_size):
        raise NotExactError(reason)
    changed = copy.deepcopy(model)
    config = _config(bits, group_size)
    quantize_(changed, QATConfig(config, step=step) if step else config)
    for name, layer in changed.named_modules():
        if isinstance(layer, nn.Linear) and not _rounds(layer, bits):
            raise NotExactError(f"torchao left {name} as it was")
    return changed


def _rounds(layer: nn.Linear, bits: int) -> bool:
    return getattr(layer, "weight_fake_quantizer", None) is not None or coverage.bits_of(layer.weight) <= bits


def _config(bits: int, group_size: int) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
