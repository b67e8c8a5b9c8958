"""Trailing-layer pruning of text encoders: embeddings at every depth, where to cut, and the cut itself.

Depth counts blocks: depth 0 is the embedding layer, depth L the whole model of L blocks. The method is L3Prune
(arXiv 2410.14578); the other rules are Block Influence (ShortGPT, arXiv 2403.03853) and the angular distance of
Gromov et al. (arXiv 2403.17887).
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.depth.embeddings import layer_embeddings
    from overparam.compress.depth.saving import save, save_encoder
    from overparam.compress.depth.selection import (
        Cuts,
        LayerLoss,
        initial_loss,
        initial_losses,
        l3prune,
        pick_frequencies,
    )
    from overparam.compress.depth.similarity import (
        LayerSimilarity,
        keep_by_angular_distance,
        keep_by_block_influence,
        keep_random,
        layer_similarity,
    )
    from overparam.compress.depth.truncation import truncate, truncated
    from overparam.models.reading.recipe import PLAIN, PUBLISHED, RECIPES, TextRecipe, frame, instructions_of
    from overparam.models.reading.weights import POOLINGS
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "PLAIN",
    "POOLINGS",
    "PUBLISHED",
    "RECIPES",
    "Cuts",
    "LayerLoss",
    "LayerSimilarity",
    "TextRecipe",
    "frame",
    "initial_loss",
    "initial_losses",
    "instructions_of",
    "keep_by_angular_distance",
    "keep_by_block_influence",
    "keep_random",
    "l3prune",
    "layer_embeddings",
    "layer_similarity",
    "pick_frequencies",
    "save",
    "save_encoder",
    "truncate",
    "truncated",
]
