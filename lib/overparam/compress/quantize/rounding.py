"""Simulated round-to-nearest at any number of bits: the effect on accuracy, without kernels.

Weights stay float32 and take only values that b bits can represent: nothing becomes smaller or faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from overparam.compress.quantize.schemes import refuse_quantized
from overparam.compress.quantize.weights import UNKNOWN, Weight, weights
from overparam.models.proof import NotExactError

if TYPE_CHECKING:
    import torch
    from torch import nn

GROUP_SIZE = 32
_ROWS = 65536  # rows that are rounded at once
_SCALE_BITS = 32  # per group: its least value and its step, two half-precision numbers


def round_to_nearest(weight: torch.Tensor, bits: int, *, group_size: int = GROUP_SIZE) -> torch.Tensor:
    """Round a matrix to the nearest of 2^bits values, evenly spaced from the least to the largest value of each group.

    No weight moves by more than half a step, (largest − least) / (2^bits − 1) / 2.

    Args:
        weight: [rows, columns]
        bits: 1..16
        group_size: Neighbouring weights of a row that form a group; the last group of a row may be smaller.

    Raises:
        ValueError: `bits` or `group_size` is out of range, or `weight` is not a matrix.
    """
    import torch

    if not 1 <= bits <= 16 or group_size < 1 or weight.ndim != 2:
        raise ValueError(
            f"a matrix is rounded to 1..16 bits in groups of at least 1, got shape {list(weight.shape)}, {bits} bits, "
            f"groups of {group_size}"
        )
    rows, columns = weight.shape
    missing = -columns % group_size
    padded = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1) if missing else weight
    groups = padded.reshape(rows, -1, group_size).double()  # [rows, groups, group_size]
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (largest - least) / (2**bits - 1)
    rounded = torch.where(step > 0, least + ((groups - least) / step).round() * step, groups)
    return rounded.reshape(rows, -1)[:, :columns].to(weight.dtype)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are quantized: matrices of any kind and embedding tables, by name, tied ones once.

    These include stacks of experts, transposed linear layers and convolutions; see `weights.weights`.

    Raises:
        ValueError: The model is already quantized.
        NotExactError: Many of its weights were not observed to be multiplied or looked up.
    """
    return {name: weight.parameter for name, weight in _matrices(model).items()}


def _matrices(model: nn.Module) -> dict[str, Weight]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        refuse_quantized(model)
    listed = weights(model)
    others = [weight for weight in listed if weight.role == "other"]
    share = sum(w.parameter.numel() for w in others) / max(sum(w.parameter.numel() for w in listed), 1)
    if share > UNKNOWN:
        largest = max(others, key=lambda weight: weight.parameter.numel())
        raise NotExactError(
            f"{100 * share:.0f} % of the weights of {type(model).__name__} are not seen to be multiplied or looked up, "
            f"such as {largest.name}, so they would not be rounded"
        )
    return {weight.name: weight for weight in listed if weight.role != "other"}


def round_weights(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> None:
    """Round the matrices of a model in place.

    Args:
        model: Any model.
        bits: Bits of all matrices, or of those named; other matrices are not changed.
        group_size: See `round_to_nearest`; neighbours are weights that one output sums over.

    Raises:
        ValueError: A name is not a matrix of the model, it has no matrices, it is already quantized, or as for
            `round_to_nearest`; the model is then unchanged.
    """
    import torch

    chosen = _matrices(model)
    given = _by_name(chosen, bits)
    with torch.no_grad():
        for name, its_bits in given.items():
            _round(chosen[name], its_bits, group_size)


@contextmanager
def rounded(
    model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE
) -> Iterator[None]:
    """Round the matrices of a model within the block, then restore them. Arguments and errors as in `round_weights`."""
    import torch

    chosen = _matrices(model)
    before = {name: chosen[name].parameter.detach().clone() for name in _by_name(chosen, bits)}
    try:
        round_weights(model, bits, group_size=group_size)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                chosen[name].parameter.copy_(weight)


def stored_bytes(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> int:
    """Return the bytes that a model would take with its matrices packed and everything else unchanged.

    The least value and the step of each group are stored in half precision.

    Args:
        model: Any model.
        bits: As in `round_weights`.
        group_size: As in `round_to_nearest`.
    """
    chosen = _matrices(model)
    given = _by_name(chosen, bits)
    packed = sum(_bits(chosen[name], its_bits, group_size) for name, its_bits in given.items())
    quantized = {id(chosen[name].parameter) for name in given}
    rest = {id(p): p.numel() * p.element_size() for p in model.parameters() if id(p) not in quantized}
    return -(-packed // 8) + sum(rest.values())


def sizes(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> dict[str, int]:
    """Return the bits that each matrix of a model takes when rounded, including its groups' least values and steps."""
    return {name: _bits(weight, bits, group_size) for name, weight in _matrices(model).items()}


def matrix_bits(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Return the bits that a rounded matrix [rows, columns] takes, including its groups' least values and steps."""
    rows, columns = weight.shape
    return rows * columns * bits + rows * -(-columns // group_size) * _SCALE_BITS


def _bits(weight: Weight, bits: int, group_size: int) -> int:
    return matrix_bits(_as_rows(weight), bits, group_size)


def _as_rows(weight: Weight) -> torch.Tensor:
    """A weight as a matrix [outputs of all experts, inputs]."""
    moved = weight.parameter.permute(_order(weight))
    return moved.reshape(-1, prod(moved.shape[-len(weight.columns) :]))


def _order(weight: Weight) -> list[int]:
    return [dim for dim in range(weight.parameter.ndim) if dim not in weight.columns] + list(weight.columns)


def _round(weight: Weight, bits: int, group_size: int) -> None:
    import torch

    parts = torch.split(_as_rows(weight), _ROWS)
    values = torch.cat([round_to_nearest(part, bits, group_size=group_size) for part in parts])
    order = _order(weight)
    shape = [weight.parameter.shape[dim] for dim in order]
    weight.parameter.copy_(values.reshape(shape).permute([order.index(dim) for dim in range(len(order))]))


def outliers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return each matrix's largest weight divided by its root mean square: outliers make rounding steps larger."""
    every = matrices(model)
    chosen = every if names is None else {name: every[name] for name in names}
    return {
        name: float(weight.detach().abs().max() / weight.detach().double().square().mean().sqrt())
        for name, weight in chosen.items()
    }


def _by_name(known: Mapping[str, Weight], bits: int | Mapping[str, int]) -> Mapping[str, int]:
    if not known:
        raise ValueError("the model has no matrices and no embedding tables: there is nothing to round")
    given = bits if isinstance(bits, Mapping) else dict.fromkeys(known, bits)
    if outside := [each for each in given.values() if not 1 <= each <= 16]:
        raise ValueError(f"matrices are rounded to 1..16 bits, got {outside[0]}")
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(
            f"{unknown[0]!r} is not a matrix of the model; it has {', '.join(list(known)[:4])} …"
        )
    return given
