"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator

from overparam.experiment import charts
from overparam.experiment.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, Look
from overparam.models import anatomy
from overparam.studies.anatomy.learning import TEST, TRAIN, predict
from overparam.studies.anatomy.study import Study
from overparam.studies.anatomy.tuning import BEFORE, EVERYWHERE, FULL, LORA, OTHER, OWN
from overparam.studies.anatomy.watch import ARRIVES, DIVERGES, OSCILLATES

_COLOURS = dict(
    zip(anatomy.COMPONENTS, (BLUE, GREY, ORANGE, GREEN, YELLOW, PINK, BLACK, SKY, "#BBBBBB"), strict=True)
)
_WAYS = {ARRIVES: Look(BLUE, "o"), OSCILLATES: Look(ORANGE, "s", "--"), DIVERGES: Look(PINK, "^", ":")}
_SHOWN = 25  # steps of gradient descent on two weights
_MISSED = 2.0  # %: a published total that is further off needs an explanation


def plot_counts(study: Study, counts: pd.DataFrame) -> Any:
    """Draw where the parameters of every published model sit, and how far off the published totals are."""
    shares = counts[["model", "total", "unexplained", "difference"]].copy()
    for part in anatomy.COMPONENTS:
        shares[part] = 100 * counts[part] / counts["total"]
    caption = (
        "Left: where the parameters are, in percent of all. A tied head has none of its own. Right: counted total ÷ "
        f"published total − 1; hollow: as published, filled: what is left after the explanation in the table; dotted: "
        f"± {study.params.within:g} %."
    )
    with charts.figure(
        study, "fig:anatomy-counts", shares, caption=caption, width=2, height=1.75, legend=5, ncols=2, sharey=True,
        gridspec_kw={"width_ratios": (2.2, 1)},
    ) as (left, right):  # fmt: skip
        place, start = np.arange(len(shares))[::-1], np.zeros(len(shares))
        for part in anatomy.COMPONENTS:
            left.barh(place, shares[part], left=start, color=_COLOURS[part], label=part, height=0.8)
            start += shares[part].to_numpy()
        names = [
            f"{name} ({_short(total)})" for name, total in zip(shares["model"], shares["total"], strict=True)
        ]
        left.set_yticks(place, names, fontsize=6)
        left.set(xlabel="share of the parameters (%)", xlim=(0, 100), ylim=(-0.7, len(shares) - 0.3))
        far = shares["difference"].abs() > _MISSED
        right.plot(
            shares["difference"][far],
            place[far],
            color=BLUE,
            marker="o",
            linestyle="",
            fillstyle="none",
            markersize=4,
        )
        right.plot(shares["unexplained"], place, color=BLUE, marker="o", linestyle="", markersize=3)
        for at, line in ((0, "-"), (study.params.within, ":"), (-study.params.within, ":")):
            charts.reference(right, at, line=line, upright=True)
        right.set_xlabel("counted against published (%)")
    return left.figure


def _short(total: float) -> str:
    unit, name = next((each for each in ((1e9, "B"), (1e6, "M")) if total >= each[0]), (1e3, "K"))
    return f"{total / unit:.3g} {name}"


def plot_active(study: Study, counts: pd.DataFrame) -> Any:
    """Draw total and active parameters of the mixtures, the active ones by all three definitions."""
    mixtures = counts[counts["active published"] != ""]
    if mixtures.empty:
        return None
    rows = []
    for row in mixtures.to_dict("records"):
        rows += [
            {"model": row["model"], "what": name, "share": 100 * row[f"active {name}"] / row["total"]}
            for name in anatomy.DEFINITIONS
        ]
        rows.append(
            {
                "model": row["model"],
                "what": "published",
                "share": 100 * _number(row["active published"]) / row["total"],
            }
        )
    data = pd.DataFrame(rows)
    caption = (
        "Parameters that a token uses, in percent of the total, by the three definitions that publishers use, and the "
        "published figure (cross)."
    )
    looks = {
        anatomy.BOTH: Look(BLUE, "o", ""),
        anatomy.NO_INPUT: Look(ORANGE, "s", ""),
        anatomy.NONE: Look(GREEN, "^", ""),
        "published": Look(BLACK, "x", ""),
    }
    with charts.figure(study, "fig:anatomy-active", data, caption=caption, legend=2, height=0.95) as axes:
        charts.dots(axes, data, "model", "share", by="what", look=looks)
        axes.set(xlabel="active share of the parameters (%)", xlim=(0, None))
    return axes.figure


