"""Students that embed text as their teacher does, by share of its parameters, and their controls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import distill
from overparam.compress.distill import encoders
from overparam.compress.distill.embedding import distill_embeddings
from overparam.experiment import sweep
from overparam.experiment.study import step
from overparam.experiment.subjects.base import System
from overparam.experiment.subjects.encoder import Encoder
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.distillation_retention.study import Study, measured
from overparam.support import cache
from overparam.train.distillation import Recipe
from overparam.train.loop import Log

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerBase

TEACHER, DISTILLED, CUT, BORROWED, UNTRAINED, WORDS = (
    "teacher",
    "distilled",
    "cut from the teacher, distilled",
    "borrowed token vectors, no training",
    "random weights",
    "bag of words",
)


@dataclass(frozen=True)
class Students:
    """Students of the teacher.

    Attributes:
        distilled: By share; of the share that tasks use one a training seed, of the others one.
        controls: By name, of the share that tasks use and the first seed.
        table: One row a share: shape, parameters, and what vocabulary and training cost.
    """

    distilled: dict[float, list[SentenceTransformer]]
    controls: dict[str, SentenceTransformer]
    table: pd.DataFrame


@dataclass(frozen=True)
class Suite:
    """Scores of the embedding suite.

    Attributes:
        table: One row a system and share: mean over tasks in points, and what it keeps of the teacher's in percent.
        by_task: Score of each task (rows) by system (columns), in points.
        kept: Retention of the distilled students by share, in percent.
    """

    table: pd.DataFrame
    by_task: pd.DataFrame
    kept: dict[float, stats.Estimate]


@step
def build(study: Study) -> Students:
    """Build a student of every share, with a vocabulary of its own, and let it learn to embed as the teacher does.

    Its token vectors begin as the teacher's outputs for the tokens. Controls of the share that tasks use: the same
    student with random weights, with its first weights alone, and one that is cut from the teacher's own layers and
    then trained in the same way.
    """
    params = study.params
    targets = encoders.outputs(study.encoder, study.texts)
    distilled: dict[float, list[SentenceTransformer]] = {}
    controls: dict[str, SentenceTransformer] = {}
    rows = []
    for share in params.shares:
        config = shape(study, share)
        tokenizer = study.tokenizer
        if config.vocab_size < len(tokenizer):
            tokenizer = distill.retrained_tokenizer(
                tokenizer,
                study.vocabulary_texts,
                config.vocab_size,
                max_length=config.max_position_embeddings,
            )
            config.vocab_size = len(tokenizer)
        for seed in params.train_seeds if share == params.task_share else params.train_seeds[:1]:
            student = distill.new_student(config, seed=seed, tokenizer=tokenizer)
            first = share == params.task_share and seed == params.train_seeds[0]
            if first:
                controls[UNTRAINED] = _wrapped(study, student, tokenizer, seed)
                cut = distill.cut_student(
                    study.teacher,
                    config,
                    tokenizer=tokenizer,
                    teacher_tokenizer=study.tokenizer,
                    seed=seed,
                )
                controls[CUT] = _wrapped(study, cut, tokenizer, seed)
                _learn(study, controls[CUT], targets, seed, f"student {CUT}")
            distill.borrow_token_vectors(
                student, tokenizer, study.teacher, study.tokenizer, pooling=study.pooling
            )
            if first:
                controls[BORROWED] = _wrapped(study, student, tokenizer, seed)
            encoder = _wrapped(study, student, tokenizer, seed)
            log, kwh = measured(partial(_learn, study, encoder, targets, seed, f"student of {share:.0%}"))
            distilled.setdefault(share, []).append(encoder)
            rows.append({"seed": seed} | _row(study, share, encoder, log) | {"training_kwh": kwh})
    table = pd.DataFrame(rows)
    study.recorder.table("students", table)
    return Students(distilled, controls, table)


def shape(study: Study, share: float) -> BertConfig:
    """Return the shape of the student of a share; the projection to the teacher's width is part of the budget."""
    head = 0
    while True:
        config = distill.student_config(study.teacher, share, head_size=head)
        needed = 0 if config.hidden_size == study.width else config.hidden_size * study.width
        if needed <= head:
            return config
        head = needed


def _wrapped(
    study: Study, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> SentenceTransformer:
    return encoders.as_encoder(
        model.to(study.teacher.device),
        tokenizer,
        width=study.width,
        max_length=study.params.max_length,
        seed=seed,
    )


def _learn(
    study: Study, encoder: SentenceTransformer, targets: NDArray[np.float32], seed: int, label: str
) -> Log:
    params = study.params
    recipe = Recipe(
        steps=params.steps,
        batch_size=params.batch_size,
        learning_rate=params.learning_rate,
        warmup=max(1, params.steps // 10),
        seed=seed,
    )
    folder = study.checkpoint(encoder, recipe, study.texts, params.objective, targets)
    with cache.using(folder):
        return distill_embeddings(
            encoder, study.texts, targets, recipe, objective=params.objective, checkpoint=folder, label=label
        )


def _row(study: Study, share: float, encoder: SentenceTransformer, log: Log) -> dict[str, object]:
    config = encoders.transformer(encoder).config
    total = sum(parameter.numel() for parameter in encoder.parameters())
    pieces = distill.cost(encoder.tokenizer, study.tokenizer, study.texts[:500])
    return {
        "share": share,
        "parameters": total,
        "share_reached": total / study.parameters,
        "embedding_parameters": models.count_parameters(encoders.transformer(encoder)).embedding,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "feed_forward": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "tokens_over_teacher": pieces.tokens_ratio,
        "unknown_share": pieces.unknown_share,
        "first_loss": float(np.mean(log.loss[:10])),
        "last_loss": float(np.mean(log.loss[-10:])),
        "training_seconds": log.seconds[-1],
    }


@step
def score(study: Study, students: Students) -> Suite:
    """Score teacher, students, controls and ready-made students on the embedding suite."""
    params = study.params
    named = [(TEACHER, 1.0, [study.encoder])]
    named += [(DISTILLED, share, several) for share, several in students.distilled.items()]
    named += [(name, params.task_share, [each]) for name, each in students.controls.items()]
    for name in params.ready_made:
        model, tokenizer = models.load(name, device=study.teacher.device)
        share = models.count_parameters(model).total / study.parameters
        ready = encoders.as_encoder(model, tokenizer, max_length=params.max_length)
        named.append((f"{name}, ready-made", round(share, 3), [ready]))
    systems = [
        System.ready(name, encoder, columns={"share": share}, repeat={"repeat": repeat})
        for name, share, several in named
        for repeat, encoder in enumerate(several)
    ]
    words = System.ready(WORDS, None, columns={"share": 0.0}, repeat={"repeat": 0})
    subject = Encoder(encoders.outputs, params.suite, params.suite_items, params.seed)
    scores = sweep.score(study, subject, systems)
    scores[WORDS, 0.0] = [subject.floor()]
    sweep.keep(study, subject, [words], scores[WORDS, 0.0])
    found = sweep.compare(subject, scores, ["share"], n_resamples=CURVE_RESAMPLES)
    table = found.table[["system", "share", "score", "kept", "kept_low", "kept_high"]]
    labels = [_label(*key) for key in scores]
    by_task = found.table[[*scores[WORDS, 0.0][0]]].set_axis(labels).T
    study.recorder.table("suite", table)
    study.recorder.table("suite_by_task", by_task.rename_axis("task").reset_index())
    return Suite(table, by_task, {share: found.kept[DISTILLED, share] for share in params.shares})


def _label(system: str, share: float) -> str:
    return f"{share:.0%} {system}" if system == DISTILLED else system
