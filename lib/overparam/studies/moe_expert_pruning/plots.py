"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from overparam.record import figures
from overparam.studies.moe_expert_pruning.overlap import SHARE, Overlap
from overparam.studies.moe_expert_pruning.recovery import Recovered
from overparam.studies.moe_expert_pruning.study import Study
from overparam.studies.moe_expert_pruning.sweep import GUARDED, PUBLISHED, Quality, Sweep
from overparam.studies.moe_expert_pruning.verdicts import published_quality

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = figures.OKABE_ITO[:6]
GREY, DARK_YELLOW = "#777777", "#B8A800"
_METHODS = {  # (method, allocation): label, colour, marker
    PUBLISHED: ("routing mass, by divergence", BLUE, "o"),
    ("routing_mass", "uniform"): ("routing mass, equal", SKY, "s"),
    GUARDED: ("routing mass, super experts kept", DARK_YELLOW, "h"),
    ("routing_mass", "inverse"): ("routing mass, inverse", PINK, "v"),
    ("frequency", "uniform"): ("frequency, equal", YELLOW, "P"),
    ("koishekenov", "uniform"): ("Koishekenov, equal", GREEN, "^"),
    ("reap", "uniform"): ("REAP, equal", ORANGE, "D"),
    ("random", "uniform"): ("random", GREY, "x"),
    ("inverted", "uniform"): ("inverted", "#000000", "*"),
}
_GROUPS = {  # group of tests: label, colour, marker
    "seen": ("into calibrated languages", BLUE, "o"),
    "unseen": ("into an unseen language", ORANGE, "s"),
    "reverse": ("into English", GREEN, "^"),
    "interface": ("interface strings", PINK, "D"),
    "wmt24++": ("WMT24++", SKY, "P"),
    "plain": ("English news, newsgroups", GREY, "v"),
}


