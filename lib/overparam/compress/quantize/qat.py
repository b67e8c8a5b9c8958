"""Quantization-aware training by torchao: linear layers round their weights while they learn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

GROUP_SIZE = 32


def prepare(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy whose linear layers compute with rounded weights; gradients pass the rounding unchanged.

    Args:
        model: It is not changed.
        bits: Of the weights, 2..8; symmetric, in groups.
        group_size: Neighbouring weights of a row that share a scale.

    Raises:
        ValueError: `bits` out of range, or groups that do not divide a layer's columns.
    """
    return _quantized(model, bits, group_size, "prepare")


def convert(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy of a trained model of `prepare`, with weights in integers. Arguments and errors as there."""
    return _quantized(model, bits, group_size, "convert")


def post_training(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> nn.Module:
    """Return a copy with weights in integers, by the same rounding and without training.

    Arguments and errors are those of `prepare`.
    """
    return _quantized(model, bits, group_size, None)


def _quantized(model: nn.Module, bits: int, group_size: int, step: str | None) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % group_size:
            raise ValueError(
                f"groups of {group_size} do not divide the {module.in_features} columns of {name}"
            )
    changed = copy.deepcopy(model)
    config = _config(bits, group_size)
    quantize_(changed, QATConfig(config, step=step) if step else config)
    return changed


def _config(bits: int, group_size: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
