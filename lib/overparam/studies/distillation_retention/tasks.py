"""Students of a task: what they learn from labels, from soft targets, from hidden states, from unlabelled text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.compress.distill import encoders
from overparam.compress.distill.classifier import UNLABELLED, train_classifier
from overparam.evaluate import classification
from overparam.evaluate.topics import Topics, topics
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.distillation_retention.general import CUT, TEACHER, UNTRAINED, WORDS, Students
from overparam.studies.distillation_retention.study import Study, measured
from overparam.support import cache, progress
from overparam.train.distillation import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LABELS, SOFT, MATCHED, EXTRA, OTHER = (
    "labels",
    "soft targets",
    "soft targets and hidden states",
    "soft targets, unlabelled text too",
    "soft targets, verses too",
)
MAJORITY = "majority class"
RANDOM_START, CUT_START = "soft targets, from random weights", "soft targets, from the cut"
BEST = EXTRA  # how the students of every share are trained

Probabilities = NDArray[np.float64]  # [test texts, classes]


@dataclass(frozen=True)
class Taught:
    """Classifiers of every task.

    Attributes:
        data: By task.
        probabilities: (task, system, share) -> of the test texts, one array a seed.
        classifiers: Students of `task_share` that were trained as `BEST`, by task, of the first seed.
        table: One row a task, system and share.
        kept: (task, share) -> what a student trained as `BEST` keeps of its teacher's accuracy, in percent.
        soft: Accuracy with soft targets less accuracy with labels alone, mean over tasks, in points.
        kind: The same for unlabelled text of the task's own kind less as many verses.
    """

    data: dict[str, Topics]
    probabilities: dict[tuple[str, str, float], list[Probabilities]]
    classifiers: dict[str, SentenceTransformer]
    table: pd.DataFrame
    kept: dict[tuple[str, float], stats.Estimate]
    soft: stats.Estimate
    kind: stats.Estimate


@step
def teach(study: Study, students: Students) -> Taught:
    """Fine-tune a teacher for every task and seed, and students of it in every way; beside them the controls."""
    from scipy.special import softmax

    params = study.params
    data = {
        name: topics(
            name,
            labelled=params.labelled,
            unlabelled=params.unlabelled,
            test_items=params.test_items,
            characters=params.characters,
            seed=params.seed,
        )
        for name in params.topics
    }
    found: dict[tuple[str, str, float], list[Probabilities]] = {}
    spent: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    classifiers: dict[str, SentenceTransformer] = {}
    runs = [(task, number) for task in data.values() for number in range(len(params.train_seeds))]
    for task, number in progress.track(runs, "tasks"):
        for (system, share), (classifier, cost) in _trained(study, students, task, number).items():
            if (system, share, number) == (BEST, params.task_share, 0):
                classifiers[task.name] = classifier
            key = (task.name, system, share)
            probabilities = softmax(encoders.outputs(classifier, task.test_texts).astype(np.float64), axis=1)
            found.setdefault(key, []).append(probabilities)
            spent.setdefault(key, []).append(cost)
    for task in data.values():
        words = classification.bag_of_words(task.texts, task.labels, task.test_texts, seed=params.seed)
        found[task.name, WORDS, 0.0] = [words]
        most = classification.majority(task.labels, len(task.test_texts))
        found[task.name, MAJORITY, 0.0] = [np.eye(len(task.classes))[most]]
    rows = [
        _row(study, data[task], system, share, several, found[task, TEACHER, 1.0])
        | dict(
            zip(
                ("training_seconds", "training_kwh"),
                np.mean(spent.get((task, system, share), [(0.0, 0.0)]), axis=0),
                strict=True,
            )
        )
        for (task, system, share), several in progress.track(found.items(), "intervals of the tasks")
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("tasks", table)
    kept = {(task, share): _kept(found, data[task], BEST, share) for task in data for share in params.shares}
    gains = {
        name: _gain(study, data, found, before, after)
        for name, before, after in (
            ("soft_targets_less_labels", LABELS, SOFT),
            ("own_kind_less_other_kind", OTHER, EXTRA),
        )
    }
    for name, gain in gains.items():
        study.recorder.metric(name, gain, "points")
    return Taught(data, found, classifiers, table, kept, *gains.values())


def correct(task: Topics, several: Sequence[Probabilities]) -> list[NDArray[np.float64]]:
    """Whether each test text was classified rightly, one array [n, 1] a seed."""
    return [classification.correct(each.argmax(axis=1), task.test_labels) for each in several]


def _trained(
    study: Study, students: Students, task: Topics, number: int
) -> dict[tuple[str, float], tuple[SentenceTransformer, tuple[float, float]]]:
    """All classifiers of a task and of one of the seeds, by system and share, with seconds and kWh of the training."""
    params = study.params
    seed = params.train_seeds[number]
    classes, own = len(task.classes), params.task_share
    verses = study.verses(len(task.unlabelled))
    teacher = encoders.as_classifier(study.encoder, classes, seed=seed)
    cost = _fit(study, teacher, task, TEACHER, seed, task.texts)
    found = {(TEACHER, 1.0): (teacher, cost)}
    states = encoders.pooled(teacher, task.texts)
    soft, of_further, of_verses = (
        encoders.outputs(teacher, texts) if texts else np.zeros((0, classes), dtype=np.float32)
        for texts in (task.texts, task.unlabelled, verses)
    )

    def student(
        start: SentenceTransformer,
        system: str,
        share: float,
        more: Sequence[str] = (),
        **targets: NDArray[np.float32],
    ) -> None:
        model = encoders.as_classifier(start, classes, seed=seed)
        texts = [*task.texts, *more]
        found[system, share] = (model, _fit(study, model, task, f"{share} {system}", seed, texts, **targets))

    mine = students.distilled[own][number]
    student(mine, LABELS, own)
    student(mine, SOFT, own, teacher_logits=soft)
    student(mine, MATCHED, own, teacher_logits=soft, teacher_states=states)
    student(mine, OTHER, own, verses, teacher_logits=np.concatenate([soft, of_verses]))
    student(students.controls[UNTRAINED], RANDOM_START, own, teacher_logits=soft)
    student(students.controls[CUT], CUT_START, own, teacher_logits=soft)
    for share, several in students.distilled.items():
        if number < len(several):
            logits = np.concatenate([soft, of_further])
            student(several[number], EXTRA, share, task.unlabelled, teacher_logits=logits)
    return found


def _fit(
    study: Study,
    model: SentenceTransformer,
    task: Topics,
    name: str,
    seed: int,
    texts: Sequence[str],
    **targets: NDArray[np.float32],
) -> tuple[float, float]:
    """Train on texts of which the first are the labelled ones; return seconds and kWh."""
    params = study.params
    labels = np.full(len(texts), UNLABELLED)
    labels[: len(task.labels)] = task.labels
    teaches = name == TEACHER
    steps = params.teacher_steps if teaches else params.student_steps
    recipe = Recipe(
        steps=steps,
        batch_size=params.teacher_batch_size if teaches else params.student_batch_size,
        learning_rate=params.teacher_learning_rate if teaches else params.student_learning_rate,
        warmup=max(1, steps // 10),
        seed=seed,
    )
    soft = (params.temperature, params.soft_weight, list(targets)) if targets else ()
    folder = study.checkpoint(model, recipe, texts, labels, soft, *targets.values())
    fit = partial(
        train_classifier,
        model,
        texts,
        labels,
        recipe,
        temperature=params.temperature,
        soft_weight=params.soft_weight,
        checkpoint=folder,
        label=f"{task.name}: {name}",
        **targets,
    )
    with cache.using(folder):
        log, kwh = measured(fit)
    return log.seconds[-1], kwh


def _row(
    study: Study,
    task: Topics,
    system: str,
    share: float,
    several: Sequence[Probabilities],
    teacher: Sequence[Probabilities],
) -> dict[str, object]:
    items = correct(task, several)
    for seed, each in zip(study.params.train_seeds, items, strict=False):
        study.recorder.keep(each, system=system, share=share, seed=seed, task=task.name)
    accuracy = stats.suite_score({task.name: (items, "mean")}, n_resamples=CURVE_RESAMPLES)
    if share:  # a student is compared with its own teacher
        teacher = teacher[: len(several)]
    kept = stats.retention(correct(task, teacher), items, n_resamples=CURVE_RESAMPLES)
    repeated = list(several) if len(several) == len(teacher) else [several[0]] * len(teacher)
    before, after = ([each.argmax(axis=1) for each in side] for side in (teacher, repeated))
    same = [classification.agreement(*each) for each in zip(before, after, strict=True)]
    return {
        "task": task.name,
        "system": system,
        "share": share,
        "seeds": len(several),
        **accuracy.scaled(100).columns("accuracy"),
        "spread_over_seeds": 100 * float(np.ptp([each.mean() for each in items])),
        **kept.scaled(100).columns("kept"),
        "agreement": 100 * float(np.mean(same)),
        **classification.flips_over_repeats(before, after, task.test_labels),
        "calibration_error": float(
            np.mean([classification.expected_calibration_error(each, task.test_labels) for each in several])
        ),
    }


def _kept(
    found: dict[tuple[str, str, float], list[Probabilities]], task: Topics, system: str, share: float
) -> stats.Estimate:
    several = found[task.name, system, share]
    sides = (found[task.name, TEACHER, 1.0][: len(several)], several)
    return stats.retention(*(correct(task, side) for side in sides)).scaled(100)


def _gain(
    study: Study,
    data: dict[str, Topics],
    found: dict[tuple[str, str, float], list[Probabilities]],
    before: str,
    after: str,
) -> stats.Estimate:
    """Accuracy of one way to learn less that of another, mean over tasks in points, paired by text and seed."""
    share = study.params.task_share
    pairs = {
        task.name: (
            correct(task, found[task.name, before, share]),
            correct(task, found[task.name, after, share]),
            "mean",
        )
        for task in data.values()
    }
    return stats.suite_difference(pairs).scaled(100)
