"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.experiment import charts
from overparam.experiment.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, Look
from overparam.record import ledger
from overparam.studies.adaptive_depth import FULL, LABELS
from overparam.studies.adaptive_depth.bounds import FIXED, METHOD, ORACLE, RANDOM, RISK, RULE, SHUFFLED
from overparam.studies.adaptive_depth.retrieval import CALM
from overparam.studies.adaptive_depth.study import Study
from overparam.studies.adaptive_depth.timing import CALIBRATED, ONE, OPENVINO, REGROUPED, TORCH, WAITING

SYSTEMS = {
    "probability": Look(BLUE, "o"),
    "margin": Look(SKY, "s", label="margin"),
    "entropy": Look(GREEN, "^"),
    "patience": Look(PINK, "D"),
    "learned": Look(YELLOW, "v"),
    FIXED: Look(BLACK, "o", "--", hollow=True),
    RANDOM: Look(GREY, "", "-"),
    SHUFFLED: Look(GREY, "", ":"),
    ORACLE: Look(ORANGE, "P", ""),
}
_AXIS = "layers saved (%)"


def _short(name: str) -> str:
    model, comma, rest = name.partition(", ")
    return ledger.model_name(model) + comma + rest


def _name(axes: Any, name: str) -> None:
    """Write a panel's name above it."""
    axes.annotate(name, (0.5, 1.02), xycoords="axes fraction", ha="center", fontsize=7)


def plot_depths(study: Study, depths: pd.DataFrame) -> Any:
    """Draw the accuracy of the exits by depth: a panel a task."""
    tasks = list(study.params.tasks)
    data = depths.assign(share=100 * depths["depth"] / depths["layers"])
    data["series"] = [
        f"{_short(encoder)}{' (distilled)' if teaching == FULL else ''}"
        for encoder, teaching in zip(data["encoder"], data["teaching"], strict=True)
    ]
    colours = dict(zip(dict.fromkeys(data["encoder"]), (BLUE, ORANGE, GREEN), strict=False))
    looks = {}
    for encoder, colour in colours.items():
        looks[_short(encoder)] = Look(colour, "o")
        looks[f"{_short(encoder)} (distilled)"] = Look(colour, "s", ":", hollow=True)
    caption = (
        f"Accuracy of a linear exit after each layer on {int(data['texts'].max())} test texts, trained on labels, or "
        "on the full model's probabilities (distilled; the last exit is the same). "
        "Bars: 95 % bootstrap interval over texts."
    )
    with charts.figure(
        study,
        "fig:exits-depths",
        data,
        caption=caption,
        legend=2,
        width=2,
        height=0.9,
        ncols=len(tasks),
        squeeze=False,
    ) as panels:
        for axes, task in zip(panels[0], tasks, strict=True):
            own = data[data["task"] == task]
            charts.curves(axes, own[own["teaching"] == LABELS], "share", "accuracy", by="series", look=looks)
            distilled = own[own["teaching"] == FULL].drop(columns=["accuracy_low", "accuracy_high"])
            charts.curves(axes, distilled, "share", "accuracy", by="series", look=looks)
            axes.set(xlabel="depth (% of the layers)")
            _name(axes, task)
        panels[0][0].set_ylabel("accuracy (%)")
    return panels[0][0].figure


def plot_curves(study: Study, curves: pd.DataFrame, controls: pd.DataFrame) -> Any:
    """Draw what leaving early loses against the layers that it saves: rules and controls, a panel a task."""
    tasks = list(study.params.tasks)
    caption = (
        f"Exits of {_short(study.params.model)}: texts that become wrong ({RISK}: right at full depth, wrong at the "
        "exit) against the layers saved, over all thresholds, in percent of the pool. Black: all texts leave at "
        f"one depth. Grey: as many texts leave at each exit as by the rule {RULE!r}, but at random (line), or "
        "confidences are shuffled among texts (dotted). Plus: the oracle, which leaves as soon as nothing is lost. "
        f"Dashed level: {study.params.alpha:.0%}. Cross: the calibrated threshold, on the test half."
    )
    with charts.figure(
        study, "fig:exits-controls", curves, caption=caption, legend=3, width=2, height=1.0, ncols=len(tasks),
        squeeze=False,
    ) as panels:  # fmt: skip
        for axes, task in zip(panels[0], tasks, strict=True):
            own = curves[curves["task"] == task].sort_values(["system", "saved"])
            charts.curves(axes, own, "saved", "lost", by="system", look=SYSTEMS, markersize=2.5)
            at = controls[controls["task"] == task]
            axes.plot(
                at["saved"], at["lost"], color="#D00000", marker="x", linestyle="", markersize=6, zorder=5,
                clip_on=False, label="calibrated",
            )  # fmt: skip
            charts.reference(axes, 100 * study.params.alpha)
            axes.set_yscale("symlog", linthresh=1)
            axes.set(xlabel=_AXIS, xlim=(-2, 100), ylim=(-0.08, None))
            axes.set_yticks([0, 1, 10], ["0", "1", "10"])
            _name(axes, task)
        panels[0][0].set_ylabel("newly wrong (% of the texts)")
    return panels[0][0].figure


