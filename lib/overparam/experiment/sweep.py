"""Systems × subject → one table: what each system scores, and what it keeps of the first, paired by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from overparam.experiment.study import Study
from overparam.experiment.subjects.base import Scores, Subject, System
from overparam.record import stats

CURVE_RESAMPLES = 1000  # of the intervals in tables; the verdicts use the defaults of `stats`
Key = tuple[Any, ...]  # name of a system, and the values of its columns


@dataclass(frozen=True)
class Sweep:
    """Every system beside the first of them, which is what nothing was taken from.

    Attributes:
        table: A row a system: ``system``, its own columns, ``score``, ``kept`` in percent with its interval, ``n``
            items, ``p_holm`` and ``within_margin`` where there is a margin, and the score of each task.
        kept: The same of all but the first system.
    """

    table: pd.DataFrame
    kept: dict[Key, stats.Estimate]


def sweep(study: Study[Any], subject: Subject, systems: Sequence[System], *, margin: float) -> Sweep:
    """Score systems and compare them with the first; their per-item scores are kept with the record.

    Args:
        study: Whose record it is.
        subject: What is measured.
        systems: All with the same columns.
        margin: Loss up to which quality counts as unchanged, in percent.
    """
    return compare(subject, score(study, subject, systems), list(systems[0].columns), margin=margin)


def score(study: Study[Any], subject: Subject, systems: Sequence[System]) -> dict[Key, list[Scores]]:
    """Score systems, and keep their per-item scores; a list holds the repeats of one system."""
    scores = subject.score(systems)
    keep(study, subject, systems, scores)
    found: dict[Key, list[Scores]] = {}
    for system, each in zip(systems, scores, strict=True):
        found.setdefault((system.name, *system.columns.values()), []).append(each)
    return found


def keep(study: Study[Any], subject: Subject, systems: Sequence[System], scores: Sequence[Scores]) -> None:
    """Keep per-item scores with the record, task by task."""
    for task in scores[0]:
        for system, each in zip(systems, scores, strict=True):
            named = {"system": system.name, **system.columns, **system.repeat}
            study.recorder.keep(each[task].items, **named, task=f"{subject.task}: {task}")


def compare(
    subject: Subject,
    scores: Mapping[Key, Sequence[Scores]],
    columns: Sequence[str] = (),
    *,
    margin: float | None = None,
    n_resamples: int | None = None,
) -> Sweep:
    """Compare systems with the first.

    Args:
        subject: What was measured.
        scores: From `score`.
        columns: Names of the systems' own columns.
        margin: See `sweep`; None: no test.
        n_resamples: Of the intervals; see `stats.suite_retention`.
    """
    first, *others = scores
    every = {
        key: subject.kept(scores[first], repeats, n_resamples=n_resamples) for key, repeats in scores.items()
    }
    kept = {key: every[key] for key in others}
    tests = {} if margin is None else _tests(kept, margin) | {first: {"p_holm": 1.0, "within_margin": True}}
    rows = [
        dict(zip(("system", *columns), key, strict=True))
        | {"score": subject.points(repeats, repeats[0]), **every[key].columns("kept"), "n": every[key].n}
        | tests.get(key, {})
        | {task: subject.points(repeats, [task]) for task in repeats[0]}
        for key, repeats in scores.items()
    ]
    return Sweep(pd.DataFrame(rows), kept)


def _tests(kept: Mapping[Key, stats.Estimate], margin: float) -> dict[Key, dict[str, object]]:
    """Whether each system changes the quality, and whether it stays within the margin for certain.

    `p_holm`: two-sided p-value of the change, by a normal approximation to its bootstrap, corrected for the number of
    systems (Holm 1979). `within_margin`: the whole interval lies within the margin.
    """
    from scipy.stats import norm

    def p_value(change: stats.Estimate) -> float:
        spread = (change.high - change.low) / (2 * norm.ppf(0.975))
        return 1.0 if spread == 0 else float(2 * norm.sf(abs(change.value) / spread))

    changes = {key: each.shifted(-100) for key, each in kept.items()}
    adjusted = stats.holm([p_value(change) for change in changes.values()])
    return {
        key: {"p_holm": p, "within_margin": stats.equivalent(change, margin) == "equivalent"}
        for (key, change), p in zip(changes.items(), adjusted, strict=True)
    }
