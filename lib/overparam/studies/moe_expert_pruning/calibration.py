"""How the unpruned model routes calibration text, and which experts that text keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.compress import experts
from overparam.data.kinds import KINDS
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.moe_expert_pruning.study import Study
from overparam.support import progress

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Calibration:
    """How the unpruned model routes calibration text.

    Attributes:
        parts: For each language, statistics of parts of its text: instruction, source and the model's own
            translation.
        generated: For each language, statistics of the generated tokens alone.
        english: The same sentences as plain English text.
        kinds: Text that is not translated, by kind.
        reverse: Into English, for each language.
        others: What is never calibrated on, and counts only where idle experts are looked for: the unseen
            languages in both directions.
    """

    parts: dict[str, list[experts.RoutingStatistics]]
    generated: dict[str, experts.RoutingStatistics]
    english: experts.RoutingStatistics
    kinds: dict[str, experts.RoutingStatistics]
    reverse: dict[str, experts.RoutingStatistics]
    others: list[experts.RoutingStatistics]

    def of(self, language: str) -> experts.RoutingStatistics:
        """Statistics of one language."""
        return added(self.parts[language])

    @property
    def pooled(self) -> experts.RoutingStatistics:
        """Statistics of all languages of the calibration together."""
        return added([part for parts in self.parts.values() for part in parts])

    def target(self, text: str, language: str = "") -> experts.RoutingStatistics:
        """Statistics of "read and written" text, or of "written" text alone, of one language or of all."""
        if text == "read and written":
            return self.of(language) if language else self.pooled
        return self.generated[language] if language else added(list(self.generated.values()))

    @property
    def mix(self) -> NDArray[np.float64]:
        """Mean routing mass over every direction and kind of text of the study, each counted alike."""
        every = [
            *map(self.of, self.parts),
            *self.reverse.values(),
            self.english,
            *self.kinds.values(),
            *self.others,
        ]
        return np.asarray(np.mean([each.routing_mass for each in every], axis=0))


def added(parts: Sequence[experts.RoutingStatistics]) -> experts.RoutingStatistics:
    """Add statistics up."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_SENSITIVITY_SHARES = (1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the experts, that a layer keeps alone
_PART = 4  # sentences of a part: what a bootstrap over calibration text draws


@step
def calibrate(study: Study) -> Calibration:
    """Let the model translate the calibration text, and collect the routing of all that it read and wrote."""
    params = study.params
    n = params.calibration_items
    parts: dict[str, list[experts.RoutingStatistics]] = {}
    generated: dict[str, experts.RoutingStatistics] = {}
    reverse: dict[str, experts.RoutingStatistics] = {}
    every = {language: study.pairs("en", language, "calibration", n) for language in params.languages}
    own = study.translations(study.model, every, label="translating the calibration text")
    for language, pairs in every.items():
        asked = study.ask([pair.source for pair in pairs], "en", language)
        sequences = _sequences(study, asked, [each.ids for each in own[language]], end=study.ends)
        chunks = [sequences[at : at + _PART] for at in range(0, n, _PART)]
        label = f"routing of {language}"
        parts[language] = [
            experts.collect(study.model, [_batch(study, chunk)], reap=True)
            for chunk in progress.track(chunks, label)
        ]
        generated[language] = experts.collect(
            study.model, (_batch(study, chunk, generated_only=True) for chunk in chunks)
        )
        reverse[language] = _reading(study, language, "en")
    texts = [pair.source for pair in study.pairs("en", params.languages[0], "calibration", n)]
    english, *plain = (
        _collected(study, *study.plain(some), end=False)
        for some in (texts, *(study.plain_texts(kind, "validation", n) for kind in KINDS))
    )
    others = [_reading(study, *way) for other in params.unseen for way in (("en", other), (other, "en"))]
    return Calibration(parts, generated, english, dict(zip(KINDS, plain, strict=True)), reverse, others)


def _reading(study: Study, source: str, target: str) -> experts.RoutingStatistics:
    """Statistics of reference translations of the calibration sentences."""
    pairs = study.pairs(source, target, "calibration", study.params.calibration_items)
    return _collected(study, *study.given(pairs, source, target), end=study.ends)


def _collected(
    study: Study, given: Sequence[str], written: Sequence[str], *, end: bool
) -> experts.RoutingStatistics:
    ids = [list(row) for row in study.tokenizer(list(written), add_special_tokens=False)["input_ids"]]
    return experts.collect(study.model, _batches(study, _sequences(study, given, ids, end=end)), reap=True)


Sequence_ = tuple[list[int], list[int]]  # what was given, what was written


