"""Quantization-aware training against rounding afterwards, at equal steps: of a classifier or a decoder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress.distill import encoders
from overparam.compress.distill.classifier import train_classifier
from overparam.data.packing import Tree, pack
from overparam.evaluate import classification, samples
from overparam.evaluate.topics import Topics, topics
from overparam.experiment.study import step
from overparam.experiment.subjects.decoder import Decoder, Outcome
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import Study
from overparam.support import progress
from overparam.train import causal
from overparam.train.distillation import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import PreTrainedModel

FULL, AFTER, TRAINED = "full precision", "rounded after training", "trained with rounding"
_TASK = "next token"  # of a decoder
_MEASURES = {
    "mean": ("accuracy", 100),
    "perplexity": ("perplexity", 1),
}  # by statistic: column, and its scale
_ROW = 128  # tokens of a row that a decoder is trained on
_COLUMNS = [
    "task",
    "bits",
    "way",
    "change",
    "kept",
    "flipped",
    "mcnemar_p_first_seed",
]  # of a table without rows
Items = NDArray[np.float64]
Way = tuple[int, str]  # bits, and FULL, AFTER or TRAINED


Several = dict[str, list[Outcome]]  # by task, one a seed


@dataclass(frozen=True)
class QualityByBits:
    """Quality by bits.

    Attributes:
        table: One row a task, number of bits and way.
        gap_closed: By bits, where plain rounding costs more than its interval, mean over tasks and seeds: how much of
            that loss training takes back; 1 is all of it.
        after: Change of the accuracy by plain rounding, in percent of full precision, by bits; of a decoder, the rise
            of its perplexity with a minus sign.
        trained: The same with quantization-aware training.
        hidden: By bits: percent of the answers that flipped by plain rounding beyond the change of the accuracy.
    """

    table: pd.DataFrame
    gap_closed: dict[int, stats.Estimate]
    after: dict[int, stats.Estimate]
    trained: dict[int, stats.Estimate]
    hidden: dict[int, stats.Estimate]


@step
def train(study: Study) -> QualityByBits:
    """Fine-tune the model on each task, then let it go on with and without rounding.

    It goes on in full precision, to be rounded afterwards, or with its weights rounded at every step, for as many
    steps. An encoder learns to classify topics, a decoder goes on with verses and articles: all weights of its blocks,
    its embedding table left as it is. A model that cannot be trained with rounding is left out: see `not_trained` of
    the study.
    """
    params = study.params
    if study.not_trained:
        table = pd.DataFrame(columns=_COLUMNS)
        study.recorder.table("training", table)
        return QualityByBits(table, {}, {}, {}, {})
    subject = study.subject
    outcomes = _of_decoder(study, subject) if isinstance(subject, Decoder) else _of_encoder(study)
    found: dict[tuple[str, int, str], list[Outcome]] = {}
    for (task, *way), outcome in outcomes:
        found.setdefault((task, *way), []).append(outcome)  # type: ignore[arg-type]
    table = pd.DataFrame(
        [_row(study, key, several, found[key[0], 32, FULL]) for key, several in found.items()]
    )
    study.recorder.table("training", table)

    def by_task(bits: int, way: str) -> Several:
        return {task: found[task, bits, way] for task in dict.fromkeys(task for task, *_ in found)}

    full = by_task(32, FULL)
    closed, after, trained, hidden = {}, {}, {}, {}
    for bits in params.qat_bits:
        plain, aware = by_task(bits, AFTER), by_task(bits, TRAINED)
        after[bits], trained[bits] = (_kept(study, full, side).shifted(-100) for side in (plain, aware))
        hidden[bits] = stats.suite_score(
            {name: (list(map(_hidden, full[name], plain[name])), "mean") for name in full}
        ).scaled(100)
        lost = stats.suite_difference(
            {name: (_gains(full[name]), _gains(plain[name]), "mean") for name in full}
        )
        if lost.high < 0:
            closed[bits] = gap_closed(full, plain, aware)
            study.recorder.metric(f"gap_closed_{bits}_bits", closed[bits], "of the gap")
        study.recorder.metric(f"retention_{bits}_bits_after", after[bits].shifted(100), "% of full precision")
        study.recorder.metric(
            f"retention_{bits}_bits_trained", trained[bits].shifted(100), "% of full precision"
        )
    return QualityByBits(table, closed, after, trained, hidden)


def gap_closed(full: Several, plain: Several, aware: Several) -> stats.Estimate:
    """(aware − plain) ÷ (full − plain), mean over tasks, with an interval paired by item.

    Of accuracies, or of log-likelihoods. Its numerator and denominator are differences of the same items, so that it
    is a retention of what each item gains.
    """

    def gained(side: list[Outcome], less: list[Outcome]) -> list[Items]:
        return [a.gains - b.gains for a, b in zip(side, less, strict=True)]

    pairs = {
        name: (gained(full[name], plain[name]), gained(aware[name], plain[name]), "mean") for name in full
    }
    return stats.suite_retention(pairs)


def _hidden(full: Outcome, other: Outcome) -> Items:
    """Whether each answer flipped, less what it adds to the change of the accuracy, [answers, 1]."""
    was, now = full.answers == full.truth, other.answers == full.truth
    change = now.astype(float) - was
    flipped = (full.answers != other.answers).astype(np.float64)
    return np.asarray(flipped - np.sign(change.mean()) * change)[:, None]


def _gains(several: list[Outcome]) -> list[Items]:
    return [outcome.gains for outcome in several]


def _kept(study: Study, full: Several, found: Several) -> stats.Estimate:
    """Percent of full precision's quality."""

    def by_seed(side: Several) -> list[dict[str, Outcome]]:
        return [dict(zip(side, each, strict=True)) for each in zip(*side.values(), strict=True)]

    return study.subject.kept(by_seed(full), by_seed(found))


