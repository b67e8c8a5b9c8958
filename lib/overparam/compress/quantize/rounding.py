"""Round-to-nearest at any number of bits, simulated: what bits cost in accuracy, where no kernel is needed.

Weights stay float32 and hold the values that b bits could: nothing becomes smaller or faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

GROUP_SIZE = 32
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
    """The weights that quantization is about: of linear layers and embedding tables, by name, tied ones once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = cast(nn.Parameter, module.weight)
            found.setdefault(id(weight), (f"{name}.weight", weight))
    return dict(found.values())


def round_weights(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> None:
    """Round the matrices of a model in place.

    Args:
        model: Any.
        bits: Of all matrices, or of those named; the others stay as they are.
        group_size: See `round_to_nearest`.

    Raises:
        ValueError: A name is no matrix of the model, or as `round_to_nearest`.
    """
    weights = matrices(model)
    given = _by_name(weights, bits)
    with torch.no_grad():
        for name, its_bits in given.items():
            weights[name].copy_(round_to_nearest(weights[name], its_bits, group_size=group_size))


@contextmanager
def rounded(
    model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE
) -> Iterator[None]:
    """Round the matrices of a model for a while, then put them back. Arguments and errors as in `round_weights`."""
    weights = matrices(model)
    before = {name: weights[name].detach().clone() for name in _by_name(weights, bits)}
    try:
        round_weights(model, bits, group_size=group_size)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)


def stored_bytes(model: nn.Module, bits: int | Mapping[str, int], *, group_size: int = GROUP_SIZE) -> int:
    """Return the bytes that a model would take with its matrices packed, everything else as it is.

    The least value and the step of each group are in half precision.

    Args:
        model: Any.
        bits: As in `round_weights`.
        group_size: As in `round_to_nearest`.
    """
    weights = matrices(model)
    given = _by_name(weights, bits)
    packed = sum(matrix_bits(weights[name], its_bits, group_size) for name, its_bits in given.items())
    quantized = {id(weights[name]) for name in given}
    rest = {id(p): p.numel() * p.element_size() for p in model.parameters() if id(p) not in quantized}
    return -(-packed // 8) + sum(rest.values())


def matrix_bits(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Return the bits that a rounded matrix takes, its groups' least values and steps included."""
    rows, columns = weight.shape
    return rows * columns * bits + rows * -(-columns // group_size) * _SCALE_BITS


def outliers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return, for each matrix, its largest weight over its root mean square: what stretches the steps of rounding."""
    weights = matrices(model)
    chosen = weights if names is None else {name: weights[name] for name in names}
    return {
        name: float(weight.detach().abs().max() / weight.detach().double().square().mean().sqrt())
        for name, weight in chosen.items()
    }


def _by_name(weights: Mapping[str, nn.Parameter], bits: int | Mapping[str, int]) -> Mapping[str, int]:
    given = bits if isinstance(bits, Mapping) else dict.fromkeys(weights, bits)
    if unknown := sorted(given.keys() - weights.keys()):
        raise ValueError(
            f"{unknown[0]!r} is no matrix of the model; there are {', '.join(list(weights)[:4])} …"
        )
    return given
