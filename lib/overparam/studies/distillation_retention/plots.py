"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from overparam.evaluate import classification
from overparam.record import figures
from overparam.studies.distillation_retention.general import BORROWED, CUT, TEACHER, UNTRAINED, WORDS, Suite
from overparam.studies.distillation_retention.specialists import ALL, NEIGHBOURS, NONE, Compared
from overparam.studies.distillation_retention.study import Study
from overparam.studies.distillation_retention.tasks import (
    CUT_START,
    EXTRA,
    LABELS,
    MAJORITY,
    MATCHED,
    OTHER,
    RANDOM_START,
    SOFT,
    Taught,
)
from overparam.studies.distillation_retention.verdicts import PUBLISHED

GREY = "#777777"
_BINS = 10


def plot_retention(study: Study, suite: Suite, taught: Taught) -> Any:
    """Draw what students keep of their teacher by their share of its parameters, beside what was published."""
    params = study.params
    series = {"embedding suite": suite.kept}
    series |= {task: {share: taught.kept[task, share] for share in params.shares} for task in params.topics}
    rows = [
        {"series": name, "share_percent": 100 * share, **found.columns("kept")}
        for name, by_share in series.items()
        for share, found in sorted(by_share.items())
    ]
    published = PUBLISHED.rename(columns={"student": "series", "kept_percent": "kept"}).drop(columns="source")
    data = pd.concat([pd.DataFrame(rows), published], ignore_index=True)
    with figures.style():
        figure, axes = plt.subplots()
        target = params.retention_target
        axes.axhline(target, color=GREY, linestyle="--", linewidth=0.8, marker="")
        axes.annotate(f"{target:g} %", (100, target), xytext=(0, 2), textcoords="offset points", color=GREY,
                      fontsize=7, ha="right")  # fmt: skip
        for name, colour, marker in zip(series, figures.OKABE_ITO, figures.MARKERS, strict=False):
            drawn = data[data["series"] == name]
            axes.errorbar(drawn["share_percent"], drawn["kept"], yerr=figures.error_bars(drawn, "kept"),
                          color=colour, marker=marker, label=name)  # fmt: skip
        for (student, rows_of), marker in zip(published.groupby("series", sort=False), "Pv*", strict=True):
            axes.plot(rows_of["share_percent"], rows_of["kept"], color=GREY, marker=marker, linestyle="",
                      fillstyle="none", markersize=5, label=f"{student} (published)")  # fmt: skip
        _share_axis(axes, {100 * share for share in params.shares} | {20, 60, 100})
        figures.legend_above(figure)
        axes.set_ylabel("score kept (%)")
        caption = (
            f"What distilled students of {params.teacher} keep of its score: mean of {len(params.suite)} embedding "
            f"tasks, and accuracy of topic classification (fine-tuned teacher, student trained on labels, soft "
            "targets and unlabelled text). Paired 95 % bootstrap interval over items and seeds. Grey: published "
            "students, of other teachers and on other tasks."
        )
        return figures.publish(
            figure, "fig:distillation-retention", data=data, caption=caption, recorder=study.recorder
        )


def plot_tasks(study: Study, taught: Taught) -> Any:
    """Draw the accuracy of the teacher, of the student by what it learned from, and of the controls."""
    systems = (TEACHER, LABELS, SOFT, MATCHED, EXTRA, OTHER, RANDOM_START, CUT_START, WORDS, MAJORITY)
    table = taught.table
    data = table[table["share"].isin([0.0, 1.0, study.params.task_share])]
    columns = ["task", "system", "accuracy", "accuracy_low", "accuracy_high"]
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, 0.95 * figures.WIDTH))
        places = np.arange(len(systems))[::-1]
        tasks = study.params.topics
        for number, (task, colour, marker) in enumerate(
            zip(tasks, figures.OKABE_ITO, figures.MARKERS, strict=False)
        ):
            rows = data[data["task"] == task].set_index("system").reindex(systems)
            axes.errorbar(
                rows["accuracy"],
                places - 0.2 * (number - (len(tasks) - 1) / 2),
                xerr=figures.error_bars(rows, "accuracy"),
                color=colour,
                marker=marker,
                linestyle="",
                label=task,
            )
        axes.set_yticks(places, systems, fontsize=6)
        figure.legend(loc="outside upper center", ncols=3, fontsize=6)
        axes.set_xlabel("accuracy (%)")
        share = study.params.task_share
        caption = (
            f"Accuracy on held-out texts: {study.params.teacher} fine-tuned on {study.params.labelled} labelled "
            f"texts, a student of {share:.0%} of its size by what it learned from, and controls. 95 % bootstrap "
            f"interval over {study.params.test_items} texts and {len(study.params.train_seeds)} seed(s)."
        )
        return figures.publish(
            figure, "fig:distillation-tasks", data=data[columns], caption=caption, recorder=study.recorder
        )


def plot_suite(study: Study, suite: Suite) -> Any:
    """Draw the mean score of the embedding suite by share, beside the controls."""
    data = suite.table
    controls = (UNTRAINED, BORROWED, CUT, WORDS)
    with figures.style():
        figure, axes = plt.subplots()
        line = data[data["system"].isin(["distilled", TEACHER])].sort_values("share")
        axes.plot(
            100 * line["share"], line["score"], color=figures.OKABE_ITO[0], marker="o", label="distilled"
        )
        own = 100 * study.params.task_share
        for name, colour, marker in zip(controls, figures.OKABE_ITO[1:], figures.MARKERS[1:], strict=False):
            value = data.loc[data["system"] == name, "score"].iloc[0]
            if name == WORDS:
                axes.axhline(value, color=colour, linestyle="--", marker="", label=name)
            else:
                axes.plot(own, value, color=colour, marker=marker, linestyle="", label=name)
        _share_axis(axes, {100 * share for share in (*study.params.shares, 1.0)})
        figures.legend_above(figure)
        axes.set_ylabel("mean score (points)")
        caption = (
            f"Mean score over {len(study.params.suite)} embedding tasks of {study.params.teacher} (100 %) and of its "
            f"students, and of the controls at {own:g} %."
        )
        return figures.publish(
            figure, "fig:distillation-suite", data=data, caption=caption, recorder=study.recorder
        )


