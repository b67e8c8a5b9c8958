"""The training loop for students of all kinds: batches of similar length, checkpoints to resume from."""

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

_BUCKET = 8  # batches that are sorted by length together: little padding, and different batches every epoch


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Texts per step.
        learning_rate: Peak learning rate: linear warm-up, then linear decay to zero.
        warmup: Warm-up steps.
        weight_decay: Weight decay of AdamW, on matrices.
        clip: Maximum gradient norm.
        seed: Seed of the order of texts.
        version: Raised by the author of this module when its results change.
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
    """What a training run logs, one value per step.

    Attributes:
        loss: Loss of the batch.
        seconds: Wall time so far, pauses between runs excluded.
        resumed: Steps taken from a checkpoint.
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
        FloatingPointError: If the loss is not finite; the message names the step. The model then has the weights from
            before that step, and so has the last checkpoint.
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
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # seeds dropout: a resumed run draws the same
            value = loss(next(order))
            loss_value = float(value.detach())
            if not math.isfinite(loss_value):
                raise FloatingPointError(f"the training loss is {loss_value} at step {step + 1}")
            value.backward()  # type: ignore[no-untyped-call]
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {norm} at step {step + 1}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.loss.append(loss_value)
            log.seconds.append(before + time.perf_counter() - started)
            last = step + 1 == recipe.steps
            if checkpoint and ((step + 1) % every == 0 or last):
                moments = [] if last else [optimizer]  # a finished training keeps only its weights
                checkpoints.store(checkpoint, model, moments, recipe=asdict(recipe), log=asdict(log))
    finally:
        model.eval()
        torch.set_rng_state(state)
    return log


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