def plot_routing(study: Study, routing: pd.DataFrame) -> Any:
    """Draw the routing mass of every expert by layer, one panel a text."""
    texts = list(routing["text"].unique())
    columns = min(3, len(texts))
    rows = -(-len(texts) // columns)
    layers = routing["layer"].nunique()
    with figures.style():
        size = (figures.WIDTH, rows * (0.35 + 0.055 * layers * 2))
        figure, axes = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        top = float(routing["routing_mass"].max())
        image: Any = None
        for text, axis in zip(texts, axes.flat, strict=False):
            table = routing[routing["text"] == text].pivot(
                index="layer", columns="expert", values="routing_mass"
            )
            image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
            axis.set_yticks(range(len(table)), [str(layer) for layer in table.index], fontsize=5)
            axis.set_title(text, fontsize=7)
        for axis in axes.flat[len(texts) :]:
            axis.set_visible(False)
        figure.colorbar(image, ax=axes, label="routing mass", shrink=0.8)
        figure.supxlabel("expert", fontsize=8)
        figure.supylabel("layer", fontsize=8)
        caption = (
            f"Share of the routing that each expert of {study.params.model} gets, by layer, on "
            f"{study.params.calibration_items} calibration sentences into each language (instruction, source and the "
            "model's own translation), on the same sentences in English, and on English news. "
            f"The uniform share is {1 / study.n_experts:.3f}."
        )
        return figures.publish(
            figure, "fig:experts-routing-mass", data=routing, caption=caption, recorder=study.recorder
        )


def plot_methods(study: Study, found: Sweep) -> Any:
    """Draw how the loss rises with the share pruned, for every score, layer budget and control."""
    table = found.table.copy()
    chance = table["method"] == "random"  # its band is the range over choices
    table.loc[chance, "low"] = table.loc[chance, "high"] = table.loc[chance, "loss_change"]
    table = table.groupby(["method", "allocation", "share_pruned"], as_index=False).agg(
        loss_change=("loss_change", "mean"), low=("low", "min"), high=("high", "max")
    )
    with figures.style():
        figure, axes = plt.subplots()
        for (method, allocation), (label, colour, marker) in _METHODS.items():
            rows = table[(table["method"] == method) & (table["allocation"] == allocation)]
            drawn = (rows[name].clip(lower=1e-3) for name in ("loss_change", "low", "high"))
            figures.line_with_band(
                axes, 100 * rows["share_pruned"], *drawn, color=colour, marker=marker, label=label
            )
        axes.set_yscale("log")
        figures.legend_above(figure)
        axes.set_xlabel("experts pruned (%)")
        axes.set_ylabel("rise of the loss (nats a token)")
        caption = (
            f"Rise of the negative log-likelihood of reference translations by {study.params.model}, mean over "
            f"{', '.join(study.params.languages)}, without retraining; by score and layer budget, with 95 % bootstrap "
            f"interval over {study.params.test_items} sentences a language (random: range over "
            f"{study.params.random_seeds} choices). Rises below 0.001 are drawn there."
        )
        return figures.publish(
            figure, "fig:experts-methods", data=table, caption=caption, recorder=study.recorder
        )


def plot_quality(study: Study, translated: Quality, recovered: Recovered) -> Any:
    """Draw the change of chrF++ by the share pruned, before and after recovery, beside what was published."""
    ours = translated.table
    series = {
        "no training, by divergence": (_of(ours, PUBLISHED), BLUE, "o", "-"),
        "no training, equal budgets": (
            _of(ours, ("routing_mass", "uniform")),
            SKY,
            "s",
            "-",
        ),
        "no training, super experts kept": (_of(ours, GUARDED), DARK_YELLOW, "h", "-"),
        "same, one language at a time": (_of(ours, GUARDED, "one language"), GREY, "p", "-"),
    }
    for label, method, targets, colour, marker in (
        ("recovered on references", PUBLISHED[0], "references", GREEN, "^"),
        ("recovered on the parent", PUBLISHED[0], "parent", PINK, "D"),
        ("recovered, super experts kept", GUARDED[0], "parent", "#000000", "X"),
    ):
        if recovered.table.empty:
            break
        rows = recovered.table[recovered.table["trained"] == "all parameters"]
        rows = rows[(rows["targets"] == targets) & (rows["method"] == method)]
        series[label] = (rows, colour, marker, "-")
    paper = published_quality()
    series["paper, no training (xCOMET)"] = (paper[~paper["recovered"]], ORANGE, "v", ":")
    series["paper, recovered (xCOMET)"] = (paper[paper["recovered"]], YELLOW, "P", ":")
    columns = ["share_pruned", "change_percent", "low", "high"]
    data = pd.concat(
        [
            rows.reindex(columns=columns).assign(series=name).sort_values("share_pruned")
            for name, (rows, *_) in series.items()
        ],
        ignore_index=True,
    )
    with figures.style():
        figure, axes = plt.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6, marker="")
        for name, (_, colour, marker, line) in series.items():
            rows = data[data["series"] == name]
            axes.errorbar(
                100 * rows["share_pruned"],
                rows["change_percent"],
                yerr=figures.error_bars(rows, "change_percent", "low", "high"),
                color=colour,
                marker=marker,
                linestyle=line,
                fillstyle="none" if line == ":" else "full",
                label=name,
            )
        figures.legend_above(figure)
        axes.set_xlabel("experts pruned (%)")
        axes.set_ylabel("change of chrF++ (%)")
        caption = (
            f"Change of chrF++ of {study.params.model} from English into {', '.join(study.params.languages)} against "
            f"the unpruned model, paired 95 % bootstrap interval over {study.params.translated_items} sentences a "
            f"language; failed generations score 0. Recovery: {study.params.recovery_steps} steps of all parameters. "
            "Dotted: xCOMET of GPT-OSS-20B on FLORES-200 (arXiv 2605.28042), another model and metric; at 87.5 % "
            "without training it wrote nothing that could be used."
        )
        return figures.publish(
            figure, "fig:experts-quality", data=data, caption=caption, recorder=study.recorder
        )


