"""What every subject has: systems are scored, and what each keeps is estimated, paired by item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from overparam.record import stats
from overparam.support import progress

Array = NDArray[np.float64]
Outputs = Sequence[NDArray[np.float32]]  # of each text
# of one run, by task: a `score`, its `items` [n, k], and the `statistic` of `stats` that makes it of them
Scores = Mapping[str, Any]
Repeats = Sequence[Scores]  # of runs that differ in a seed alone


@dataclass(frozen=True)
class System:
    """One way to make a model smaller, a control, or the model as it is.

    Attributes:
        name: In tables and per-item scores.
        opened: Gives the run while it is scored; weights that are changed in place are put back afterwards.
        columns: What tells it from others of its name, such as a sparsity; in tables and per-item scores.
        repeat: The same in per-item scores alone, such as a seed: repeats make one row of a table.
    """

    name: str
    opened: Callable[[], AbstractContextManager[Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    repeat: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def ready(cls, name: str, run: Any, **more: Mapping[str, Any]) -> System:
        """Return a system whose run is there already."""
        return cls(name, lambda: nullcontext(run), **more)


def paired(base: Repeats, scores: Repeats) -> dict[str, tuple[list[Array], list[Array], str]]:
    """Return what `stats.suite_retention` and `suite_difference` compare, from the repeats of each side."""
    return {
        task: ([each[task].items for each in base], [each[task].items for each in scores], score.statistic)
        for task, score in scores[0].items()
    }


class Subject(ABC):
    """A model with what its quality is.

    Attributes:
        task: Of its per-item scores, before the name of each task.
        scale: Of scores in tables.
    """

    task: ClassVar[str]
    scale: ClassVar[float] = 1.0

    @abstractmethod
    def scored(self, run: Any) -> Scores:
        """Score a run on every task."""

    def score(self, systems: Sequence[System]) -> Sequence[Scores]:
        """Score each system on every task."""
        scores = []
        for system in progress.track(systems, f"scoring {self.task}"):
            with system.opened() as run:
                scores.append(self.scored(run))
        return scores

    def points(self, repeats: Repeats, tasks: Iterable[str]) -> float:
        """Return the mean score over tasks and repeats as tables have it."""
        return self.scale * _mean(repeats, tasks)

    def kept(self, base: Repeats, scores: Repeats, *, n_resamples: int | None = None) -> stats.Estimate:
        """Estimate what a system keeps of the base's mean score, in percent, paired by item and repeat."""
        return stats.suite_retention(paired(base, scores), n_resamples=n_resamples).scaled(100)

    def gained(self, base: Repeats, before: Repeats, after: Repeats) -> stats.Estimate:
        """Estimate what one system keeps more than another, in percent of the base's mean score."""
        return stats.suite_difference(paired(before, after)).scaled(100 / _mean(base, base[0]))


def _mean(repeats: Repeats, tasks: Iterable[str]) -> float:
    return float(np.mean([each[task].score for task in tasks for each in repeats]))
