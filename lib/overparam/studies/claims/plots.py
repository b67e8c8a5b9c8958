"""The figures of the summary; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.experiment import charts
from overparam.experiment.charts import GREEN, GREY, ORANGE, YELLOW, Look
from overparam.studies.claims.study import Study

_VERDICTS = {
    "reproduced": Look(GREEN),
    "reproduced in direction": Look(YELLOW),
    "not reproduced": Look(ORANGE),
    "inconclusive": Look(GREY),
}
_PUBLISHED = Look("black", "D", hollow=True, label="published")
_BOUND = Look("black", "|", label="margin of the rule")
_LINEAR = 10  # points or percent: up to here the axis is linear, beyond it logarithmic
_WIDE = 2.1  # columns


def plot_forest(study: Study, data: pd.DataFrame) -> Any:
    """Draw the published point of each claim against the measured interval."""
    if data.empty:
        return "no record answers a claim of the ledger with a number"
    caption = (
        f"Published points (diamonds) against what was measured (dots with 95 % interval): {len(data)} verdicts on "
        f"{data['model'].nunique()} models, in points of a score of 100 or in percent of the unpruned model; "
        "0 is no change, in proportion, or the goal. Bars: the margin of a rule that allows no loss, or asks for a "
        "gain. The axis is linear within ±10 and logarithmic beyond."
    )
    rows = data.assign(row=data["claim"] + ", " + data["model"] + " (" + data["unit"] + ")")
    order, height = list(rows["row"]), 0.27 + 0.072 * len(rows)
    with charts.figure(
        study, "fig:claims-forest", data, caption=caption, legend=3, width=_WIDE, height=height
    ) as axes:
        charts.reference(axes, 0, line="-", upright=True)
        charts.dots(axes, rows, "row", "value", by="verdict", look=_VERDICTS, order=order)
        marks = rows.drop(columns=["low", "high"])
        charts.dots(axes, marks, "row", "published", look=_PUBLISHED, order=order)
        charts.dots(axes, marks, "row", "bound", look=_BOUND, order=order, markersize=8)
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.0)
        ticks = [-100, -30, -10, -5, 0, 5, 10, 30, 100]
        axes.set_xticks(ticks, [f"{tick}".replace("-", "−") for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("points or percent, as each row says; linear within ±10")
    return axes.figure


def plot_pareto(study: Study, data: pd.DataFrame) -> Any:
    """Draw quality kept against size and against speed, over all studies."""
    if data.empty:
        return "no record has both a score and a cost of a compressed model"
    caption = (
        "Score kept against the parameters that are left, embedding tables included, and against speed: "
        f"{data['model'].nunique()} models of {data['study'].nunique()} studies, 95 % intervals. Scores are those "
        "of each study (mean over embedding tasks, chrF++): curves of one model can be compared, levels of two "
        "can not. Speed is of encoding a batch, or of translating one."
    )
    drawn = data.assign(series=data["model"] + ": " + data["system"])
    drawn = drawn.sort_values("size_percent", kind="stable")
    look = charts.looks(data["model"] + ": " + data["system"])
    ends = drawn.drop_duplicates("series")  # the smallest of each
    layout: dict[str, Any] = {"ncols": 2, "sharey": True}
    with charts.figure(
        study, "fig:claims-pareto", data, caption=caption, width=_WIDE, height=0.9, **layout
    ) as (size, speed):
        for axes, column in ((size, "size_percent"), (speed, "speed")):
            charts.curves(axes, drawn, column, "kept_percent", by="series", look=look, linewidth=0.8)
            charts.reference(axes, 100, line="-")
        size.set(xlabel="parameters or bytes left (%)", ylabel="score kept (% of the full model)")
        size.set(xlim=(104, 0), ylim=(-5, 108))
        speed.set_xlabel("speed (times the full model)")
        colours = {name: each.colour for name, each in look.items()}
        charts.label_ends(size, ends, "size_percent", "kept_percent", "series", colours)
    return size.figure
