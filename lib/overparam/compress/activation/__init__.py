"""Activation sparsity without training: small inputs of matrices become zeros, and zeros need no column of a matrix.

The thresholds are those of TEAL (arXiv 2408.14690), one a matrix; controls zero inputs at random, or the largest.
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.activation.product import sparse_product, stored
    from overparam.compress.activation.zeroing import (
        Zeros,
        at_random,
        largest,
        matrices,
        quantiles,
        smallest,
        zeroed,
    )
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "Zeros",
    "at_random",
    "largest",
    "matrices",
    "quantiles",
    "smallest",
    "sparse_product",
    "stored",
    "zeroed",
]
