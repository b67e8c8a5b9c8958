"""Comparison of two runs' per-item scores, paired where the items match."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pandas as pd

from overparam.record import stats

ITEM = ("item", "verse")  # columns that identify an item
OUTCOMES = (
    "nll",
    "tokens",
    "text",
    "translation",
    "failure",
)  # columns with results of a run, besides scores
_SCORE = re.compile(r"(.+)_\d+$")  # columns such as value_0, or chrf_0 … chrf_23 of one item's statistics
_GROUP_SIZE = 64  # a column with more distinct values identifies items, not systems or tasks
_LEVEL = 0.05
_RESAMPLES = 500

State = Literal["identical", "agree", "differ"]


def compare(left: pd.DataFrame, right: pd.DataFrame) -> list[tuple[State, str]]:
    """Match items by all columns that are not scores, and compare the scores.

    If scores differ, each group of items (system, task, …) is compared by a paired bootstrap of its score. A group
    differs if its p-value, from the bootstrap's standard error, is below 5 % after Holm's correction over all groups.

    Returns:
        (state, detail): first for the whole table, then for each group that differs.
    """
    from scipy.special import ndtr

    if list(left.columns) != list(right.columns):
        return [("differ", "the columns are not the same")]
    scores = [c for c in left.columns if _SCORE.fullmatch(c) or c in OUTCOMES]
    keys = [c for c in left.columns if c not in scores]
    # a missing name is a name too: otherwise groupby would drop these rows
    one, other = (frame.assign(**frame[keys].astype("str").fillna("")) for frame in (left, right))
    if one.duplicated(keys).any() or other.duplicated(keys).any():
        return [("differ", "items cannot be identified: several rows have the same names")]
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
    shown = f"{len(both)} items, {changed.sum()} with different scores{others}"
    if not gaps:
        return [("agree", f"{shown}; none of these scores is a number that can be compared")]
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
    """Paired differences B − A of all groups in which a score differs."""
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
    """The statistic for the score columns of a group, as `overparam.evaluate` and `stats` store them."""
    families: dict[str, list[str]] = {}
    for name in scores:
        if (match := _SCORE.fullmatch(name)) and part[f"{name}·a"].notna().any():
            families.setdefault(match[1], []).append(name)
    statistics = []
    for family, columns in families.items():
        if family in ("chrf", "bleu"):
            statistics.append(("chrf++" if family == "chrf" else "bleu", columns))
        elif len(columns) == 1:
            statistics.append(("mean", columns))
        else:  # scores with labels: two classes, or human ratings
            classes = part[f"{columns[1]}·a"].nunique()
            statistics.append(("average_precision" if classes <= 2 else "spearman", columns[:2]))
    if {"nll", "tokens"} <= set(scores) and part["nll·a"].notna().any():
        statistics.append(("nll_per_token", ["nll", "tokens"]))
    return statistics
