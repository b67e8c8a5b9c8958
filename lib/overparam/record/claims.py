"""Published claims and the verdict on each, always computed from the measured estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from overparam.record.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal[
    "reproduced", "reproduced in direction", "not reproduced", "inconclusive", "not testable at this scale"
]
Kind = Literal["no_worse", "better", "unchanged", "difference", "proportional"]


@dataclass(frozen=True)
class Claim:
    """One published claim with the verdict of this run.

    Attributes:
        id: Stable name, such as ``l3prune-large``.
        statement: The claim in our own words.
        source: Paper and section or table.
        published: The published value, as shown to readers.
        measured: The measured estimate; None if the claim is not testable at this scale.
        unit: Unit of measured and margin, such as ``points``.
        margin: The margin used by the rule.
        verdict: Computed by `judge`.
        rule: The rule in words, with its numbers.
        figure: Id of the figure that shows it, or empty.
        note: Differences from the published conditions.
    """

    id: str
    statement: str
    source: str
    published: str
    measured: Estimate | None
    unit: str
    margin: float
    verdict: Verdict
    rule: str
    figure: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "measured": self.measured.to_dict() if self.measured else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Claim:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: for fields or a verdict that this version does not know.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown or values.get("verdict") not in get_args(Verdict):
            raise ValueError(
                f"claim {values.get('id')!r}: unknown fields {sorted(unknown)} "
                f"or verdict {values.get('verdict')!r}"
            )
        measured = values["measured"]
        return cls(**{**values, "measured": Estimate.from_dict(measured) if measured else None})


def judge(
    kind: Kind,
    measured: Estimate | None,
    *,
    margin: float,
    published: float | None = None,
    direction_within: float | None = None,
    unit: str = "",
) -> tuple[Verdict, str]:
    """Judge an estimate by the rule of its kind; `measured` None is "not testable at this scale".

    ``no_worse`` (`measured` is compressed − baseline, higher is better): reproduced if the whole CI is at or above
    −margin; not reproduced if it is entirely below −margin; else inconclusive.

    ``better`` (`measured` is a gain): reproduced if the whole CI is above `margin`; not reproduced if it is entirely
    at or below it; else inconclusive.

    ``unchanged`` (`measured` is a change of either sign): reproduced if the whole CI is within ±margin; not reproduced
    if it is entirely outside; else inconclusive.

    ``difference`` (`measured` against a `published` number, higher is better): reproduced if the CI overlaps
    published ± margin or is better. If its half-width is above both the margin and the published size, it would
    overlap almost anything: inconclusive. In direction if the CI is on the same side of zero as the published number
    (and, if `direction_within` is given, the estimate is no further from zero than that). Else not reproduced.

    ``proportional`` (`measured` is the slope of relative cost over relative depth; 1 is proportional): reproduced if
    the CI overlaps 1 ± margin and excludes 0; inconclusive if it overlaps 1 ± margin and includes 0; in direction if
    it is above 0; else not reproduced.

    Returns:
        The verdict, and the rule in words with its numbers.

    Raises:
        ValueError: for an unknown kind, a negative margin, NaN, or a missing published number.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of claim {kind!r}: use one of {', '.join(get_args(Kind))}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if measured is None:
        return "not testable at this scale", "not measured at this scale"
    if math.isnan(measured.value) or math.isnan(measured.low) or math.isnan(measured.high):
        raise ValueError(f"cannot judge NaN: {measured}")
    if kind == "no_worse":
        return _no_worse(measured, margin, unit)
    if kind == "better":
        return _better(measured, margin, unit)
    if kind == "unchanged":
        return _unchanged(measured, margin, unit)
    if kind == "proportional":
        return _proportional(measured, margin)
    if published is None:
        raise ValueError("a claim of kind 'difference' needs the published number: published=")
    return _difference(measured, margin, published, direction_within, unit)


def judged(
    id: str,
    statement: str,
    *,
    source: str,
    published: str,
    kind: Kind,
    measured: Estimate | None,
    margin: float,
    published_value: float | None = None,
    direction_within: float | None = None,
    unit: str = "points",
    figure: str = "",
    note: str = "",
) -> Claim:
    """Build a claim with its verdict, from the fields of `Claim` and the arguments of `judge`.

    Raises:
        ValueError: as `judge`, and if nothing was measured and no note says why.
    """
    if measured is None and not note:
        raise ValueError(f"claim {id!r} was not measured: say why in note=")
    verdict, rule = judge(
        kind, measured, margin=margin, published=published_value, direction_within=direction_within, unit=unit
    )
    return Claim(id, statement, source, published, measured, unit, margin, verdict, rule, figure, note)


def verdict_table(claims: list[Claim]) -> pd.DataFrame:
    """The claims as a table for readers."""
    import pandas as pd

    rows = []
    for claim in claims:
        m = claim.measured
        shown = "—" if m is None else f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}] {claim.unit}"
        rows.append(
            {
                "claim": claim.statement,
                "published": claim.published,
                "measured [95 % CI]": shown,
                "verdict": claim.verdict,
                "rule": claim.rule,
                "note": claim.note,
            }
        )
    return pd.DataFrame(rows)


def _no_worse(measured: Estimate, margin: float, unit: str) -> tuple[Verdict, str]:
    rule = f"reproduced when the whole CI of the change is at or above {_text(-margin or 0.0, unit)}"
    if measured.low >= -margin:
        return "reproduced", rule
    return ("not reproduced" if measured.high < -margin else "inconclusive"), rule


def _better(measured: Estimate, margin: float, unit: str) -> tuple[Verdict, str]:
    rule = f"reproduced when the whole CI is above {_text(margin, unit)}"
    if measured.low > margin:
        return "reproduced", rule
    return ("not reproduced" if measured.high <= margin else "inconclusive"), rule


def _unchanged(measured: Estimate, margin: float, unit: str) -> tuple[Verdict, str]:
    rule = f"reproduced when the whole CI of the change lies within ± {_text(margin, unit)}"
    if -margin <= measured.low and measured.high <= margin:
        return "reproduced", rule
    outside = measured.high < -margin or measured.low > margin
    return ("not reproduced" if outside else "inconclusive"), rule


def _difference(
    measured: Estimate, margin: float, published: float, direction_within: float | None, unit: str
) -> tuple[Verdict, str]:
    rule = (
        f"reproduced when the CI meets {_text(published, unit)} ± {_text(margin)} or is better, "
        f"unless it is wider than ± {_text(max(margin, abs(published)))}; "
        "in direction when it is on the same side of 0"
    )
    if direction_within is not None:
        rule += f" and within {_text(direction_within, unit)} of it"
    if measured.high >= published - margin:
        too_wide = (measured.high - measured.low) / 2 > max(margin, abs(published))
        better = measured.low > published + margin
        return ("inconclusive" if too_wide and not better else "reproduced"), rule
    same_side = (measured.high < 0 and published < 0) or (measured.low > 0 and published > 0)
    near = direction_within is None or abs(measured.value) <= direction_within
    return ("reproduced in direction" if same_side and near else "not reproduced"), rule


def _proportional(measured: Estimate, margin: float) -> tuple[Verdict, str]:
    rule = (
        f"reproduced when the slope's CI meets 1 ± {_text(margin)} and excludes 0; in direction when above 0"
    )
    if measured.low <= 1 + margin and measured.high >= 1 - margin:
        return ("reproduced" if measured.low > 0 else "inconclusive"), rule
    return ("reproduced in direction" if measured.low > 0 else "not reproduced"), rule


def _text(number: float, unit: str = "") -> str:
    return f"{number:g} {unit}".strip().replace("-", "−")
