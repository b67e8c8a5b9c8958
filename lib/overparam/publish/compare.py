"""Comparison of two results folders: which quality metrics agree and which differ.

Metrics with an interval agree if the interval of their difference, assuming independence, contains zero; metrics
without one agree if they are equal to six digits. If both records have scores of the same items, these are compared
item by item. Times, memory, energy and speed differ between any two runs: they are listed, not judged.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from overparam.publish.inventory import Inventory, folder
from overparam.record import paired_items
from overparam.record.record import Metric, Record

State = Literal["identical", "agree", "differ", "only in A", "only in B", "not judged"]
# words in names or units of costs; all other metrics count as quality
COST = re.compile(
    r"(^|[ _])(seconds?|hours?|h|s|ms|latency|latencies|times?|costs?|speed|energy|kwh|peak|resident|watts?)($|[ _])"
)
_DIGITS = 1e-6


@dataclass(frozen=True)
class Row:
    """One metric, or the scores of one system on one task, in both folders."""

    job: str
    name: str
    a: str
    b: str
    state: State
    detail: str = ""


def is_cost(name: str, unit: str = "") -> bool:
    """Return whether a metric is a time, memory in use, energy or speed, by words in its name and unit.

    Any other metric counts as quality: a cost that is not recognised shows up as a difference, and none is hidden.
    """
    return bool(COST.search(name.lower()) or COST.search(unit.lower()))


def compare(a: Inventory, b: Inventory) -> list[Row]:
    """Compare all jobs that have a record in either folder."""
    left, right = ({(r.study, r.slug): r for r in each.studies} for each in (a, b))
    rows: list[Row] = []
    for key in sorted(left.keys() | right.keys()):
        job = "/".join(key)
        if key not in right:
            rows.append(Row(job, "record", "there", "—", "only in A"))
        elif key not in left:
            rows.append(Row(job, "record", "—", "there", "only in B"))
        else:
            rows += _records(job, left[key], right[key])
    return rows


def differences(rows: list[Row]) -> list[Row]:
    """The rows that make the comparison fail."""
    return [row for row in rows if row.state in ("differ", "only in A", "only in B")]


def summary(rows: list[Row]) -> str:
    """Numbers of rows by state, in one line."""
    counts = pd.Series([row.state for row in rows], dtype=str).value_counts(sort=False)
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "nothing to compare"


def table(rows: list[Row]) -> str:
    """The rows as aligned text, job by job."""
    lines = []
    for job in dict.fromkeys(row.job for row in rows):
        own = [row for row in rows if row.job == job]
        widths = [max(len(getattr(row, part)) for row in own) for part in ("name", "a", "b", "state")]
        lines.append(f"\n{job}")
        lines += [
            f"  {row.name:<{widths[0]}}  {row.a:>{widths[1]}}  {row.b:>{widths[2]}}  "
            f"{row.state:<{widths[3]}}  {row.detail}".rstrip()
            for row in own
        ]
    return "\n".join(lines).lstrip("\n")


def _records(job: str, a: Record, b: Record) -> list[Row]:
    rows = []
    changed = [name for name in {**a.params, **b.params} if a.params.get(name) != b.params.get(name)]
    if changed:
        text = ", ".join(f"{name}: {a.params.get(name)!r} / {b.params.get(name)!r}" for name in changed)
        rows.append(Row(job, "parameters", "", "", "not judged", text))
    for name in {**a.metrics, **b.metrics}:
        rows.append(_metric(job, name, a.metrics.get(name), b.metrics.get(name)))
    for claim in a.claims:
        other = next((each for each in b.claims if each.id == claim.id), None)
        if other and other.verdict != claim.verdict:
            detail = "verdicts follow from the metrics"
            rows.append(
                Row(job, f"verdict on {claim.id}", claim.verdict, other.verdict, "not judged", detail)
            )
    for name in {**a.items, **b.items}:
        rows += _items(job, name, a, b)
    return rows


def _metric(job: str, name: str, a: Metric | None, b: Metric | None) -> Row:
    if a is None or b is None:
        state: State = "only in A" if a else "only in B"
        cost = is_cost(name, (a or b or Metric(0)).unit)
        return Row(job, name, _text(a), _text(b), "not judged" if cost else state)
    if is_cost(name, a.unit):
        return Row(job, name, _text(a), _text(b), "not judged", "a cost")
    if a.value == b.value:
        return Row(job, name, _text(a), _text(b), "identical")
    if a.estimate and b.estimate:
        gap = b.value - a.value
        below = math.hypot(a.estimate.high - a.value, b.value - b.estimate.low)
        above = math.hypot(a.value - a.estimate.low, b.estimate.high - b.value)
        agree = gap - below <= 0 <= gap + above
        detail = f"B − A: {gap:.4g} [{gap - below:.4g}, {gap + above:.4g}]"
        return Row(job, name, _text(a), _text(b), "agree" if agree else "differ", detail)
    near = math.isclose(a.value, b.value, rel_tol=_DIGITS)
    return Row(job, name, _text(a), _text(b), "agree" if near else "differ", "no interval")


def _text(metric: Metric | None) -> str:
    if metric is None:
        return "—"
    e = metric.estimate
    return f"{metric.value:.6g} [{e.low:.4g}, {e.high:.4g}]" if e else f"{metric.value:.6g}"


def _items(job: str, name: str, a: Record, b: Record) -> list[Row]:
    label = f"items of {name}"
    if name not in a.items or name not in b.items:
        return [Row(job, label, "", "", "only in A" if name in a.items else "only in B")]
    if a.items[name].sha256 == b.items[name].sha256:
        return [Row(job, label, "", "", "identical", "the same file")]
    paths = [folder(each) / each.items[name].file for each in (a, b)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        return [Row(job, label, "", "", "differ", f"missing: {', '.join(missing)}")]
    left, right = (pd.read_parquet(path) for path in paths)
    return [
        Row(job, label, str(len(left)), str(len(right)), *each) for each in paired_items.compare(left, right)
    ]
