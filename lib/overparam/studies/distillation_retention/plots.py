"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from overparam.evaluate import classification
from overparam.experiment import charts
from overparam.experiment.charts import GREY, Look
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

_BINS = 10
_SIZE = "parameters of the student (% of the teacher's)"


def plot_retention(study: Study, suite: Suite, taught: Taught) -> Any:
    """Draw retention by the student's share of the teacher's parameters, beside published students."""
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
    caption = (
        f"What distilled students of {params.teacher} keep of its score: mean of {len(params.suite)} embedding "
        f"tasks, and accuracy of topic classification (fine-tuned teacher, student trained on labels, soft "
        "targets and unlabelled text). Paired 95 % bootstrap interval over items and seeds. Grey: published "
        "students, of other teachers and on other tasks."
    )
    look = charts.looks(series) | {
        student: Look(GREY, marker, "", hollow=True, label=f"{student} (published)")
        for student, marker in zip(published["series"].unique(), "Pv*", strict=True)
    }
    with charts.figure(study, "fig:distillation-retention", data, caption=caption, legend=2) as axes:
        charts.reference(axes, params.retention_target, f"{params.retention_target:g} %")
        charts.curves(axes, data, "share_percent", "kept", by="series", look=look)
        _share_axis(axes, {100 * share for share in params.shares} | {20, 60, 100})
        axes.set_ylabel("score kept (%)")
    return axes.figure


def plot_tasks(study: Study, taught: Taught) -> Any:
    """Draw the accuracy of the teacher, of the student by training targets, and of controls."""
    params = study.params
    systems = (TEACHER, LABELS, SOFT, MATCHED, EXTRA, OTHER, RANDOM_START, CUT_START, WORDS, MAJORITY)
    data = taught.table[taught.table["share"].isin([0.0, 1.0, params.task_share])]
    data = data[["task", "system", "accuracy", "accuracy_low", "accuracy_high"]]
    caption = (
        f"Accuracy on held-out texts: {params.teacher} fine-tuned on {params.labelled} labelled "
        f"texts, a student of {params.task_share:.0%} of its size by training targets, and controls. 95 % "
        f"bootstrap interval over {params.test_items} texts and {len(params.train_seeds)} seed(s)."
    )
    with charts.figure(study, "fig:distillation-tasks", data, caption=caption, legend=3, height=0.95) as axes:
        look = charts.looks(params.topics)
        charts.dots(axes, data, "system", "accuracy", by="task", look=look, order=systems, spread=0.2)
        axes.set_xlabel("accuracy (%)")
    return axes.figure


def plot_suite(study: Study, suite: Suite) -> Any:
    """Draw the mean score of the embedding suite by share, beside the controls."""
    data, own = suite.table, 100 * study.params.task_share
    caption = (
        f"Mean score over {len(study.params.suite)} embedding tasks of {study.params.teacher} (100 %) and of its "
        f"students, and of the controls at {own:g} %."
    )
    look = charts.looks(("distilled", UNTRAINED, BORROWED, CUT, WORDS))
    with charts.figure(study, "fig:distillation-suite", data, caption=caption, legend=2) as axes:
        words = float(data.loc[data["system"] == WORDS, "score"].iloc[0])
        axes.axhline(words, color=look.pop(WORDS).colour, linestyle="--", marker="", label=WORDS)
        drawn = data.replace({"system": {TEACHER: "distilled"}}).sort_values("share")
        controls = ~drawn["system"].isin(["distilled"])
        drawn = drawn.assign(percent=(100 * drawn["share"]).mask(controls, own))
        charts.curves(axes, drawn, "percent", "score", by="system", look=look)
        _share_axis(axes, {100 * share for share in (*study.params.shares, 1.0)})
        axes.set_ylabel("mean score (points)")
    return axes.figure


