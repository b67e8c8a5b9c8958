"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from overparam.compress import depth
from overparam.record import figures, ledger
from overparam.studies.trailing_layer_pruning.recipes import Comparison
from overparam.studies.trailing_layer_pruning.study import Study, ZeroShot, scores_table
from overparam.studies.trailing_layer_pruning.training import Trained

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = figures.OKABE_ITO[:6]
GREY = "#777777"


def plot_initial_loss(study: Study, loss: depth.LayerLoss, cuts: depth.Cuts) -> Any:
    """Draw the initial loss by depth, with both picks and the border of the two halves."""
    data = pd.DataFrame(
        {"depth": range(loss.layers + 1), "loss": loss.mean, "low": loss.low, "high": loss.high}
    )
    with figures.style():
        figure, axes = plt.subplots()
        columns = (data[name] for name in ("depth", "loss", "low", "high"))
        figures.line_with_band(axes, *columns, color=BLUE, marker="o")
        axes.axvline(loss.layers // 2 + 0.5, color=GREY, linestyle=":", linewidth=0.8, marker="")
        for name, keep, marker in (("small", cuts.small, "s"), ("large", cuts.large, "D")):
            axes.plot(keep, loss.mean[keep], marker=marker, color=ORANGE, markersize=6, linestyle="")
            side = -1 if name == "small" or keep > 0.8 * loss.layers else 1
            axes.annotate(
                f"{name}: {keep}",
                (keep, loss.mean[keep]),
                xytext=(side * 6, -12),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                color=ORANGE,
            )
        axes.margins(y=0.18)
        _depth_axis(axes, loss.layers)
        axes.set_ylabel("initial loss (nats)")
        caption = (
            f"Contrastive loss of {study.params.model} at every depth before any training: mean over {loss.n} "
            f"queries, each against {2 * loss.batch_size} candidates, with 95 % bootstrap interval. L3Prune "
            f"picks the least loss in each half (border dotted): {_interior(cuts.interior_small)} at {cuts.small} "
            f"and {_interior(cuts.interior_large)} at {cuts.large} layers."
        )
        return figures.publish(
            figure, "fig:layers-initial-loss", data=data, caption=caption, recorder=study.recorder
        )


def plot_recipes(study: Study, comparison: Comparison) -> Any:
    """Draw the initial loss by depth under both recipes, with the picks of each."""
    data = pd.concat(
        [
            pd.DataFrame(
                {
                    "recipe": name,
                    "depth": range(loss.layers + 1),
                    "loss": loss.mean,
                    "low": loss.low,
                    "high": loss.high,
                }
            )
            for name, loss in comparison.losses.items()
        ],
        ignore_index=True,
    )
    with figures.style():
        figure, axes = plt.subplots()
        for (name, rows), colour, marker in zip(
            data.groupby("recipe", sort=False), (BLUE, GREEN), "os", strict=True
        ):
            columns = (rows[column] for column in ("depth", "loss", "low", "high"))
            figures.line_with_band(axes, *columns, color=colour, marker=marker, label=name)
            picks = [comparison.cuts[str(name)].small, comparison.cuts[str(name)].large]
            axes.plot(
                picks,
                comparison.losses[str(name)].mean[picks],
                marker="D",
                color=ORANGE,
                markersize=6,
                linestyle="",
            )
        axes.axvline(study.layers // 2 + 0.5, color=GREY, linestyle=":", linewidth=0.8, marker="")
        axes.plot([], [], marker="D", color=ORANGE, linestyle="", label="picks")
        figures.legend_above(figure)
        _depth_axis(axes, study.layers)
        axes.set_ylabel("initial loss (nats)")
        scale = next(iter(comparison.losses.values())).scale
        named = "; ".join(f"{name}: {cut.small} and {cut.large}" for name, cut in comparison.cuts.items())
        caption = (
            f"Initial loss of {study.params.model} by depth under both recipes, on the same triplets and with cosines "
            f"times {scale:g}, with 95 % bootstrap interval. They differ by at most "
            f"{comparison.largest_difference:.0%}. Layers picked: {named}."
        )
        return figures.publish(
            figure, "fig:layers-recipes", data=data, caption=caption, recorder=study.recorder
        )


def plot_zero_shot(study: Study, zero: ZeroShot, cuts: depth.Cuts) -> Any:
    """Draw the mean score by depth without training, over its two floors."""
    data = zero.table
    with figures.style():
        figure, axes = plt.subplots()
        for (system, rows), colour, marker in zip(
            data[data["system"] != "bag of words"].groupby("system", sort=False),
            (BLUE, GREY),
            "os",
            strict=True,
        ):
            label = study.params.model if system == "zero-shot" else system
            columns = (rows[name] for name in ("depth", "score", "low", "high"))
            figures.line_with_band(axes, *columns, color=colour, marker=marker, label=label)
        words = float(data.loc[data["system"] == "bag of words", "score"].iloc[0])
        axes.axhline(words, color=GREEN, linestyle="--", marker="", label="bag of words")
        for keep in (cuts.small, cuts.large):
            axes.plot(keep, zero.mean(keep), marker="D", color=ORANGE, markersize=6, linestyle="")
        axes.plot([], [], marker="D", color=ORANGE, linestyle="", label="picks of L3Prune")
        figures.legend_above(figure)
        _depth_axis(axes, study.layers)
        axes.set_ylabel(f"mean score of {len(study.params.tasks)} tasks (points)")
        caption = (
            f"Mean main score of {study.params.model} over {len(study.params.tasks)} tasks at every depth, without "
            "training, with 95 % bootstrap interval over items; floors are a twin with random weights (up to the "
            "`small` pick) and hashed bags of words."
        )
        return figures.publish(
            figure, "fig:layers-zero-shot", data=data, caption=caption, recorder=study.recorder
        )


def plot_tasks(study: Study, zero: ZeroShot) -> Any:
    """Draw each task's score by depth, as a heat map; each task's best depth is marked."""
    import seaborn as sns

    table = scores_table(zero.by_depth)
    data = table.rename_axis("task").reset_index().melt("task", var_name="depth", value_name="score")
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH * 1.25, figures.WIDTH * (0.2 + 0.06 * len(table))))
        sns.heatmap(
            table,
            ax=axes,
            cmap="viridis",
            xticklabels=2,
            cbar_kws={"label": "main score (points)"},
            rasterized=True,
        )
        for row, best in enumerate(table.to_numpy().argmax(axis=1)):
            axes.plot(best + 0.5, row + 0.5, marker="o", color="white", markersize=3, linestyle="")
        axes.set_xlabel("layers kept")
        axes.set_ylabel("")
        axes.tick_params(axis="x", rotation=0)
        caption = (
            f"Main score of {study.params.model} on each task by depth, without training; a white dot marks each "
            "task's best depth. One cut for all tasks is a compromise."
        )
        return figures.publish(
            figure, "fig:layers-tasks", data=data, caption=caption, recorder=study.recorder
        )