def _sequences(
    study: Study, given: Sequence[str], written: Sequence[Sequence[int]], *, end: bool
) -> list[Sequence_]:
    before = study.tokenizer(list(given), add_special_tokens=study.prompter.add_special_tokens)["input_ids"]
    eos = [study.tokenizer.eos_token_id] if end else []
    return [(list(first), [*second, *eos]) for first, second in zip(before, written, strict=True)]


def _batches(study: Study, sequences: Sequence[Sequence_], size: int = 16) -> list[dict[str, torch.Tensor]]:
    return [_batch(study, sequences[at : at + size]) for at in range(0, len(sequences), size)]


def _batch(
    study: Study, sequences: Sequence[Sequence_], *, generated_only: bool = False
) -> dict[str, torch.Tensor]:
    import torch

    width = max(len(given) + len(written) for given, written in sequences)
    ids = torch.full((len(sequences), width), int(study.tokenizer.pad_token_id or 0))
    mask, count = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (given, written) in enumerate(sequences):
        end = len(given) + len(written)
        ids[row, :end] = torch.tensor([*given, *written])
        mask[row, :end] = 1
        count[row, len(given) if generated_only else 0 : end] = True
    return {"input_ids": ids, "attention_mask": mask, "count_mask": count}


@step
def sensitivity(study: Study, calibration: Calibration) -> pd.DataFrame:
    """Cut one layer alone to several numbers of experts, and measure the loss of the calibration text's references.

    Returns:
        A row a layer (counted among the mixture-of-experts layers) and number of experts `kept`: rise of the negative
        log-likelihood a token, with its interval.
    """
    tests = study.calibration_tests
    before = study.losses_on(tests, study.model)
    mass = experts.scores(calibration.pooled, "routing_mass")
    groups, full = study.layers[0].groups, [study.n_experts] * len(study.layers)
    least = groups * math.ceil(study.top_k / groups)
    counts = {least, *(groups * round(study.n_experts * share / groups) for share in _SENSITIVITY_SHARES)}
    every = [
        (layer, kept)
        for layer in range(len(full))
        for kept in sorted(count for count in counts if least <= count < study.n_experts)
    ]
    rows = []
    for layer, kept in progress.track(every, "cutting one layer"):
        keep = experts.select(mass, [*full[:layer], kept, *full[layer + 1 :]], groups=groups)
        after = study.losses_on(tests, study.pruned(keep))
        change = stats.suite_difference(
            {name: (before[name], after[name], "nll_per_token") for name in tests},
            n_resamples=CURVE_RESAMPLES,
            shared_items=True,
        )
        rows.append({"layer": layer, "kept": kept, **change.columns("loss_change")})
    table = pd.DataFrame(rows)
    study.recorder.table("sensitivity", table)
    return table


def keep_sets(
    study: Study,
    statistics: experts.RoutingStatistics,
    calibration: Calibration,
    share: float,
    *,
    method: str = "routing_mass",
    allocation: str = "divergence",
    language: str = "",
    rises: pd.DataFrame | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Choose the experts that stay when `share` of all are pruned.

    Args:
        study: The started study.
        statistics: Of the text whose experts stay.
        calibration: Of all texts, for the layer budgets.
        share: Share of all experts that is pruned.
        method: One of `experts.METHODS`.
        allocation: "divergence" (published; its target text is the parameter `budget_text`), "divergence, written"
            (of translations alone), "uniform", "inverse" or "sensitivity".
        language: Language that budgets by divergence are for; empty for all.
        rises: From `sensitivity`, for the budgets of that name.
        seed: Of the method "random".
    """
    layers, groups = len(study.layers), study.layers[0].groups
    # in units of one expert a group, since routers that choose among groups need them equal
    total = round(layers * study.n_experts * (1 - share) / groups)
    least = min(math.ceil(study.top_k / groups), total // layers)
    limits = (least, study.n_experts // groups)
    if allocation == "uniform":
        units = experts.allocate_uniform(total, layers, *limits)
    elif allocation == "sensitivity":
        assert rises is not None
        grid = rises.pivot(index="layer", columns="kept", values="loss_change")
        kept = [int(count) // groups for count in grid.columns.to_numpy()]
        units = experts.allocate_by_rise(grid, kept, total, *limits)
    else:
        text = "written" if allocation.endswith("written") else study.params.budget_text
        target = calibration.target(text, language)
        apart = experts.divergence(target.routing_mass, calibration.english.routing_mass)
        share_out = experts.allocate_inverse if allocation == "inverse" else experts.allocate
        units = share_out(apart, total, *limits)
    counts = [groups * unit for unit in units]
    return experts.select(experts.scores(statistics, method, seed=seed), counts, groups=groups)
