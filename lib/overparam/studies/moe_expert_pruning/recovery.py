"""A short fine-tuning after the cut: on references, and on what the unpruned model writes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from overparam.compress import experts
from overparam.data.packing import Packed, Tree, pack
from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.moe_expert_pruning.study import (
    Baseline,
    Losses,
    Scores,
    Study,
    change_in_chrf,
    change_in_loss,
    columns,
    failure_share,
    mean_chrf,
)
from overparam.studies.moe_expert_pruning.sweep import GUARDED, PUBLISHED, Quality, Sweep, System, shares
from overparam.support import progress
from overparam.train import causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Examples = dict[str, list[tuple[str, str]]]  # language -> (prompt, target)
TARGETS = ("references", "parent")


@dataclass(frozen=True)
class Kind:
    """One way to recover: how much was pruned by which score, what the model learned from, and how.

    With nothing pruned, it is the control: the unpruned model, trained alike.
    """

    share: float
    method: str
    targets: str
    lora: bool = False

    @property
    def trained(self) -> str:
        """What was trained, in words."""
        return "adapters" if self.lora else "all parameters"

    @property
    def control(self) -> Kind:
        """The unpruned model, trained on the same targets in the same way."""
        return replace(self, share=0.0, method=PUBLISHED[0])


CUTS = {method: System(0.0, method, allocation).name for method, allocation in (PUBLISHED, GUARDED)}


@dataclass(frozen=True)
class Recovered:
    """Recovered models.

    Attributes:
        table: One row a kind, over seeds.
        change: Relative change of chrF++ against the unpruned model, in percent.
    """

    table: pd.DataFrame
    change: dict[Kind, stats.Estimate]


@step
def training_texts(study: Study) -> dict[str, Examples]:
    """Return training prompts with both kinds of targets: references, and the unpruned model's translations.

    No translator of this suite was trained on these sentences. The second is sequence-level distillation (Kim & Rush,
    arXiv 1606.07947). Translations that did not come to an end are left out.
    """
    found: dict[str, Examples] = {kind: {} for kind in TARGETS}
    params = study.params
    if not params.recovery_shares:
        return found
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


@step
def recover(
    study: Study, base: Baseline, found: Sweep, pruned: Quality, texts: Mapping[str, Examples]
) -> Recovered:
    """Fine-tune the models of the published cut and of the guarded one, and the unpruned model as a control.

    All parameters, on references and on the parent's translations; adapters on the middle share; the guarded cut, and
    the cut that lets a token use fewer experts, on the parent's translations alone.
    """
    params = study.params
    kinds = [
        Kind(share, PUBLISHED[0], targets)
        for share in ((0.0, *params.recovery_shares) if params.recovery_shares else ())
        for targets in TARGETS
    ]
    kinds += [Kind(share, GUARDED[0], "parent") for share in params.recovery_shares]
    if params.recovery_shares:
        kinds += [Kind(share, PUBLISHED[0], "parent") for share in shares(study)[len(params.shares) :]]
        middle = sorted(params.recovery_shares)[len(params.recovery_shares) // 2]
        kinds.append(Kind(middle, PUBLISHED[0], "parent", lora=True))
    for targets in TARGETS:
        if kinds and not any(texts[targets].values()):
            progress.note(f"no translation of {targets} came to an end: nothing to learn from, left out")
            kinds = [kind for kind in kinds if kind.targets != targets]
    scores: dict[Kind, list[Scores]] = {}
    losses: dict[Kind, list[Losses]] = {}
    runs = [(kind, seed) for kind in kinds for seed in params.recovery_seeds]
    for kind, seed in progress.track(runs, "recovering"):
        # in float32: in bfloat16 most updates of a short fine-tuning round to nothing
        cut = study.pruned(found.keep[kind.method, kind.share]) if kind.share else study.model
        model = copy.deepcopy(cut).float()
        _train(study, model, texts[kind.targets], kind, seed)
        model.to(study.model.dtype)
        system = f"recovered, {CUTS[kind.method]}" if kind.share else "unpruned, trained alike"
        columns: dict[str, Any] = {
            "share": kind.share,
            "targets": kind.targets,
            "trained": kind.trained,
            "seed": seed,
        }
        written, _ = study.translate_test(system, model, **columns)
        scores.setdefault(kind, []).append(written)
        losses.setdefault(kind, []).append(study.losses(system, model, **columns))
    change = {kind: change_in_chrf(study, base.scores, several) for kind, several in scores.items()}
    rows = [_row(study, base, pruned, kind, scores[kind], losses[kind], change[kind]) for kind in scores]
    for row, kind in zip(rows, scores, strict=True):
        if kind.share and kind.control in scores:
            apart = change_in_chrf(study, scores[kind.control], scores[kind])
            row |= apart.columns("change_from_control")
    table = pd.DataFrame(rows)
    study.recorder.table("recovery", table)
    return Recovered(table, change)


def _train(study: Study, model: PreTrainedModel, examples: Examples, kind: Kind, seed: int) -> None:
    params = study.params
    recipe = causal.Recipe(
        steps=params.recovery_steps,
        learning_rate=params.lora_learning_rate if kind.lora else params.recovery_learning_rate,
        warmup=max(1, params.recovery_steps // 10),
        decay=params.recovery_steps // 2,
        balance=0.01,
        seed=seed,
    )
    adapters = experts.Lora() if kind.lora else None
    label = f"recovering at {kind.share:.1%}, {kind.targets}"
    experts.recover(model, _batches(study, examples, seed), recipe, lora=adapters, label=label)


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
    pruned: Quality,
    kind: Kind,
    scores: Sequence[Scores],
    losses: Sequence[Losses],
    change: stats.Estimate,
) -> dict[str, object]:
    languages = study.params.languages
    before = mean_chrf(base.scores, languages)
    after = float(sum(mean_chrf(each, languages) for each in scores) / len(scores))
    allocation = next(each for method, each in (PUBLISHED, GUARDED) if method == kind.method)
    unrecovered = pruned.scores[System(kind.share, kind.method, allocation)] if kind.share else base.scores
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
        "share_pruned": kind.share,
        "method": kind.method,
        "targets": kind.targets,
        "trained": kind.trained,
        "seeds": len(scores),
        "chrF++": after,
        **columns("change_percent", change),
        "chrF++_pruned": cut,
        "gap_closed": (after - cut) / (before - cut) if lost.high < 0 else float("nan"),
        "failed": sum(failure_share(each, languages) for each in scores) / len(scores),
        **{f"loss_change_{group}": value for group, value in risen.items()},
    }
