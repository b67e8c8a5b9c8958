"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.experiment import charts
from overparam.experiment.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, Look
from overparam.studies.moe_expert_pruning.overlap import SHARE, Overlap
from overparam.studies.moe_expert_pruning.recovery import Recovered
from overparam.studies.moe_expert_pruning.study import Study
from overparam.studies.moe_expert_pruning.sweep import GUARDED, PUBLISHED, SENSITIVE, WRITTEN, Quality, Sweep
from overparam.studies.moe_expert_pruning.verdicts import published_quality

DARK_YELLOW = "#B8A800"
_SYSTEM = ["method", "allocation"]
_METHODS = {
    PUBLISHED: Look(BLUE, "o", label="routing mass, by divergence"),
    ("routing_mass", "uniform"): Look(SKY, "s", label="routing mass, equal"),
    SENSITIVE: Look(BLACK, "d", "--", label="routing mass, by sensitivity"),
    WRITTEN: Look(BLUE, "o", "--", hollow=True, label="routing mass, by written text's divergence"),
    GUARDED: Look(DARK_YELLOW, "h", label="routing mass, super experts kept"),
    ("routing_mass", "inverse"): Look(PINK, "v", label="routing mass, inverse"),
    ("frequency", "uniform"): Look(YELLOW, "P", label="frequency, equal"),
    ("koishekenov", "uniform"): Look(GREEN, "^", label="Koishekenov, equal"),
    ("reap", "uniform"): Look(ORANGE, "D", label="REAP, equal"),
    ("random", "uniform"): Look(GREY, "x", label="random"),
    ("inverted", "uniform"): Look(BLACK, "*", label="inverted"),
}
_GROUPS = {  # groups of tests
    "seen": Look(BLUE, "o", label="into calibrated languages"),
    "unseen": Look(ORANGE, "s", label="into an unseen language"),
    "reverse": Look(GREEN, "^", label="into English"),
    "interface": Look(PINK, "D", label="interface strings"),
    "wmt24++": Look(SKY, "P", label="WMT24++"),
    "plain": Look(GREY, "v", label="not translated"),
}
_SERIES = {
    "no training, by divergence": Look(BLUE, "o"),
    "no training, by sensitivity": Look(SKY, "s"),
    "no training, super experts kept": Look(DARK_YELLOW, "h"),
    "same, one language at a time": Look(GREY, "p"),
    "recovered on references": Look(GREEN, "^"),
    "recovered on the parent": Look(PINK, "D"),
    "recovered, super experts kept": Look(BLACK, "X"),
    "paper, no training (xCOMET)": Look(ORANGE, "v", ":", hollow=True),
    "paper, recovered (xCOMET)": Look(YELLOW, "P", ":", hollow=True),
}
_LOSS, _PRUNED = "increase in loss (nats/token)", "experts pruned (%)"


