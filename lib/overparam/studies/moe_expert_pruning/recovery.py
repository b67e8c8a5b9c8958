"""A short fine-tuning after the cut: on references, and on what the unpruned model writes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from overparam import progress
from overparam.compress import causal, experts
from overparam.data.packing import Packed, Tree, pack
from overparam.report import stats
from overparam.studies.moe_expert_pruning.study import (
    Baseline,
    Losses,
    Scores,
    Study,
    change_in_chrf,
    change_in_loss,
    failure_share,
    mean_chrf,
)
from overparam.studies.moe_expert_pruning.sweep import PUBLISHED, Quality, Sweep, System

Examples = dict[str, list[tuple[str, str]]]  # language -> (prompt, target)
TARGETS = ("references", "parent")


@dataclass(frozen=True)
class Run:
    """One recovery: what was pruned, what it learned from, and how."""

    share: float
    targets: str
    lora: bool
    seed: int


@dataclass(frozen=True)
class Recovered:
    """Recovered models.

    Attributes:
        table: One row a share, kind of targets and way of training, over seeds.
        change: Relative change of chrF++ against the unpruned model, by the same, in percent.
    """

    table: pd.DataFrame
    change: dict[tuple[float, str, bool], stats.Estimate]


def training_texts(study: Study) -> dict[str, Examples]:
    """Return training prompts with both kinds of targets: references, and the unpruned model's translations.

    The second is sequence-level distillation (Kim & Rush, arXiv 1606.07947). Translations that did not come to an
    end are left out.
    """
    found: dict[str, Examples] = {kind: {} for kind in TARGETS}
    params = study.params
    every = {
        language: study.pairs("en", language, "training", params.recovery_items)
        for language in params.languages
    }
    own = study.translations(study.model, every, label="the parent translates the training text")
    for language, pairs in every.items():
        asked = study.ask([pair.source for pair in pairs], "en", language)
        found["references"][language] = _examples(study, asked, [pair.target for pair in pairs])
        usable = [
            (prompt, generation.text)
            for prompt, generation in zip(asked, own[language], strict=True)
            if generation.ended and generation.text
        ]
        found["parent"][language] = _examples(study, *map(list, zip(*usable, strict=True))) if usable else []
    return found


def _examples(study: Study, asked: list[str], answers: list[str]) -> list[tuple[str, str]]:
    return list(zip(*study.prompter.given(asked, answers), strict=True))


def recover(
    study: Study, base: Baseline, found: Sweep, pruned: Quality, texts: Mapping[str, Examples]
) -> Recovered:
    """Fine-tune the models of the published cut: all parameters, and adapters on the middle share."""
    params = study.params
    middle = sorted(params.recovery_shares)[len(params.recovery_shares) // 2 :][
        :1
    ]  # none when none is asked for
    runs = [
        Run(share, targets, lora, seed)
        for share in params.recovery_shares
        for targets in TARGETS
        for lora in (False, True)
        for seed in params.recovery_seeds
        if not lora or (share in middle and targets == "parent")
    ]
    for targets in TARGETS:
        if runs and not any(texts[targets].values()):
            progress.note(f"no translation of {targets} came to an end: nothing to learn from, left out")
            runs = [run for run in runs if run.targets != targets]
    scores: dict[tuple[float, str, bool], list[Scores]] = {}
    losses: dict[tuple[float, str, bool], list[Losses]] = {}
    for run in progress.track(runs, "recovering"):
        # in float32: in bfloat16 most updates of a short fine-tuning round to nothing
        model = copy.deepcopy(study.pruned(found.keep[run.share])).float()
        _train(study, model, texts[run.targets], run)
        model.to(study.model.dtype)
        how = "adapters" if run.lora else "all parameters"
        columns: dict[str, Any] = {
            "share": run.share,
            "targets": run.targets,
            "trained": how,
            "seed": run.seed,
        }
        written, _ = study.translate_test("recovered", model, **columns)
        key = (run.share, run.targets, run.lora)
        scores.setdefault(key, []).append(written)
        losses.setdefault(key, []).append(study.losses("recovered", model, **columns))
    change = {key: change_in_chrf(study, base.scores, several) for key, several in scores.items()}
    rows = [_row(study, base, found, pruned, key, scores[key], losses[key], change[key]) for key in scores]
    table = pd.DataFrame(rows)
    study.recorder.table("recovery", table)
    return Recovered(table, change)


def _train(study: Study, model: PreTrainedModel, examples: Examples, run: Run) -> None:
    params = study.params
    recipe = causal.Recipe(
        steps=params.recovery_steps,
        learning_rate=params.lora_learning_rate if run.lora else params.recovery_learning_rate,
        warmup=max(1, params.recovery_steps // 10),
        decay=params.recovery_steps // 2,
        balance=0.01,
        seed=run.seed,
    )
    adapters = experts.Lora() if run.lora else None
    label = f"recovering at {run.share:.1%}, {run.targets}"
    experts.recover(model, _batches(study, examples, run.seed), recipe, lora=adapters, label=label)


def _batches(study: Study, examples: Examples, seed: int) -> Iterator[Packed]:
    """Yield batches for ever, each epoch in another order; translations of one sentence share its tokens."""
    params = study.params
    found = trees(study, examples)

    def endless() -> Iterator[Tree]:
        rng = random.Random(seed)
        while True:
            yield from rng.sample(found, len(found))

    return pack(endless(), rows=params.recovery_rows, length=params.recovery_row_length)


def trees(study: Study, examples: Examples) -> list[Tree]:
    """Return training sequences: prompts that differ in their last token alone share the others.

    A tree that is longer than a row is taken apart; a sequence that is, is left out.
    """
    length = study.params.recovery_row_length
    branches: dict[tuple[int, ...], list[Sequence[int]]] = {}
    end = [study.tokenizer.eos_token_id] if study.ends else []
    for pairs in filter(None, examples.values()):
        prompts = study.tokenizer(
            [prompt for prompt, _ in pairs], add_special_tokens=study.prompter.add_special_tokens
        )["input_ids"]
        targets = study.tokenizer([target for _, target in pairs], add_special_tokens=False)
        for prompt, target in zip(prompts, targets["input_ids"], strict=True):
            branches.setdefault(tuple(prompt[:-1]), []).append([prompt[-1], *target, *end])
    found = []
    for prefix, continued in branches.items():
        whole = Tree(prefix, continued)
        alone = [Tree(prefix, [branch]) for branch in continued]
        found += [whole] if len(whole) <= length else [tree for tree in alone if len(tree) <= length]
    return found


def _row(
    study: Study,
    base: Baseline,
    found: Sweep,
    pruned: Quality,
    key: tuple[float, str, bool],
    scores: Sequence[Scores],
    losses: Sequence[Losses],
    change: stats.Estimate,
) -> dict[str, object]:
    share, targets, lora = key
    languages = study.params.languages
    before = mean_chrf(base.scores, languages)
    after = float(sum(mean_chrf(each, languages) for each in scores) / len(scores))
    unrecovered = pruned.scores[System(share, *PUBLISHED)]
    cut, lost = mean_chrf(unrecovered, languages), change_in_chrf(study, base.scores, unrecovered)
    groups = {test.group for test in study.tests.values()}
    risen = {
        group: sum(
            change_in_loss(
                study, base.losses, each, [name for name, test in study.tests.items() if test.group == group]
            ).value
            for each in losses
        )
        / len(losses)
        for group in sorted(groups)
    }
    return {
        "share_pruned": share,
        "targets": targets,
        "trained": "adapters" if lora else "all parameters",
        "seeds": len(scores),
        "chrF++": after,
        "change_percent": change.value,
        "low": change.low,
        "high": change.high,
        "chrF++_pruned": cut,
        "gap_closed": (after - cut) / (before - cut) if lost.high < 0 else float("nan"),
        "failed": sum(failure_share(each, languages) for each in scores) / len(scores),
        **{f"loss_change_{group}": value for group, value in risen.items()},
        **{"loss_change_pruned_seen": change_in_loss(study, base.losses, found.losses[share]).value},
    }
