"""The loop that all of this package's own trainings share: one optimizer step after another, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overparam.support import progress
from overparam.train import checkpoint as checkpoints
from overparam.train.recipe import LoopRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
SomeLog = TypeVar("SomeLog", bound="Log")


@dataclass
class Log:
    """What a training run logs, one value per step.

    Attributes:
        loss: Loss of the step, before its update.
        seconds: Wall time so far, pauses between runs excluded.
        resumed: Steps taken from a checkpoint.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resumed: int = field(default=0, compare=False)


def run(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[T],
    gradients: Callable[[int, T], float],
    recipe: LoopRecipe,
    log: SomeLog,
    *,
    settings: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    every: int,
    at_checkpoint: Callable[[int], None] | None = None,
    label: str,
) -> SomeLog:
    """Train `model` in place with a batch per step; it is in evaluation mode and without gradients afterwards.

    `gradients` gets the step, counted from 0, and its batch; it adds the gradients of the loss, and returns the loss.
    It may add values of its own to the empty `log`, which is filled and returned. A run that finds a state in the
    folder `checkpoint` resumes from it: batches must be the same in every run. There is a checkpoint after `every`
    steps and at the end; `at_checkpoint` is then called with the number of steps done.

    Raises:
        ValueError: A checkpoint of another recipe, model or `settings`, of more steps, or of a finished training that
            cannot be extended.
        FloatingPointError: The loss or the norm of its gradient is not finite; the message names the step. The model
            then has the weights from before that step, and so has the last checkpoint.
    """
    import torch

    described = asdict(recipe) | dict(settings or {})
    if checkpoint:
        vars(log).update(checkpoints.restore(checkpoint, model, optimizers, recipe=described))
    log.resumed = done = len(log.loss)
    if 0 < done < recipe.steps and not any(optimizer.state for optimizer in optimizers):
        raise ValueError(f"{checkpoint} holds a finished training of {done} steps; use another folder")
    before = log.seconds[-1] if log.seconds else 0.0
    started, unseen = time.perf_counter(), islice(batches, done, None)
    model.train()
    try:
        with torch.random.fork_rng():
            for step in progress.track(range(done, recipe.steps), label):
                torch.manual_seed(recipe.seed * 1_000_003 + step)  # a resumed run draws the same
                loss = gradients(step, next(unseen))
                norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
                for what, value in (("training loss", loss), ("norm of the gradient", norm)):
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the {what} is {value} at step {step + 1}")
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.rate(step)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                log.loss.append(loss)
                log.seconds.append(before + time.perf_counter() - started)
                last = step + 1 == recipe.steps
                if not last and (step + 1) % every:
                    continue
                if checkpoint:
                    kept = [] if last and not recipe.extendable else optimizers
                    checkpoints.store(checkpoint, model, kept, recipe=described, log=asdict(log))
                if at_checkpoint:
                    model.eval()
                    at_checkpoint(step + 1)
                    model.train()
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    return log
