"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.experiment import charts
from overparam.experiment.charts import BLUE, GREEN, GREY, ORANGE, Look
from overparam.studies.moe_pretraining.expert_load import MIX
from overparam.studies.moe_pretraining.quality import CHANCE, GREEDY, TARGETS, arrow, best_search
from overparam.studies.moe_pretraining.study import SMOOTHED_OVER, Study
from overparam.studies.moe_pretraining.training import TrainedTranslator

_SMALLEST = 1e-4  # nats, on a logarithmic axis


def plot_curve(study: Study, trained: TrainedTranslator) -> Any:
    """Draw the loss on training and held-out text, and the balance of the experts, by tokens seen."""
    data = pd.read_csv(study.recorder.directory / "learning_curve.csv")
    data = data[["step", "tokens", "minutes", "smoothed_loss", "validation_loss", "balance"]]
    drawn = data.assign(millions=data["tokens"] / 1e6)
    caption = (
        f"Cross entropy per predicted token in {len(data)} steps: mean over the last {SMOOTHED_OVER} steps on "
        f"training text, and on the same mix of held-out text at each checkpoint; below, the load-balancing loss "
        f"(1: all experts of a layer carry the same load). {trained.log.tokens[-1] / 1e6:.1f} million tokens "
        f"took {trained.log.seconds[-1] / 3600:.2f} h."
    )
    layout: dict[str, Any] = {"nrows": 2, "sharex": True, "height_ratios": [3, 1]}
    with charts.figure(study, "fig:moe-pretraining-curve", data, caption=caption, height=0.9, **layout) as (
        upper,
        lower,
    ):
        held_out = drawn.dropna(subset="validation_loss")
        charts.curves(upper, drawn, "millions", "smoothed_loss", look=Look(BLUE, "", label="training"))
        charts.curves(
            upper, held_out, "millions", "validation_loss", look=Look(ORANGE, "s", label="held out")
        )
        upper.set_ylabel("cross entropy (nats/token)")
        upper.legend()
        charts.curves(lower, drawn, "millions", "balance", look=Look(GREEN, ""))
        charts.reference(lower, 1, line=":")
        lower.set(xlabel="tokens seen (millions)", ylabel="balance loss")
    return upper.figure


def plot_load(study: Study, load: pd.DataFrame) -> Any:
    """Draw the routing mass of every expert on the training mix, and its range over the tasks."""
    tasks = load[load["task"] != MIX].groupby(["layer", "expert"])["routing_mass"]
    data = load[load["task"] == MIX][["layer", "expert", "routing_mass"]].merge(
        (tasks.max() - tasks.min()).rename("range_over_tasks").reset_index(), on=["layer", "expert"]
    )
    caption = (
        "Routing mass of every expert in units of the uniform share. Above: on held-out text of the training mix. "
        f"Below: the difference between the tasks that use it most and least, of {load['task'].nunique() - 1} tasks "
        "(eight directions and five kinds of plain text)."
    )
    labels = {"routing_mass": "load (uniform = 1)", "range_over_tasks": "range over tasks"}
    with charts.figure(
        study, "fig:moe-expert-load", data, caption=caption, height=1, nrows=2, sharex=True
    ) as panels:
        for axes, (column, label), colours in zip(panels, labels.items(), ("viridis", "magma"), strict=True):
            grid = data.pivot(index="layer", columns="expert", values=column)
            charts.heatmap(axes, grid, label, colours=colours, vmin=0)
            axes.set_ylabel("layer")
            axes.tick_params(rotation=0)
        panels[-1].set_xlabel("expert")
    return panels[0].figure


def plot_removals(study: Study, removed: pd.DataFrame) -> Any:
    """Draw the rise of the loss without each expert, by layer; nothing if it was not measured."""
    if removed.empty:
        return None
    params = study.params
    caption = (
        "Rise of the loss on held-out verses from English when one expert alone is removed, mean over "
        f"{len(TARGETS)} languages with {params.removed_verses} verses each. Rises below {_SMALLEST:g} are drawn "
        "there. Dashed: the most that this suite allows."
    )
    with charts.figure(study, "fig:moe-removals", removed, caption=caption) as axes:
        drawn = removed.assign(loss_change=removed["loss_change"].clip(lower=_SMALLEST))
        axes.plot(drawn["layer"], drawn["loss_change"], "o", color=BLUE, alpha=0.5, markersize=3)
        charts.reference(axes, params.removal_margin)
        axes.set(yscale="log", xlabel="layer", ylabel="rise of the loss (nats/token)")
        axes.set_xticks(sorted(set(removed["layer"])))
    return axes.figure


def plot_quality(study: Study, translation: pd.DataFrame) -> Any:
    """Draw chrF++ by direction and search, with the goal."""
    params = study.params
    data = translation[["search", "source", "target", "chrf", "chrf_low", "chrf_high"]]
    searches = dict.fromkeys((best_search(params), GREEDY, CHANCE))
    look = dict(zip(searches, (Look(BLUE, "o"), Look(ORANGE, "s"), Look(GREY, "^")), strict=False))
    caption = (
        f"chrF++ on {params.test_verses} held-out verses by direction, with 95 % bootstrap interval over verses; "
        "failed translations count as empty. Dashed: the goal from English. Floor: the human translation of "
        "another verse. Only some of the training verses had an Italian translation."
    )
    with charts.figure(study, "fig:moe-translator-quality", data, caption=caption, legend=4) as axes:
        directions = list(map(arrow, data["source"], data["target"]))
        charts.dots(
            axes, data.assign(direction=directions), "direction", "chrf", by="search", look=look, spread=0.15
        )
        top = len(set(directions)) - 1
        axes.plot(
            [params.goal] * 2, [top - 2.4, top + 0.4], color=GREEN, linestyle="--", marker="", label="goal"
        )
        axes.set(xlim=(0, None), xlabel="chrF++")
    return axes.figure
