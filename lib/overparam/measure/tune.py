"""Comparing settings by time, in turns with a reference, and finding the fastest within a budget.

A *cell* is a callable without arguments that does the same work with some setting; if it returns a float, these are the
seconds that it took, otherwise it is timed. Nothing here knows what a cell does.

Every cell is timed next to a run of the reference, and only ratios of neighbours are used: what slows the machine for a
while slows both. A ratio is the median over rounds, with a percentile bootstrap interval over rounds; no round is left
out. The best of many noisy cells looks better than it is, so confirm it on other work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from overparam.support import progress

Cells = Mapping[str, Callable[[], object]]
RESAMPLES = 4000
_NEAR = 4  # cells between two runs of the reference
_FEWEST = 5  # rounds from which on an interval is given
_ENOUGH = 31  # rounds of the last two cells of `halving`


@dataclass(frozen=True)
class Comparison:
    """What `paired` or `halving` found.

    Attributes:
        table: A row a cell, fastest first: `ratio`, how many times as fast as the reference it is, with `ratio_low` and
            `ratio_high` (no interval below 5 rounds); `seconds`, median; `least`; `rounds`; `first`, seconds of
            the first call, preparations included; `status`, empty or why it was not timed to the end.
        rounds: A row a round and cell: `seconds`, `reference`, seconds of the reference next to it.
        best: Of `halving`: the fastest cell, if its whole interval lies above 1; otherwise the reference.
        seconds: How long everything took.
    """

    table: pd.DataFrame
    rounds: pd.DataFrame
    best: str
    seconds: float


class _Times:
    """The times of all cells, as they come in."""

    def __init__(self, cells: Cells, reference: str) -> None:
        if reference not in cells:
            raise ValueError(f"reference must be one of the cells, got {reference!r}: {', '.join(cells)}")
        if len(cells) < 2:
            raise ValueError("there must be a cell besides the reference")
        self.cells, self.reference = cells, reference
        self.rows: list[tuple[int, str, float, float]] = []
        self.logs: dict[str, list[float]] = {name: [] for name in cells}
        self.first: dict[str, float] = {}
        self.status: dict[str, str] = dict.fromkeys(cells, "")
        self.started = time.perf_counter()

    @property
    def alive(self) -> list[str]:
        return [name for name in self.cells if name != self.reference and not self.status[name]]

    def passed(self) -> float:
        return time.perf_counter() - self.started

    def call(self, name: str) -> float | None:
        """Seconds of a call; None if it failed, and then the cell is out."""
        started = time.perf_counter()
        try:
            said = self.cells[name]()
        except Exception as error:
            if name == self.reference:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.status[name] = f"failed: {first[:160]}"
            return None
        return said if isinstance(said, float) else time.perf_counter() - started

    def warm(self, name: str) -> None:
        took = self.call(name)
        self.first[name] = math.nan if took is None else took

    def round(self, number: int, order: Random) -> Iterator[None]:
        """Time every cell that is still in, each next to the reference; yields after every few."""
        names = self.alive
        order.shuffle(names)
        before = self.call(self.reference)
        for start in range(0, len(names), _NEAR):
            some = names[start : start + _NEAR]
            own = [self.call(name) for name in some]
            after = self.call(self.reference)
            for place, (name, took) in enumerate(zip(some, own, strict=True)):
                base = before if place < len(some) / 2 else after
                if took is not None and base is not None:
                    self.rows.append((number, name, took, base))
                    self.logs[name].append(math.log(base / took))
            before = after
            yield

    def middle(self, name: str) -> float:
        return float(np.median(self.logs[name]))

    def result(self, *, choose: bool) -> Comparison:
        rounds = pd.DataFrame(self.rows, columns=["round", "cell", "seconds", "reference"])
        rows: list[dict[str, Any]] = []
        for name in self.cells:
            if name == self.reference:
                base = rounds["reference"].to_numpy(float)
                found = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
                own = base
            else:
                own = rounds.loc[rounds["cell"] == name, "seconds"].to_numpy(float)
                value, low, high = interval(self.logs[name])
                found = {"ratio": value, "ratio_low": low, "ratio_high": high}
            known = {"seconds": float(np.median(own)), "least": float(own.min())} if len(own) else {}
            rows.append(
                {"cell": name, **found, **known, "rounds": len(self.logs[name]) or len(own) * (name == self.reference),
                 "first": self.first.get(name, math.nan), "status": self.status[name]}
            )  # fmt: skip
        columns = [
            "cell",
            "ratio",
            "ratio_low",
            "ratio_high",
            "seconds",
            "least",
            "rounds",
            "first",
            "status",
        ]
        table = pd.DataFrame(rows).reindex(columns=columns)
        table = table.sort_values(
            "ratio", ascending=False, na_position="last", kind="stable", ignore_index=True
        )
        best = self.reference
        in_ = [name for name in self.alive if self.logs[name]]
        if choose and in_:
            top = max(in_, key=self.middle)
            best = top if interval(self.logs[top])[1] > 1 else self.reference
        return Comparison(table, rounds, best, self.passed())


def interval(logs: list[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of paired log-ratios as a ratio, and its 95 % bootstrap interval over rounds; NaN without."""
    if not logs:
        return math.nan, math.nan, math.nan
    values = np.asarray(logs)
    middle = float(np.exp(np.median(values)))
    if len(values) < _FEWEST:
        return middle, math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.exp(np.percentile(np.median(values[draws], axis=1), [2.5, 97.5]))
    return middle, float(low), float(high)


