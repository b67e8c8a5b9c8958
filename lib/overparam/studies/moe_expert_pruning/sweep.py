"""How quality falls with the share of experts pruned: scores, layer budgets, controls, and other texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from overparam import progress
from overparam.compress import experts
from overparam.report import stats
from overparam.studies.moe_expert_pruning.calibration import Calibration, added, keep_sets
from overparam.studies.moe_expert_pruning.study import (
    CURVE_RESAMPLES,
    Baseline,
    Losses,
    Scores,
    Study,
    change_in_chrf,
    change_in_loss,
    failure_share,
    mean_chrf,
)

PUBLISHED = ("routing_mass", "divergence")  # score and layer budget of the paper
_PEERS = ("frequency", "koishekenov", "reap")  # published with equal budgets
_DEEP = 0.75  # share at which peer and chance are translated with once more


@dataclass(frozen=True)
class System:
    """One way to choose the experts that stay."""

    share: float
    method: str
    allocation: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Its name in the per-item scores."""
        seed = f" {self.seed}" if self.method == "random" else ""
        return f"{self.method}{seed}, {self.allocation} budgets"


@dataclass(frozen=True)
class Sweep:
    """Every system at every share.

    Attributes:
        table: One row a system: rise of the negative log-likelihood a token with its interval, and how many of
            the pruned experts were idle on the training mix anyway.
        losses: Of the published method on every test, by share.
        keep: Experts that the published method keeps, by share.
    """

    table: pd.DataFrame
    losses: dict[float, Losses]
    keep: dict[float, list[list[int]]]


def systems(study: Study, share: float) -> list[System]:
    """Return the systems that are compared at a share: the method, its budgets' controls, its peers, and chance."""
    method = PUBLISHED[0]
    found = [System(share, method, allocation) for allocation in ("divergence", "uniform", "inverse")]
    found += [System(share, peer, "uniform") for peer in (*_PEERS, "inverted")]
    return found + [System(share, "random", "uniform", seed) for seed in range(study.params.random_seeds)]


def sweep(study: Study, base: Baseline, calibration: Calibration) -> Sweep:
    """Prune by every system at every share, and measure the likelihood of the reference translations."""
    seen = [f"en-{language}" for language in study.params.languages]
    pooled, idle = calibration.pooled, idle_experts(study, calibration)
    rows, losses, kept = [], {}, {}
    every = [system for share in study.params.shares for system in systems(study, share)]
    for system in progress.track(every, "pruning"):
        keep = _keep(study, system, pooled, calibration.english)
        published = (system.method, system.allocation) == PUBLISHED
        found = study.losses(
            system.name, study.pruned(keep), () if published else seen, share=system.share, seed=system.seed
        )
        if published:
            losses[system.share], kept[system.share] = found, keep
        change = change_in_loss(study, base.losses, found)
        rows.append(
            {
                "share_pruned": system.share,
                "method": system.method,
                "allocation": system.allocation,
                "seed": study.params.seed + system.seed if system.method == "random" else None,
                "loss_change": change.value,
                "low": change.low,
                "high": change.high,
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
    english: experts.RoutingStatistics,
) -> list[list[int]]:
    return keep_sets(
        study,
        statistics,
        english,
        system.share,
        method=system.method,
        allocation=system.allocation,
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


def quality(study: Study, base: Baseline, calibration: Calibration) -> Quality:
    """Translate with pruned models.

    The published method and equal budgets at every share; all systems at half; REAP and random experts also deeper.
    """
    half, deep = (min(study.params.shares, key=lambda each: abs(each - share)) for share in (0.5, _DEEP))
    chosen = [
        System(share, PUBLISHED[0], allocation)
        for share in study.params.shares
        for allocation in ("divergence", "uniform")
    ]
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
        published = (system.method, system.allocation) == PUBLISHED
        model = study.pruned(_keep(study, system, pooled, calibration.english))
        scores[system], written = study.translate_test(
            system.name,
            model,
            languages=everywhere if published else languages,
            share=system.share,
            seed=system.seed,
        )
        if published:
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
        "repeat": system.seed,
        "chrF++": mean_chrf(scores, languages),
        "change_percent": change.value,
        "low": change.low,
        "high": change.high,
        "failed": failure_share(scores, languages),
    }


def examples(study: Study, found: Quality, language: str, item: int = 0) -> pd.DataFrame:
    """Show one test sentence as each pruned model translates it."""
    pair = study.pairs("en", language, "test", study.params.translated_items)[item]
    rows = [("source", pair.source), ("reference", pair.target)]
    rows += [
        (f"{share:.1%} pruned" if share else "unpruned", written[language][item])
        for share, written in sorted(found.texts.items())
    ]
    return pd.DataFrame(rows, columns=["", language])


def elsewhere(study: Study, base: Baseline, found: Sweep) -> pd.DataFrame:
    """Compare what the published cut does to seen and unseen languages, to English, and to other texts.

    Returns:
        One row a share and group: rise of the negative log-likelihood a token, with its interval.
    """
    groups: dict[str, list[str]] = {}
    for name, test in study.tests.items():
        groups.setdefault(test.group, []).append(name)
    rows = []
    for share, losses in found.losses.items():
        for group, names in groups.items():
            change = change_in_loss(study, base.losses, losses, names)
            rows.append(
                {
                    "share_pruned": share,
                    "group": group,
                    "loss_change": change.value,
                    "low": change.low,
                    "high": change.high,
                }
            )
    table = pd.DataFrame(rows)
    study.recorder.table("elsewhere", table)
    return table


def transfer(study: Study, base: Baseline, calibration: Calibration) -> pd.DataFrame:
    """Calibrate on one text, test on another: each language, all languages, translation into English, news.

    At the shares next to 50 and 75 %. Layer budgets are equal here, so that only the choice of experts differs; one
    random choice stands beside.

    Returns:
        One row a share, calibration and test: rise of the negative log-likelihood a token, with its interval.
    """
    sources = {language: calibration.of(language) for language in study.params.languages}
    sources |= {
        "all languages": calibration.pooled,
        "into English": added(list(calibration.reverse.values())),
        "news": calibration.news,
        "none (random)": calibration.pooled,
    }
    shares = sorted({min(study.params.shares, key=lambda each: abs(each - share)) for share in (0.5, _DEEP)})
    rows = []
    for share in shares:
        for name, statistics in progress.track(sources.items(), f"calibrations at {share:.0%}"):
            method = "random" if name.startswith("none") else PUBLISHED[0]
            keep = keep_sets(
                study,
                statistics,
                calibration.english,
                share,
                method=method,
                allocation="uniform",
                seed=study.params.seed,
            )
            losses = study.losses(
                f"calibrated on {name}", study.pruned(keep), share=share, allocation="uniform"
            )
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
                        "loss_change": change.value,
                        "low": change.low,
                        "high": change.high,
                    }
                )
    table = pd.DataFrame(rows)
    study.recorder.table("transfer", table)
    return table
