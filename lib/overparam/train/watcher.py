"""What watches a training of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from overparam.support import progress
from overparam.train.loop import require_finite


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Feeds the progress display, keeps the losses, and stops at a loss that is not finite."""

    def __init__(self, steps: int, label: str) -> None:
        self.losses: list[float] = []
        self._steps: Iterator[int] = iter(progress.track(range(steps), label))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the display."""
        next(self._steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the display on."""
        next(self._steps, None)

    def on_log(self, _: Any, state: Any, *__: Any, logs: dict[str, float] | None = None, **___: Any) -> None:
        """Keep the loss of a step, and refuse one that is not finite."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            require_finite(self.losses[-1], state.global_step)
