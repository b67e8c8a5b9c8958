"""How quality falls with the share of experts pruned: scores, layer budgets, controls, and other texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from overparam.compress import experts
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.moe_expert_pruning.calibration import Calibration, added, keep_sets
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
from overparam.support import progress

PUBLISHED = ("routing_mass", "divergence")  # score and layer budget of the paper
WRITTEN = ("routing_mass", "divergence, written")  # of the translation alone
GUARDED = ("routing_mass_super", "uniform")  # the same score with super experts kept: not the paper's
SENSITIVE = (
    "routing_mass",
    "sensitivity",
)  # layer budgets by what a cut of each layer costs: not the paper's
_PEERS = (
    "frequency",
    "koishekenov",
    "reap",
)  # published with equal budgets; REAP with the gates that the model applies
_DEEP = 0.75  # share at which peer and chance are translated with once more


@dataclass(frozen=True)
class System:
    """One way to choose the experts that stay.

    Attributes:
        share: Share of the experts that is pruned.
        method: One of `experts.METHODS`.
        allocation: Of the layer budgets, see `keep_sets`.
        seed: Of random choices, added to the study's.
        alone: Whether a model is pruned for each language by itself, instead of one for all.
    """

    share: float
    method: str
    allocation: str
    seed: int = 0
    alone: bool = False

    @property
    def name(self) -> str:
        """Its name in the per-item scores."""
        seed = f" {self.seed}" if self.method == "random" else ""
        return f"{self.method}{seed}, {self.allocation} budgets{', one language' if self.alone else ''}"


@dataclass(frozen=True)
class Sweep:
    """Every system at every share.

    Attributes:
        table: One row a system: rise of the negative log-likelihood a token with its interval, and how many of
            the pruned experts were idle on the training mix anyway.
        losses: Of the published method and the guarded one on every test, by method and share.
        keep: Experts that they keep, likewise.
    """

    table: pd.DataFrame
    losses: dict[tuple[str, float], Losses]
    keep: dict[tuple[str, float], list[list[int]]]


def systems(study: Study, share: float) -> list[System]:
    """Return the systems that are compared at a share: the method, controls of its budgets, its peers, and chance."""
    if share == study.lowered:  # all budgets are the same
        return [System(share, *PUBLISHED)]
    method = PUBLISHED[0]
    found = [System(share, method, allocation) for allocation in ("divergence", "uniform", "inverse")]
    found += [System(share, *WRITTEN)] if study.params.budget_text != "written" else []
    found += [System(share, *SENSITIVE), System(share, *GUARDED)]
    found += [System(share, peer, "uniform") for peer in (*_PEERS, "inverted")]
    return found + [System(share, "random", "uniform", seed) for seed in range(study.params.random_seeds)]


def shares(study: Study) -> list[float]:
    """The shares of the parameters, and the one where a token uses fewer experts."""
    lowered = study.lowered
    return [*study.params.shares, *([lowered] if lowered and lowered > study.params.shares[-1] else [])]


@step
def sweep(study: Study, base: Baseline, calibration: Calibration, rises: pd.DataFrame) -> Sweep:
    """Prune by every system at every share, and measure the likelihood of the reference translations."""
    seen = [f"en-{language}" for language in study.params.languages]
    pooled, idle = calibration.pooled, idle_experts(study, calibration)
    rows, losses, kept = [], {}, {}
    every = [system for share in shares(study) for system in systems(study, share)]
    for system in progress.track(every, "pruning"):
        keep = _keep(study, system, pooled, calibration, rises)
        everywhere = (system.method, system.allocation) in (PUBLISHED, GUARDED)
        found = study.losses(
            system.name, study.pruned(keep), () if everywhere else seen, share=system.share, seed=system.seed
        )
        if everywhere:
            losses[system.method, system.share], kept[system.method, system.share] = found, keep
        change = change_in_loss(study, base.losses, found)
        rows.append(
            {
                "share_pruned": system.share,
                "method": system.method,
                "allocation": system.allocation,
                "seed": study.params.seed + system.seed if system.method == "random" else None,
                **columns("loss_change", change),
                "idle_among_pruned": _idle_share(study, keep, idle),
                "kept_by_layer": " ".join(str(len(layer)) for layer in keep),
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("sweep", table)
    return Sweep(table, losses, kept)


def _keep(
    study: Study,
    system: System,
    statistics: experts.RoutingStatistics,
    calibration: Calibration,
    rises: pd.DataFrame,
    language: str = "",
) -> list[list[int]]:
    return keep_sets(
        study,
        statistics,
        calibration,
        system.share,
        method=system.method,
        allocation=system.allocation,
        language=language,
        rises=rises,
        seed=study.params.seed + system.seed,
    )


def idle_experts(study: Study, calibration: Calibration) -> list[set[int]]:
    """Return the experts of each layer that hardly work on anything: pruning those is free."""
    least = study.params.idle_below / study.n_experts
    return [set(np.flatnonzero(layer < least).tolist()) for layer in calibration.mix]


def _idle_share(study: Study, keep: Sequence[Sequence[int]], idle: Sequence[set[int]]) -> float:
    """Share of the pruned experts that are idle."""
    pruned = len(study.layers) * study.n_experts - sum(map(len, keep))
    return sum(len(each - set(kept)) for kept, each in zip(keep, idle, strict=True)) / pruned


@dataclass(frozen=True)
class Quality:
    """What pruned models write.

    Attributes:
        table: One row a system.
        scores: By system.
        texts: Translations by the published method, by share and language.
    """

    table: pd.DataFrame
    scores: dict[System, Scores]
    texts: dict[float, dict[str, list[str]]]


@step
def quality(study: Study, base: Baseline, calibration: Calibration, rises: pd.DataFrame) -> Quality:
    """Translate with pruned models.

    The published method, equal budgets, budgets by sensitivity and super experts kept at every share, and all but equal
    budgets for each language by itself too; all systems at half; REAP and random experts also deeper.
    """
    half, deep = (min(study.params.shares, key=lambda each: abs(each - share)) for share in (0.5, _DEEP))
    chosen = [
        System(share, *how)
        for share in study.params.shares
        for how in (PUBLISHED, (PUBLISHED[0], "uniform"), SENSITIVE, GUARDED)
    ]
    chosen += [
        System(share, *how, alone=True)
        for share in study.params.shares
        for how in (PUBLISHED, SENSITIVE, GUARDED)
    ]
    chosen += [System(share, *PUBLISHED) for share in shares(study)[len(study.params.shares) :]]
    chosen += [system for system in systems(study, half) if system not in chosen]
    deeper = [system for system in systems(study, deep) if system.method in ("reap", "random")]
    chosen += [system for system in deeper if system not in chosen]
    languages = study.params.languages
    rows = [_row(System(0.0, *PUBLISHED), base.scores, stats.Estimate(0.0, 0.0, 0.0, 0), languages)]
    scores: dict[System, Scores] = {}
    texts = {0.0: base.texts}
    everywhere = (*languages, *study.params.unseen)
    pooled = calibration.pooled
    for system in progress.track(chosen, "translating with pruned models"):
        how = (system.method, system.allocation)
        both = everywhere if how in (PUBLISHED, GUARDED) else languages
        parts = {language: (language,) for language in languages} if system.alone else {"": both}
        scores[system] = {}
        for name, some in parts.items():
            statistics = calibration.of(name) if name else pooled
            model = study.pruned(_keep(study, system, statistics, calibration, rises, name))
            columns = {"share": system.share, "seed": system.seed}
            found, written = study.translate_test(system.name, model, languages=some, **columns)
            scores[system] |= found
            if how == PUBLISHED and not system.alone:
                texts[system.share] = written
        change = change_in_chrf(study, base.scores, scores[system])
        rows.append(_row(system, scores[system], change, languages))
    table = pd.DataFrame(rows)
    study.recorder.table("quality", table)
    return Quality(table, scores, texts)


def _row(
    system: System, scores: Scores, change: stats.Estimate, languages: Sequence[str]
) -> dict[str, object]:
    return {
        "share_pruned": system.share,
        "method": system.method,
        "allocation": system.allocation,
        "calibration": "one language" if system.alone else "all languages",
        "repeat": system.seed,
        "chrF++": mean_chrf(scores, languages),
        **columns("change_percent", change),
        "failed": failure_share(scores, languages),
    }


@step
def without_super_experts(study: Study, base: Baseline, calibration: Calibration) -> pd.DataFrame:
    """Prune single experts: each super expert, and beside it the most used other one of its layer.

    Returns:
        One row an expert: its routing mass, its output norm against the median of its layer, and the rise of the
        negative log-likelihood without it. Empty when the model has no super expert.
    """
    pooled = calibration.pooled
    mass, norms = (experts.scores(pooled, method) for method in ("routing_mass", "reap"))
    seen = [f"en-{language}" for language in study.params.languages]
    rows = []
    for layer, found in enumerate(experts.super_experts(pooled)):
        if not found or study.layers[layer].groups > 1:  # routers that choose among groups need them equal
            continue
        used = max(set(range(study.n_experts)) - set(found), key=lambda each: mass[layer][each])
        for expert in (*found, used):
            keep = [[each for each in range(study.n_experts) if (at, each) != (layer, expert)]
                    for at in range(len(study.layers))]  # fmt: skip
            after = study.losses(f"without expert {expert} of layer {layer}", study.pruned(keep), seen)
            change = change_in_loss(study, base.losses, after)
            rows.append(
                {
                    "layer": study.layers[layer].index,
                    "expert": expert,
                    "super": expert in found,
                    "routing_mass": mass[layer][expert],
                    "norm_over_median": norms[layer][expert] / np.median(norms[layer]),
                    **change.columns("loss_change"),
                }
            )
    columns = ["layer", "expert", "super", "routing_mass", "norm_over_median"]
    table = pd.DataFrame(rows, columns=None if rows else columns)
    study.recorder.table("super_experts", table)
    study.recorder.metric("super_experts", int(sum(row["super"] for row in rows)))
    return table


@step
def examples(study: Study, found: Quality, language: str, item: int = 0) -> pd.DataFrame:
    """Show one test sentence as each pruned model translates it."""
    pair = study.pairs("en", language, "test", study.params.translated_items)[item]
    rows = [("source", pair.source), ("reference", pair.target)]
    rows += [
        (f"{share:.1%} pruned" if share else "unpruned", written[language][item])
        for share, written in sorted(found.texts.items())
    ]
    return pd.DataFrame(rows, columns=["", language])


@step
def elsewhere(study: Study, base: Baseline, found: Sweep) -> pd.DataFrame:
    """Compare what a cut does to seen and unseen languages, to English, and to other texts.

    Returns:
        One row a method, share and group: rise of the negative log-likelihood a token, with its interval.
    """
    groups: dict[str, list[str]] = {}
    for name, test in study.tests.items():
        groups.setdefault(test.group, []).append(name)
    rows = []
    for (method, share), losses in found.losses.items():
        for group, names in groups.items():
            change = change_in_loss(study, base.losses, losses, names)
            rows.append(
                {
                    "method": method,
                    "share_pruned": share,
                    "group": group,
                    **columns("loss_change", change),
                }
            )
    table = pd.DataFrame(rows)
    study.recorder.table("elsewhere", table)
    return table


@step
def transfer(study: Study, base: Baseline, calibration: Calibration) -> pd.DataFrame:
    """Calibrate on one text, test on another: each language, all languages, translation into English, other tasks.

    At the share next to 50 %. Super experts, which serve every text, stay and layer budgets are equal here, so that
    only the choice of the other experts differs; one random choice of all experts stands beside.

    Returns:
        One row a calibration and test: rise of the negative log-likelihood a token, with its interval.
    """
    sources = {language: calibration.of(language) for language in study.params.languages}
    sources |= {
        "all languages": calibration.pooled,
        "into English": added(list(calibration.reverse.values())),
        **calibration.kinds,
        "none (random)": calibration.pooled,
    }
    share = min(study.params.shares, key=lambda each: abs(each - 0.5))
    rows = []
    for name, statistics in progress.track(sources.items(), f"calibrations at {share:.0%}"):
        method = "random" if name.startswith("none") else GUARDED[0]
        keep = keep_sets(
            study,
            statistics,
            calibration,
            share,
            method=method,
            allocation="uniform",
            seed=study.params.seed,
        )
        losses = study.losses(f"calibrated on {name}", study.pruned(keep), share=share, allocation="uniform")
        for test, items in losses.items():
            change = stats.difference(
                base.losses[test], items, statistic="nll_per_token", n_resamples=CURVE_RESAMPLES
            )
            rows.append(
                {
                    "share_pruned": share,
                    "calibration": name,
                    "test": test,
                    "group": study.tests[test].group,
                    **columns("loss_change", change),
                }
            )
    table = pd.DataFrame(rows)
    study.recorder.table("transfer", table)
    return table
