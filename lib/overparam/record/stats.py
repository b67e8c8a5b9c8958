"""Uncertainty of scores: one bootstrap for means, ratios and differences, over items and over seeds.

Every interval is a *percentile* bootstrap interval (Efron & Tibshirani 1993, ch. 13). Two systems scored on the same
items are compared *paired*: each resample uses the same item indices on both sides. With several seeds, seeds are
resampled too, crossed with the items; with few seeds (such as three) that is only a rough guide, since they say little
about the spread over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overparam.record import corpus_statistics

Array = NDArray[np.float64]
Items = Array | Sequence[Array]  # [n] or [n, k]; or a list of these, one per seed, items in the same order
Equivalence = Literal["equivalent", "worse", "better", "inconclusive"]

_CHUNK = 2_000_000  # numbers drawn at a time, so that memory stays small


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower end of the interval; ``-inf`` if the data do not bound it.
        high: Upper end of the interval; ``inf`` if the data do not bound it.
        n: Number of items.
    """

    value: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Estimate:
        """Multiply value and ends, such as by 100 for percent; the lower end stays the lower one."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.value, low, high, self.n)

    def shifted(self, by: float) -> Estimate:
        """Add to value and ends, such as -1 to turn a retention into a relative change."""
        return Estimate(self.value + by, self.low + by, self.high + by, self.n)

    def columns(self, name: str) -> dict[str, float]:
        """Return value and ends as columns of a table: ``name``, ``name_low``, ``name_high``."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an unbounded end becomes None."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "n": self.n}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """Read what `to_dict` wrote."""
        low, high = values["low"], values["high"]
        return cls(
            float(values["value"]),
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
            int(values["n"]),
        )


def _mean(items: Array) -> Array:
    return np.asarray(items[..., 0].mean(axis=-1))


def _spearman(items: Array) -> Array:
    columns = np.ascontiguousarray(np.moveaxis(items[..., :2], -1, 0))  # [2, ..., n]
    order = np.argsort(columns, axis=-1)
    ends = _group_ends(np.take_along_axis(columns, order, axis=-1))
    starts = np.empty_like(ends)  # of each group of ties: where the group before it ended, plus one
    starts[..., 0] = 0
    starts[..., 1:] = np.where(ends[..., 1:] != ends[..., :-1], ends[..., :-1] + 1, 0)
    ranks = np.empty(columns.shape)
    np.put_along_axis(ranks, order, (np.maximum.accumulate(starts, axis=-1) + ends) / 2, axis=-1)
    ranks -= (items.shape[-2] - 1) / 2  # centred; ties share their mean rank
    covariance = (ranks[0] * ranks[1]).sum(axis=-1)
    spread = np.sqrt((ranks**2).sum(axis=-1).prod(axis=0))
    # the rank correlation of a constant column is undefined: counted as 0
    return np.asarray(np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0))


def _average_precision(items: Array) -> Array:
    order = np.argsort(-items[..., 0], axis=-1)
    scores = np.take_along_axis(items[..., 0], order, axis=-1)
    labels = np.take_along_axis(items[..., 1], order, axis=-1) > 0
    # tied scores share one threshold: each item gets the precision at the end of its group of ties
    ends = _group_ends(scores)
    hits = np.take_along_axis(labels.cumsum(axis=-1), ends, axis=-1)
    positives = labels.sum(axis=-1)
    total = (labels * hits / (ends + 1)).sum(axis=-1)
    return np.asarray(np.divide(total, positives, out=np.zeros_like(total), where=positives > 0))


def _group_ends(ordered: Array) -> NDArray[np.int64]:
    """For each position of sorted values ``[..., n]``, return the last position with the same value."""
    n = ordered.shape[-1]
    last = np.ones(ordered.shape, dtype=bool)
    last[..., :-1] = ordered[..., :-1] != ordered[..., 1:]
    return np.minimum.accumulate(np.where(last, np.arange(n), n)[..., ::-1], axis=-1)[..., ::-1]


STATISTICS: dict[str, Callable[[Array], Array]] = {
    "mean": _mean,
    "spearman": _spearman,
    "average_precision": _average_precision,
    "v_measure_mean": _mean,
    "chrf++": corpus_statistics.chrf,
    "bleu": corpus_statistics.bleu,
    "nll_per_token": corpus_statistics.nll_per_token,
    "perplexity": corpus_statistics.perplexity,
}
"""From per-item scores ``[..., n, k]`` to the score ``[...]``.

``mean`` and ``v_measure_mean`` use column 0 (one value per item, or per clustering); ``spearman`` uses the predicted
and the human similarity; ``average_precision`` uses the predicted similarity and the label (0 or 1). The last four are
corpus scores, computed from sums of the columns over all items.
"""

