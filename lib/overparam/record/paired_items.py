"""Per-item scores of two runs, compared item by item where the items match."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pandas as pd

from overparam.record import stats

ITEM = ("item", "verse")  # columns that say which item it is
OUTCOMES = (
    "nll",
    "tokens",
    "text",
    "translation",
    "failure",
)  # what a run makes of an item, beside its scores
_SCORE = re.compile(r"(.+)_\d+$")  # columns such as value_0, or chrf_0 … chrf_23 of one item's statistics
_GROUP_SIZE = 64  # a column of more different values than that tells items apart, not systems or tasks
_LEVEL = 0.05
_RESAMPLES = 500

State = Literal["identical", "agree", "differ"]


def compare(left: pd.DataFrame, right: pd.DataFrame) -> list[tuple[State, str]]:
    """Match items by every column that is no score, and compare the scores.

    Where scores differ, each group of items (system, task, …) is compared by a paired bootstrap of its score; a group
    differs when its p-value, from the bootstrap's spread, is below 5 % after Holm's correction for all groups.

    Returns:
        Rows of state and detail: the first for the table as a whole, then one for each group that differs.
    """
    from scipy.special import ndtr

    if list(left.columns) != list(right.columns):
        return [("differ", "the columns are not the same")]
    scores = [c for c in left.columns if _SCORE.fullmatch(c) or c in OUTCOMES]
    keys = [c for c in left.columns if c not in scores]
    # a name that is missing is a name like any other: groups are not to lose the rows that have none
    one, other = (frame.assign(**frame[keys].astype("str").fillna("")) for frame in (left, right))
    if one.duplicated(keys).any() or other.duplicated(keys).any():
        return [("differ", "items cannot be told apart: several rows have the same names")]
    both = one.merge(other, on=keys, suffixes=("·a", "·b"))
    alone = len(one) + len(other) - 2 * len(both)
    others = f"; {alone} without a partner" if alone else ""
    if both.empty:
        return [("differ", f"no items in common{others}")]
    changed = np.zeros(len(both), dtype=bool)
    for name in scores:
        a, b = both[f"{name}·a"], both[f"{name}·b"]
        if not pd.api.types.is_numeric_dtype(a):
            a, b = a.astype("str"), b.astype("str")  # the categories of the two files may differ
        changed |= ((a != b) & ~(a.isna() & b.isna())).to_numpy(dtype=bool)
    if not changed.any():
        return [("identical", f"{len(both)} items, every score the same{others}")]
    groups = [key for key in keys if key not in ITEM and both[key].nunique() <= _GROUP_SIZE]
    gaps = _gaps(both, changed, groups, scores)
    shown = f"{len(both)} items, {changed.sum()} with other scores{others}"
    if not gaps:
        return [("agree", f"{shown}; none of them numbers that can be compared")]
    p_values = [
        2 * ndtr(-abs(gap.value) / se) if (se := (gap.high - gap.low) / 3.92) > 0 else float(gap.value == 0)
        for _, gap in gaps
    ]
    differ = [gap for gap, p in zip(gaps, stats.holm(p_values), strict=True) if p < _LEVEL]
    total = both.groupby(groups).ngroups if groups else 1
    rows: list[tuple[State, str]] = [
        (
            "differ" if differ else "agree",
            f"{shown}; {len(differ)} of {total} groups differ, paired, after Holm's correction",
        )
    ]
    return rows + [
        ("differ", f"{name}: B − A {gap.value:.4g} [{gap.low:.4g}, {gap.high:.4g}], {gap.n} items")
        for name, gap in differ
    ]


def _gaps(
    both: pd.DataFrame, changed: np.ndarray, groups: list[str], scores: list[str]
) -> list[tuple[str, stats.Estimate]]:
    """Paired differences B − A of the groups in which some score differs."""
    numbered = both.groupby(groups, sort=False).ngroup() if groups else pd.Series(0, index=both.index)
    gaps = []
    for _, part in both[numbered.isin(numbered[changed].unique())].groupby(numbered, sort=False):
        name = " ".join(filter(None, (part[key].iloc[0] for key in groups))) or "all"
        for statistic, columns in _statistics(part, scores):
            a, b = (part[[f"{column}·{side}" for column in columns]].to_numpy(float) for side in "ab")
            known = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
            if known.any() and (a[known] != b[known]).any():
                gap = stats.difference(a[known], b[known], statistic=statistic, n_resamples=_RESAMPLES)
                gaps.append((f"{name} {statistic}", gap))
    return gaps


def _statistics(part: pd.DataFrame, scores: list[str]) -> list[tuple[str, list[str]]]:
    """Which statistics the score columns of a group are made for, as `overparam.evaluate` and `stats` keep them."""
    families: dict[str, list[str]] = {}
    for name in scores:
        if (found := _SCORE.fullmatch(name)) and part[f"{name}·a"].notna().any():
            families.setdefault(found[1], []).append(name)
    statistics = []
    for family, columns in families.items():
        if family in ("chrf", "bleu"):
            statistics.append(("chrf++" if family == "chrf" else "bleu", columns))
        elif len(columns) == 1:
            statistics.append(("mean", columns))
        else:  # scores against labels: two classes, or a human's judgement on a scale
            classes = part[f"{columns[1]}·a"].nunique()
            statistics.append(("average_precision" if classes <= 2 else "spearman", columns[:2]))
    if {"nll", "tokens"} <= set(scores) and part["nll·a"].notna().any():
        statistics.append(("nll_per_token", ["nll", "tokens"]))
    return statistics
