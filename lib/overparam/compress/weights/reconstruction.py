"""Choosing zeros by what the other weights can make up for, and letting them do it."""

from __future__ import annotations

import torch
from torch import Tensor

from overparam.support import progress

_DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the mean of the diagonal, tried one after the other
_BLOCK = 128  # columns whose zeros are chosen together
_ROWS = 32  # rows whose systems of equations are in memory at once


def count_of(sparsity: float, weights: int) -> int:
    """Zeros among so many weights, rounded down; 29 % of 100 are 29, whatever their product is as a float."""
    return int(sparsity * weights + 1e-9)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    *,
    pattern: tuple[int, int] | None = None,
    block: int = _BLOCK,
    name: str = "a matrix",
) -> Tensor:
    """Prune a matrix by SparseGPT (arXiv 2301.00774): column by column, the columns that follow make up for zeros.

    Args:
        weight: [outputs, inputs].
        gram: Sum over tokens of the products of inputs. [inputs, inputs]
        sparsity: Share of zeros in each block of columns.
        pattern: (zeros, of) such as (2, 4): so many zeros in every so many inputs of a row, instead of `sparsity`.
        block: Columns whose zeros are chosen together, by the smallest ``w² / [H⁻¹]²``.
        name: For messages.

    Returns:
        The pruned matrix, in float32 or better. Inputs that are always zero get zero weights.

    Raises:
        ValueError: If the products of inputs cannot be inverted with any damping, as when they are not finite.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(dtype, copy=True)  # [outputs, inputs]
    upper, dead = _inverse_factor(gram.to(dtype), name)
    w[:, dead] = 0
    columns = w.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, factor = w[:, start:end], upper[start:end, start:end]
        diagonal = factor.diagonal()
        zero = torch.zeros(part.shape, dtype=torch.bool)
        if pattern is None:
            saliency = (part / diagonal).square().flatten()
            zero.view(-1)[saliency.argsort(stable=True)[: count_of(sparsity, saliency.numel())]] = True
        errors = torch.zeros_like(part)
        for column in range(end - start):
            if pattern is not None and column % pattern[1] == 0:
                here = slice(column, column + pattern[1])
                saliency = (part[:, here] / diagonal[here]).square()
                chosen = saliency.argsort(dim=1, stable=True)[:, : pattern[0]]
                zero[:, here] = zero[:, here].scatter(1, chosen, True)
            kept = part[:, column].masked_fill(zero[:, column], 0)
            error = (part[:, column] - kept) / diagonal[column]
            part[:, column:] -= error[:, None] * factor[column, column:]
            part[:, column] = kept
            errors[:, column] = error
        w[:, end:] -= errors @ upper[start:end, end:]
        part.masked_fill_(zero, 0)
    return w


def refit(weight: Tensor, keep: Tensor, gram: Tensor, *, name: str = "a matrix") -> Tensor:
    """Change the weights that stay so that the outputs on the calibration text change least (arXiv 2510.14444).

    Every row is a least-squares problem of its own over the inputs that it keeps.

    Args:
        weight: [outputs, inputs].
        keep: Which weights stay. bool [outputs, inputs]
        gram: Sum over tokens of the products of inputs. [inputs, inputs]
        name: For messages.

    Returns:
        The matrix with zeros where nothing stays, in float32 or better.

    Raises:
        ValueError: As for `sparsegpt`.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    damped, _, _ = _damped(gram.to(dtype), name)
    target = weight.to(dtype) @ damped  # [outputs, inputs]
    most = int(keep.sum(1).max())
    order = (~keep).int().argsort(dim=1, stable=True)[:, :most]  # inputs that stay come first
    stays = keep.gather(1, order)
    found = torch.zeros(weight.shape, dtype=dtype)
    for start in range(0, len(weight), _ROWS):
        index, here = order[start : start + _ROWS], stays[start : start + _ROWS]
        system = damped[index[:, :, None], index[:, None, :]]  # [rows, most, most]
        system *= here[:, :, None] & here[:, None, :]
        system += torch.diag_embed((~here).to(dtype))
        right = (target[start : start + _ROWS].gather(1, index) * here)[..., None]
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(system))[..., 0]
        found[start : start + _ROWS].scatter_(1, index, solved * here)
    return found


def _inverse_factor(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse, and the inputs that are always zero."""
    _, lower, dead = _damped(gram, name)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True), dead


def _damped(gram: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the diagonal until it can be factored: the sum, its lower factor, and inputs that are always zero."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean())
    if not mean > 0 or mean == float("inf"):
        raise ValueError(f"{name}: all of its inputs are zero on the calibration text, or not finite")
    for damping in _DAMPINGS:
        sum_ = gram + torch.diag(damping * mean + dead.float() * mean)
        lower, failed = torch.linalg.cholesky_ex(sum_)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            if not int(torch.linalg.cholesky_ex((inverse + inverse.mT) / 2, upper=True)[1]):
                if damping != _DAMPINGS[0]:
                    progress.note(
                        f"{name}: few or dependent calibration tokens, damped by {damping:g} of the mean"
                    )
                return sum_, lower, dead
    raise ValueError(f"{name}: products of its inputs cannot be inverted even with damping; use more text")
