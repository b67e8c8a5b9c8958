"""What a list of systems costs: bytes, memory, time and energy, measured in the same way for every study.

A step is something that is timed, such as encoding a batch; ``<step>_seconds`` is its median over rounds in which the
systems take turns, with its 95 % interval (``_low``, ``_high``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from overparam.measure import energy, speed
from overparam.record import stats
from overparam.support import progress

K = TypeVar("K", str, float, int)  # what names a system: its scheme, share or depth
M = TypeVar("M")
Memory = TypeVar("Memory")
Call = Callable[[], object]


@dataclass(frozen=True)
class Step(Generic[K]):
    """Something that is timed.

    Attributes:
        calls: By system.
        texts: How many texts one call reads.
    """

    calls: Mapping[K, Call]
    texts: int = 1


@dataclass(frozen=True)
class Measured(Generic[K]):
    """Time and energy.

    Attributes:
        table: A row a system: its name, its own columns, times by step, energy and ``energy_method``.
        latencies: Raw times: the system, ``step``, ``texts``, ``seconds``.
        timings: By step and system.
    """

    table: pd.DataFrame
    latencies: pd.DataFrame
    timings: dict[str, dict[K, speed.Timing]]

    def faster(self, step: str, base: K) -> dict[K, stats.Estimate]:
        """How many times as fast as `base` each system makes a step, paired by round."""
        timings = self.timings[step]
        return {name: speed_up(timings[base].values, timing.values) for name, timing in timings.items()}


def measure(
    by: str,
    own: Mapping[K, Mapping[str, Any]],
    steps: Mapping[str, Step[K]],
    *,
    repeats: int,
    warmup: int = 2,
    energy_step: str,
    energy_repeats: int,
    unit: str,
    units: int,
) -> Measured[K]:
    """Time every step of every system, and count the energy of one of them.

    Args:
        by: Name of the column that names the systems.
        own: What is known of each system already, such as its bytes: columns of the table.
        steps: One after the other; within a step the systems take turns, so that a drift of the machine meets all.
        repeats: Timed rounds.
        warmup: Rounds before them that are not counted.
        energy_step: The step whose energy is counted.
        energy_repeats: How often it is made for that.
        unit: What its energy is given for, as ``kwh_per_million_<unit>``.
        units: How many of them one call of it works on.
    """
    timings: dict[str, dict[K, speed.Timing]] = {}
    for name, step in steps.items():
        named = speed.interleaved(
            {str(system): call for system, call in step.calls.items()}, warmup=warmup, repeats=repeats
        )
        timings[name] = {system: named[str(system)] for system in step.calls}
    rows: list[dict[str, Any]] = []
    for system in progress.track(list(own), "measuring energy"):
        with energy.energy() as used:
            for _ in range(energy_repeats):
                steps[energy_step].calls[system]()
        row: dict[str, Any] = {by: system, **own[system]}
        for name in steps:
            timing = timings[name][system]
            row |= {
                f"{name}_seconds": timing.median,
                f"{name}_seconds_low": timing.low,
                f"{name}_seconds_high": timing.high,
            }
        row[f"kwh_per_million_{unit}"] = used.kwh / (energy_repeats * units) * 1e6
        row["energy_method"] = used.method
        rows.append(row)
    raw = [
        {by: system, "step": name, "texts": steps[name].texts, "seconds": seconds}
        for name, by_system in timings.items()
        for system, timing in by_system.items()
        for seconds in timing.values
    ]
    return Measured(pd.DataFrame(rows), pd.DataFrame(raw), timings)


def sizes(
    systems: Mapping[K, M],
    save: Callable[[M, Path], tuple[int, dict[str, Any]]],
    target: str,
    memories: Callable[[str, Iterable[Mapping[str, Any]]], Iterable[Memory]],
) -> dict[K, tuple[int, Memory]]:
    """Save one system after the other and measure its memory in a fresh process.

    Args:
        systems: Models by name.
        save: Saves a model into an empty folder; returns its bytes, and the arguments of the process's function.
        target: That function, "package.module:function".
        memories: `memory.peak_memories` or `memory.resident_memories`.

    Returns:
        Bytes on disk and memory, by name.
    """
    saved: list[int] = []

    def jobs() -> Iterator[dict[str, Any]]:
        for model in progress.track(list(systems.values()), "measuring memory"):
            with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
                size, arguments = save(model, Path(folder))
                saved.append(size)
                yield arguments

    held = list(memories(target, jobs()))
    return dict(zip(systems, zip(saved, held, strict=True), strict=True))


def speed_up(base: Sequence[float], other: Sequence[float]) -> stats.Estimate:
    """How many times as fast as `base` the other is, paired by round."""
    return stats.retention(np.asarray(other), np.asarray(base))
