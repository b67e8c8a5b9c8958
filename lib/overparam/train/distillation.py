"""One training loop for students of all kinds: batches of similar length, checkpoints that resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overparam.support import progress
from overparam.train import checkpoint as checkpoints

if TYPE_CHECKING:
    import torch
    from torch import nn

_BUCKET = 8  # batches sorted by length together: little padding, and others every epoch


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Texts a step.
        learning_rate: Peak of a linear warm-up and a linear decay to zero.
        warmup: Steps of the warm-up.
        weight_decay: Of AdamW, on matrices.
        clip: Largest norm of the gradient.
        seed: Of the order of the texts.
        version: Raised by the author of this module when its outcome changes.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 42
    version: int = 1

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        up = (step + 1) / max(1, self.warmup)
        down = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.learning_rate * min(1.0, up, down)


@dataclass
class Log:
    """What a training leaves, one value a step.

    Attributes:
        loss: Of the batch.
        seconds: Wall time so far, pauses between runs excluded.
        resumed: Steps that were taken from a checkpoint.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resumed: int = 0


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
    """Train `model` in place, all parameters that require a gradient.

    Args:
        model: What is trained; it is left in evaluation mode.
        loss: Gives the loss of a batch, whose texts it is told by number. int64 [batch]
        lengths: Tokens of every text; their number is the number of texts.
        recipe: See `Recipe`.
        checkpoint: Folder of the state; a run that finds one there goes on from it.
        every: Steps between checkpoints.
        label: Name of the step in the progress display.

    Raises:
        ValueError: No texts, or a checkpoint of another recipe or model.
        FloatingPointError: If the loss is not finite; says at which step. The model is then as it was before that
            step, and so is the last checkpoint.
    """
    import torch

    if not len(lengths):
        raise ValueError("there are no texts to train on")
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    log = Log()
    if checkpoint and (stored := checkpoints.find(checkpoint)):
        log = Log(**checkpoints.restore(stored, model, [optimizer], recipe=asdict(recipe)))
    log.resumed = done = len(log.loss)
    if 0 < done < recipe.steps and not optimizer.state:
        raise ValueError(f"{checkpoint} holds a finished training of {done} steps; use another folder")
    before = log.seconds[-1] if log.seconds else 0.0
    order = batches(lengths, recipe.batch_size, seed=recipe.seed)
    for _ in range(done):
        next(order)
    started, state = time.perf_counter(), torch.get_rng_state()
    model.train()
    try:
        for step in progress.track(range(done, recipe.steps), label):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # of dropout: a run that resumes draws the same
            value = loss(next(order))
            found = float(value.detach())
            if not math.isfinite(found):
                raise FloatingPointError(f"the training loss is {found} at step {step + 1}")
            value.backward()  # type: ignore[no-untyped-call]
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {norm} at step {step + 1}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.loss.append(found)
            log.seconds.append(before + time.perf_counter() - started)
            last = step + 1 == recipe.steps
            if checkpoint and ((step + 1) % every == 0 or last):
                moments = [] if last else [optimizer]  # a finished training needs its weights alone
                checkpoints.store(checkpoint, model, moments, recipe=asdict(recipe), log=asdict(log))
    finally:
        model.eval()
        torch.set_rng_state(state)
    return log


def batches(lengths: Sequence[int], size: int, *, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield numbers of texts for ever, in batches of similar length, each epoch in another order. int64 [size].

    The last texts of an epoch that fill no batch are left out of it; where all texts are fewer than a batch, every
    batch holds all of them.
    """
    sizes, rng = np.asarray(lengths), np.random.default_rng(seed)
    size = min(size, len(sizes))
    while True:
        order = rng.permutation(len(sizes))[: len(sizes) // size * size]  # left out by chance, not by length
        found = []
        for at in range(0, len(order), size * _BUCKET):
            bucket = order[at : at + size * _BUCKET]
            bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
            found += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        for which in rng.permutation(len(found)):
            yield found[which]
