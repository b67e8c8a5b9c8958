"""The figures of the summary; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from overparam.record import figures
from overparam.studies.claims.study import Study

COLOURS = {
    "reproduced": figures.OKABE_ITO[2],
    "reproduced in direction": figures.OKABE_ITO[4],
    "not reproduced": figures.OKABE_ITO[1],
    "inconclusive": "#777777",
}
_LINEAR = 10  # points or percent: up to here the axis is linear, beyond it logarithmic
_WIDE = 2.1 * figures.WIDTH


def plot_forest(study: Study, data: pd.DataFrame) -> Any:
    """Draw the published point of each claim against the measured interval."""
    if data.empty:
        return "no record answers a claim of the ledger with a number"
    rows = data.iloc[::-1].reset_index(drop=True)
    with figures.style():
        figure, axes = plt.subplots(figsize=(_WIDE, 0.9 + 0.24 * len(rows)))
        places = np.arange(len(rows))
        for verdict, colour in COLOURS.items():
            these = rows["verdict"] == verdict
            if these.any():
                part = rows[these]
                errors = figures.error_bars(part, "value", "low", "high")
                axes.errorbar(
                    part["value"],
                    places[these],
                    xerr=errors,
                    color=colour,
                    marker="o",
                    linestyle="",
                    label=verdict,
                )
        axes.plot(
            rows["published"],
            places,
            marker="D",
            color="black",
            markerfacecolor="white",
            linestyle="",
            label="published",
        )
        axes.plot(
            rows["bound"],
            places,
            marker="|",
            color="black",
            markersize=8,
            linestyle="",
            label="margin of the rule",
        )
        axes.axvline(0, color="#aaaaaa", linewidth=0.8, marker="", zorder=0)
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.0)
        axes.set_xticks(
            [-100, -30, -10, -5, 0, 5, 10, 30, 100],
            labels=["−100", "−30", "−10", "−5", "0", "5", "10", "30", "100"],
        )
        axes.minorticks_off()
        labels = [f"{row.claim}\n{row.model} ({row.unit})" for row in rows.itertuples()]
        axes.set_yticks(places, labels=[label.replace("\n", ", ") for label in labels], fontsize=6)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("points or percent, as each row says; linear within ±10")
        figure.legend(loc="outside upper center", ncols=3, fontsize=6)
        caption = (
            f"Published points (diamonds) against what was measured (dots with 95 % interval): {len(rows)} verdicts on "
            f"{data['model'].nunique()} models, in points of a score of 100 or in percent of the unpruned model; "
            "0 is no change, in proportion, or the goal. Bars: the margin of a rule that allows no loss, or asks for a "
            "gain. The axis is linear within ±10 and logarithmic beyond."
        )
        return figures.publish(
            figure, "fig:claims-forest", data=data, caption=caption, recorder=study.recorder
        )


def plot_pareto(study: Study, data: pd.DataFrame) -> Any:
    """Draw quality kept against size and against speed, over all studies."""
    if data.empty:
        return "no record has both a score and a cost of a compressed model"
    with figures.style():
        figure, (size, speed) = plt.subplots(1, 2, sharey=True, figsize=(_WIDE, 0.9 * figures.WIDTH))
        groups = data.groupby(["model", "system"], sort=False)
        markers = dict(zip(data["model"].unique(), figures.MARKERS * 3, strict=False))
        for number, ((model, system), rows) in enumerate(groups):
            ordered = rows.sort_values("size_percent")
            errors = figures.error_bars(ordered, "kept_percent", "low", "high")
            look = {
                "color": figures.OKABE_ITO[number % 5 if number % 8 > 5 else number % 8],
                "marker": markers[model],
                "linestyle": "-" if number % 2 == 0 else "--",
                "linewidth": 0.8,
            }
            size.errorbar(
                ordered["size_percent"],
                ordered["kept_percent"],
                yerr=errors,
                label=f"{model}: {system}",
                **look,
            )
            speed.errorbar(ordered["speed"], ordered["kept_percent"], yerr=errors, **look)
        size.invert_xaxis()
        size.set(xlabel="parameters or bytes left (%)", ylabel="score kept (% of the full model)")
        speed.set(xlabel="speed (times the full model)")
        for axes in (size, speed):
            axes.axhline(100, color="#aaaaaa", linewidth=0.8, marker="", zorder=0)
        figure.legend(loc="outside upper center", ncols=2, fontsize=6)
        caption = (
            "Score kept against the parameters that are left, embedding tables included, and against speed: "
            f"{data['model'].nunique()} models of {data['study'].nunique()} studies, 95 % intervals. Scores are those "
            "of each study (mean over embedding tasks, chrF++): curves of one model can be compared, levels of two "
            "can not. Speed is of encoding a batch, or of translating one."
        )
        return figures.publish(
            figure, "fig:claims-pareto", data=data, caption=caption, recorder=study.recorder
        )
