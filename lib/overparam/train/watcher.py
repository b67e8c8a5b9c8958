"""What watches a training of sentence-transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from overparam.support import progress


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Feeds the progress display, and stops at a loss that is not finite."""

    def __init__(self, steps: int, label: str) -> None:
        self._steps: Iterator[int] = iter(progress.track(range(steps), label))
        next(self._steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the display on."""
        next(self._steps, None)

    def on_log(self, _: Any, state: Any, *__: Any, logs: dict[str, float] | None = None, **___: Any) -> None:
        """Refuse a loss that is not finite."""
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at step {state.global_step}")
