"""What the figures of all studies have in common; each is drawn from a table and saved with the points that it shows.

`figure` opens and saves; the other functions draw into its axes: `curves`, `dots`, `heatmap`, `front` with
`label_points`, `reference` for margins and published levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from overparam.record import figures
from overparam.record.record import Recorder

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = figures.OKABE_ITO[:6]
GREY, BLACK = "#777777", "#000000"


class Recorded(Protocol):
    """A study with a running record."""

    @property
    def recorder(self) -> Recorder:
        """Its record."""


@dataclass(frozen=True)
class Look:
    """How one series is drawn; without a line it is points alone, without a label its key is in the legend."""

    colour: str = BLUE
    marker: str = "o"
    line: str = "-"
    hollow: bool = False
    label: str | None = None


def looks(keys: Iterable[Any], **same: Any) -> dict[Any, Look]:
    """Give each series a colour and a marker of its own; `same` are fields that all have."""
    colours, markers = figures.OKABE_ITO, figures.MARKERS
    return {
        key: Look(colours[i % 8], markers[i % 8], **{"hollow": i >= 8, **same})
        for i, key in enumerate(dict.fromkeys(keys))
    }


@contextmanager
def figure(
    study: Recorded,
    id: str,
    table: pd.DataFrame,
    *,
    caption: str,
    legend: int = 0,
    height: float | None = None,
    width: float = 1.0,
    **subplots: Any,
) -> Iterator[Any]:
    """Open axes in the suite's style; afterwards save the figure and the table of its points in the record.

    Args:
        study: Whose record it is.
        id: Stable id such as ``fig:layers-cost``.
        table: Exactly the points that are drawn.
        caption: What a reader needs to know to read it.
        legend: Columns of the legend above the axes, where each label stands once; 0: no legend.
        height: In columns' widths; enough for the legend by default.
        width: In columns' widths.
        subplots: What `plt.subplots` takes besides, such as the numbers of rows and columns.
    """
    size = (width * figures.WIDTH, (height or (0.85 if legend else 0.68)) * figures.WIDTH)
    with figures.style():
        drawn, axes = plt.subplots(figsize=size, **subplots)
        try:
            yield axes
            if legend:
                _legend(drawn, legend)
            figures.publish(drawn, id, data=table, caption=caption, recorder=study.recorder)
        finally:
            plt.close(drawn)


def _legend(drawn: Figure, columns: int) -> None:
    """A legend above the axes, where it hides no point."""
    handles: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    drawn.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=columns,
        fontsize=6,
        handlelength=1.4,
        columnspacing=1,
    )


def curves(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    by: str | list[str] | None = None,
    look: Look | Mapping[Any, Look] | None = None,
    band: bool = False,
    **line: Any,
) -> None:
    """Draw a line for each series, with its interval where the table has one: ``<y>_low``, or ``low``.

    Args:
        axes: Where.
        table: Rows in the order in which they are joined.
        x: Column.
        y: Column.
        by: Column, or columns, that tell the series apart; None: there is one.
        look: Of each series, in the legend's order; those that are not in it are not drawn. By default, `looks`.
            Of the only series, one look.
        band: Draw the interval as a band, not as bars.
        line: What `Axes.errorbar` takes besides.
    """
    for label, rows, each in _series(table, by, look):
        _draw(axes, rows[x], rows[y], each, label, band=band, vertical=error_bars(rows, y), **line)


def dots(
    axes: Axes,
    table: pd.DataFrame,
    name: str,
    value: str,
    *,
    by: str | None = None,
    look: Look | Mapping[Any, Look] | None = None,
    order: Iterable[str] = (),
    spread: float = 0.0,
    **mark: Any,
) -> None:
    """Draw a row for each name, from the top down, with a point and its interval for each series.

    Args:
        axes: Where.
        table: A row for each name and series.
        name: Column of the rows' names.
        value: Column; its interval is that of `curves`.
        by: Column that tells the series apart.
        look: As in `curves`.
        order: Names from the top down; by default as in the table.
        spread: Distance between two series within a row, in rows.
        mark: What `Axes.errorbar` takes besides.
    """
    names = list(order) or list(dict.fromkeys(table[name]))
    place = {each: len(names) - 1 - number for number, each in enumerate(names)}
    drawn = list(_series(table[table[name].isin(names)], by, look))
    for number, (label, rows, each) in enumerate(drawn):
        at = rows[name].map(place) - spread * (number - (len(drawn) - 1) / 2)
        _draw(axes, rows[value], at, each, label, horizontal=error_bars(rows, value), linestyle="", **mark)
    axes.set_yticks(list(place.values()), names, fontsize=6)


def _series(
    table: pd.DataFrame, by: str | list[str] | None, look: Look | Mapping[Any, Look] | None
) -> Iterator[tuple[str | None, pd.DataFrame, Look]]:
    """Label, rows and look of each series that has rows."""
    if by is None or isinstance(look, Look):
        one = look if isinstance(look, Look) else Look()
        yield one.label, table, one
        return
    groups: dict[Any, pd.DataFrame] = dict(list(table.groupby(by, sort=False)))
    for key, each in (look or looks(groups)).items():
        if key in groups:
            yield str(key) if each.label is None else each.label, groups[key], each


def _draw(
    axes: Axes,
    x: Any,
    y: Any,
    look: Look,
    label: str | None,
    *,
    vertical: NDArray[np.float64] | None = None,
    horizontal: NDArray[np.float64] | None = None,
    band: bool = False,
    **line: Any,
) -> None:
    style = {
        "color": look.colour,
        "marker": look.marker,
        "linestyle": look.line,
        "fillstyle": "none" if look.hollow else "full",
        "markersize": 4.5 if look.hollow else 3.5,
        "label": label,
        **line,
    }
    if band and vertical is not None:
        axes.fill_between(x, y - vertical[0], y + vertical[1], color=look.colour, alpha=0.18, linewidth=0)
        vertical = None
    axes.errorbar(x, y, yerr=vertical, xerr=horizontal, **style)


def error_bars(rows: pd.DataFrame, name: str) -> NDArray[np.float64] | None:
    """Lengths of the bars of a column's interval for `Axes.errorbar`, [2, rows]; an end that is not bounded has none.

    The ends are the columns ``<name>_low`` and ``<name>_high``, or else ``low`` and ``high``; None where no row has
    an interval.
    """
    columns = next(
        (pair for pair in ([f"{name}_low", f"{name}_high"], ["low", "high"]) if set(pair) <= set(rows)), []
    )
    if not columns or rows[columns].isna().all(axis=None):
        return None
    lengths = np.abs(rows[columns].to_numpy(float).T - rows[name].to_numpy(float))
    return np.where(np.isfinite(lengths), lengths, 0.0)


def reference(axes: Axes, at: float, label: str = "", *, line: str = "--", upright: bool = False) -> None:
    """Draw a grey level across the axes: a margin, a goal, no change; its label stands at the right end."""
    (axes.axvline if upright else axes.axhline)(at, color=GREY, linestyle=line, linewidth=0.8, marker="")
    if label:
        axes.annotate(
            label,
            (1, at),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, -2),
            textcoords="offset points",
            color=GREY,
            fontsize=6,
            ha="right",
            va="top",
        )


def diagonal(axes: Axes, end: float, label: str | None = None) -> None:
    """Draw the dotted line from the origin on which x and y are equal."""
    axes.plot([0, end], [0, end], color=GREY, linestyle=":", linewidth=0.8, marker="", label=label)


def heatmap(axes: Axes, grid: pd.DataFrame, label: str, *, colours: str = "viridis", **options: Any) -> None:
    """Draw a table as colours; `label` is what they mean, `options` what `seaborn.heatmap` takes besides."""
    import seaborn as sns

    look = {"cbar_kws": {"label": label}, "rasterized": True, "annot_kws": {"size": 5.5}, **options}
    sns.heatmap(grid, ax=axes, cmap=colours, **look)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(labelsize=6)


def relative(costs: pd.DataFrame, full: pd.Series, x: pd.Series, **columns: str) -> pd.DataFrame:
    """Costs in percent of the full model's.

    Args:
        costs: A row a model.
        full: The full model's row.
        x: What they are drawn against; its name is that of the first column.
        columns: Name in the legend, with _ for a blank -> column of the costs.

    Returns:
        A row a model, sorted by `x`: its column, and one a cost.
    """
    parts = {name.replace("_", " "): 100 * costs[column] / full[column] for name, column in columns.items()}
    return pd.DataFrame({str(x.name): x, **parts}).sort_values(str(x.name))


def wide_curves(axes: Axes, table: pd.DataFrame) -> None:
    """Draw every column but the first against the first."""
    x, *names = map(str, table.columns)
    curves(axes, table.melt(x, names, var_name="series", value_name="of full"), x, "of full", by="series")


def on_front(size: pd.Series, kept: pd.Series) -> list[bool]:
    """Tell which systems no other beats: none keeps more and is no larger, or is smaller and keeps no less."""
    return [
        not (((size <= own) & (kept > share)) | ((size < own) & (kept >= share))).any()
        for own, share in zip(size, kept, strict=True)
    ]


def front(axes: Axes, table: pd.DataFrame, x: str, y: str, on: str) -> None:
    """Join the systems that no other beats, those whose column `on` is true, by a dotted step line."""
    best = table[table[on]].sort_values(x)
    axes.step(best[x], best[y], where="post", color=GREY, marker="", linewidth=0.8, linestyle=":")


def label_points(axes: Axes, table: pd.DataFrame, x: str, y: str, text: str, colours: Sequence[str]) -> None:
    """Write a text beside each point of a table, where it hides as little as possible.

    Args:
        axes: With its final limits and scales.
        table: A row a point; the intervals of `y` are kept clear too.
        x: Column.
        y: Column.
        text: Column of the labels.
        colours: Of the labels, one a row.
    """
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()  # the layout is computed when a figure is drawn
    reach = 3 * drawn.dpi / 72
    at, bars = table[[x, y]].to_numpy(float), error_bars(table, y)
    lengths = np.zeros((2, len(table))) if bars is None else bars
    low, high = (
        axes.transData.transform(at + [[0, sign]] * lengths[[end]].T) for end, sign in ((0, -1), (1, 1))
    )
    taken = [Bbox([bottom - reach, top + reach]) for bottom, top in zip(low, high, strict=True)]
    for number, (place, words, colour) in enumerate(zip(at, table[text], colours, strict=True)):
        written = axes.annotate(
            words,
            (place[0], place[1]),
            xytext=(0, 0),
            textcoords="offset points",
            color=colour,
            fontsize=5.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
        )
        written.set_in_layout(False)
        others = [box for other, box in enumerate(taken) if other != number]
        costs = [(_hidden(_moved(written, offset), others, axes), offset) for offset in _PLACES]
        best = min(costs, key=lambda each: each[0])[1]  # the first, and so the nearest, of equal ones
        taken.append(_moved(written, best))


def label_ends(axes: Axes, ends: pd.DataFrame, x: str, y: str, text: str, colours: Mapping[str, str]) -> None:
    """Write the name of each line into a column right of the axes, joined to the line's end.

    Args:
        axes: With its final limits.
        ends: A row a line.
        x: Column of its end.
        y: Column of its end.
        text: Column of the names.
        colours: By name.
    """
    bottom, top = axes.get_ylim()
    gap, rows = 0.07 * (top - bottom), ends.sort_values(y)
    places = rows[y].to_numpy(float, copy=True)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    highest = top - gap * (np.arange(len(places))[::-1] + 0.5)
    for end, place in zip(rows.to_dict("records"), np.minimum(places, highest), strict=True):
        colour = colours[end[text]]
        axes.annotate(
            end[text],
            (end[x], end[y]),
            xytext=(1.04, place),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontsize=6,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.4,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


_PLACES = [  # (right, up) of a label from its point, in points of type
    (distance * right, distance * up)
    for distance in (5, 9, 14, 20, 28, 38, 50)
    for right, up in ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
]


def _moved(written: Annotation, place: tuple[int, int]) -> Bbox:
    """Move a label to a place, and return what it covers."""
    written.set(ha="center" if not place[0] else "left" if place[0] > 0 else "right")
    written.xyann = place
    written.get_window_extent()  # moves it
    return Text.get_window_extent(written)  # without its line to the point


def _hidden(box: Bbox, others: Iterable[Bbox], axes: Axes) -> float:
    """How many pixels of others a label hides; many more where it leaves the axes."""
    inside = Bbox.intersection(box, axes.bbox)
    outside = inside is None or inside.width * inside.height < 0.999 * box.width * box.height
    shared = [both for other in others if (both := Bbox.intersection(box, other)) is not None]
    return sum(both.width * both.height for both in shared) + 1e6 * outside