def plot_routing(study: Study, routing: pd.DataFrame) -> Any:
    """Draw the routing mass of every expert by layer, with one panel per text."""
    texts = list(routing["text"].unique())
    columns = min(3, len(texts))
    rows = -(-len(texts) // columns)
    caption = (
        f"Share of the routing that each expert of {study.params.model} gets, by layer, on "
        f"{study.params.calibration_items} calibration sentences into each language (instruction, source and the "
        "model's own translation), on the same sentences in English, and on text of other kinds. "
        f"The uniform share is {1 / study.n_experts:.3f}."
    )
    with charts.figure(
        study,
        "fig:experts-routing-mass",
        routing,
        caption=caption,
        height=rows * (0.105 + 0.033 * routing["layer"].nunique()),
        nrows=rows,
        ncols=columns,
        squeeze=False,
    ) as axes:
        shown = list(zip(texts, axes.flat, strict=False))
        for text, panel in shown:
            grid = routing[routing["text"] == text].pivot(
                index="layer", columns="expert", values="routing_mass"
            )
            charts.heatmap(panel, grid, "", cbar=False, vmin=0, vmax=float(routing["routing_mass"].max()))
            panel.tick_params(labelsize=5, rotation=0)
            panel.set_title(text, fontsize=7)
        for panel in axes.flat[len(texts) :]:
            panel.set_visible(False)
        figure = axes[0][0].figure
        figure.colorbar(shown[0][1].collections[0], ax=axes, label="routing mass", shrink=0.8)
        figure.supxlabel("expert", fontsize=8)
        figure.supylabel("layer", fontsize=8)
    return figure


def plot_sensitivity(study: Study, rises: pd.DataFrame) -> Any:
    """Draw the increase in loss when one layer alone is cut, by the experts that it keeps."""
    layers = {at: f"layer {layer.index}" for at, layer in enumerate(study.layers)}
    data = rises.assign(layer=rises["layer"].map(layers))
    caption = (
        f"Increase in the negative log-likelihood of the calibration text's references when one layer of "
        f"{study.params.model} alone keeps so many of its {study.n_experts} experts, those with the highest routing "
        f"mass, mean over {', '.join(study.params.languages)}. 95 % bootstrap interval over "
        f"{study.params.calibration_items} sentences per language."
    )
    with charts.figure(study, "fig:experts-sensitivity", data, caption=caption, legend=3) as axes:
        charts.curves(axes, data, "kept", "loss_change", by="layer")
        charts.reference(axes, 0, line="-")
        axes.set(xlabel="experts that this layer keeps", ylabel=_LOSS)
        axes.set_xscale("log", base=2)
        ticks = sorted(set(data["kept"]))
        axes.set_xticks(ticks, [str(each) for each in ticks])
    return axes.figure


def plot_methods(study: Study, found: Sweep) -> Any:
    """Draw the increase in loss by the share pruned, for every score, layer budget and control."""
    data = _over_choices(found.table, "loss_change")
    caption = (
        f"Increase in the negative log-likelihood of reference translations by {study.params.model}, mean over "
        f"{', '.join(study.params.languages)}, without retraining; by score and layer budget, with 95 % bootstrap "
        f"interval over {study.params.test_items} sentences per language (random: range over "
        f"{study.params.random_seeds} choices). Increases below 0.001 are drawn at 0.001."
    )
    with charts.figure(study, "fig:experts-methods", data, caption=caption, legend=2) as axes:
        visible = {name: data[name].clip(lower=1e-3) for name in ("loss_change", "low", "high")}
        _against_share(axes, data.assign(**visible), "loss_change", by=_SYSTEM, look=_METHODS, band=True)
        axes.set(yscale="log", xlabel=_PRUNED, ylabel=_LOSS)
    return axes.figure


def plot_quality(study: Study, translated: Quality, recovered: Recovered) -> Any:
    """Draw the change in chrF++ by the share pruned, before and after recovery, beside published values."""
    ours, trained, paper = translated.table, recovered.table, published_quality()
    parts = [
        _of(ours, PUBLISHED),
        _of(ours, SENSITIVE),
        _of(ours, GUARDED),
        _of(ours, GUARDED, "one language"),
        *(
            trained.query("trained == 'all parameters' and method == @method and targets == @targets")
            if len(trained)
            else None
            for method, targets in (
                (PUBLISHED[0], "references"),
                (PUBLISHED[0], "parent"),
                (GUARDED[0], "parent"),
            )
        ),
        paper[~paper["recovered"]],
        paper[paper["recovered"]],
    ]
    columns = ["share_pruned", "change_percent", "low", "high"]
    data = pd.concat(
        [
            rows.reindex(columns=columns).assign(series=name).sort_values("share_pruned")
            for name, rows in zip(_SERIES, parts, strict=True)
            if rows is not None
        ],
        ignore_index=True,
    )
    caption = (
        f"Change in chrF++ of {study.params.model} from English into {', '.join(study.params.languages)} against "
        f"the unpruned model, paired 95 % bootstrap interval over {study.params.translated_items} sentences per "
        f"language; failed generations score 0. Recovery: {study.params.recovery_steps} steps of all parameters; at "
        "0 % the unpruned model, trained alike. The last point without training lets a token use one expert less. "
        "Dotted: xCOMET of GPT-OSS-20B on FLORES-200 (arXiv 2605.28042), another model and metric; at 87.5 % "
        "without training, its output was unusable."
    )
    with charts.figure(study, "fig:experts-quality", data, caption=caption, legend=2) as axes:
        charts.reference(axes, 0, line="-")
        _against_share(axes, data, "change_percent", by="series", look=_SERIES)
        axes.set(xlabel=_PRUNED, ylabel="change in chrF++ (%)")
    return axes.figure


def plot_chrf(study: Study, translated: Quality) -> Any:
    """Draw the change in chrF++ without training, by score and budget."""
    table = translated.table
    table = table[(table["share_pruned"] > 0) & (table["calibration"] == "all languages")]
    data = _over_choices(table, "change_percent")
    caption = (
        f"Change in chrF++ of {study.params.model} against the unpruned model, mean over "
        f"{', '.join(study.params.languages)}, without training, by score and layer budget; paired 95 % bootstrap "
        f"interval over {study.params.translated_items} sentences (random: mean and range of "
        f"{study.params.random_seeds} choices). Translations with scores other than the published one were made at "
        "only some shares."
    )
    with charts.figure(study, "fig:experts-chrf", data, caption=caption, legend=2) as axes:
        charts.reference(axes, 0, line="-")
        _against_share(axes, data, "change_percent", by=_SYSTEM, look=_METHODS)
        axes.set(xlabel=_PRUNED, ylabel="change in chrF++ (%)")
    return axes.figure


def plot_elsewhere(study: Study, table: pd.DataFrame) -> Any:
    """Draw the increase in loss on other languages, directions and texts, as published and with super experts kept."""
    caption = (
        f"Increase in the negative log-likelihood when the experts of {study.params.model} are chosen for translation "
        f"from English into {', '.join(study.params.languages)}, by routing mass with budgets by divergence "
        "(left) or with super experts kept and equal budgets (right): on those "
        f"languages, on {', '.join(study.params.unseen) or 'none'}, which calibration never saw, into English, on "
        "text of other domains, and on text that is not translated. 95 % bootstrap interval over sentences."
    )
    panels = {PUBLISHED[0]: "as published", GUARDED[0]: "super experts kept"}
    with charts.figure(
        study, "fig:experts-elsewhere", table, caption=caption, legend=2, ncols=2, sharey=True
    ) as both:
        for axes, (method, title) in zip(both, panels.items(), strict=True):
            rows = table[table["method"] == method]
            _against_share(axes, rows, "loss_change", by="group", look=_GROUPS, band=True)
            charts.reference(axes, 0, line="-")
            axes.set_title(title, fontsize=7)
        both[0].figure.supxlabel(_PRUNED, fontsize=8)
        both[0].set_ylabel(_LOSS)
    return both[0].figure


def plot_transfer(study: Study, table: pd.DataFrame) -> Any:
    """Draw the increase in loss by calibration text and test."""
    share = table["share_pruned"].iloc[0]
    grid = table.pivot_table("loss_change", "calibration", "test", sort=False, observed=True)
    caption = (
        f"Increase in the negative log-likelihood of each test when {100 * share:g} % of the experts of "
        f"{study.params.model} are pruned by the routing mass on each calibration text, with super experts kept "
        "and equal layer budgets (except for the random choice, which ignores super experts)."
    )
    with charts.figure(study, "fig:experts-transfer", table, caption=caption, height=0.8, width=1.4) as axes:
        charts.heatmap(axes, grid, _LOSS, colours="viridis_r", annot=True, fmt=".1f", annot_kws={"size": 5})
        axes.set(xlabel="test", ylabel="calibration")
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(axis="y", rotation=0)
    return axes.figure


def plot_overlap(study: Study, agreement: Overlap) -> Any:
    """Draw the overlap of the experts kept by each calibration text."""
    matrix = agreement.matrix
    data = matrix.rename_axis("text").reset_index().melt("text", var_name="other", value_name="iou")
    caption = (
        f"Experts of {study.params.model} kept at {100 * SHARE:g} % pruned, by the text that they were chosen "
        f"on: intersection over union, mean over layers. For two random choices it is {agreement.chance:.2f}; the "
        "paper reports about 0.6 between languages."
    )
    with charts.figure(study, "fig:experts-overlap", data, caption=caption, height=0.85) as axes:
        charts.heatmap(
            axes, matrix, "intersection over union", vmin=0, vmax=1, annot=True, fmt=".2f", square=True
        )
    return axes.figure


def plot_calibration_size(study: Study, table: pd.DataFrame, agreement: Overlap) -> Any:
    """Draw the stability of the choice by the number of calibration sentences."""
    caption = (
        f"Agreement of the experts of {study.params.model} kept at {100 * SHARE:g} % pruned when they are chosen "
        "on two disjoint draws of this many calibration sentences: mean and middle 95 % of 200 draws."
    )
    with charts.figure(study, "fig:experts-calibration-size", table, caption=caption) as axes:
        charts.curves(axes, table, "sentences", "overlap", band=True)
        charts.reference(axes, agreement.chance, "chance", line=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(table["sentences"], [str(n) for n in table["sentences"]])
        axes.set(ylim=(0, 1.03), ylabel="intersection over union")
        axes.set_xlabel("calibration sentences (each in every language)")
    return axes.figure


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw size and time relative to the unpruned model."""
    data = charts.relative(
        costs,
        costs.loc[costs["share_pruned"] == 0].iloc[0],
        (100 * costs["share_pruned"]).rename("pruned_percent"),
        parameters="parameters",
        bytes_on_disk="folder_bytes",
        resident_memory="resident_bytes",
        active_parameters="active_parameters",
        time_to_translate="generate_all_seconds",
        time_to_read_prompts="prompt_seconds",
    )
    caption = (
        f"Size and time of {study.params.model} by the share of experts pruned, relative to the unpruned model: "
        "bytes of the saved folder, memory of a fresh process that has loaded it, and median time of reading "
        "prompts and of translating them. A token uses as many experts as before, so its computation is the same."
    )
    with charts.figure(study, "fig:experts-cost", data, caption=caption, legend=2) as axes:
        charts.wide_curves(axes, data)
        axes.set(ylim=(0, None), xlabel=_PRUNED, ylabel="of the unpruned model (%)")
    return axes.figure


def _against_share(axes: Any, table: pd.DataFrame, y: str, **series: Any) -> None:
    charts.curves(axes, table.assign(percent=100 * table["share_pruned"]), "percent", y, **series)


def _over_choices(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """One row per system and share; the interval of random choices is their range."""
    chance = table["method"] == "random"
    own = {end: table[end].where(~chance, table[value]) for end in ("low", "high")}
    return (
        table.assign(**own)
        .groupby(["method", "allocation", "share_pruned"], as_index=False)
        .agg(**{value: (value, "mean"), "low": ("low", "min"), "high": ("high", "max")})
    )


def _of(table: pd.DataFrame, system: tuple[str, str], calibration: str = "all languages") -> pd.DataFrame:
    method, allocation = system
    return table[
        (table["method"] == method)
        & (table["allocation"] == allocation)
        & (table["calibration"] == calibration)
    ]