def plot_bound(study: Study, saved: pd.DataFrame) -> Any:
    """Draw that the bounds hold, and what they allow to be saved: by a rule, and by one depth for all texts."""
    params = study.params
    data = saved[
        (saved["encoder"] == params.model) & (saved["teaching"] == LABELS) & (saved["risk_of"] == RISK)
        & saved["rule"].isin([RULE, FIXED])
    ]  # fmt: skip
    data = data.assign(
        percent=100 * data["alpha"],
        method=data["method"].replace({"crc": "risk control", "ltt": "Learn-then-Test"}),
    )
    data["series"] = data["method"] + ", " + data["rule"]
    looks = {
        f"risk control, {RULE}": Look(BLUE, "o"),
        f"Learn-then-Test, {RULE}": Look(ORANGE, "s"),
        f"risk control, {FIXED}": Look(BLUE, "o", "--", hollow=True),
        f"Learn-then-Test, {FIXED}": Look(ORANGE, "s", "--", hollow=True),
    }
    caption = (
        f"{_short(params.model)}, mean over tasks and {params.resplits} resplits of the pool. Left: layers saved. "
        "Middle: mean risk on the test half; risk control keeps it below alpha (dotted). Right: how often the "
        f"risk is above alpha with the rule {RULE!r}: on the test half of a resplit (solid), which has noise of its "
        "own, and in the pool, when calibrations are drawn from it (dotted). Learn-then-Test keeps that below delta "
        f"(dashed, {params.delta:.0%}); risk control bounds the mean only."
    )
    names = ["saved", "risk", "above", "drawn_above"]
    points = data.groupby(["series", "percent"], sort=False)[names].mean().reset_index()
    by_rule = points[points["series"].str.endswith(RULE)]
    drawn = {name: Look(look.colour, look.marker, ":", hollow=True, label="") for name, look in looks.items()}
    with charts.figure(
        study, "fig:exits-bound", points, caption=caption, legend=2, width=2, height=0.85, ncols=3
    ) as panels:
        left, middle, right = panels
        charts.curves(left, points, "percent", "saved", by="series", look=looks)
        charts.curves(middle, points, "percent", "risk", by="series", look=looks)
        charts.diagonal(middle, 100 * params.alphas[-1])
        charts.curves(right, by_rule, "percent", "above", by="series", look=looks)
        charts.curves(right, by_rule, "percent", "drawn_above", by="series", look=drawn)
        charts.reference(right, 100 * params.delta)
        labels = (_AXIS, "mean test risk (%)", "risk above alpha (% of times)")
        for axes, label in zip(panels, labels, strict=True):
            axes.set(xlabel="alpha (%)", ylabel=label, xlim=(0, None), ylim=(0, None))
    return panels[0].figure


def plot_difficulty(study: Study, difficulty: pd.DataFrame) -> Any:
    """Draw how early texts leave by how hard they are, by measures that know no encoder."""
    data = difficulty.melt(
        ["task", "measure", "layers", "partial", "partial_low", "partial_high"],
        [f"fifth_{k}" for k in range(1, 6)],
        var_name="fifth",
        value_name="depth",
    )
    data["fifth"] = data["fifth"].str.removeprefix("fifth_").astype(int)
    looks = {"words": Look(GREY, "o"), "rare words": Look(GREEN, "^"), "bag-of-words loss": Look(BLUE, "s")}
    tasks = list(study.params.tasks)
    caption = (
        f"Left: mean layers of {_short(study.params.model)} by fifth of the texts, from easy (1) to hard (5) by "
        "each measure, where half of the layers are saved; mean over tasks. Right: Spearman's correlation of layers "
        "and measure, length partialled out (for words: nothing), with its 95 % bootstrap interval."
    )
    means = data.groupby(["measure", "fifth"], sort=False)["depth"].mean().reset_index()
    with charts.figure(
        study, "fig:exits-simpler", data, caption=caption, legend=3, width=2, height=0.8, ncols=2
    ) as (left, right):
        charts.curves(left, means, "fifth", "depth", by="measure", look=looks)
        left.set(xlabel="fifth of the texts, easy to hard", ylabel="mean layers", xticks=range(1, 6))
        points = {name: Look(look.colour, look.marker, "") for name, look in looks.items()}
        charts.reference(right, 0, line="-", upright=True)
        charts.dots(right, difficulty, "task", "partial", by="measure", look=points, order=tasks, spread=0.2)
        right.set_xlabel("correlation with depth")
        right.margins(y=0.2)
    return left.figure


