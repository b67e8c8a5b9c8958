"""A product of a matrix and one token's input that reads only the columns where the input is not zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def stored(weight: Tensor) -> Tensor:
    """Return a matrix [out, in] as `sparse_product` reads it: a row for each input, [in, out]."""
    return weight.detach().T.contiguous()


def sparse_product(x: Tensor, rows: Tensor) -> Tensor:
    """Multiply one token's input by a matrix; zeros of the input cost nothing.

    `embedding_bag` is a fused weighted sum of rows. It pays for one token only: for many, no row is left out.

    Args:
        x: [in].
        rows: From `stored`, [in, out].

    Returns:
        [out].
    """
    at = x.nonzero().squeeze(1)
    if not len(at):
        return rows.new_zeros(rows.shape[1])
    summed: Tensor = functional.embedding_bag(at[None], rows, per_sample_weights=x[at][None], mode="sum")
    return torch.squeeze(summed, 0)
