"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.compress import depth
from overparam.experiment import charts
from overparam.experiment.charts import BLUE, GREEN, GREY, ORANGE, Look
from overparam.record import ledger
from overparam.studies.trailing_layer_pruning.recipes import Comparison
from overparam.studies.trailing_layer_pruning.study import Study, ZeroShot, scores_table
from overparam.studies.trailing_layer_pruning.training import TrainedScores

_PICK = {"marker": "D", "color": ORANGE, "linestyle": ""}


def plot_initial_loss(study: Study, loss: depth.LayerLoss, cuts: depth.Cuts) -> Any:
    """Draw the initial loss by depth, with both picks and the boundary of the two halves."""
    data = _by_depth(loss)
    caption = (
        f"Contrastive loss of {study.params.model} at every depth before any training: mean over {loss.n} "
        f"queries, each against {2 * loss.batch_size} candidates, with 95 % bootstrap interval. L3Prune "
        f"picks the lowest loss in each half (boundary dotted): {_interior(cuts.interior_small)} at {cuts.small} "
        f"and {_interior(cuts.interior_large)} at {cuts.large} layers."
    )
    with charts.figure(study, "fig:layers-initial-loss", data, caption=caption) as axes:
        charts.curves(axes, data, "depth", "loss", band=True)
        charts.reference(axes, loss.layers // 2 + 0.5, line=":", upright=True)
        for name, keep, marker in (("small", cuts.small, "s"), ("large", cuts.large, "D")):
            axes.plot(keep, loss.mean[keep], **{**_PICK, "marker": marker}, markersize=6)
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
    return axes.figure


def plot_recipes(study: Study, comparison: Comparison) -> Any:
    """Draw the initial loss by depth under both recipes, with the picks of each."""
    parts = [_by_depth(loss).assign(recipe=name) for name, loss in comparison.losses.items()]
    data = pd.concat(parts, ignore_index=True)[["recipe", "depth", "loss", "low", "high"]]
    scale = next(iter(comparison.losses.values())).scale
    named = "; ".join(f"{name}: {cut.small} and {cut.large}" for name, cut in comparison.cuts.items())
    caption = (
        f"Initial loss of {study.params.model} by depth under both recipes, on the same triplets and with cosines "
        f"times {scale:g}, with 95 % bootstrap interval. They differ by at most "
        f"{comparison.largest_difference:.0%}. Layers picked: {named}."
    )
    look = dict(zip(comparison.losses, (Look(BLUE, "o"), Look(GREEN, "s")), strict=True))
    with charts.figure(study, "fig:layers-recipes", data, caption=caption, legend=2) as axes:
        charts.curves(axes, data, "depth", "loss", by="recipe", look=look, band=True)
        for name, cut in comparison.cuts.items():
            picks = [cut.small, cut.large]
            axes.plot(picks, comparison.losses[name].mean[picks], **_PICK, markersize=6, label="picks")
        charts.reference(axes, study.layers // 2 + 0.5, line=":", upright=True)
        _depth_axis(axes, study.layers)
        axes.set_ylabel("initial loss (nats)")
    return axes.figure


def plot_zero_shot(study: Study, zero: ZeroShot, cuts: depth.Cuts) -> Any:
    """Draw the mean score by depth without training, with both floors."""
    data, number = zero.table, len(study.params.tasks)
    caption = (
        f"Mean main score of {study.params.model} over {number} tasks at every depth, without "
        "training, with 95 % bootstrap interval over items; floors are a twin with random weights (up to the "
        "`small` pick) and hashed bags of words."
    )
    look = {"zero-shot": Look(BLUE, "o", label=study.params.model), "random weights": Look(GREY, "s")}
    with charts.figure(study, "fig:layers-zero-shot", data, caption=caption, legend=2) as axes:
        charts.curves(axes, data, "depth", "score", by="system", look=look, band=True)
        words = float(data.loc[data["system"] == "bag of words", "score"].iloc[0])
        axes.axhline(words, color=GREEN, linestyle="--", marker="", label="bag of words")
        picks = [cuts.small, cuts.large]
        axes.plot(picks, list(map(zero.mean, picks)), **_PICK, markersize=6, label="picks of L3Prune")
        _depth_axis(axes, study.layers)
        axes.set_ylabel(f"mean score of {number} tasks (points)")
    return axes.figure


def plot_tasks(study: Study, zero: ZeroShot) -> Any:
    """Draw each task's score by depth, as a heat map; each task's best depth is marked."""
    table = scores_table(zero.by_depth)
    data = table.rename_axis("task").reset_index().melt("task", var_name="depth", value_name="score")
    caption = (
        f"Main score of {study.params.model} on each task by depth, without training; a white dot marks each "
        "task's best depth. One cut for all tasks is a compromise."
    )
    height = 0.2 + 0.06 * len(table)
    with charts.figure(study, "fig:layers-tasks", data, caption=caption, height=height, width=1.25) as axes:
        charts.heatmap(axes, table, "main score (points)", xticklabels=2)
        for row, best in enumerate(table.to_numpy().argmax(axis=1)):
            axes.plot(best + 0.5, row + 0.5, marker="o", color="white", markersize=3, linestyle="")
        axes.set_xlabel("layers kept")
        axes.tick_params(axis="x", rotation=0)
    return axes.figure


def plot_trained(study: Study, trained: TrainedScores) -> Any:
    """Draw the change after training by the share of layers removed, beside the published picks."""
    params, model = study.params, study.params.model
    ours, published = trained.table, ledger.points("l3prune")
    ours = ours.rename(columns={"change_low": "low", "change_high": "high"})
    ours = ours.assign(series=model, pruned_percent=100 * ours["pruned"])
    published["series"] = "published, " + published["model"]
    published["pruned_percent"] = 100 * (1 - published["kept"] / published["layers"])
    columns = ["series", "pruned_percent", "change", "low", "high"]
    data = pd.concat([ours, published], ignore_index=True)[columns]
    caption = (
        f"Change against the unpruned model trained the same way, {len(params.train_seeds)} training "
        f"seed(s), paired 95 % bootstrap interval over items and seeds; {params.train_steps} LoRA steps. "
        "Open markers: the published picks of four models (arXiv 2410.14578, its table). Grey band: what "
        "counts as negligible."
    )
    look = {model: Look()} | {
        f"published, {name}": Look(ORANGE, marker, "", hollow=True, label=f"{name} (paper)")
        for name, marker in zip(published["model"].unique(), "s^vP", strict=True)
    }
    with charts.figure(study, "fig:layers-trained", data, caption=caption, legend=2) as axes:
        charts.reference(axes, 0, line="-")
        near = params.negligible_margin
        axes.axhspan(-near, near, color=GREY, alpha=0.12, linewidth=0)
        charts.curves(axes, data, "pruned_percent", "change", by="series", look=look)
        axes.set(xlabel="layers pruned (%)", ylabel="change in mean score (points)")
    return axes.figure


def plot_rules(study: Study, rules: pd.DataFrame) -> Any:
    """Draw the score of each rule for choosing layers, compared with cutting trailing layers."""
    data = rules[rules["rule"] != "trailing"][["rule", "change", "change_low", "change_high"]]
    kept = len(str(rules["kept"].iloc[0]).split())
    caption = (
        f"{study.params.model} with {kept} of {study.layers} layers, chosen by each rule, without training: "
        f"difference in the mean score on {', '.join(study.params.rule_tasks)} from keeping the leading layers, "
        "paired 95 % bootstrap interval over items."
    )
    with charts.figure(study, "fig:layers-rules", data, caption=caption) as axes:
        charts.reference(axes, 0, line="-", upright=True)
        charts.dots(axes, data, "rule", "change")
        axes.set_xlabel("change against trailing layers (points)")
    return axes.figure


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw cost relative to the unpruned model by relative depth; on the diagonal it is proportional."""
    full = costs.sort_values("depth").iloc[-1]
    data = charts.relative(
        costs,
        full,
        (100 * costs["depth"] / full["depth"]).rename("depth_percent"),
        encoding_time="batch_seconds",
        block_parameters="block_parameters",
        all_parameters="parameters",
        peak_memory="peak_bytes",
        energy="kwh_per_million_tokens",
    )
    caption = (
        f"Cost of {study.params.model} by depth, relative to all {int(full['depth'])} layers: median time and "
        f"energy of encoding {study.params.cost_texts} texts, peak resident memory of a fresh process, and "
        "parameters with and without the embedding table, which is not pruned. Dotted: proportional."
    )
    with charts.figure(study, "fig:layers-cost", data, caption=caption, legend=2) as axes:
        charts.diagonal(axes, 100)
        charts.wide_curves(axes, data)
        axes.set(xlim=(0, 103), ylim=(0, None), xlabel="layers kept (%)", ylabel="of the unpruned model (%)")
    return axes.figure


def _by_depth(loss: depth.LayerLoss) -> pd.DataFrame:
    columns = {"loss": loss.mean, "low": loss.low, "high": loss.high}
    return pd.DataFrame({"depth": range(loss.layers + 1), **columns})


def _depth_axis(axes: Any, layers: int) -> None:
    axes.set_xlabel("layers kept")
    axes.set_xticks(range(0, layers + 1, 2 if layers > 10 else 1))


def _interior(flag: bool) -> str:
    return "a local minimum" if flag else "only the edge of its half"
