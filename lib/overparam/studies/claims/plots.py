"""The figures of the summary, each saved with its points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from overparam.experiment import charts
from overparam.publish import tables
from overparam.record import figures
from overparam.studies.claims.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "reproduced": figures.OKABE_ITO[2],
    "reproduced in direction": figures.OKABE_ITO[4],
    "not reproduced": figures.OKABE_ITO[1],
    "inconclusive": "#777777",
}
_SHOWN_DPI = 90  # in the notebook, which shows a figure a study; files have 300
_LINEAR = 10  # points or percent: up to here the axis is linear, beyond that logarithmic
_TICKS = (-100, -30, -10, -5, 0, 5, 10, 30, 100)
_WIDE = 2.1 * figures.WIDTH
_ROW, _LINE, _GAP = 0.17, 0.125, 0.09  # inches: row of a model, line of a statement, gap between claims
_STATEMENT, _MODEL = 2.75, 0.75  # inches: width of statements and of models' names
_LEAST = 50  # percent kept; settings that keep less are not drawn
_SLOWEST = 0.5  # times the full model's speed; slower settings are not drawn
_DARK = (*figures.OKABE_ITO[:6], figures.OKABE_ITO[7])  # without yellow, in which text is illegible
_APART = 0.058  # distance between two labels of curves, as a share of the axes' height


def plot_forests(study: Study, data: pd.DataFrame) -> Iterator[Any]:
    """Draw, for each study, the published point of each claim against the measured interval."""
    if data.empty:
        yield "no record answers a claim of the ledger with a number"
        return
    for name, rows in data.groupby("study", sort=False):
        yield _forest(study, str(name), rows.reset_index(drop=True))


def _forest(study: Study, name: str, rows: pd.DataFrame) -> Any:
    places, statements, height = _places(rows)
    caption = (
        f"{tables.title(name)}: published values (diamonds) and measured values (dots with 95 % interval), "
        "in points of a score of 100 or in percent of the full model; 0 is no change, proportional, or the goal. "
        "Bars: the margin of a rule about a loss or a gain. The axis is linear within ±10 and "
        "logarithmic beyond."
    )
    with figures.style():
        left, width, tall = _STATEMENT + _MODEL, _WIDE - _STATEMENT - _MODEL - 0.1, height + 0.68
        figure, axes = plt.subplots(figsize=(_WIDE, tall), layout="none", dpi=_SHOWN_DPI)
        axes.set_position((left / _WIDE, 0.42 / tall, width / _WIDE, height / tall))
        _draw_verdicts(axes, rows, places)
        end = max(115.0, 1.1 * float(rows[["low", "high"]].abs().to_numpy().max()))
        axes.set_xlim(-end, end)
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.0)
        axes.set_xticks(_TICKS, labels=[str(tick).replace("-", "−") for tick in _TICKS])
        axes.minorticks_off()
        axes.set_yticks(places, labels=rows["model"], fontsize=6.5)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(height, 0)
        for place, text in statements:
            across: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "zorder": 0}
            axes.plot(
                [-left / width, 1], [place - _GAP / 2] * 2, color="#dddddd", lw=0.6, marker="", **across
            )
            axes.annotate(
                text, (-left / width, place + 0.03), xycoords=("axes fraction", "data"), fontsize=6.5, va="top",
                linespacing=1.15, xytext=(3, 0), textcoords="offset points", annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel("points or percent (see each claim)", fontsize=7)
        figure.legend(loc="upper right", ncols=6, fontsize=6, handletextpad=0.3, columnspacing=1)
        identity = f"fig:claims-forest-{name.replace('_', '-')}"
        return figures.publish(figure, identity, data=rows, caption=caption, recorder=study.recorder)


def _places(rows: pd.DataFrame) -> tuple[list[float], list[tuple[float, str]], float]:
    """Positions of rows and of statements, and the total height, in inches from the top."""
    places, statements, top = [], [], _GAP / 2
    for _, group in rows.groupby("claim", sort=False):
        first = group.iloc[0]
        lines = textwrap.wrap(
            f"{first['statement'].replace('`', '')} ({first['unit']})", 58, break_on_hyphens=False
        )
        statements.append((top, "\n".join(lines)))
        places += [top + _ROW * (number + 0.5) for number in range(len(group))]
        top += max(_ROW * len(group), _LINE * len(lines)) + _GAP
    return places, statements, top


def _draw_verdicts(axes: Axes, rows: pd.DataFrame, places: list[float]) -> None:
    heights = np.array(places)
    for verdict, colour in COLOURS.items():
        these = (rows["verdict"] == verdict).to_numpy()
        if these.any():
            bars = charts.error_bars(rows[these], "value")
            look: dict[str, Any] = {"color": colour, "marker": "o", "linestyle": "", "label": verdict}
            axes.errorbar(rows["value"][these], heights[these], xerr=bars, **look)
    alone: dict[str, Any] = {"color": "black", "linestyle": ""}
    axes.plot(rows["published"], heights, marker="D", markerfacecolor="white", label="published", **alone)
    axes.plot(rows["bound"], heights, marker="|", markersize=7, label="margin of the rule", **alone)
    axes.axvline(0, color="#aaaaaa", linewidth=0.8, marker="", zorder=0)


def plot_pareto(study: Study, data: pd.DataFrame) -> Any:
    """Draw quality kept against size and against speed, over all studies."""
    if data.empty:
        return "no record has both a score and a cost of a compressed model"
    drawn = data[(data["kept_percent"] >= _LEAST) & (data["speed"] >= _SLOWEST)]
    caption = (
        "Score kept against size (remaining parameters with embedding tables; bytes for models of fewer bits) and "
        f"against speed: {data['model'].nunique()} models, {data['curve'].nunique()} ways to make them smaller. Lines "
        "with 95 % intervals join the settings that no other of their curve beats in both; others are pale dots. "
        "Scores are those of each study (mean over embedding tasks, chrF++, perplexity): curves of one model can be "
        "compared, levels of two cannot. Speed is for a batch of texts, or for a decoder's next token. "
        f"{len(data) - len(drawn)} settings that keep less than {_LEAST} % or run at less than {_SLOWEST:g} times the "
        "speed are not drawn."
    )
    with figures.style():
        figure, (size, speed) = plt.subplots(1, 2, sharey=True, figsize=(_WIDE, 2.9), layout="none")
        figure.subplots_adjust(left=0.065, right=0.835, bottom=0.13, top=0.97, wspace=0.5)
        for axes, cost in ((size, "size_percent"), (speed, "speed")):
            axes.axhline(100, color="#aaaaaa", linewidth=0.8, marker="", zorder=0)
            axes.set(xscale="log", ylim=(_LEAST - 2, 104))
            _draw_curves(axes, drawn, cost)
        size.invert_xaxis()
        size.set_xticks([100, 50, 20, 10, 5], labels=["100", "50", "20", "10", "5"])
        speed.set_xticks([0.5, 1, 2, 5, 10], labels=["0.5", "1", "2", "5", "10"])
        for axes in (size, speed):
            axes.minorticks_off()
        size.set(xlabel="size (% of the full model)", ylabel="score kept (% of the full model)")
        speed.set_xlabel("speed (times the full model)")
        return figures.publish(
            figure, "fig:claims-pareto", data=drawn, caption=caption, recorder=study.recorder
        )


def _draw_curves(axes: Axes, data: pd.DataFrame, cost: str) -> None:
    """Draw a line per model and method of compression, with one colour per method and one marker per model."""
    ends = []
    colours = dict(zip(data["curve"].unique(), _DARK * 3, strict=False))
    markers = dict(zip(data["model"].unique(), figures.MARKERS * 3, strict=False))
    for (curve, model), rows in data.groupby(["curve", "model"], sort=False):
        best = _unbeaten(rows, cost)
        if best.empty:  # neither the full model nor a smaller or faster one
            continue
        look: dict[str, Any] = {"color": colours[curve], "marker": markers[model]}
        others = rows.drop(index=best.index)
        axes.plot(others[cost], others["kept_percent"], linestyle="", alpha=0.25, markersize=2.5, **look)
        bars = charts.error_bars(best, "kept_percent")
        axes.errorbar(best[cost], best["kept_percent"], yerr=bars, **look)
        last = best.iloc[-1]
        ends.append((float(last[cost]), float(last["kept_percent"]), f"{model}, {curve}", colours[curve]))
    _label_curves(axes, ends)


def _unbeaten(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The full model, and the smaller or faster rows that no other row beats in both quality and cost."""
    smaller = cost == "size_percent"
    full = rows["size_percent"].eq(100) & rows["speed"].eq(1)
    gains = rows[full | (rows[cost] < 100 if smaller else rows[cost] > 1)].round({cost: 1})
    ordered = gains.sort_values([cost, "kept_percent"], ascending=[smaller, False])
    best = ordered["kept_percent"].cummax().shift(fill_value=-np.inf)
    return rows.loc[ordered.index[(ordered["kept_percent"] > best) | full[ordered.index]][::-1]]


def _label_curves(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write the names of curves, given their ends (x, y, name, colour), to the right without overlap."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: -end[1])
    heights = [(y - low) / (high - low) for _, y, _, _ in ends]
    for number in range(1, len(heights)):
        heights[number] = min(heights[number], heights[number - 1] - min(_APART, 1 / len(heights)))
    up = max(0.0, -heights[-1])  # where many names end below the axes
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        tie = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name, (x, y), xytext=(1.08, height + up), textcoords="axes fraction", color=colour, fontsize=6.5,
            va="center", annotation_clip=False, arrowprops={**tie, "relpos": (0, 0.5)},
        )  # fmt: skip
