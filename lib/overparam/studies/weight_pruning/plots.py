"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.experiment import charts
from overparam.experiment.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, Look
from overparam.studies.weight_pruning.study import FLOOR, INVERTED, RANDOM, UNPRUNED, Quality, Study, Times

_METHODS = {
    "wanda_refit": Look(GREEN, "^", label="Wanda, refitted"),
    "sparsegpt": Look(ORANGE, "s", label="SparseGPT"),
    "wanda": Look(BLUE, "o", label="Wanda"),
    "magnitude": Look(PINK, "D", label="magnitude"),
    RANDOM: Look(GREY, "x", label="random"),
    INVERTED: Look(BLACK, "*", label="inverted"),
}
_KINDS = {
    **{name: _METHODS[name] for name in ("wanda_refit", "sparsegpt", "wanda", "magnitude")},
    "rounded": Look(SKY, "P", label="fewer bits"),
    "fewer layers": Look(YELLOW, "v", label="fewer layers"),
}


def plot_quality(study: Study, found: Quality) -> Any:
    """Draw what is kept by the share of zeros, for every method and control."""
    table = found.table
    free = table[(table["pattern"] == "") & ~table["system"].isin([UNPRUNED, FLOOR])]
    data = free[["system", "sparsity", "kept", "kept_low", "kept_high", "moved"]]
    drawn = data.assign(percent=100 * data["sparsity"])
    floor = table.loc[table["system"] == FLOOR, "kept"]
    caption = (
        f"What {study.params.model} keeps of {study.subject.metric} (%) when a share of its layers' weights is zero, "
        "without training, by how they are chosen; 95 % bootstrap interval, random over "
        f"{len(study.params.control_seeds)} seeds. Dashed: {study.params.margin:g} % lost. "
        + (
            "Less than −100 is not shown. "
            if study.decoder
            else "Dotted: a bag of words, which needs no model. "
        )
        + "Embeddings, head and norms are never pruned."
    )
    with charts.figure(study, "fig:weights-quality", data, caption=caption, legend=3) as axes:
        charts.curves(axes, drawn, "percent", "kept", by="system", look=_METHODS)
        charts.reference(axes, 100, line="-")
        charts.reference(axes, 100 - study.params.margin)
        axes.set(xlabel="weights of the layers that are zero (%)", ylabel="quality kept (%)")
        for level in floor:
            charts.reference(axes, level, FLOOR, line=":")
        axes.set_ylim(_lowest(drawn), 105)
    return axes.figure


def plot_bytes(study: Study, table: pd.DataFrame) -> Any:
    """Draw what is kept against the bytes that the layers take: zeros, fewer bits, fewer layers."""
    data = table[~table["kind"].str.endswith("2:4")].sort_values(["kind", "bytes_percent"])
    caption = (
        f"What {study.params.model} keeps of {study.subject.metric} (%) against the bytes of its layers' weights as "
        "stored, in percent of 16 bits a weight: zeros as the weights that stay and a bit for every place, rounded "
        "weights with the scales of their groups, or fewer layers. No training. 95 % bootstrap interval."
    )
    with charts.figure(study, "fig:weights-bytes", data, caption=caption, legend=3) as axes:
        charts.curves(axes, data, "bytes_percent", "kept", by="kind", look=_KINDS)
        charts.reference(axes, 100 - study.params.margin)
        axes.set(xlabel="bytes of the layers (% of 16 bits)", ylabel="quality kept (%)")
        axes.set_ylim(_lowest(data), 105)
    return axes.figure


def plot_calibration(study: Study, table: pd.DataFrame) -> Any:
    """Draw what each change of the calibration text changes; nothing if it was not measured."""
    if table.empty:
        return None
    caption = (
        f"What {study.params.model} keeps (%) at half of the weights by Wanda, when one thing about the text that "
        "weights are chosen by is changed; 95 % bootstrap interval."
    )
    with charts.figure(study, "fig:weights-calibration", table, caption=caption) as axes:
        charts.dots(axes, table, "change", "kept")
        axes.set(xlabel="quality kept (%)")
    return axes.figure


def plot_times(study: Study, found: Times) -> Any:
    """Draw how many times as fast as dense sparse products are."""
    data = found.products
    caption = (
        f"Time of a product with the largest matrix of {study.params.model} ({data['matrix'].iloc[0]}) stored as "
        "compressed sparse rows, against the dense one, by the share of zeros; interleaved rounds, 95 % interval."
    )
    with charts.figure(study, "fig:weights-products", data, caption=caption, legend=2) as axes:
        drawn = data.assign(percent=100 * data["sparsity"], series=data["tokens"].map(_tokens))
        charts.curves(axes, drawn, "percent", "times_as_fast", by="series")
        charts.reference(axes, 1, "as fast as dense")
        axes.set(xlabel="zeros (%)", ylabel="times as fast as dense", ylim=(0, None))
    return axes.figure


def _lowest(data: pd.DataFrame) -> float:
    """The lower end of the axis of quality: a perplexity may rise a thousandfold."""
    return max(-100.0, float(data["kept_low"].min()) - 3)


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"