def paired(
    cells: Cells, reference: str, *, rounds: int = 15, give_up: float | None = None, seed: int = 0
) -> Comparison:
    """Compare every cell with the reference, in turns.

    Args:
        cells: Name -> callable.
        reference: Name of one of them.
        rounds: Timed rounds, after one that is not counted.
        give_up: A cell that is slower than the reference by this factor in the first round is not timed again.
        seed: Of the order of the cells, which is another in every round.

    Raises:
        ValueError: There is no such reference, nothing to compare, or `rounds` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    times, order = _Times(cells, reference), Random(seed)
    for name in progress.track(list(cells), "first calls"):
        times.warm(name)
    for number in progress.track(range(rounds), "taking turns"):
        for _ in times.round(number, order):
            pass
        if number == 0 and give_up is not None:
            for name in times.alive:
                if times.middle(name) < -math.log(give_up):
                    times.status[name] = f"given up after one round: more than {give_up:g} times as slow"
    return times.result(choose=False)


def halving(
    cells: Cells,
    reference: str,
    *,
    budget_s: float,
    keep: float = 1 / 3,
    prepared: bool = False,
    seed: int = 0,
) -> Comparison:
    """Find the fastest cell by successive halving (Jamieson & Talwalkar, arXiv 1502.07943), within a time budget.

    All cells get one round; the fastest third of them gets two more, the fastest third of these four more, and so on.
    The last two take turns until the interval of a ratio is known or time is up.

    Args:
        cells: Name -> callable.
        reference: Name of one of them, such as the default setting.
        budget_s: Seconds after which no further call begins.
        keep: Share of the cells that stays after each rung.
        prepared: Whether the first call of a cell takes no longer than others; if not, it is made without being timed.
        seed: Of the order of the cells.

    Raises:
        ValueError: There is no such reference, or `budget_s` ends before any cell was compared with it.
    """
    if not budget_s > 0:
        raise ValueError(f"budget_s must be above 0, got {budget_s:g}")
    if not 0 < keep < 1:
        raise ValueError(f"keep must be above 0 and below 1, got {keep:g}")
    times, order = _Times(cells, reference), Random(seed)
    times.warm(reference)
    waiting = [] if prepared else times.alive
    order.shuffle(waiting)
    for name in progress.track(waiting, "first calls"):
        if times.passed() > 0.6 * budget_s:  # leaves time to compare those that have begun
            times.status[name] = "not reached within the budget"
        else:
            times.warm(name)
    rung = done = 0
    while times.alive and times.passed() < budget_s and done < _ENOUGH:
        for _ in range(2**rung):
            for _ in times.round(done, order):
                if times.passed() > budget_s:
                    break
            done += 1
        timed = sorted((name for name in times.alive if times.logs[name]), key=times.middle, reverse=True)
        if len(timed) > 2:
            rung += 1
            for name in timed[max(2, math.ceil(keep * len(timed))) :]:
                times.status[name] = f"beaten in rung {rung}"
        else:
            rung = 0
    if not times.rows:
        raise ValueError(
            f"budget_s = {budget_s:g} ended before any of {len(cells) - 1} cells was compared: the first call of the "
            f"reference took {times.first[reference]:.2g} s; give at least "
            f"{3 * (times.first[reference] or 1) * len(cells):.2g}"
        )
    for name in times.alive:
        if not times.logs[name]:
            times.status[name] = "not reached within the budget"
    return times.result(choose=True)