def plot_chrf(study: Study, translated: Quality) -> Any:
    """Draw the change of chrF++ without training, by score and budget."""
    table = translated.table
    table = table[(table["share_pruned"] > 0) & (table["calibration"] == "all languages")].copy()
    chance = table["method"] == "random"
    table.loc[chance, "low"] = table.loc[chance, "high"] = table.loc[chance, "change_percent"]
    table = table.groupby(["method", "allocation", "share_pruned"], as_index=False).agg(
        change_percent=("change_percent", "mean"), low=("low", "min"), high=("high", "max")
    )
    with figures.style():
        figure, axes = plt.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6, marker="")
        for (method, allocation), (label, colour, marker) in _METHODS.items():
            rows = _of(table, (method, allocation))
            axes.errorbar(
                100 * rows["share_pruned"],
                rows["change_percent"],
                yerr=figures.error_bars(rows, "change_percent", "low", "high"),
                color=colour,
                marker=marker,
                label=label,
            )
        figures.legend_above(figure)
        axes.set_xlabel("experts pruned (%)")
        axes.set_ylabel("change of chrF++ (%)")
        caption = (
            f"Change of chrF++ of {study.params.model} against the unpruned model, mean over "
            f"{', '.join(study.params.languages)}, without training, by score and layer budget; paired 95 % bootstrap "
            f"interval over {study.params.translated_items} sentences (random: mean and range of "
            f"{study.params.random_seeds} choices). Scores other than the published ones were translated with at "
            "some shares only."
        )
        return figures.publish(
            figure, "fig:experts-chrf", data=table, caption=caption, recorder=study.recorder
        )


def plot_elsewhere(study: Study, table: pd.DataFrame) -> Any:
    """Draw what a cut does to other languages, directions and texts: the published one, and with super experts kept."""
    panels = {PUBLISHED[0]: "as published", GUARDED[0]: "super experts kept"}
    with figures.style():
        figure, both = plt.subplots(1, 2, sharey=True)
        for axes, (method, title) in zip(both, panels.items(), strict=True):
            for group, (label, colour, marker) in _GROUPS.items():
                rows = table[(table["group"] == group) & (table["method"] == method)]
                if rows.empty:
                    continue
                drawn = (rows[name] for name in ("loss_change", "low", "high"))
                figures.line_with_band(
                    axes,
                    100 * rows["share_pruned"],
                    *drawn,
                    color=colour,
                    marker=marker,
                    label=label if method == PUBLISHED[0] else None,
                )
            axes.axhline(0, color=GREY, linewidth=0.6, marker="")
            axes.set_title(title, fontsize=7)
        figures.legend_above(figure)
        figure.supxlabel("experts pruned (%)", fontsize=8)
        both[0].set_ylabel("rise of the loss (nats a token)")
        caption = (
            f"Rise of the negative log-likelihood when the experts of {study.params.model} are chosen for translation "
            f"from English into {', '.join(study.params.languages)}, by routing mass with budgets by divergence "
            "(left) or with super experts kept and equal budgets (right): on those "
            f"languages, on {', '.join(study.params.unseen) or 'none'}, which calibration never saw, into English, on "
            "text of other domains, and on plain English. 95 % bootstrap interval over sentences."
        )
        return figures.publish(
            figure, "fig:experts-elsewhere", data=table, caption=caption, recorder=study.recorder
        )


def plot_transfer(study: Study, table: pd.DataFrame) -> Any:
    """Draw which calibration text serves which test."""
    import seaborn as sns

    share, rows = table["share_pruned"].iloc[0], table
    grid = rows.pivot_table(
        index="calibration", columns="test", values="loss_change", sort=False, observed=True
    )
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, 0.8 * figures.WIDTH))
        sns.heatmap(
            grid,
            ax=axes,
            cmap="viridis_r",
            annot=True,
            fmt=".1f",
            annot_kws={"size": 5},
            cbar_kws={"label": "rise of the loss (nats a token)"},
            rasterized=True,
        )
        axes.set_xlabel("test")
        axes.set_ylabel("calibration")
        axes.tick_params(axis="x", rotation=90, labelsize=6)
        axes.tick_params(axis="y", rotation=0, labelsize=6)
        caption = (
            f"Rise of the negative log-likelihood of each test when {100 * share:g} % of the experts of "
            f"{study.params.model} are pruned by the routing mass on each calibration text, with super experts kept "
            "and equal layer budgets; the random choice keeps none on purpose."
        )
        return figures.publish(
            figure, "fig:experts-transfer", data=rows, caption=caption, recorder=study.recorder
        )


