"""Training of students of all kinds on batches of texts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam.train import loop
from overparam.train.loop import Log
from overparam.train.recipe import LoopRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

_BUCKET = 8  # batches that are sorted by length together: little padding, and different batches every epoch


@dataclass(frozen=True, kw_only=True)
class Recipe(LoopRecipe):
    """How a student is trained, beside what `LoopRecipe` says.

    Attributes:
        batch_size: Texts per step.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 64


def fit(
    model: nn.Module,
    loss: Callable[[NDArray[np.int64]], torch.Tensor],
    lengths: Sequence[int],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    every: int = 500,
    label: str = "distilling",
) -> Log:
    """Train all parameters of `model` that require a gradient, in place.

    Args:
        model: The model to train; in evaluation mode afterwards.
        loss: Returns the loss of a batch, given the indices of its texts. int64 [batch]
        lengths: Tokens of each text.
        recipe: See `Recipe`.
        checkpoint: Folder for the training state; a run that finds a state there resumes from it.
        every: Steps between checkpoints.
        label: Name shown in the progress display.

    Raises:
        ValueError: No texts, or a checkpoint of another recipe or model.
        FloatingPointError: See `loop.run`.
    """
    import torch

    if not len(lengths):
        raise ValueError("there are no texts to train on")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, rest = ([p for p in trained if (p.ndim >= 2) is wanted] for wanted in (True, False))
    decayed: dict[str, Any] = {"params": matrices, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW([decayed, {"params": rest}], weight_decay=0.0, fused=True)
    order = batches(lengths, recipe.batch_size, seed=recipe.seed)

    def gradients(_: int, rows: NDArray[np.int64]) -> float:
        value = loss(rows)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    return loop.run(
        model, [optimizer], order, gradients, recipe, Log(), checkpoint=checkpoint, every=every, label=label
    )


def batches(lengths: Sequence[int], size: int, *, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of texts forever, in batches of similar length, each epoch in a new order. int64 [size].

    Texts that do not fill the last batch of an epoch are left out of it; if there are fewer texts than a batch holds,
    every batch has all of them.
    """
    sizes, rng = np.asarray(lengths), np.random.default_rng(seed)
    size = min(size, len(sizes))
    while True:
        order = rng.permutation(len(sizes))[: len(sizes) // size * size]  # left out by chance, not by length
        epoch = []
        for at in range(0, len(order), size * _BUCKET):
            bucket = order[at : at + size * _BUCKET]
            bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
            epoch += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        for which in rng.permutation(len(epoch)):
            yield epoch[which]
