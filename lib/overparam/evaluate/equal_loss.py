"""What one training saves of another's cost until both have the same loss: the horizontal distance of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overparam.record.stats import Estimate

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # costs, increasing, and the losses there


@dataclass(frozen=True)
class Reached:
    """The cost at which a curve reaches a loss.

    Attributes:
        cost: Where it does; outside of the curve, its nearest end.
        outside: -1 when it was there before the curve begins, 1 when it is not there when the curve ends, else 0.
    """

    cost: float
    outside: int = 0


def reached(costs: ArrayLike, losses: ArrayLike, loss: float) -> Reached:
    """Return where a curve first reaches a loss, interpolated linearly over the logarithm of the cost.

    Args:
        costs: Increasing, above 0: tokens, operations, seconds, or bytes of models of growing size.
        losses: There.
        loss: To be reached.

    Raises:
        ValueError: For costs that do not increase from above 0, or another number of losses.
    """
    x, y = np.asarray(costs, float), np.asarray(losses, float)
    if x.shape != y.shape or not len(x) or x[0] <= 0 or not (np.diff(x) > 0).all():
        raise ValueError("costs must increase from above 0, with one loss each")
    best = np.minimum.accumulate(y)
    if best[0] <= loss:
        return Reached(float(x[0]), 0 if best[0] == loss else -1)
    if best[-1] > loss:
        return Reached(float(x[-1]), 1)
    after = int(np.argmax(best <= loss))
    part = (best[after - 1] - loss) / (best[after - 1] - best[after])
    return Reached(float(x[after - 1] * (x[after] / x[after - 1]) ** part))


def common_loss(*curves: Curve) -> float:
    """The lowest loss that all curves reach."""
    return max(float(np.min(losses)) for _, losses in curves)


def saved(base: Sequence[Reached], other: Sequence[Reached]) -> Estimate:
    """Return how much of `base`'s cost `other` saves at equal loss, in percent, paired by seed.

    The interval is Student's for the mean logarithm of the ratio. One seed bounds nothing; neither does a curve that
    ends before it is there bound the side on which it would go on.

    Args:
        base: Of every seed.
        other: Of the same seeds.
    """
    from scipy import stats

    ratios = np.log([b.cost / a.cost for a, b in zip(base, other, strict=True)])
    mean, n = float(ratios.mean()), len(ratios)
    half = math.inf if n == 1 else float(stats.t.ppf(0.975, n - 1) * ratios.std(ddof=1) / math.sqrt(n))
    less = any(a.outside > 0 for a in base) or any(b.outside < 0 for b in other)  # the ratio may be smaller
    more = any(a.outside < 0 for a in base) or any(b.outside > 0 for b in other)
    low = math.inf if more else mean + half
    high = -math.inf if less else mean - half
    return Estimate(_percent(mean), _percent(low), _percent(high), n)


def mean(values: ArrayLike) -> Estimate:
    """The mean over seeds with Student's 95 % interval, which one seed leaves unbounded."""
    from scipy import stats

    each = np.asarray(values, float)
    half = math.inf if len(each) == 1 else float(stats.t.ppf(0.975, len(each) - 1) * stats.sem(each))
    return Estimate(float(each.mean()), float(each.mean() - half), float(each.mean() + half), len(each))


def _percent(log_ratio: float) -> float:
    return 100 * (1 - math.exp(log_ratio)) if log_ratio < math.inf else -math.inf