_CHEAP = ("mean", "v_measure_mean")


def bootstrap(
    items: Items,
    *,
    statistic: str = "mean",
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate a score and its percentile bootstrap interval.

    Args:
        items: Per-item scores ``[n]`` or ``[n, k]``, or a list of such arrays, one for each seed.
        statistic: A name in `STATISTICS`.
        n_resamples: Bootstrap samples; by default 10,000 for means and 2,000 for other statistics.
        seed: Seed of the draws.
        confidence: Of the interval.

    Returns:
        The estimate; with several seeds, of the mean over seeds.

    Raises:
        ValueError: for an unknown statistic, no items, NaN, or seeds with different items.
    """
    return suite_score({"": (items, statistic)}, n_resamples=n_resamples, seed=seed, confidence=confidence)


def difference(
    baseline_items: Items,
    compressed_items: Items,
    *,
    statistic: str = "mean",
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate compressed − baseline, paired by item (and by seed, if both sides have several).

    Arguments and errors are those of `bootstrap`; one side may have one seed and the other several.
    """
    pairs = {"": (baseline_items, compressed_items, statistic)}
    return suite_difference(pairs, n_resamples=n_resamples, seed=seed, confidence=confidence)


def retention(
    baseline_items: Items,
    compressed_items: Items,
    *,
    statistic: str = "mean",
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate compressed ÷ baseline, paired by item (and by seed, if both sides have several).

    If the baseline's own interval contains zero, the ratio is not bounded (Fieller 1954): the interval is (−inf, inf).
    Use `difference` then.

    Raises:
        ValueError: as `bootstrap`, and when the baseline's score is zero.
    """
    pairs = {"": (baseline_items, compressed_items, statistic)}
    return suite_retention(pairs, n_resamples=n_resamples, seed=seed, confidence=confidence)


def suite_score(
    tasks: Mapping[str, tuple[Items, str]],
    *,
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    shared_items: bool = False,
) -> Estimate:
    """Estimate the mean score over tasks: {task: (items, statistic)}. Arguments as in `suite_difference`."""
    pairs = {task: (items, items, statistic) for task, (items, statistic) in tasks.items()}
    points, draws, n = _sample(pairs, n_resamples, seed, shared_items)
    return _interval(points[0], draws[0], n, confidence)


def suite_difference(
    pairs: Mapping[str, tuple[Items, Items, str]],
    *,
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    shared_items: bool = False,
) -> Estimate:
    """Estimate the mean over tasks of compressed − baseline.

    Tasks are fixed; items are drawn within each task, and one draw of seeds serves all tasks.

    Args:
        pairs: For each task: baseline items, compressed items, statistic.
        n_resamples: By default 10,000 if every statistic is a mean, else 2,000.
        seed: Seed of the draws.
        confidence: Of the interval.
        shared_items: Whether all tasks have the same items in the same order (one sentence in several languages).
            They are then resampled together; separate draws would make the interval too narrow.
    """
    points, draws, n = _sample(pairs, n_resamples, seed, shared_items)
    return _interval(points[1] - points[0], draws[1] - draws[0], n, confidence)


def suite_retention(
    pairs: Mapping[str, tuple[Items, Items, str]],
    *,
    n_resamples: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    shared_items: bool = False,
) -> Estimate:
    """Estimate the compressed model's mean score over tasks ÷ the baseline's mean score over tasks.

    A ratio of means, as in published averages; a mean of ratios could be dominated by one task with a baseline near
    zero. Arguments as in `suite_difference`, edge cases as in `retention`.
    """
    points, draws, n = _sample(pairs, n_resamples, seed, shared_items)
    if points[0] == 0:
        raise ValueError("retention needs a baseline score other than 0, got 0; use difference instead")
    base = _interval(points[0], draws[0], n, confidence)
    if base.low <= 0 <= base.high:
        return Estimate(float(points[1] / points[0]), -math.inf, math.inf, n)
    usable = draws[0] != 0
    return _interval(points[1] / points[0], draws[1][usable] / draws[0][usable], n, confidence)


def equivalent(estimate: Estimate, margin: float) -> Equivalence:
    """Compare a difference with a margin that was fixed in advance.

    Returns:
        "equivalent" when the whole interval lies within ±margin (ends included), "worse" when it lies
        entirely below −margin, "better" when entirely above +margin, else "inconclusive".
    """
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if -margin <= estimate.low and estimate.high <= margin:
        return "equivalent"
    if estimate.high < -margin:
        return "worse"
    return "better" if estimate.low > margin else "inconclusive"


def holm(p_values: ArrayLike) -> Array:
    """Adjust p-values for multiple tests (Holm 1979), in the order given.

    Raises:
        ValueError: for a p-value outside 0..1, or NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values must be a list of numbers in 0..1, got {p_values!r}")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def _sample(
    pairs: Mapping[str, tuple[Items, Items, str]],
    n_resamples: int | None,
    seed: int,
    shared_items: bool,
) -> tuple[Array, Array, int]:
    """Return both sides' scores ``[2]``, their draws ``[2, n_resamples]`` and the number of items."""
    if not pairs:
        raise ValueError("no task to compare: pairs is empty")
    names = [statistic for _, _, statistic in pairs.values()]
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}: use one of {', '.join(STATISTICS)}")
    if n_resamples is None:
        n_resamples = 10_000 if all(name in _CHEAP for name in names) else 2_000
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    tasks = {
        task: (_stack(base, task), _stack(small, task), name) for task, (base, small, name) in pairs.items()
    }
    counts = {len(side) for base, small, _ in tasks.values() for side in (base, small)}
    seeds = max(counts)
    if not counts <= {1, seeds}:
        raise ValueError(f"numbers of seeds must be equal, or 1 on one side, got {sorted(counts)}")

    rng = np.random.default_rng(seed)
    seed_draws = rng.integers(seeds, size=(n_resamples, seeds))
    points, draws, total = np.zeros(2), np.zeros((2, n_resamples)), 0
    if shared_items and len({base.shape[1:] for base, _, _ in tasks.values()}) > 1:
        raise ValueError("shared_items needs tasks with equally many items, of one kind of score")
    state = rng.bit_generator.state
    for task, (base, small, name) in tasks.items():
        if shared_items:
            rng.bit_generator.state = state  # the same draws for every task
        if base.shape[1] != small.shape[1]:
            raise ValueError(
                f"paired scores need the same items on both sides{_of(task)}: "
                f"baseline has {base.shape[1]}, compressed has {small.shape[1]}"
            )
        total += base.shape[1]
        sides = (base,) if small is base or np.array_equal(base, small) else (base, small)
        task_points, task_draws = _resample(sides, STATISTICS[name], seed_draws, rng)
        points += task_points / len(tasks)  # one side alone broadcasts to both
        draws += task_draws / len(tasks)
    return points, draws, total


