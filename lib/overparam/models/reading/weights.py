"""Pooling weights: how much each token counts in the embedding of its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overparam.models.reading.recipe import PLAIN, TextRecipe

if TYPE_CHECKING:
    import torch

POOLINGS = ("weighted_mean", "mean", "last", "cls")


def pooling_weights(
    pooling: str, attention_mask: torch.Tensor, pooled_mask: torch.Tensor, recipe: TextRecipe = PLAIN
) -> torch.Tensor:
    """Pooling weights that sum to one. float32 [texts, 1, tokens]."""
    import torch

    mask = pooled_mask.float()
    if pooling == "weighted_mean":
        counted = attention_mask if recipe.weights_from == "first token" else pooled_mask
        mask = mask * counted.cumsum(1)
    elif pooling == "last":
        last = attention_mask.sum(1, keepdim=True) - 1
        mask = torch.zeros_like(mask).scatter_(1, last, 1.0)
    elif pooling == "cls":
        mask = torch.zeros_like(mask).scatter_(1, pooled_mask.argmax(1, keepdim=True), 1.0)
    return (mask / mask.sum(1, keepdim=True)).unsqueeze(1)