def _number(text: str) -> float:
    from overparam.models import published

    return published.number(text)


def plot_card(study: Study, card: pd.DataFrame) -> Any:
    """Draw money and carbon of every training, with the ends of the assumptions."""
    data = card.sort_values("operations", ascending=False)
    caption = (
        "What trainings took, from 6·N·D and device hours (published where filled, else those of H100s), with the ends "
        f"of the assumptions: {study.params.price[0]:g} to {study.params.price[2]:g} dollars an hour, "
        f"{study.params.grid[0]:g} to {study.params.grid[2]:g} kg CO2e a kWh, utilisation "
        f"{study.params.utilisation[0]:.0%} to {study.params.utilisation[2]:.0%} where hours are computed. Dotted: "
        "10 million dollars; three cars over their lives, fuel included."
    )
    with charts.figure(
        study, "fig:anatomy-card", data, caption=caption, width=2, height=0.95, ncols=2, sharey=True
    ) as (left, right):
        for axes, name, at in ((left, "million dollars", 10), (right, "cars", 3)):
            for known, look in ((True, Look(BLUE, "o", "")), (False, Look(BLUE, "o", "", hollow=True))):
                own = data[data["hours published"] == known]
                charts.dots(axes, own, "model", name, look=look, order=list(data["model"]))
            charts.reference(axes, at, line=":", upright=True)
            axes.set_xscale("log")
        left.set_xlabel("cost of the devices (million dollars)")
        right.set_xlabel("CO2e (cars over their lives)")
    return left.figure


def plot_line(study: Study, line: pd.DataFrame) -> Any:
    """Draw the paths of two weights, by learning rate."""
    data = line[line["step"] <= _SHOWN]
    caption = (
        "Gradient descent on the weights a and b of y = a·x + b, whose best values are 2 and 1. Left: a, step by step. "
        "Right: the loss. The rate that diverges is above 2 ÷ the largest curvature."
    )
    with charts.figure(
        study, "fig:anatomy-line", data, caption=caption, legend=3, width=2, height=0.7, ncols=2
    ) as (left, right):
        for rate, rows in data.groupby("rate", sort=False):
            look = _WAYS[rows["behaviour"].iloc[0]]
            named = Look(
                look.colour, look.marker, look.line, label=f"rate {rate:g}: {rows['behaviour'].iloc[0]}"
            )
            charts.curves(left, rows, "step", "a", look=named)
            charts.curves(right, rows, "step", "loss", look=named)
        charts.reference(left, 2, line=":")
        left.set(xlabel="step", ylabel="weight a")
        right.set(xlabel="step", ylabel="loss", yscale="log")
    return left.figure


def plot_weight(study: Study, watched: dict[str, pd.DataFrame]) -> Any:
    """Draw one weight over training, and what setting weights to zero does to the loss."""
    path, changes = watched["path"], watched["zeroed"]
    sizes = changes["change"].abs().sort_values(ascending=False).to_numpy()
    part = 100 * sizes.cumsum() / max(sizes.sum(), 1e-300)
    size = _short(float(watched["parts"]["parameters"].iloc[0]))
    ranked = pd.DataFrame({"weights": 100 * np.arange(1, len(sizes) + 1) / len(sizes), "share": part})
    data = pd.concat([path.assign(panel="path"), ranked.assign(panel="zeroed")], ignore_index=True)
    caption = (
        f"A weight of a transformer with {size} parameters: its value (left) and its gradient (middle) "
        f"over {len(path)} steps of training. Right: {len(changes)} weights, set to zero one at a time: the share of "
        "all changes of the loss (their sizes) that the most important ones make; dotted: if all mattered equally."
    )
    with charts.figure(study, "fig:anatomy-weight", data, caption=caption, width=2, height=0.62, ncols=3) as (
        left,
        middle,
        right,
    ):
        charts.curves(left, path, "step", "value", look=Look(BLUE, ""))
        charts.curves(middle, path, "step", "gradient", look=Look(ORANGE, ""), linewidth=0.7)
        charts.reference(middle, 0, line="-")
        middle.set_yscale("symlog", linthresh=float(path["gradient"].abs().quantile(0.9)))
        middle.tick_params(axis="y", labelsize=6)
        charts.curves(right, ranked, "weights", "share", look=Look(GREEN, ""))
        charts.diagonal(right, 100)
        left.set(xlabel="step", ylabel="value")
        middle.set(xlabel="step", ylabel="gradient")
        right.set(
            xlabel="weights, most important first (%)",
            ylabel="of all changes (%)",
            xlim=(0, 100),
            ylim=(0, 102),
        )
    return left.figure


