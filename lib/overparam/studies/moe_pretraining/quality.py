"""How well the translator translates, and how well it predicts plain text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd

from overparam.data import kinds, parallel
from overparam.data.kinds import KINDS
from overparam.evaluate import generation, likelihood, prompts, translation
from overparam.experiment.study import step
from overparam.models.translator import PLAIN
from overparam.record import stats
from overparam.studies.moe_pretraining import Params, corpus
from overparam.studies.moe_pretraining.study import Study, Translator

TARGETS = ("fr", "de", "es")  # of every verse
OTHERS = (*TARGETS, "it")
DIRECTIONS = (*(("en", other) for other in OTHERS), *((other, "en") for other in OTHERS))
GREEDY, CHANCE = "greedy", "another verse"
_BATCH_TOKENS = 16384


def arrow(source: str, target: str) -> str:
    """A direction as readers see it."""
    return f"{source}→{target}"


def best_search(params: Params) -> str:
    """Name of the search whose scores the claims are about."""
    return f"beam {params.beams}" if params.beams > 1 else GREEDY


@step
def translate(study: Study, translator: Translator) -> pd.DataFrame:
    """Translate held-out verses in every direction, greedily and with a beam, and score them.

    The floor is "another verse": the human translations, each paired with the wrong verse.

    Returns:
        One row a direction and search: chrF++ and BLEU with 95 % bootstrap intervals over verses, share of failed
        translations by reason, sacrebleu's signatures.
    """
    params, tokenizer = study.params, translator.tokenizer
    pairs = {
        (source, target): parallel.verse_pairs(source, target, "test", n=params.test_verses, seed=params.seed)
        for source, target in DIRECTIONS
    }
    ask = prompts.tagged()
    asked = [ask([pair.source for pair in pairs[key]], *key) for key in DIRECTIONS]
    together = [prompt for each in asked for prompt in each]  # batches of one length, whatever the direction
    sources = [pair.source for key in DIRECTIONS for pair in pairs[key]]
    limits = [
        generation.default_limit(len(ids)) for ids in tokenizer(sources, add_special_tokens=False).input_ids
    ]
    rows = []
    for search, beams in {GREEDY: 1, best_search(params): params.beams}.items():
        made = generation.generate(
            translator.model,
            tokenizer,
            together,
            max_new_tokens=limits,
            num_beams=beams,
            batch_tokens=_BATCH_TOKENS,
            label=f"translating ({search})",
        )
        for number, key in enumerate(DIRECTIONS):
            mine = made[number * params.test_verses : (number + 1) * params.test_verses]
            texts, ended = [each.text for each in mine], [each.ended for each in mine]
            rows.append(_score(study, search, key, pairs[key], texts, ended))
    for key in DIRECTIONS:
        references = [pair.target for pair in pairs[key]]
        others = [*references[1:], references[0]]
        rows.append(_score(study, CHANCE, key, pairs[key], others, [True] * len(others)))
    table = pd.DataFrame(rows)
    study.recorder.table("translation", table)
    for row in table[table["search"] == best_search(params)].to_dict("records"):
        for metric in ("chrf", "bleu"):
            estimate = stats.Estimate(row[metric], row[f"{metric}_low"], row[f"{metric}_high"], row["verses"])
            study.recorder.metric(f"{metric}_{row['source']}_{row['target']}", estimate, "points")
    return table


@step
def examples(study: Study, n: int = 2) -> pd.DataFrame:
    """The first translations from English, as they came."""
    items = pd.concat(study.items, ignore_index=True)
    items = items[(items["search"] == best_search(study.params)) & (items["source"] == "en")]
    shown = items.groupby("target", sort=False).head(n).sort_values("verse", kind="stable")
    return shown[["verse", "target", "text", "reference", "failure"]].reset_index(drop=True)


@step
def plain_text(study: Study, translator: Translator) -> pd.DataFrame:
    """Measure the perplexity of held-out plain text, kind by kind, cut to the length of training pieces."""
    params = study.params
    rows = []
    for kind in KINDS:
        texts = kinds.texts(kind, "test")
        chosen = random.Random(params.seed).sample(texts, min(params.test_verses, len(texts)))
        items = likelihood.perplexity(
            translator.model,
            translator.tokenizer,
            chosen,
            prefix=PLAIN,
            max_length=corpus.PIECE + 2,
            label=f"scoring {kind}",
        )
        estimate = stats.bootstrap(items, statistic="perplexity", seed=params.seed)
        tokens, characters = int(items[:, 1].sum()), sum(map(len, chosen))
        loss = stats.bootstrap(items, statistic="nll_per_token", seed=params.seed)
        study.recorder.metric(f"perplexity_{kind}", estimate)
        study.recorder.metric(f"loss_{kind}", loss, "nats per token")
        rows.append(
            {"kind": kind, **estimate.columns("perplexity"), **loss.columns("loss"), "texts": estimate.n}
            | {"tokens": tokens, "characters": characters}
        )
    table = pd.DataFrame(rows)
    study.recorder.table("plain_text", table)
    return table


def _score(
    study: Study,
    search: str,
    direction: tuple[str, str],
    pairs: list[parallel.Pair],
    texts: list[str],
    ended: list[bool],
) -> dict[str, Any]:
    source, target = direction
    references = [pair.target for pair in pairs]
    found = translation.score(texts, references, ended=ended, target_language=target)
    both = {"chrf": found.chrf, "bleu": found.bleu}
    study.items.append(
        pd.DataFrame(
            {
                "search": search,
                "source": source,
                "target": target,
                "verse": [pair.id for pair in pairs],
                "text": texts,
                "reference": references,
                "failure": found.failures,
            }
            | {
                f"{name}_{column}": score.items[:, column].astype(np.int32)
                for name, score in both.items()
                for column in range(score.items.shape[1])
            }
        )
    )
    row: dict[str, Any] = {"search": search, "source": source, "target": target, "verses": len(pairs)}
    for name, score in both.items():
        estimate = stats.bootstrap(score.items, statistic=score.statistic, seed=study.params.seed)
        row |= estimate.columns(name)
    row |= {f"failed_{reason}": share for reason, share in found.failure_shares.items()}
    return row | {f"{name}_signature": score.signature for name, score in both.items()}