def plot_timing(study: Study, timing: pd.DataFrame) -> Any:
    """Draw time saved against layers saved."""
    data = timing[
        ["engine", "way", "setting", "layers_saved", "time_saved", "time_saved_low", "time_saved_high"]
    ]
    looks = {ONE: Look(BLUE, "o"), REGROUPED: Look(GREEN, "s"), WAITING: Look(ORANGE, "^")}
    engines = [engine for engine in (TORCH, OPENVINO) if engine in set(data["engine"])]
    caption = (
        f"Time saved of the plain model's, exits included, against layers saved: {_short(study.params.model)}, "
        f"{study.params.tasks[0]}, one text at a time and {study.params.timed_batch} together, where the batch goes on "
        "without the texts that have left (regrouped), or is computed in full until the last has left (waiting). "
        f"Dotted: as much time as layers. Hollow: the calibrated threshold ({CALIBRATED}). "
        "At 0: exits disabled, and exits that are computed and never sure. PyTorch with "
        f"{study.params.threads} thread{'s' if study.params.threads > 1 else ''}. Bars: 95 % bootstrap interval."
    )
    with charts.figure(
        study, "fig:exits-time", data, caption=caption, legend=3, width=2 if len(engines) > 1 else 1, height=0.9,
        ncols=len(engines), squeeze=False, sharey=True,
    ) as panels:  # fmt: skip
        for axes, engine in zip(panels[0], engines, strict=True):
            own = data[data["engine"] == engine].sort_values("layers_saved")
            rest = own[own["setting"] != CALIBRATED]
            charts.curves(axes, rest, "layers_saved", "time_saved", by="way", look=looks)
            hollow = {
                way: Look(look.colour, look.marker, "", hollow=True, label="") for way, look in looks.items()
            }
            charts.curves(
                axes, own[own["setting"] == CALIBRATED], "layers_saved", "time_saved", by="way", look=hollow
            )
            charts.diagonal(axes, 100)
            charts.reference(axes, 0, line="-")
            axes.set(xlabel=_AXIS)
            _name(axes, engine)
        panels[0][0].set_ylabel("time saved (%)")
    return panels[0][0].figure


def plot_retrieval(study: Study, retrieval: pd.DataFrame) -> Any:
    """Draw recall against the mean depth of the queries; the searched texts are at full depth."""
    if retrieval.empty:
        return None
    caption = (
        f"Share of {int(retrieval['queries'].max())} verses whose paraphrase is found first among verses at full "
        "depth, against the mean layers of the query: a fixed depth, leaving where the embedding no longer moves "
        "(adaptive), and the best choice of the depth (oracle), for the encoder as it is and trained for all depths. "
        "Bars of the fixed depth: 95 % bootstrap interval."
    )
    data = retrieval.assign(series=retrieval["encoder"].map(_short) + ": " + retrieval["system"])
    looks = {}
    for encoder, colour in zip(dict.fromkeys(retrieval["encoder"]), (ORANGE, GREEN), strict=True):
        looks[f"{_short(encoder)}: {FIXED}"] = Look(colour, "o", "--", hollow=True)
        looks[f"{_short(encoder)}: {CALM}"] = Look(colour, "s")
        looks[f"{_short(encoder)}: {ORACLE}"] = Look(colour, "*", "")
    plain = data["system"] != FIXED
    with charts.figure(study, "fig:exits-retrieval", data, caption=caption, legend=1, height=1.15) as axes:
        charts.curves(axes, data[~plain], "depth", "recall", by="series", look=looks)
        others = data[plain].drop(columns=["recall_low", "recall_high"]).sort_values("depth")
        charts.curves(axes, others, "depth", "recall", by="series", look=looks)
        axes.set(xlabel="mean layers of the query", ylabel="found first (%)", ylim=(0, 102))
    return axes.figure


def plot_tokens(study: Study, tokens: pd.DataFrame) -> Any:
    """Draw how often a depth writes the last one's token."""
    if tokens.empty:
        return None
    data = tokens.assign(share=100 * tokens["depth"] / tokens["layers"], name=tokens["decoder"].map(_short))
    looks = dict(zip(dict.fromkeys(data["name"]), (Look(BLUE, "o"), Look(ORANGE, "s")), strict=False))
    caption = (
        "Tokens whose likeliest successor at a depth, read by the final norm and the output head without any training, "
        f"is the last depth's; {int(data['tokens'].max())} tokens at most, 95 % bootstrap interval."
    )
    with charts.figure(study, "fig:exits-tokens", data, caption=caption, legend=2) as axes:
        charts.curves(axes, data, "share", "agrees", by="name", look=looks)
        axes.set(xlabel="depth (% of the layers)", ylabel="same token (%)", ylim=(0, 102), xlim=(0, 102))
    return axes.figure


def show(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows of a table in which columns have these values, without those columns."""
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame.drop(columns=list(where)).reset_index(drop=True)


def judged_rows(study: Study, saved: pd.DataFrame) -> pd.DataFrame:
    """What every rule saves on the main encoder, under the method, risk and alpha that are judged."""
    rows = show(
        saved,
        encoder=study.params.model,
        teaching=LABELS,
        risk_of=RISK,
        method=METHOD,
        alpha=study.params.alpha,
    )
    names = ["task", "rule", "saved", "judged", "judged_low", "judged_high", "risk", "above"]
    return rows[names].round(2)
