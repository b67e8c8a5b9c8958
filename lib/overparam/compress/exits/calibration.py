"""Thresholds with a bound on what leaving early costs, from texts that neither trained nor tested anything."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

METHODS = ("crc", "ltt")
"""Conformal risk control bounds the mean risk; Learn-then-Test the share of calibrations with a risk above alpha."""

RISKS = ("newly wrong", "disagreement")
"""Texts that the full model classifies rightly and the exit wrongly; texts to which they give different classes."""

THRESHOLDS: Floats = np.concatenate([[np.inf], 1 / (1 + np.exp(-np.linspace(14, -3, 171)))])
"""Thresholds that are tried, fixed before any text is seen: from never leaving early to leaving at once."""


def losses(predicted: ArrayLike, labels: ArrayLike | None, risk: str) -> Floats:
    """Return the loss of each exit against the full model, the last exit: 0 or 1.

    Args:
        predicted: Classes, [texts, exits].
        labels: The right classes [texts]; "disagreement" needs none.
        risk: One of `RISKS`.

    Returns:
        float64 [texts, exits].

    Raises:
        ValueError: The risk is unknown, or there are no labels.
    """
    if risk not in RISKS:
        raise ValueError(f"risk must be one of {', '.join(RISKS)}, got {risk!r}")
    classes = np.asarray(predicted)
    if risk == "disagreement":
        return np.asarray(classes != classes[:, -1:], dtype=np.float64)
    if labels is None:
        raise ValueError("the risk 'newly wrong' needs labels; 'disagreement' does not")
    right = classes == np.asarray(labels)[:, None]
    return np.asarray(right[:, -1:] & ~right, dtype=np.float64)


def risks(left: ArrayLike, losses: ArrayLike) -> Floats:
    """Return what each text loses at each threshold: the most at this threshold or a more cautious one.

    The maximum makes the loss grow as thresholds fall, which conformal risk control needs; it can only overstate it.

    Args:
        left: Exits at which texts leave, from the most cautious threshold on, [thresholds, texts].
        losses: Of each exit, [texts, exits].

    Returns:
        float64 [thresholds, texts].
    """
    each = np.take_along_axis(np.asarray(losses), np.asarray(left).T, axis=1).T
    return np.maximum.accumulate(each, axis=0)


def calibrate(losses: ArrayLike, *, alpha: float, delta: float = 0.1, method: str = "ltt") -> int:
    """Choose the threshold that saves most and keeps the risk below `alpha`.

    "crc": the last threshold with n/(n+1) · mean loss + 1/(n+1) ≤ α (arXiv 2208.02814, eq. 4). "ltt": thresholds are
    tested in their order, until the first whose risk is not significantly below α (fixed-sequence testing, arXiv
    2110.01052); the p-value of 0/1 losses is the exact one of the binomial distribution.

    Args:
        losses: From `risks`: of each threshold, the most cautious first, and text; from 0 to 1. [thresholds, texts]
        alpha: Bound on the risk, in (0, 1).
        delta: Share of calibrations that may miss it, in (0, 1); for "ltt".
        method: One of `METHODS`.

    Returns:
        The position of the threshold.

    Raises:
        ValueError: `alpha` or `delta` is out of range, there are too few texts for `alpha`, losses are not 0 or 1
            ("ltt"), or even the first threshold loses too much.
    """
    table = np.asarray(losses, dtype=np.float64)
    if method == "ltt" and not np.isin(table, (0, 1)).all():
        raise ValueError("Learn-then-Test is exact for losses of 0 and 1 only; use method='crc'")
    totals = table.sum(axis=1, keepdims=True)
    return int(positions(totals, table.shape[1], alpha=alpha, delta=delta, method=method)[0])


def positions(totals: Floats, n: int, *, alpha: float, delta: float, method: str) -> NDArray[np.int64]:
    """Do what `calibrate` does for several sets of `n` texts at once, given their summed losses [thresholds, sets]."""
    from scipy.stats import binom

    _between("alpha", alpha)
    if (least := smallest_alpha(max(n, 1), delta=delta, method=method)) > alpha:
        raise ValueError(
            f"alpha = {alpha:g} needs more than the {n} texts of this calibration set: with {n}, the smallest alpha "
            f"that {method} allows is {least:.4f}"
        )
    holds = (totals + 1) / (n + 1) <= alpha if method == "crc" else binom.cdf(totals, n, alpha) <= delta
    if not holds[0].all():
        raise ValueError(
            "the first threshold must lose nothing: begin with one at which no text leaves early"
        )
    return np.asarray(np.where(holds.all(axis=0), len(holds), holds.argmin(axis=0)) - 1, dtype=np.int64)


def smallest_alpha(n: int, *, delta: float = 0.1, method: str = "ltt") -> float:
    """Return the smallest bound that `n` texts allow, when none of them loses anything.

    Raises:
        ValueError: The method is unknown, or `delta` is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _between("delta", delta)
    return 1 / (n + 1) if method == "crc" else -math.expm1(math.log(delta) / n)


def _between(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
