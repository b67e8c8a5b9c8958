"""A small specialised student against larger general encoders, on equal labelled data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import depth
from overparam.compress.distill import encoders
from overparam.compress.distill.classifier import train_classifier
from overparam.evaluate import classification
from overparam.evaluate.topics import Topics
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.distillation_retention.general import WORDS, Students
from overparam.studies.distillation_retention.study import Study
from overparam.studies.distillation_retention.tasks import LABELS, Taught
from overparam.support import cache, progress
from overparam.train.distillation import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STUDENT = "student"
PROBED = "student as it is, linear probe"
NEIGHBOURS = 5
_MIDDLE = 0.6  # of the layers of a decoder, where its embeddings are best without training
NONE, ALL = "none", "all"  # labelled texts, in the column per_class


@dataclass(frozen=True)
class Compared:
    """Accuracy by labelled data.

    Attributes:
        table: One row a task, system and number of labels a class: accuracy in points with its interval.
        items: (task, system, number of labels a class) -> whether each test text was classified rightly. [n, 1]
    """

    table: pd.DataFrame
    items: dict[tuple[str, str, str], NDArray[np.float64]]


@step
def compare(study: Study, taught: Taught, students: Students) -> Compared:
    """Train the student on few labels, and probe general encoders with the same ones.

    General encoders stay as they are: a linear probe, the nearest neighbours, and, without any label, the name of the
    topic that is nearest to a text. So does, with all labels, the student before it learned any task.
    """
    params, data = study.params, taught.data
    rows = []
    items: dict[tuple[str, str, str], NDArray[np.float64]] = {}

    def add(task: Topics, system: str, count: str, predicted: NDArray[np.int64]) -> None:
        found = items[task.name, system, count] = classification.correct(predicted, task.test_labels)
        study.recorder.keep(found, system=system, per_class=count, task=f"few labels: {task.name}")
        accuracy = stats.bootstrap(found, n_resamples=CURVE_RESAMPLES).scaled(100)
        rows.append({"task": task.name, "system": system, "per_class": count, **accuracy.columns("accuracy")})

    for name in params.general_models:
        embed = _embedder(study, name)
        for task in progress.track(data.values(), f"probing {name}"):
            known, test, topics = (
                embed(texts) for texts in (task.texts, task.test_texts, list(_descriptions(task)))
            )
            guessed = classification.zero_shot(topics, test)
            add(task, f"{name}, zero-shot", NONE, guessed)
            for count, chosen in _draws(study, task).items():
                some = (known[chosen], task.labels[chosen], test)
                found = {
                    "linear probe": classification.linear_probe(*some, seed=params.seed),
                    "nearest neighbours": classification.nearest_neighbours(*some, k=NEIGHBOURS),
                }
                for how, each in found.items():
                    add(task, f"{name}, {how}", count, each)
    start = students.distilled[params.task_share][0]
    for task in data.values():
        for count, chosen in progress.track(_draws(study, task).items(), f"few labels, {task.name}"):
            texts, labels = [task.texts[i] for i in chosen], task.labels[chosen]
            if count == ALL:  # trained before
                mine = taught.probabilities[task.name, LABELS, params.task_share][0].argmax(axis=1)
                words = taught.probabilities[task.name, WORDS, 0.0][0]
            else:
                mine = _student(study, start, task, texts, labels)
                words = classification.bag_of_words(texts, labels, task.test_texts, seed=params.seed)
            add(task, STUDENT, count, mine)
            add(task, WORDS, count, words.argmax(axis=1))
        known, test = (encoders.outputs(start, texts) for texts in (task.texts, task.test_texts))
        add(task, PROBED, ALL, classification.linear_probe(known, task.labels, test, seed=params.seed))
    table = pd.DataFrame(rows)
    study.recorder.table("specialists", table)
    return Compared(table, items)


def _draws(study: Study, task: Topics) -> dict[str, NDArray[np.int64]]:
    """Texts by number a class; the smaller draws are the beginning of the larger, and `ALL` is all."""
    counts = study.params.per_class
    few = {
        str(count): np.asarray(classification.few_shot(task.labels, count, seed=study.params.seed))
        for count in counts
    }
    return few | {ALL: np.arange(len(task.texts))}


def _descriptions(task: Topics) -> list[str]:
    """What a topic is called, in words."""
    return [f"This text is about {name.replace('.', ' ').replace('-', ' ')}." for name in task.classes]


def _embedder(study: Study, name: str) -> Callable[[list[str]], NDArray[np.float32]]:
    """Embeddings of a general encoder, float32 [texts, dim].

    By its recipe where it has one; else the mean over tokens of the last layer, or of a middle one of a decoder.
    """
    params = study.params
    if name == params.teacher:
        return lambda texts: encoders.outputs(study.encoder, texts)
    model, tokenizer = models.load(name, device=study.teacher.device)
    if models.recipe(model):
        encoder = encoders.as_encoder(model, tokenizer, max_length=params.max_length)
        return lambda texts: encoders.outputs(encoder, texts)
    if models.is_decoder(name, kind=params.kinds.get(name, "auto")):
        depth.truncate(model, round(_MIDDLE * len(models.blocks(model).layers)))

    def embed(texts: list[str]) -> NDArray[np.float32]:
        found = depth.layer_embeddings(
            model, tokenizer, texts, pooling="mean", batch_tokens=2048, max_length=params.max_length
        )
        return np.asarray(found[:, -1])

    return embed


def _student(
    study: Study, start: SentenceTransformer, task: Topics, texts: list[str], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    params = study.params
    model = encoders.as_classifier(start, len(task.classes), seed=params.train_seeds[0])
    recipe = Recipe(
        steps=params.student_steps,
        batch_size=params.student_batch_size,
        learning_rate=params.student_learning_rate,
        warmup=max(1, params.student_steps // 10),
        seed=params.train_seeds[0],
    )
    folder = study.checkpoint(model, recipe, texts, labels)
    label = f"{len(texts)} labels, {task.name}"
    with cache.using(folder):
        train_classifier(model, texts, labels, recipe, checkpoint=folder, label=label)
    return np.asarray(encoders.outputs(model, task.test_texts).argmax(axis=1))
