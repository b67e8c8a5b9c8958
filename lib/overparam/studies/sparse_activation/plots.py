"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from overparam.evaluate import equal_loss
from overparam.experiment import charts
from overparam.experiment.charts import BLUE, GREEN, GREY, ORANGE, PINK, SKY, Look
from overparam.studies.sparse_activation import ACTIVE, MIXTURE, RANDOM, TOTAL, UPCYCLED
from overparam.studies.sparse_activation.inference import ALL, AS_TRAINED, AT_RANDOM, DOWN, LARGEST, SMALLEST
from overparam.studies.sparse_activation.study import Study

LOOKS = {
    ACTIVE: Look(BLUE, "o"),
    MIXTURE: Look(ORANGE, "s"),
    TOTAL: Look(GREEN, "^"),
    RANDOM: Look(PINK, "D", "--"),
    UPCYCLED: Look(SKY, "v", ":"),
}
AXES = {
    "tokens": "training tokens",
    "flops": "training operations",
    "seconds": "training time (s, two cores)",
    "megabytes": "size of the weights (MB)",
}
_LOOK_OF_COST = {"tokens": ":", "flops": "-", "seconds": "--"}
_PARTS = 4  # of a training, after which losses are drawn against bytes


def plot_curves(study: Study, curves: pd.DataFrame, live: pd.DataFrame) -> Any:
    """Draw held-out loss against each cost: four curves a model."""
    data = _over_seeds(curves)
    seeds = curves["seed"].nunique()
    committed = study.params.committed_curves
    beside = _over_seeds(live) if committed else data.iloc[:0]
    table = pd.concat([data.assign(run="judged"), beside.assign(run="this run")], ignore_index=True)
    caption = (
        f"Held-out loss (mean over {len(study.params.kinds)} kinds of text) against what training it took, and, below "
        f"right, against the bytes of the weights after equal tokens (grey: models trained on equally many). Mean of "
        f"{seeds} seed{'s' if seeds > 1 else ''}; band: 95 % interval (Student)."
        + (" Without markers: the curves of this run." if committed else "")
    )
    with charts.figure(
        study,
        "fig:sparse-curves",
        table,
        caption=caption,
        legend=3,
        width=2,
        height=1.5,
        nrows=2,
        ncols=2,
        sharey=True,
    ) as panels:
        for axes, cost in zip(panels.flat, AXES, strict=True):
            if cost == "megabytes":
                _draw_bytes(axes, data)
            else:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.xaxis.set_minor_formatter(NullFormatter())
                charts.curves(axes, data, cost, "loss", by="arm", look=LOOKS, band=True)
                charts.curves(axes, beside, cost, "loss", by="arm", look=LOOKS, marker="", alpha=0.6)
            axes.set_xlabel(AXES[cost])
        for axes in panels[:, 0]:
            axes.set_ylabel("loss (nats/token)")
    return panels.flat[0].figure


def _draw_bytes(axes: Any, data: pd.DataFrame) -> None:
    """Points of equal tokens, joined from the smallest dense model over the mixture to the largest."""
    last = int(data["step"].max())
    for part in range(1, _PARTS + 1):
        at = data.loc[(data["step"] - last * part / _PARTS).abs().groupby(data["arm"]).idxmin()]
        dense = at[at["arm"].isin([ACTIVE, TOTAL])].sort_values("megabytes")
        axes.plot(dense["megabytes"], dense["loss"], color=GREY, linewidth=0.8, marker="")
        axes.annotate(
            f"{dense['tokens'].iloc[-1] / 1e6:.2g}M tokens", (dense["megabytes"].iloc[-1], dense["loss"].iloc[-1]),
            xytext=(-3, 5), textcoords="offset points", fontsize=6, color=GREY, ha="right",
        )  # fmt: skip
        at = at[["arm", "megabytes", "loss"]]  # intervals would hide each other
        charts.curves(axes, at, "megabytes", "loss", by="arm", look={k: _points(v) for k, v in LOOKS.items()})


def _points(look: Look) -> Look:
    return Look(look.colour, look.marker, "")


