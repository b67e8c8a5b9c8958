"""Quantization-aware training of a classifier against rounding it afterwards, at the same number of steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import progress
from overparam.compress.distill import encoders
from overparam.compress.distill.classifier import train_classifier
from overparam.compress.distill.training import Recipe
from overparam.compress.quantize import qat
from overparam.evaluate import classification
from overparam.evaluate.topics import Topics, topics
from overparam.report import stats
from overparam.studies.quantization_accuracy.study import CURVE_RESAMPLES, Study

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FULL, AFTER, TRAINED = "full precision", "rounded after training", "trained with rounding"
Hits = NDArray[np.float64]  # whether each test text was classified rightly [texts, 1]


@dataclass(frozen=True)
class Trained:
    """Accuracy by bits.

    Attributes:
        table: One row a task, number of bits and way.
        gap_closed: By bits, where plain rounding costs more than its interval, mean over tasks and seeds: how much of
            that loss training takes back; 1 is all of it.
        after: Change of the accuracy by plain rounding, in percent of full precision, by bits.
        trained: The same with quantization-aware training.
    """

    table: pd.DataFrame
    gap_closed: dict[int, stats.Estimate]
    after: dict[int, stats.Estimate]
    trained: dict[int, stats.Estimate]


def train(study: Study) -> Trained | None:
    """Fine-tune the encoder on each task, then let it go on with and without rounding; None for a decoder.

    It goes on in full precision, to be rounded afterwards, or with its weights rounded at every step, for as many
    steps.
    """
    if study.decoder:
        return None
    params = study.params
    found: dict[tuple[str, int, str], list[NDArray[np.int64]]] = {}
    data = {
        name: topics(
            name,
            labelled=params.labelled,
            test_items=params.test_items,
            characters=params.characters,
            seed=params.seed,
        )
        for name in params.topics
    }
    runs = [(task, seed) for task in data.values() for seed in params.train_seeds]
    for task, seed in progress.track(runs, "fine-tuning"):
        for key, predicted in _predictions(study, task, seed).items():
            found.setdefault((task.name, *key), []).append(predicted)
    rows = [
        _row(study, data[name], bits, way, several, found[name, 32, FULL])
        for (name, bits, way), several in found.items()
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("training", table)
    hits = {
        key: [classification.correct(each, data[key[0]].test_labels) for each in several]
        for key, several in found.items()
    }
    closed, after, trained = {}, {}, {}
    for bits in params.qat_bits:
        full, plain, aware = (
            {name: hits[name, number, way] for name in data}
            for number, way in ((32, FULL), (bits, AFTER), (bits, TRAINED))
        )
        after[bits], trained[bits] = (
            stats.suite_retention({name: (full[name], side[name], "mean") for name in data})
            .scaled(100)
            .shifted(-100)
            for side in (plain, aware)
        )
        lost = stats.suite_difference({name: (full[name], plain[name], "mean") for name in data})
        if lost.high < 0:
            closed[bits] = gap_closed(full, plain, aware)
            study.recorder.metric(f"gap_closed_{bits}_bits", closed[bits], "of the gap")
        study.recorder.metric(f"retention_{bits}_bits_after", after[bits].shifted(100), "% of full precision")
        study.recorder.metric(
            f"retention_{bits}_bits_trained", trained[bits].shifted(100), "% of full precision"
        )
    return Trained(table, closed, after, trained)


def gap_closed(
    full: dict[str, list[Hits]], plain: dict[str, list[Hits]], aware: dict[str, list[Hits]]
) -> stats.Estimate:
    """(aware − plain) ÷ (full − plain), mean over tasks, with an interval paired by item.

    Its numerator and denominator are differences of the same items, so that it is a retention of what each item
    gains.
    """
    pairs = {
        name: (
            [a - b for a, b in zip(full[name], plain[name], strict=True)],
            [a - b for a, b in zip(aware[name], plain[name], strict=True)],
            "mean",
        )
        for name in full
    }
    return stats.suite_retention(pairs)


def _predictions(study: Study, task: Topics, seed: int) -> dict[tuple[int, str], NDArray[np.int64]]:
    """Classes of the test texts by bits and way."""
    params = study.params
    width = study.model.config.hidden_size
    encoder = encoders.as_encoder(study.model, study.tokenizer, width=width, max_length=params.max_length)
    model = encoders.as_classifier(encoder, len(task.classes), seed=seed)
    _fit(study, model, task, seed, params.train_steps, params.learning_rate, f"{task.name}: full precision")
    start = copy.deepcopy(model)
    _fit(study, model, task, seed + 1, params.qat_steps, params.qat_learning_rate, f"{task.name}: going on")
    found = {(32, FULL): _classes(model, task)}
    for bits in params.qat_bits:
        plain = _with(
            model, qat.post_training(encoders.transformer(model), bits, group_size=params.group_size)
        )
        found[bits, AFTER] = _classes(plain, task)
        aware = _with(start, qat.prepare(encoders.transformer(start), bits, group_size=params.group_size))
        _fit(
            study,
            aware,
            task,
            seed + 1,
            params.qat_steps,
            params.qat_learning_rate,
            f"{task.name}: {bits} bits",
        )
        whole = _with(aware, qat.convert(encoders.transformer(aware), bits, group_size=params.group_size))
        found[bits, TRAINED] = _classes(whole, task)
    return found


def _fit(
    study: Study, model: SentenceTransformer, task: Topics, seed: int, steps: int, rate: float, label: str
) -> None:
    recipe = Recipe(
        steps=steps,
        batch_size=study.params.train_batch_size,
        learning_rate=rate,
        warmup=max(1, steps // 10),
        seed=seed,
    )
    train_classifier(model, task.texts, task.labels, recipe, label=label)


def _with(model: SentenceTransformer, body: object) -> SentenceTransformer:
    """A copy with another transformer inside."""
    changed = copy.deepcopy(model)
    changed[0].model = body
    return changed.eval()


def _classes(model: SentenceTransformer, task: Topics) -> NDArray[np.int64]:
    return np.asarray(encoders.outputs(model, task.test_texts).argmax(axis=1))


def _row(
    study: Study,
    task: Topics,
    bits: int,
    way: str,
    several: list[NDArray[np.int64]],
    full: list[NDArray[np.int64]],
) -> dict[str, object]:
    hits = [classification.correct(each, task.test_labels) for each in several]
    for seed, each in zip(study.params.train_seeds, hits, strict=True):
        study.keep(f"{bits} bits, {way}", task.name, each, {"seed": seed})
    base = [classification.correct(each, task.test_labels) for each in full]
    changed = [
        classification.flips(before, after, task.test_labels)
        for before, after in zip(full, several, strict=True)
    ]
    accuracy = stats.suite_score({task.name: (hits, "mean")}, n_resamples=CURVE_RESAMPLES)
    return {
        "task": task.name,
        "bits": bits,
        "way": way,
        **accuracy.scaled(100).columns("accuracy"),
        **stats.retention(base, hits, n_resamples=CURVE_RESAMPLES).scaled(100).columns("kept"),
        "flipped": 100
        * float(np.mean([1 - classification.agreement(a, b) for a, b in zip(full, several, strict=True)])),
        "right_to_wrong": float(np.mean([each.right_to_wrong for each in changed])),
        "wrong_to_right": float(np.mean([each.wrong_to_right for each in changed])),
        "mcnemar_p_first_seed": changed[0].p_value,
    }
