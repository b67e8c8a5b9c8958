"""Timing of calls: raw values, and their median with a bootstrap confidence interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from overparam.support import progress

RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls, in order, and their median with its 95 % interval."""

    values: tuple[float, ...]
    median: float
    low: float
    high: float


def latency(fn: Callable[[], Any], *, warmup: int = 2, repeats: int = 10) -> Timing:
    """Time a call.

    Args:
        fn: Called without arguments.
        warmup: Calls that are made first and not timed.
        repeats: Timed calls.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
    """
    return interleaved({"": fn}, warmup=warmup, repeats=repeats)[""]


def interleaved(
    fns: Mapping[str, Callable[[], Any]], *, warmup: int = 2, repeats: int = 10
) -> dict[str, Timing]:
    """Time several calls in turns, A B C A B C …, so that heat, clock changes and other load affect all equally.

    Args:
        fns: Name -> function without arguments.
        warmup: Rounds that are made first and not timed.
        repeats: Timed rounds.

    Raises:
        ValueError: No functions, `repeats` below 1 or `warmup` below 0.
    """
    if not fns:
        raise ValueError("fns must name at least one function")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    values: dict[str, list[float]] = {name: [] for name in fns}
    for _ in progress.track(range(repeats), "taking turns"):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            values[name].append(time.perf_counter() - start)
    return {name: _timing(seconds) for name, seconds in values.items()}


def _timing(seconds: Sequence[float]) -> Timing:
    values = np.asarray(seconds)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return Timing(tuple(seconds), float(np.median(values)), float(low), float(high))
