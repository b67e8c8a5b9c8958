"""Distillation of a decoder by next token: forward and reverse KL, and on texts that the student writes itself."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from overparam import models
from overparam.compress.distill.decoder import Objective, distill_decoder, token_kl
from overparam.data import splits
from overparam.evaluate import samples
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.distillation_retention.study import Study, cached
from overparam.support import cache, progress
from overparam.train import causal

_PROMPT = 0.25  # of the tokens of a text; the rest is the target
_KL = "nll_per_token"  # the sum of column 0 over that of column 1


@dataclass(frozen=True)
class _Way:
    name: str
    objective: Objective
    on_policy_share: float = 0.0


_WAYS = (
    _Way("forward KL", "forward_kl"),
    _Way("reverse KL (MiniLLM)", "reverse_kl"),
    _Way("forward KL, half on own texts (GKD)", "forward_kl", 0.5),
    _Way("JSD, half on own texts (GKD)", "jsd", 0.5),
)


@step
def compare(study: Study) -> pd.DataFrame | None:
    """Distil the decoder that the parameters name in every way, and measure how near it comes to its teacher.

    Texts are verses, cut after a quarter; those that are measured are of the test split.

    Returns:
        One row a way: KL(teacher ‖ student) and KL(student ‖ teacher) on held-out texts, in nats a token, before, and
        their change with a paired interval. None when the parameters name no decoder.

    Raises:
        ValueError: If teacher and student have other tokenizers.
    """
    params = study.params
    if params.decoder_teacher is None or params.decoder_student is None:
        return None
    device = models.working_device()
    teacher, tokenizer = models.load(
        params.decoder_teacher, dtype=models.working_dtype("auto"), device=device, causal=True
    )
    student, own = models.load(params.decoder_student, device=device, causal=True)
    learn, judge = (_pairs(study, tokenizer, split, n) for split, n in _sizes(study))
    before = token_kl(student, teacher, *judge, label="the student before")
    study.recorder.keep(before, system="before", task="decoder")
    recipe = causal.Recipe(
        steps=params.decoder_steps,
        learning_rate=params.decoder_learning_rate,
        warmup=max(1, params.decoder_steps // 10),
        decay=params.decoder_steps,
        seed=params.seed,
    )
    both = [models.provenance(name) for name in (params.decoder_teacher, params.decoder_student)]
    rows = []
    for way in progress.track(_WAYS, "distilling a decoder"):
        model = copy.deepcopy(student)
        folder = cached(both, asdict(recipe), asdict(way), params.decoder_batch_size, learn)
        with cache.using(folder):
            losses = distill_decoder(
                model,
                teacher,
                *learn,
                recipe,
                objective=way.objective,
                on_policy_share=way.on_policy_share,
                batch_size=params.decoder_batch_size,
                tokenizers=(own, tokenizer),
                checkpoint=folder,
                label=way.name,
            )
        after = token_kl(model, teacher, *judge, label=f"after {way.name}")
        study.recorder.keep(after, system=way.name, task="decoder")
        row: dict[str, object] = {"way": way.name, "last_loss": losses[-1]}
        for name, column in (("forward_kl", 0), ("reverse_kl", 1)):
            sides = [items[:, [column, 2]] for items in (before, after)]
            start = stats.bootstrap(sides[0], statistic=_KL, n_resamples=CURVE_RESAMPLES)
            change = stats.difference(*sides, statistic=_KL, n_resamples=CURVE_RESAMPLES)
            row |= {f"{name}_before": start.value, **change.columns(f"{name}_change")}
        rows.append(row)
    table = pd.DataFrame(rows)
    study.recorder.table("decoders", table)
    return table


def _sizes(study: Study) -> tuple[tuple[str, int], tuple[str, int]]:
    params = study.params
    return ("train", params.decoder_texts), ("test", max(8, params.decoder_texts // 8))


def _pairs(study: Study, tokenizer: Any, split: str, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the beginnings of `n` verses, and of what follows."""
    texts = samples.shuffled([verse.text for verse in splits.verses_in("web", split)], study.params.seed)[:n]
    rows = tokenizer(texts, truncation=True, max_length=study.params.max_length)["input_ids"]
    cuts = [max(1, round(_PROMPT * len(row))) for row in rows]
    return [row[:at] for row, at in zip(rows, cuts, strict=True)], [
        row[at:] for row, at in zip(rows, cuts, strict=True)
    ]