def plot_capacity(study: Study, capacity: pd.DataFrame) -> Any:
    """Draw the bits that models store for each parameter, by size."""
    if capacity.empty:
        return None
    caption = (
        f"Bits of random strings that a model stores for each of its parameters after {study.params.capacity_epochs} "
        f"epochs, when about {study.params.capacity_bits:g} are offered; 95 % bootstrap interval over strings, "
        "one seed. Grey: strings that it did not see, of which it is wrong with confidence (below 0). Dashed: "
        "published, for facts "
        "(2 bits, arXiv 2404.05405) and for random strings (3.6, arXiv 2505.24832)."
    )
    with charts.figure(
        study, "fig:anatomy-capacity", capacity, caption=caption, legend=2, height=0.85
    ) as axes:
        charts.curves(
            axes, capacity, "parameters", "per_parameter", look=Look(BLUE, "o", label="strings it saw")
        )
        charts.curves(
            axes, capacity, "parameters", "unseen", look=Look(GREY, "s", ":", label="strings it did not see")
        )
        for at, text in ((2, "facts, published"), (3.6, "strings, published")):
            charts.reference(axes, at, text)
        axes.set(xscale="log", xlabel="parameters", ylabel="bits stored a parameter")
        _sizes_as_ticks(axes, capacity["parameters"])
    return axes.figure