Found = Iterator[tuple[tuple[str, int, str], Outcome]]  # (task, bits, way) of one seed after the other


def _of_encoder(study: Study) -> Found:
    """Train classifiers of topics in every way, and let them classify the test texts."""
    params = study.params
    data = [
        topics(
            name,
            labelled=params.labelled,
            test_items=params.test_items,
            characters=params.characters,
            seed=params.seed,
        )
        for name in params.topics
    ]
    runs = [(task, seed) for task in data for seed in params.train_seeds]
    for task, seed in progress.track(runs, "fine-tuning"):
        encoder = encoders.as_encoder(study.model, study.tokenizer, max_length=params.max_length)
        fit = partial(_fit_classifier, study, task)
        model = encoders.as_classifier(encoder, len(task.classes), seed=seed)
        for way, whole in _ways(study, model, fit, seed, encoders.transformer, _with_transformer):
            answers = np.asarray(encoders.outputs(whole, task.test_texts).argmax(axis=1))
            items = classification.correct(answers, task.test_labels)
            yield (task.name, *way), Outcome(items, answers, np.asarray(task.test_labels))


def _of_decoder(study: Study, subject: Decoder) -> Found:
    """Let the decoder go on with verses and articles in every way, and read held-out ones."""
    texts = [text for view, some in subject.views.items() if view.endswith(", en") for text in some]
    fit = partial(_fit_decoder, study)
    for seed in progress.track(study.params.train_seeds, "fine-tuning"):
        model = copy.deepcopy(study.model).requires_grad_(False)
        _layers(model).requires_grad_(True)
        for way, whole in _ways(study, model, fit, seed, _layers, _with_layers):
            yield (_TASK, *way), subject.read(study.plain(whole), texts)


def _ways(
    study: Study,
    model: Any,
    fit: Callable[[Any, int, float, int, str], None],
    seed: int,
    body: Callable[[Any], nn.Module],
    with_body: Callable[[Any, nn.Module], Any],
) -> Iterator[tuple[Way, Any]]:
    """Train a model in every way; what is rounded is its `body`."""
    from overparam.compress.quantize import qat

    params = study.params
    steps, rate, size = params.qat_steps, params.qat_learning_rate, params.group_size
    fit(model, params.train_steps, params.learning_rate, seed, "full precision")
    start = copy.deepcopy(model)
    fit(model, steps, rate, seed + 1, "going on")
    yield (32, FULL), model
    for bits in params.qat_bits:
        yield (bits, AFTER), with_body(model, qat.post_training(body(model), bits, group_size=size))
        aware = with_body(start, qat.prepare(body(start), bits, group_size=size))
        fit(aware, steps, rate, seed + 1, f"{bits} bits")
        yield (bits, TRAINED), with_body(aware, qat.convert(body(aware), bits, group_size=size))


def _fit_classifier(
    study: Study, task: Topics, model: SentenceTransformer, steps: int, rate: float, seed: int, label: str
) -> None:
    recipe = Recipe(
        steps=steps,
        batch_size=study.params.train_batch_size,
        learning_rate=rate,
        warmup=max(1, steps // 10),
        seed=seed,
    )
    train_classifier(model, task.texts, task.labels, recipe, label=f"{task.name}: {label}")


def _fit_decoder(
    study: Study, model: PreTrainedModel, steps: int, rate: float, seed: int, label: str
) -> None:
    recipe = causal.Recipe(
        steps=steps, learning_rate=rate, warmup=max(1, steps // 10), decay=steps // 2, seed=seed
    )
    texts = itertools.cycle(samples.shuffled(study.train_texts, seed))
    trees = (Tree((), [study.tokenizer(text)["input_ids"][:_ROW]]) for text in texts)
    batches = pack(trees, rows=study.params.train_batch_size, length=_ROW)
    causal.train(model, batches, recipe, label=label)


def _with_transformer(model: SentenceTransformer, body: nn.Module) -> SentenceTransformer:
    changed = copy.deepcopy(model)
    changed[0].model = body
    return changed.eval()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return models.blocks(model.base_model).layers


def _with_layers(model: PreTrainedModel, layers: nn.Module) -> PreTrainedModel:
    changed = models.sharing_copy(model)
    changed.base_model.set_submodule(models.blocks(model.base_model).path, layers)
    return changed.eval()


def _row(
    study: Study, key: tuple[str, int, str], several: list[Outcome], full: list[Outcome]
) -> dict[str, object]:
    task, bits, way = key
    items = [outcome.items for outcome in several]
    for seed, each in zip(study.params.train_seeds, items, strict=True):
        study.recorder.keep(each, system=f"{bits} bits, {way}", seed=seed, task=task)
    statistic = several[0].statistic
    measure, scale = _MEASURES[statistic]
    score, base = (
        stats.bootstrap(
            [each.items for each in side], statistic=statistic, n_resamples=CURVE_RESAMPLES
        ).scaled(scale)
        for side in (several, full)
    )
    before, after = ([each.answers for each in side] for side in (full, several))
    same = [classification.agreement(*each) for each in zip(before, after, strict=True)]
    return {
        "task": task,
        "bits": bits,
        "way": way,
        **score.columns(measure),
        "change": score.value - base.value,
        **_kept(study, {task: full}, {task: several}).columns("kept"),
        "flipped": 100 * float(np.mean([1 - each for each in same])),
        **classification.flips_over_repeats(before, after, several[0].truth),
    }