def plot_specialists(study: Study, compared: Compared) -> Any:
    """Draw accuracy against the number of labels: the student, general encoders, and a bag of words."""
    data = compared.table[compared.table["per_class"] != NONE]
    counts = [*map(str, study.params.per_class), ALL]
    tasks = study.params.topics
    caption = (
        f"Accuracy against labelled data: the {study.params.task_share:.0%} student fine-tuned on labels alone, "
        f"general encoders, not trained, under a linear probe and {NEIGHBOURS} nearest neighbours, and a "
        f"bag of words; all: up to {study.params.labelled} texts. The student was first distilled on "
        "unlabelled text of the same kinds."
    )
    drawn = data[["task", "system", "accuracy"]].assign(place=data["per_class"].astype(str).map(counts.index))
    drawn = drawn.sort_values("place", kind="stable")
    with charts.figure(
        study,
        "fig:distillation-specialists",
        data,
        caption=caption,
        legend=2,
        ncols=len(tasks),
        sharey=True,
        squeeze=False,
    ) as (panels,):
        look = charts.looks(data["system"])
        for task, axes in zip(tasks, panels, strict=True):
            charts.curves(axes, drawn[drawn["task"] == task], "place", "accuracy", by="system", look=look)
            axes.set_xticks(range(len(counts)), counts)
            axes.annotate(task, (0.5, 1), xycoords="axes fraction", ha="center", va="bottom", fontsize=7)
        panels[0].figure.supxlabel("maximum labelled texts per class", fontsize=8)
        panels[0].set_ylabel("accuracy (%)")
    return panels[0].figure


def plot_reliability(study: Study, taught: Taught) -> Any:
    """Draw accuracy against confidence, over all tasks."""
    share = study.params.task_share
    parts = []
    for system, size in {TEACHER: 1.0, LABELS: share, SOFT: share, EXTRA: share}.items():
        pairs = [
            (each, task.test_labels)
            for key, task in taught.data.items()
            for each in taught.probabilities[key, system, size]
        ]
        sure = np.concatenate([each.max(axis=1) for each, _ in pairs])
        right = np.concatenate([each.argmax(axis=1) == labels for each, labels in pairs])
        parts.append(classification.reliability_of(sure, right, bins=_BINS).dropna().assign(system=system))
    data = pd.concat(parts, ignore_index=True)
    caption = (
        f"Reliability of {study.params.teacher} and of its {share:.0%} students over all tasks and seeds: accuracy "
        f"of texts by the probability of the predicted class, {_BINS} bins; dotted: perfectly calibrated."
    )
    with charts.figure(study, "fig:distillation-reliability", data, caption=caption, legend=2) as axes:
        charts.diagonal(axes, 1)
        charts.curves(axes, data.drop(columns=["low", "high"]), "confidence", "accuracy", by="system")
        axes.set(xlabel="confidence", ylabel="accuracy")
    return axes.figure


def plot_cost(study: Study, costs: pd.DataFrame) -> Any:
    """Draw size and time of the students relative to the teacher."""
    data = charts.relative(
        costs,
        costs.loc[costs["share"] == 1.0].iloc[0],
        (100 * costs["share"]).rename("share_percent"),
        bytes_on_disk="disk_bytes",
        time_of_a_batch="batch_seconds",
        time_of_one_text="single_seconds",
    )
    caption = (
        f"Bytes and encoding time of the students of {study.params.teacher}, relative to it: one text, and "
        f"{study.params.cost_texts} at a time; median of {study.params.cost_repeats} interleaved rounds."
    )
    with charts.figure(study, "fig:distillation-cost", data, caption=caption, legend=2) as axes:
        charts.wide_curves(axes, data)
        charts.diagonal(axes, 100, "in proportion")
        axes.set(xlabel=_SIZE, ylabel="of the teacher (%)")
    return axes.figure


def _share_axis(axes: Any, percents: set[float]) -> None:
    """Set up a logarithmic x axis of the student's share, with ticks at `percents`."""
    axes.set_xscale("log")
    ticks = sorted(percents)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(_SIZE)