def plot_specialists(study: Study, compared: Compared) -> Any:
    """Draw accuracy against the number of labels: the student, general encoders, and a bag of words."""
    rows = compared.table[compared.table["per_class"] != NONE]
    counts = [*map(str, study.params.per_class), ALL]
    tasks = study.params.topics
    with figures.style():
        figure, panels = plt.subplots(1, len(tasks), sharey=True, squeeze=False)
        for task, axes in zip(tasks, panels[0], strict=True):
            here = rows[rows["task"] == task]
            for (system, found), colour, marker in zip(
                here.groupby("system", sort=False), figures.OKABE_ITO, figures.MARKERS, strict=False
            ):
                found = found.set_index("per_class").reindex(counts)
                label = system if task == tasks[0] else None
                axes.plot(range(len(counts)), found["accuracy"], color=colour, marker=marker, label=label)
            axes.set_xticks(range(len(counts)), counts)
            axes.annotate(task, (0.5, 1), xycoords="axes fraction", ha="center", va="bottom", fontsize=7)
        figures.legend_above(figure)
        figure.supxlabel("labelled texts of a class, at most", fontsize=8)
        panels[0][0].set_ylabel("accuracy (%)")
        caption = (
            f"Accuracy against labelled data: the {study.params.task_share:.0%} student fine-tuned on labels alone, "
            f"general encoders that stay as they are under a linear probe and {NEIGHBOURS} nearest neighbours, and a "
            f"bag of words; all: up to {study.params.labelled} texts. The student began from its distillation on "
            "unlabelled text of the same kinds."
        )
        return figures.publish(
            figure, "fig:distillation-specialists", data=rows, caption=caption, recorder=study.recorder
        )


def plot_reliability(study: Study, taught: Taught) -> Any:
    """Draw how often texts are classified rightly against how sure the model is, over all tasks."""
    share = study.params.task_share
    drawn = {TEACHER: (TEACHER, 1.0), LABELS: (LABELS, share), SOFT: (SOFT, share), EXTRA: (EXTRA, share)}
    parts = []
    for name, (system, size) in drawn.items():
        pairs = [
            (each, task.test_labels)
            for key, task in taught.data.items()
            for each in taught.probabilities[key, system, size]
        ]
        sure = np.concatenate([each.max(axis=1) for each, _ in pairs])
        right = np.concatenate([each.argmax(axis=1) == labels for each, labels in pairs])
        parts.append(classification.reliability_of(sure, right, bins=_BINS).dropna().assign(system=name))
    data = pd.concat(parts, ignore_index=True)
    with figures.style():
        figure, axes = plt.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=0.8, marker="")
        for name, colour, marker in zip(drawn, figures.OKABE_ITO, figures.MARKERS, strict=False):
            rows = data[data["system"] == name]
            axes.plot(rows["confidence"], rows["accuracy"], color=colour, marker=marker, label=name)
        figures.legend_above(figure)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        caption = (
            f"Reliability of {study.params.teacher} and of its {share:.0%} students over all tasks and seeds: accuracy "
            f"of texts by the probability of the predicted class, {_BINS} bins; dotted: perfectly calibrated."
        )
        return figures.publish(
            figure, "fig:distillation-reliability", data=data, caption=caption, recorder=study.recorder
        )


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw size and time of the students relative to the teacher."""
    full = costs.loc[costs["share"] == 1.0].iloc[0]
    names = {
        "bytes on disk": "disk_bytes",
        "time of a batch": "batch_seconds",
        "time of one text": "single_seconds",
    }
    data = pd.DataFrame({"share_percent": 100 * costs["share"]}).assign(
        **{name: 100 * costs[column] / full[column] for name, column in names.items()}
    )
    data = data.sort_values("share_percent")
    with figures.style():
        figure, axes = plt.subplots()
        for name, colour, marker in zip(names, figures.OKABE_ITO, figures.MARKERS, strict=False):
            axes.plot(data["share_percent"], data[name], color=colour, marker=marker, label=name)
        axes.plot(
            [0, 100], [0, 100], color=GREY, linestyle=":", linewidth=0.8, marker="", label="in proportion"
        )
        figures.legend_above(figure)
        axes.set_xlabel("parameters of the student (% of the teacher's)")
        axes.set_ylabel("of the teacher (%)")
        caption = (
            f"Bytes and encoding time of the students of {study.params.teacher}, relative to it: one text, and "
            f"{study.params.cost_texts} at a time; median of {study.params.cost_repeats} interleaved rounds."
        )
        return figures.publish(
            figure, "fig:distillation-cost", data=data, caption=caption, recorder=study.recorder
        )


def _share_axis(axes: Any, percents: set[float]) -> None:
    """Make the x axis a logarithmic one of the student's share, with ticks at `percents`."""
    axes.set_xscale("log")
    ticks = sorted(percents)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters of the student (% of the teacher's)")
