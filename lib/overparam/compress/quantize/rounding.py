"""Round-to-nearest at any number of bits, simulated: what bits cost in accuracy, where no kernel is needed.

Weights stay float32 and hold the values that b bits could: nothing becomes smaller or faster.
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
_ROWS = 65536  # that are rounded at once
_SCALE_BITS = 32  # of a group: its least value and its step, two half-precision numbers


def round_to_nearest(weight: torch.Tensor, bits: int, *, group_size: int = GROUP_SIZE) -> torch.Tensor:
    """Round a matrix to the nearest of 2^bits values, evenly spaced from the least to the largest of each group.

    No weight moves by more than half a step, (largest − least) / (2^bits − 1) / 2.

    Args:
        weight: [rows, columns]
        bits: 1..16
        group_size: Neighbouring weights of a row that share least and largest value; the last group of a row may be
            smaller.

    Raises:
        ValueError: `bits` or `group_size` out of range, or no matrix.
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
    """The weights that quantization is about: matrices of any kind and embedding tables, by name, tied ones once.

    Stacks of experts, transposed linear layers and convolutions are among them: see `weights.weights`.

    Raises:
        ValueError: The model is quantized already.
        NotExactError: Many of its weights are not seen to be multiplied or looked up.
    """
    return {name: weight.parameter for name, weight in _matrices(model).items()}


def _matrices(model: nn.Module) -> dict[str, Weight]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        refuse_quantized(model)
    found = weights(model)
    others = [weight for weight in found if weight.role == "other"]
    share = sum(w.parameter.numel() for w in others) / max(sum(w.parameter.numel() for w in found), 1)
    if share > UNKNOWN:
        largest = max(others, key=lambda weight: weight.parameter.numel())
        raise NotExactError(
            f"{100 * share:.0f} % of the weights of {type(model).__name__} are not seen to be multiplied or looked up, "
            f"such as {largest.name}: they would not be rounded"
        )
    return {weight.name: weight for weight in found if weight.role != "other"}


def round_weights(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> None:
    """Round the matrices of a model in place.

    Args:
        model: Any.
        bits: Of all matrices, or of those named; the others stay as they are.
        group_size: See `round_to_nearest`; neighbours are weights that one output sums over.

    Raises:
        ValueError: A name is no matrix of the model, it has none, it is quantized already, or as `round_to_nearest`;
            the model is then unchanged.
    """
    import torch

    found = _matrices(model)
    given = _by_name(found, bits)
    with torch.no_grad():
        for name, its_bits in given.items():
            _round(found[name], its_bits, group_size)


@contextmanager
def rounded(
    model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE
) -> Iterator[None]:
    """Round the matrices of a model for a while, then put them back. Arguments and errors as in `round_weights`."""
    import torch

    found = _matrices(model)
    before = {name: found[name].parameter.detach().clone() for name in _by_name(found, bits)}
    try:
        round_weights(model, bits, group_size=group_size)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                found[name].parameter.copy_(weight)


def stored_bytes(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> int:
    """Return the bytes that a model would take with its matrices packed, everything else as it is.

    The least value and the step of each group are in half precision.

    Args:
        model: Any.
        bits: As in `round_weights`.
        group_size: As in `round_to_nearest`.
    """
    found = _matrices(model)
    given = _by_name(found, bits)
    packed = sum(_bits(found[name], its_bits, group_size) for name, its_bits in given.items())
    quantized = {id(found[name].parameter) for name in given}
    rest = {id(p): p.numel() * p.element_size() for p in model.parameters() if id(p) not in quantized}
    return -(-packed // 8) + sum(rest.values())


def sizes(model: nn.Module, bits: int, *, group_size: int = GROUP_SIZE) -> dict[str, int]:
    """Return the bits that each matrix of a model takes when it is rounded, its groups' values included."""
    return {name: _bits(weight, bits, group_size) for name, weight in _matrices(model).items()}


def matrix_bits(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Return the bits that a rounded matrix [rows, columns] takes, its groups' least values and steps included."""
    rows, columns = weight.shape
    return rows * columns * bits + rows * -(-columns // group_size) * _SCALE_BITS


def _bits(weight: Weight, bits: int, group_size: int) -> int:
    return matrix_bits(_as_rows(weight), bits, group_size)


def _as_rows(weight: Weight) -> torch.Tensor:
    """A weight as matrix [outputs of all experts, inputs]."""
    moved = weight.parameter.permute(_order(weight))
    return moved.reshape(-1, prod(moved.shape[-len(weight.columns) :]))


def _order(weight: Weight) -> list[int]:
    return [dim for dim in range(weight.parameter.ndim) if dim not in weight.columns] + list(weight.columns)


def _round(weight: Weight, bits: int, group_size: int) -> None:
    import torch

    parts = torch.split(_as_rows(weight), _ROWS)
    found = torch.cat([round_to_nearest(part, bits, group_size=group_size) for part in parts])
    order = _order(weight)
    shape = [weight.parameter.shape[dim] for dim in order]
    weight.parameter.copy_(found.reshape(shape).permute([order.index(dim) for dim in range(len(order))]))


def outliers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return, for each matrix, its largest weight over its root mean square: what stretches the steps of rounding."""
    found = matrices(model)
    chosen = found if names is None else {name: found[name] for name in names}
    return {
        name: float(weight.detach().abs().max() / weight.detach().double().square().mean().sqrt())
        for name, weight in chosen.items()
    }


def _by_name(found: Mapping[str, Weight], bits: int | Mapping[str, int]) -> Mapping[str, int]:
    if not found:
        raise ValueError("the model has no matrix and no embedding table: there is nothing to round")
    given = bits if isinstance(bits, Mapping) else dict.fromkeys(found, bits)
    if outside := [each for each in given.values() if not 1 <= each <= 16]:
        raise ValueError(f"matrices are rounded to 1..16 bits, got {outside[0]}")
    if unknown := sorted(given.keys() - found.keys()):
        raise ValueError(
            f"{unknown[0]!r} is no matrix of the model; there are {', '.join(list(found)[:4])} …"
        )
    return given
