"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from overparam.record import figures
from overparam.studies.moe_pretraining.load import MIX
from overparam.studies.moe_pretraining.quality import CHANCE, GREEDY, arrow, best_search
from overparam.studies.moe_pretraining.study import SMOOTHED_OVER, Study
from overparam.studies.moe_pretraining.training import Trained

BLUE, ORANGE, GREEN = figures.OKABE_ITO[:3]
GREY = "#777777"


def plot_curve(study: Study, trained: Trained) -> Any:
    """Draw the loss on training and held-out text, and the balance of the experts, by tokens seen."""
    data = pd.read_csv(study.recorder.directory / "learning_curve.csv")
    data = data[["step", "tokens", "minutes", "smoothed_loss", "validation_loss", "balance"]]
    millions = data["tokens"] / 1e6
    with figures.style():
        figure, (upper, lower) = plt.subplots(
            2, 1, sharex=True, height_ratios=[3, 1], figsize=(figures.WIDTH, 0.9 * figures.WIDTH)
        )
        upper.plot(millions, data["smoothed_loss"], color=BLUE, marker="", label="training")
        held_out = data["validation_loss"].notna()
        upper.plot(
            millions[held_out],
            data.loc[held_out, "validation_loss"],
            color=ORANGE,
            marker="s",
            label="held out",
        )
        upper.set_ylabel("cross entropy (nats/token)")
        upper.legend()
        lower.plot(millions, data["balance"], color=GREEN, marker="")
        lower.axhline(1, color=GREY, linestyle=":", linewidth=0.8, marker="")
        lower.set_ylabel("balance loss")
        lower.set_xlabel("tokens seen (millions)")
        caption = (
            f"Cross entropy per predicted token in {len(data)} steps: mean over the last {SMOOTHED_OVER} steps on "
            f"training text, and on the same mix of held-out text at each checkpoint; below, the load-balancing loss "
            f"(1: every expert of every layer carries the same). {trained.log.tokens[-1] / 1e6:.1f} million tokens "
            f"took {trained.log.seconds[-1] / 3600:.2f} h."
        )
        return figures.publish(
            figure, "fig:moe-pretraining-curve", data=data, caption=caption, recorder=study.recorder
        )


def plot_load(study: Study, load: pd.DataFrame) -> Any:
    """Draw the routing mass of every expert on the training mix, beside its range over the tasks."""
    import seaborn as sns

    tasks = load[load["task"] != MIX].groupby(["layer", "expert"])["routing_mass"]
    data = load[load["task"] == MIX][["layer", "expert", "routing_mass"]].merge(
        (tasks.max() - tasks.min()).rename("range_over_tasks").reset_index(), on=["layer", "expert"]
    )
    labels = {"routing_mass": "load (uniform = 1)", "range_over_tasks": "range over tasks"}
    with figures.style():
        figure, panels = plt.subplots(2, 1, sharex=True, figsize=(figures.WIDTH, figures.WIDTH))
        for axes, (column, label), colours in zip(panels, labels.items(), ("viridis", "magma"), strict=True):
            sns.heatmap(
                data.pivot(index="layer", columns="expert", values=column),
                ax=axes,
                cmap=colours,
                vmin=0,
                cbar_kws={"label": label},
                rasterized=True,
            )
            axes.set_ylabel("layer")
            axes.set_xlabel("")
            axes.tick_params(rotation=0)
        panels[-1].set_xlabel("expert")
        number = load["task"].nunique() - 1
        caption = (
            "Routing mass of every expert in units of the uniform share. Above: on held-out text of the training mix. "
            f"Below: the difference between the tasks that use it most and least, of {number} tasks (eight directions "
            "and plain text)."
        )
        return figures.publish(
            figure, "fig:moe-expert-load", data=data, caption=caption, recorder=study.recorder
        )


def plot_quality(study: Study, translation: pd.DataFrame) -> Any:
    """Draw chrF++ by direction and search, with the goal."""
    params = study.params
    data = translation[["search", "source", "target", "chrf", "chrf_low", "chrf_high"]]
    searches = [name for name in (best_search(params), GREEDY, CHANCE) if name in set(data["search"])]
    searches = list(dict.fromkeys(searches))
    looks = list(zip((BLUE, ORANGE, GREY), "os^", strict=True))
    with figures.style():
        figure, axes = plt.subplots()
        for place, (search, (colour, marker)) in enumerate(zip(searches, looks, strict=False)):
            rows = data[data["search"] == search]
            at = np.arange(len(rows)) + 0.15 * (place - 1)
            errors = figures.error_bars(rows, "chrf")
            axes.errorbar(at, rows["chrf"], errors, color=colour, marker=marker, linestyle="", label=search)
        axes.plot([-0.4, 2.4], [params.goal] * 2, color=GREEN, linestyle="--", marker="", label="goal")
        first = data[data["search"] == searches[0]]
        axes.set_xticks(
            range(len(first)), [arrow(*key) for key in zip(first["source"], first["target"], strict=True)]
        )
        axes.set_ylabel("chrF++")
        axes.set_ylim(0, None)
        figure.legend(loc="outside upper center", ncols=4, fontsize=6)
        caption = (
            f"chrF++ on {params.test_verses} held-out verses by direction, with 95 % bootstrap interval over verses; "
            "failed translations count as empty. Dashed: the goal from English. Floor: the human translation of "
            "another verse. Italian was seen for a part of the verses only."
        )
        return figures.publish(
            figure, "fig:moe-translator-quality", data=data, caption=caption, recorder=study.recorder
        )