def plot_trained(study: Study, trained: Trained) -> Any:
    """Draw the change after training by the share of layers removed, beside the published picks."""
    ours = trained.table
    published = ledger.points("l3prune")
    data = pd.concat(
        [
            pd.DataFrame(
                {
                    "series": study.params.model,
                    "pruned_percent": 100 * ours["pruned"],
                    "change": ours["change"],
                    "low": ours["change_low"],
                    "high": ours["change_high"],
                }
            ),
            pd.DataFrame(
                {
                    "series": "published, " + published["model"],
                    "pruned_percent": 100 * (1 - published["kept"] / published["layers"]),
                    "change": published["change"],
                }
            ),
        ],
        ignore_index=True,
    )
    with figures.style():
        figure, axes = plt.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6, marker="")
        axes.axhspan(
            -study.params.negligible_margin,
            study.params.negligible_margin,
            color=GREY,
            alpha=0.12,
            linewidth=0,
        )
        first = data[data["series"] == study.params.model]
        axes.errorbar(
            first["pruned_percent"],
            first["change"],
            yerr=figures.error_bars(first, "change", "low", "high"),
            color=BLUE,
            marker="o",
            label=study.params.model,
        )
        markers = dict(zip(published["model"].unique(), "s^vP", strict=True))
        for name, marker in markers.items():
            rows = data[data["series"] == f"published, {name}"]
            axes.plot(
                rows["pruned_percent"],
                rows["change"],
                color=ORANGE,
                marker=marker,
                linestyle="",
                fillstyle="none",
                label=f"{name} (paper)",
            )
        figures.legend_above(figure)
        axes.set_xlabel("layers pruned (%)")
        axes.set_ylabel("change of the mean score (points)")
        caption = (
            f"Change against the unpruned model trained the same way, {len(study.params.train_seeds)} training "
            f"seed(s), paired 95 % bootstrap interval over items and seeds; {study.params.train_steps} LoRA steps. "
            "Open markers: the published picks of four models (arXiv 2410.14578, its table). Grey band: what "
            "counts as negligible."
        )
        return figures.publish(
            figure, "fig:layers-trained", data=data, caption=caption, recorder=study.recorder
        )


