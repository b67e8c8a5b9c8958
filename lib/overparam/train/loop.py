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
    keep_moments: bool = True,
    label: str,
) -> SomeLog:
    """Train `model` in place; it is in evaluation mode and without gradients afterwards.

    Args:
        model: The model to train.
        optimizers: Optimizers of all its parameters that require a gradient.
        batches: What `gradients` gets in each step, the same in every run: a resumed run skips what it has seen.
        gradients: Given the step, counted from 0, and its batch, adds the gradients of the loss and returns the loss.
        recipe: See `LoopRecipe`.
        log: An empty log, which is filled and returned; `gradients` may add what `run` does not know.
        settings: What the training depends on beside its recipe; a checkpoint of other settings is refused.
        checkpoint: Folder for the training state; a run that finds a state there resumes from it.
        every: Steps between checkpoints.
        at_checkpoint: Called with the number of steps done after each checkpoint and at the end.
        keep_moments: Whether the last checkpoint holds the optimizers' moments, so that a longer run can continue it.
        label: Name shown in the progress display.

    Raises:
        ValueError: A checkpoint of another recipe or model, of more steps, or of a finished training without moments.
        FloatingPointError: The loss or the norm of its gradient is not finite; the message names the step. The model
            then has the weights from before that step, and so has the last checkpoint.
    """
    import torch

    described = asdict(recipe) | dict(settings or {})
    if checkpoint and (stored := checkpoints.find(checkpoint)):
        vars(log).update(checkpoints.restore(stored, model, optimizers, recipe=described))
    log.resumed = done = len(log.loss)
    if 0 < done < recipe.steps and not any(optimizer.state for optimizer in optimizers):
        raise ValueError(f"{checkpoint} holds a finished training of {done} steps; use another folder")
    before = log.seconds[-1] if log.seconds else 0.0
    started, unseen = time.perf_counter(), islice(batches, done, None)
    model.train()
    try:
        with torch.random.fork_rng():
            for step in progress.track(range(done, recipe.steps), label):
                torch.manual_seed(
                    recipe.seed * 1_000_003 + step
                )  # dropout and samples of a resumed run are the same
                loss = gradients(step, next(unseen))
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                require_finite(loss, step + 1)
                require_finite(float(norm), step + 1, "norm of the gradient")
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
                    kept = [] if last and not keep_moments else optimizers
                    checkpoints.store(checkpoint, model, kept, recipe=described, log=asdict(log))
                if at_checkpoint:
                    model.eval()
                    at_checkpoint(step + 1)
                    model.train()
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    return log


def require_finite(value: float, step: int, what: str = "training loss") -> None:
    """Stop a training at a value that is not finite.

    Raises:
        FloatingPointError: The message names the value and the step, counted from 1.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value} at step {step}")


def decaying(
    matrices: list[nn.Parameter], rest: list[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer that applies weight decay to matrices only."""
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
