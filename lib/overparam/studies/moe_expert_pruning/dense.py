"""A dense model of another family on the same test, asked by examples: a point of reference, not a baseline."""

from __future__ import annotations

import pandas as pd

from overparam import models
from overparam.data.parallel import Pair
from overparam.evaluate.translation import score
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.moe_expert_pruning.study import Baseline, Scores, Study, columns


@step
def dense_reference(study: Study, base: Baseline) -> pd.DataFrame | None:
    """Let the dense model translate the first test sentences, and score the unpruned model on the same ones.

    Returns:
        One row a model and language, or None when the parameters name no dense model.
    """
    params = study.params
    if params.dense_reference is None:
        return None
    model, tokenizer = models.load(params.dense_reference, device=study.model.device, causal=True)
    asked = params.model_copy(update={"prompt": "few_shot"})
    dense = Study(asked, study.recorder, model, tokenizer)
    rows = []
    every = {
        language: study.pairs("en", language, "test", params.translated_items)[: params.dense_items]
        for language in params.languages
    }
    written = dense.translations(model, every, label=f"{params.dense_reference} translates")
    for language, pairs in every.items():
        texts = {
            params.dense_reference: (
                [each.text for each in written[language]],
                [each.ended for each in written[language]],
            ),
            params.model: (base.texts[language][: len(pairs)], _ended(base.scores, language, len(pairs))),
        }
        rows += [
            _row(name, language, pairs, hypotheses, ended) for name, (hypotheses, ended) in texts.items()
        ]
    table = pd.DataFrame(rows)
    study.recorder.table("dense_reference", table)
    return table


def _ended(scores: Scores, language: str, n: int) -> list[bool]:
    return [reason != "no_end" for reason in scores[language].failures[:n]]


def _row(
    name: str, language: str, pairs: list[Pair], hypotheses: list[str], ended: list[bool]
) -> dict[str, object]:
    found = score(hypotheses, [pair.target for pair in pairs], ended=ended, target_language=language)
    estimate = stats.bootstrap(found.chrf.items, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
    return {
        "model": name,
        "language": language,
        "sentences": len(pairs),
        **columns("chrF++", estimate),
        "BLEU": found.bleu.score,
        "failed": found.failure_shares["any"],
    }
