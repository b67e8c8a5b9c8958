"""Weights set to zero: which ones, by what scores, and how those that stay make up for it.

Magnitude; Wanda (arXiv 2306.11695); SparseGPT (arXiv 2301.00774); the mask of either with a least-squares refit of
what stays (arXiv 2510.14444); random and inverted choices as controls. Zeros are at single weights, or two in every
four ("2:4"). Fused experts are pruned as the matrices that they are; embeddings, heads, routers and norms stay.
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.weights.layout import Counts, Matrix, count_zeros, matrices
    from overparam.compress.weights.pruning import METHODS, check_pattern, keeping_zeros, masks, prune, scores
    from overparam.compress.weights.reconstruction import refit, sparsegpt
    from overparam.compress.weights.statistics import Statistics, collect
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "METHODS",
    "Counts",
    "Matrix",
    "Statistics",
    "check_pattern",
    "collect",
    "count_zeros",
    "keeping_zeros",
    "masks",
    "matrices",
    "prune",
    "refit",
    "scores",
    "sparsegpt",
]