def _sizes_as_ticks(axes: Any, sizes: Any) -> None:
    """Write the sizes of models at a logarithmic axis, and no other ticks."""
    axes.set_xticks(list(sizes), [f"{size / 1000:.3g}k" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def plot_overfitting(study: Study, found: dict[str, pd.DataFrame]) -> Any:
    """Draw training and held-out loss over epochs, a panel a model."""
    curves = found["curves"]
    if curves.empty:
        return None
    data = curves.groupby(["parameters", "dropout", "epoch"], as_index=False)[[TRAIN, TEST]].mean()
    models: list[tuple[Any, pd.DataFrame]] = list(data.groupby(["dropout", "parameters"], sort=True))
    caption = (
        f"Loss over epochs on {study.params.corpus_bytes:,} bytes of text, mean of {len(study.params.seeds)} seed(s). "
        "Dotted: the epoch of early stopping, chosen on a third text. Double descent is not seen in such a range: at "
        "larger sizes or after more epochs, held-out loss may fall again."
    )
    with charts.figure(
        study, "fig:anatomy-overfitting", data, caption=caption, legend=2, width=2, height=0.62, ncols=len(models),
        sharey=True,
    ) as panels:  # fmt: skip
        for axes, (key, rows) in zip(np.atleast_1d(panels), models, strict=True):
            dropout, size = (float(each) for each in key)
            charts.curves(axes, rows, "epoch", TRAIN, look=Look(BLUE, "", label=TRAIN))
            charts.curves(axes, rows, "epoch", TEST, look=Look(ORANGE, "", "--", label=TEST))
            ends = found["ends"]
            own = ends[(ends["parameters"] == size) & (ends["dropout"] == dropout)]
            charts.reference(axes, float(own["best_epoch"].iloc[0]), line=":", upright=True)
            axes.annotate(
                f"{_short(size)} parameters" + (f"\ndropout {dropout:g}" if dropout else ""), (0.97, 0.97),
                xycoords="axes fraction", ha="right", va="top", fontsize=6,
            )  # fmt: skip
            axes.set_xlabel("epoch")
        np.atleast_1d(panels)[0].set_ylabel("loss (nats/byte)")
    return np.atleast_1d(panels)[0].figure


def plot_tuning(study: Study, tuning: pd.DataFrame) -> Any:
    """Draw what LoRA and full fine-tuning reach, and what they forget."""
    if tuning.empty:
        return None
    rows = []
    for row in tuning.to_dict("records"):
        for name, column in ((OTHER, "test"), (OWN, "own")):
            ends = {end: row[f"{column}_{end}"] for end in ("low", "high")}
            rows.append({"texts": name, "method": row["method"], "loss": row[column], **ends})
    data = pd.DataFrame(rows)
    caption = (
        f"Loss of {study.params.model} before and after fine-tuning on {study.params.tuning_pairs} pairs, on held-out "
        f"texts of that kind and on verses, which it knew before; 95 % bootstrap interval over "
        f"{int(tuning['texts'].max())} texts and {int(tuning['seeds'].max())} seed(s)."
    )
    looks = {
        BEFORE: Look(GREY, "D", ""),
        LORA: Look(BLUE, "o", ""),
        EVERYWHERE: Look(GREEN, "^", ""),
        FULL: Look(ORANGE, "s", ""),
    }
    with charts.figure(study, "fig:anatomy-tuning", data, caption=caption, legend=2, height=0.75) as axes:
        charts.dots(axes, data, "texts", "loss", by="method", look=looks, spread=0.15)
        axes.set_xlabel("loss (nats/token)")
        axes.set_ylim(-0.5, 1.5)
    return axes.figure


def plot_law(study: Study, law: dict[str, pd.DataFrame]) -> Any:
    """Draw the losses by size, the law that was fitted, and the largest model, which was held out."""
    points = law["points"]
    if points.empty:
        return None
    constants = law["fit"].set_index("constant")["value"]
    values = constants[["E", "A", "a", "B", "b"]].to_numpy(float)
    held = points["parameters"] == points["parameters"].max()
    grid = np.geomspace(points["parameters"].min(), points["parameters"].max(), 40)
    fitted = pd.DataFrame(
        {"parameters": grid, "bytes": seen, "loss": predict(values, grid, seen), "kind": "law"}
        for seen in points["bytes"].unique()
    ).explode(["parameters", "loss"])
    data = pd.concat([points.assign(kind=np.where(held, "held out", "fitted")), fitted], ignore_index=True)
    share = points["tables"].round()
    caption = (
        f"Held-out loss by size after {', '.join(f'{each / 1e6:.2g}' for each in points['bytes'].unique())} million "
        f"bytes of text, and the fitted law L = E + A/N^a + B/D^b; hollow: the largest model, which was not fitted. "
        f"Fewer than two decades of sizes, of which embedding tables are {share.min():.0f} to {share.max():.0f} %, one "
        "seed: E is hardly identified."
    )
    with charts.figure(study, "fig:anatomy-law", data, caption=caption, legend=3, height=0.9) as axes:
        looks = charts.looks(points["bytes"].unique())
        for seen, look in looks.items():
            text = f"{seen / 1e6:.2g} M bytes"
            own, line = (table[table["bytes"] == seen] for table in (points, fitted))
            axes.plot(
                line["parameters"].astype(float), line["loss"].astype(float), color=look.colour, marker=""
            )
            for part, hollow in ((own[~held.loc[own.index]], False), (own[held.loc[own.index]], True)):
                drawn = Look(look.colour, look.marker, "", hollow, None if hollow else text)
                charts.curves(axes, part[["parameters", "loss"]], "parameters", "loss", look=drawn)
        axes.set(xscale="log", xlabel="parameters", ylabel="loss (nats/byte)")
        _sizes_as_ticks(axes, points["parameters"].unique())
    return axes.figure


def plot_routing(study: Study, routing: pd.DataFrame) -> Any:
    """Draw the experts of every token of the sentence, a panel a layer."""
    layers, experts = sorted(routing["layer"].unique()), int(routing["experts"].max())
    tokens = routing.drop_duplicates("position").sort_values("position")
    top_k = int(routing.groupby(["layer", "position"]).size().max())
    one = routing.iloc[0]
    caption = (
        f"Experts that {study.params.model} uses for each token of a sentence: {top_k} of {experts} in every layer, "
        f"darker: a larger gate. A token multiplies by {one['active_expert_parameters']:,} of "
        f"{one['expert_parameters']:,} parameters of experts, {one['active'] / one['total']:.0%} of all parameters are "
        "active; all of them are kept in memory."
    )
    shown = charts.figure(
        study, "fig:anatomy-routing", routing, caption=caption, width=2, height=0.15 + 0.055 * len(tokens) / 2 + 0.35,
        ncols=len(layers), sharey=True,
    )  # fmt: skip
    with shown as panels:
        for axes, layer in zip(np.atleast_1d(panels), layers, strict=True):
            grid = np.zeros((len(tokens), experts))
            own = routing[routing["layer"] == layer]
            grid[own["position"], own["expert"]] = own["gate"]
            axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xlabel(f"expert, layer {layer + 1}", fontsize=6)
            axes.set_xticks([0, experts - 1], ["1", str(experts)], fontsize=6)
        np.atleast_1d(panels)[0].set_yticks(range(len(tokens)), list(tokens["token"]), fontsize=5)
    return np.atleast_1d(panels)[0].figure