def _over_seeds(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval of the loss over seeds, by model and step."""
    rows = []
    for (arm, step), group in curves.groupby(["arm", "step"], sort=False):
        means = {name: float(group[name].mean()) for name in ("tokens", "flops", "seconds")}
        means["megabytes"] = float(group["bytes"].iloc[0]) / 1e6
        rows.append({"arm": arm, "step": step, **means, **equal_loss.mean(group["loss"]).columns("loss")})
    return pd.DataFrame(rows)


def _bounded(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Without the intervals that are open on one side: a bar would look closed."""
    ends = [f"{name}_low", f"{name}_high"]
    closed = np.isfinite(table[ends].to_numpy(float)).all(axis=1)
    return table.assign(**{end: table[end].where(closed) for end in ends})


def plot_savings(study: Study, savings: pd.DataFrame) -> Any:
    """Draw what the mixture saves at equal loss, by loss, against both dense models."""
    data = _bounded(savings[savings["cost"].isin(_LOOK_OF_COST)], "saved")
    caption = (
        "What the mixture saves of a dense model's training cost until both have the same held-out loss; 0: as much as "
        "the dense model. Training goes from left to right; losses that one of the curves does not reach are left out. "
        f"Bars: 95 % interval over {int(savings['seeds'].max())} seeds at the lowest loss that both reach."
    )
    with charts.figure(
        study, "fig:sparse-savings", data, caption=caption, legend=3, width=2, height=0.85, ncols=2
    ) as panels:
        for axes, base in zip(panels, (ACTIVE, TOTAL), strict=True):
            for cost, line in _LOOK_OF_COST.items():
                own = data[(data["base"] == base) & (data["cost"] == cost)]
                colour = {"tokens": GREY, "flops": ORANGE, "seconds": BLUE}[cost]
                look = Look(colour, "", line, label={"flops": "operations"}.get(cost, cost))
                charts.curves(axes, own[["loss", "saved"]], "loss", "saved", look=look)
                end = own[own["lowest"]]
                charts.curves(axes, end, "loss", "saved", look=Look(colour, "o", ""))
            charts.reference(axes, 0, line="-")
            charts.reference(axes, study.params.saving, "claimed")
            axes.invert_xaxis()
            axes.set(xlabel="loss (nats/token)", ylabel=f"saved (% of {base})")
    return panels[0].figure


def plot_kinds(study: Study, final: pd.DataFrame) -> Any:
    """Draw how far every model ends above the mixture, by kind of text."""
    data = _bounded(final[final["arm"] != MIXTURE], "above")
    caption = (
        "Held-out loss at the end of training, above (worse, right) or below the mixture's, paired by seed; 95 % "
        f"interval (Student) over {int(final['seeds'].max())} seeds."
    )
    with charts.figure(study, "fig:sparse-kinds", data, caption=caption, legend=2, height=1.1) as axes:
        charts.reference(axes, 0, line="-", upright=True)
        charts.dots(
            axes, data, "kind", "above", by="arm", look={k: _points(v) for k, v in LOOKS.items()}, spread=0.17
        )
        axes.set_xlabel("loss above the mixture's (nats/token)")
    return axes.figure


def plot_routing(study: Study, routing: pd.DataFrame) -> Any:
    """Draw what disturbed routing costs a trained mixture."""
    data = routing[routing["system"] != AS_TRAINED]
    caption = (
        f"Rise of the loss of {study.params.routed_model} on {int(data['verses'].max())} held-out verses (English to "
        f"French) when a token uses another number of experts, when experts are shuffled within each layer, or when "
        f"routers are random ({len(study.params.control_seeds)} seeds each); 95 % bootstrap interval over verses."
    )
    with charts.figure(study, "fig:sparse-routing", data, caption=caption, height=0.6) as axes:
        charts.reference(axes, 0, line="-", upright=True)
        charts.dots(axes, data, "system", "lost", look=Look(BLUE, "o"))
        axes.set_xlabel("rise of the loss (nats/token)")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.margins(x=0.1)
    return axes.figure


def plot_activations(study: Study, activations: pd.DataFrame, decoding: pd.DataFrame) -> Any:
    """Draw what zeros in the inputs of matrices cost in perplexity, and what they save of the time of a token."""
    data = pd.concat([activations.assign(panel="quality"), decoding.assign(panel="time")], ignore_index=True)
    if data.empty:
        return None
    looks = {
        (SMALLEST, ALL): Look(BLUE, "o", label="smallest, all matrices (TEAL)"),
        (SMALLEST, DOWN): Look(SKY, "v", label="smallest, down_proj"),
        (AT_RANDOM, ALL): Look(GREY, "D", "--", label="random, all matrices"),
        (LARGEST, ALL): Look(PINK, "X", ":", label="largest, all matrices"),
    }
    caption = (
        f"{study.params.model}, inputs of matrices set to zero. Left: rise of the perplexity on "
        f"{int(activations['texts'].max())} {study.params.test_kind} texts, thresholds from "
        f"{study.params.calibration_kind}; 95 % bootstrap interval over texts; dotted: the margin. Right: how many "
        f"times as fast one token is in {decoding['dtype'].iloc[0]} when zeros are left out: the products alone, and a "
        "whole token by Amdahl's law; 95 % interval over rounds."
    )
    with charts.figure(
        study, "fig:sparse-activations", data, caption=caption, legend=3, width=2, height=0.95, ncols=2
    ) as (left, right):
        percent = activations.assign(zeros=100 * activations["share"])
        charts.curves(left, percent, "zeros", "worse", by=["choice", "part"], look=looks)
        charts.reference(left, study.params.margin, line=":")
        left.set(
            yscale="symlog",
            ylim=(0, None),
            xlabel="inputs set to zero (%)",
            ylabel="rise of the perplexity (%)",
        )
        times = decoding.assign(zeros=100 * decoding["share"])
        for part, colour, marker in ((ALL, ORANGE, "s"), (DOWN, GREEN, "^")):
            own = times[times["part"] == part]
            charts.curves(
                right, own, "zeros", "product", look=Look(colour, marker, "--", label=f"products, {part}")
            )
            charts.curves(
                right, own, "zeros", "token", look=Look(colour, marker, "-", label=f"token, {part}")
            )
        charts.reference(right, 1, line=":")
        right.set(xlabel="inputs set to zero (%)", ylabel="times as fast as dense")
        for axes in (left, right):
            axes.set_xticks(percent["zeros"].unique())
    return left.figure
