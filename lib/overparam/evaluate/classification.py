"""Classification of texts: few-shot examples, and the quality of predictions.

Classes are ids 0, 1, …; predictions are int64 [n], probabilities float64 [n, classes]. Predictions from embeddings
and simple baselines are in `probes`, and can be imported from here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from overparam.evaluate import samples
from overparam.evaluate.probes import (
    Classes,
    bag_of_words,
    class_ids,
    linear_probe,
    majority,
    nearest_neighbours,
    zero_shot,
)

__all__ = [
    "Flips",
    "agreement",
    "bag_of_words",
    "correct",
    "expected_calibration_error",
    "few_shot",
    "flips",
    "linear_probe",
    "majority",
    "nearest_neighbours",
    "reliability",
    "reliability_of",
    "zero_shot",
]


def few_shot(
    labels: ArrayLike, per_class: int, *, seed: int, names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Draw the same number of examples of each class; with the same seed, smaller draws are prefixes of larger ones.

    Args:
        labels: [n] ids.
        per_class: Examples per class; a class with fewer gives all it has.
        seed: Seed of the draw.
        names: Names of the classes, all of which must occur; by default all ids up to the largest must.

    Returns:
        int64 indices into `labels`: one of each class, then a second one of each, and so on.

    Raises:
        ValueError: `per_class` below 1, or a class without an example.
    """
    ids = class_ids(labels)
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    counts = np.bincount(ids, minlength=len(names or ()))
    if names is not None and len(counts) > len(names):
        raise ValueError(
            f"labels must be in 0..{len(names) - 1}, as there are {len(names)} names, got {ids.max()}"
        )
    if len(empty := np.flatnonzero(counts == 0)):
        named = [repr(names[int(index)]) if names is not None else str(index) for index in empty]
        raise ValueError(f"there is no example of class {', '.join(named)}")
    order = samples.balanced([str(label) for label in ids], seed)
    return np.asarray(order[: np.minimum(counts, per_class).sum()], dtype=np.int64)


def correct(predicted: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Per-item accuracy, float64 [n, 1] of 0 and 1; `record.stats` computes intervals for its mean."""
    first, second = _check_pairs(predicted, labels)
    return np.asarray(first == second, dtype=np.float64)[:, None]


def agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Share of texts with the same predictions [n], right or wrong."""
    return float(correct(first, second).mean())


@dataclass(frozen=True)
class Flips:
    """How predictions changed, as numbers of texts.

    Attributes:
        right_to_wrong: The baseline is right, the other wrong.
        wrong_to_right: The baseline is wrong, the other right.
        wrong_to_other_wrong: Both are wrong, with different classes.
        n: Number of all texts.
        p_value: Exact two-sided McNemar test that both err equally often; 1 if nothing changed.
    """

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int
    n: int
    p_value: float


def flips(baseline: ArrayLike, other: ArrayLike, labels: ArrayLike) -> Flips:
    """Count how the predictions `other` [n] differ from those of a baseline [n], given the right ones [n].

    Equal accuracies can hide many flips (Dutta et al. 2024, arXiv 2407.09141). The test is McNemar's (1947) in its
    exact form: a binomial test on the texts that only one side gets right.

    Raises:
        ValueError: Numbers differ, or there are none.
    """
    from scipy.stats import binomtest

    first, second = _check_pairs(baseline, other)
    truth, _ = _check_pairs(labels, baseline)
    was, now = first == truth, second == truth
    lost, won = int((was & ~now).sum()), int((~was & now).sum())
    moved = int((~was & ~now & (first != second)).sum())
    p_value = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Flips(lost, won, moved, len(truth), p_value)


def flips_over_repeats(
    baseline: Sequence[ArrayLike], other: Sequence[ArrayLike], labels: ArrayLike
) -> dict[str, float]:
    """Return `flips` of several repeats as columns of a table: mean counts, and the p-value of the first repeat."""
    each = [flips(a, b, labels) for a, b in zip(baseline, other, strict=True)]
    return {
        "right_to_wrong": float(np.mean([one.right_to_wrong for one in each])),
        "wrong_to_right": float(np.mean([one.wrong_to_right for one in each])),
        "mcnemar_p_first_seed": each[0].p_value,
    }


def reliability(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> pd.DataFrame:
    """Compute confidence and accuracy by bin: the points of a reliability diagram.

    The confidence is the probability of the predicted class. Bins are of equal width, (low, high], as in Guo et al.
    2017 (arXiv 1706.04599, section 2).

    Args:
        probabilities: [n, classes]; rows sum to 1.
        labels: [n] ids.
        bins: Number of bins.

    Returns:
        One row per bin: `low` and `high` ends, mean `confidence` and `accuracy` (NaN for empty bins), `share` of texts.

    Raises:
        ValueError: Rows are not probabilities, labels are not classes, numbers differ, or `bins` is below 1.
    """
    values, truth = np.asarray(probabilities, dtype=np.float64), class_ids(labels)
    if values.ndim != 2 or len(values) != len(truth) or truth.max() >= values.shape[1]:
        raise ValueError(
            f"probabilities must be [n, classes] for {len(truth)} labels up to {truth.max()}, "
            f"got shape {list(values.shape)}"
        )
    if not ((values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-4)):
        raise ValueError(
            "probabilities must be at least 0 and each row must sum to 1; logits need a softmax first"
        )
    return reliability_of(values.max(axis=1), values.argmax(axis=1) == truth, bins=bins)


def reliability_of(confidence: NDArray[np.float64], hits: NDArray[np.bool_], *, bins: int) -> pd.DataFrame:
    """Do the same as `reliability`, given each text's confidence [n] and whether its class is correct [n].

    This allows texts of tasks with different numbers of classes in one diagram.

    Raises:
        ValueError: `bins` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.linspace(0, 1, bins + 1)
    place = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, each, minlength=bins) / counts for each in (confidence, hits)]
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "confidence": means[0],
            "accuracy": means[1],
            "share": counts / len(hits),
        }
    )


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> float:
    """Compute the mean distance between confidence and accuracy over bins, weighted by texts: 0 is best, 1 worst.

    Guo et al. 2017 (arXiv 1706.04599, eq. 3). Arguments and errors as in `reliability`.
    """
    table = reliability(probabilities, labels, bins=bins)
    return float((table.share * (table.confidence - table.accuracy).abs()).sum())


def _check_pairs(first: ArrayLike, second: ArrayLike) -> tuple[Classes, Classes]:
    one, other = class_ids(first), class_ids(second)
    if len(one) != len(other):
        raise ValueError(f"predictions and labels must be of the same texts, got {len(one)} and {len(other)}")
    return one, other