def _resample(
    sides: tuple[Array, ...],
    score: Callable[[Array], Array],
    seed_draws: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Score each side ``[seeds, n, k]`` as it is, and on resamples of items (the same for all sides) and seeds."""
    n_resamples, n = len(seed_draws), sides[0].shape[1]
    if score is _mean:
        sides = tuple(side[..., :1] for side in sides)
    points = np.array([score(side).mean() for side in sides])
    draws = np.empty((len(sides), n_resamples))
    step = max(1, _CHUNK // (n * max(side.shape[2] for side in sides)))
    for start in range(0, n_resamples, step):
        chosen = seed_draws[start : start + step]  # [r, seeds]
        index = rng.integers(n, size=(len(chosen), n))  # [r, n]
        for row, side in zip(draws, sides, strict=True):
            by_seed = np.stack([score(one[index]) for one in side], axis=1)  # [r, seeds of this side]
            picked = np.take_along_axis(by_seed, chosen, axis=1) if len(side) > 1 else by_seed
            row[start : start + step] = picked.mean(axis=1)
    return points, draws


def _stack(items: Items, task: str) -> Array:
    """Return ``[seeds, n, k]``."""
    several = isinstance(items, list | tuple) and len(items) > 0 and np.ndim(items[0]) > 0
    arrays = [np.asarray(one, dtype=np.float64) for one in (items if several else [items])]
    if len({one.shape for one in arrays}) > 1:
        raise ValueError(
            f"every seed needs the same items{_of(task)}, got shapes {[a.shape for a in arrays]}"
        )
    stacked = np.stack([one[:, None] if one.ndim == 1 else one for one in arrays])
    if stacked.ndim != 3 or stacked.shape[1] == 0 or stacked.shape[2] == 0:
        raise ValueError(f"items must be [n] or [n, k] with n ≥ 1{_of(task)}, got shape {arrays[0].shape}")
    if not np.isfinite(stacked).all():
        raise ValueError(f"items hold NaN or infinite values{_of(task)}: a score must not rest on them")
    return stacked


def _of(task: str) -> str:
    return f" (task {task})" if task else ""


def _interval(point: float, draws: Array, n: int, confidence: float) -> Estimate:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(point), float(low), float(high), n)