def plot_overlap(study: Study, agreement: Overlap) -> Any:
    """Draw how far calibration texts agree on the experts that stay."""
    import seaborn as sns

    matrix = agreement.matrix
    data = matrix.rename_axis("text").reset_index().melt("text", var_name="other", value_name="iou")
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, 0.85 * figures.WIDTH))
        sns.heatmap(
            matrix,
            ax=axes,
            cmap="viridis",
            vmin=0,
            vmax=1,
            annot=True,
            fmt=".2f",
            annot_kws={"size": 5.5},
            cbar_kws={"label": "intersection over union"},
            square=True,
            rasterized=True,
        )
        axes.set_xlabel("")
        axes.set_ylabel("")
        axes.tick_params(labelsize=6)
        caption = (
            f"Experts of {study.params.model} that stay at {100 * SHARE:g} % pruned, by the text that they were chosen "
            f"on: intersection over union, mean over layers. Two random choices agree by {agreement.chance:.2f}; the "
            "paper reports about 0.6 between languages."
        )
        return figures.publish(
            figure, "fig:experts-overlap", data=data, caption=caption, recorder=study.recorder
        )


def plot_calibration_size(study: Study, table: pd.DataFrame, agreement: Overlap) -> Any:
    """Draw how stable the choice is against the number of calibration sentences."""
    with figures.style():
        figure, axes = plt.subplots()
        columns = (table[name] for name in ("sentences", "overlap", "low", "high"))
        figures.line_with_band(axes, *columns, color=BLUE, marker="o")
        axes.axhline(agreement.chance, color=GREY, linestyle=":", marker="")
        axes.annotate("chance", (table["sentences"].iloc[0], agreement.chance), xytext=(0, 3), color=GREY,
                      textcoords="offset points", fontsize=7)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(table["sentences"], [str(n) for n in table["sentences"]])
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("calibration sentences (each in every language)")
        axes.set_ylabel("intersection over union")
        caption = (
            f"Agreement of the experts of {study.params.model} kept at {100 * SHARE:g} % pruned when they are chosen "
            "on two disjoint draws of so many calibration sentences: mean and middle 95 % of 200 draws."
        )
        return figures.publish(
            figure, "fig:experts-calibration-size", data=table, caption=caption, recorder=study.recorder
        )


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw size and time relative to the unpruned model."""
    full = costs.loc[costs["share_pruned"] == 0].iloc[0]
    names = {
        "parameters": "parameters",
        "bytes on disk": "folder_bytes",
        "resident memory": "resident_bytes",
        "active parameters": "active_parameters",
        "time to translate": "generate_all_seconds",
        "time to read prompts": "prompt_seconds",
    }
    data = pd.DataFrame({"pruned_percent": 100 * costs["share_pruned"]})
    for name, column in names.items():
        data[name] = 100 * costs[column] / full[column]
    with figures.style():
        figure, axes = plt.subplots()
        for name, colour, marker in zip(names, figures.OKABE_ITO, figures.MARKERS, strict=False):
            axes.plot(data["pruned_percent"], data[name], color=colour, marker=marker, label=name)
        figures.legend_above(figure)
        axes.set_ylim(0, None)
        axes.set_xlabel("experts pruned (%)")
        axes.set_ylabel("of the unpruned model (%)")
        caption = (
            f"Size and time of {study.params.model} by the share of experts pruned, relative to the unpruned model: "
            "bytes of the saved folder, memory of a fresh process that has loaded it, and median time of reading "
            "prompts and of translating them. A token uses as many experts as before, so that its computation stays."
        )
        return figures.publish(
            figure, "fig:experts-cost", data=data, caption=caption, recorder=study.recorder
        )


def _of(table: pd.DataFrame, method: tuple[str, str], calibration: str = "all languages") -> pd.DataFrame:
    found = table[(table["method"] == method[0]) & (table["allocation"] == method[1])]
    return found[found["calibration"] == calibration] if "calibration" in found else found