def plot_rules(study: Study, rules: pd.DataFrame) -> Any:
    """Draw what each rule for choosing layers costs against trailing layers."""
    data = rules[rules["rule"] != "trailing"][["rule", "change", "change_low", "change_high"]]
    with figures.style():
        figure, axes = plt.subplots()
        places = np.arange(len(data))[::-1]
        axes.axvline(0, color=GREY, linewidth=0.6, marker="")
        axes.errorbar(
            data["change"],
            places,
            xerr=figures.error_bars(data, "change"),
            color=BLUE,
            marker="o",
            linestyle="",
        )
        axes.set_yticks(places, data["rule"])
        axes.set_xlabel("change against trailing layers (points)")
        kept = len(str(rules["kept"].iloc[0]).split())
        caption = (
            f"{study.params.model} with {kept} of {study.layers} layers, chosen by each rule, without training: "
            f"difference of the mean score on {', '.join(study.params.rule_tasks)} to keeping the leading layers, "
            "paired 95 % bootstrap interval over items."
        )
        return figures.publish(
            figure, "fig:layers-rules", data=data, caption=caption, recorder=study.recorder
        )


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw cost relative to the unpruned model by relative depth; the diagonal is proportional."""
    full = costs.sort_values("depth").iloc[-1]
    names = {
        "encoding time": "batch_seconds",
        "block parameters": "block_parameters",
        "all parameters": "parameters",
        "peak memory": "peak_bytes",
        "energy": "kwh_per_million_tokens",
    }
    data = pd.DataFrame({"depth_percent": 100 * costs["depth"] / full["depth"]})
    for name, column in names.items():
        data[name] = 100 * costs[column] / full[column]
    data = data.sort_values("depth_percent")
    with figures.style():
        figure, axes = plt.subplots()
        axes.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=0.8, marker="")
        for name, colour, marker in zip(names, figures.OKABE_ITO, figures.MARKERS, strict=False):
            axes.plot(data["depth_percent"], data[name], color=colour, marker=marker, label=name)
        figures.legend_above(figure)
        axes.set_xlim(0, 103)
        axes.set_ylim(0, None)
        axes.set_xlabel("layers kept (%)")
        axes.set_ylabel("of the unpruned model (%)")
        caption = (
            f"Cost of {study.params.model} by depth, relative to all {int(full['depth'])} layers: median time and "
            f"energy of encoding {study.params.cost_texts} texts, peak resident memory of a fresh process, and "
            "parameters with and without the embedding table, which is not pruned. Dotted: proportional."
        )
        return figures.publish(figure, "fig:layers-cost", data=data, caption=caption, recorder=study.recorder)


def _depth_axis(axes: Any, layers: int) -> None:
    axes.set_xlabel("layers kept")
    axes.set_xticks(range(0, layers + 1, 2 if layers > 10 else 1))


def _interior(flag: bool) -> str:
    return "a local minimum" if flag else "only the edge of its half"
