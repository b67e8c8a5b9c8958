"""Which experts stay: how much languages agree, and how much calibration text it takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from overparam.compress import experts
from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.moe_expert_pruning.calibration import Calibration, added
from overparam.studies.moe_expert_pruning.study import Study
from overparam.studies.moe_expert_pruning.sweep import idle_experts

SHARE = 0.75  # of the experts pruned, at which the paper compares kept sets
_DRAWS = 200


@dataclass(frozen=True)
class Overlap:
    """Agreement of kept sets at `SHARE`, with equal layer budgets.

    Attributes:
        matrix: Intersection over union of every two calibration texts, mean over layers.
        chance: The same for two random choices.
        languages: Mean over pairs of languages, all tokens counted, with a bootstrap interval over calibration
            sentences.
        generated: The same with generated tokens alone counted; the source is English in all of them.
    """

    matrix: pd.DataFrame
    chance: float
    languages: stats.Estimate
    generated: float


@step
def routing_table(study: Study, calibration: Calibration) -> pd.DataFrame:
    """Return the routing mass of every expert by text, as a long table, with the layers' divergences.

    `divergence` is that of the published budgets, `divergence_written` counts translations alone.
    """
    texts = {language: calibration.of(language) for language in calibration.parts}
    texts |= {"English": calibration.english, **calibration.kinds}
    english = calibration.english.routing_mass
    apart, written = (
        experts.divergence(calibration.target(text).routing_mass, english)
        for text in (study.params.budget_text, "written")
    )
    idle = idle_experts(study, calibration)
    rows = [
        {
            "text": name,
            "layer": layer.index,
            "expert": expert,
            "routing_mass": mass,
            "divergence": apart[at],
            "divergence_written": written[at],
            "idle": expert in idle[at],
        }
        for name, each in texts.items()
        for at, layer in enumerate(study.layers)
        for expert, mass in enumerate(each.routing_mass[at])
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("routing", table)
    total = len(study.layers) * study.n_experts
    study.recorder.metric("idle_experts", sum(map(len, idle)) / total, "share of all experts")
    return table


@step
def overlap(study: Study, calibration: Calibration) -> Overlap:
    """Compare the experts that different calibration texts keep."""
    texts = {language: calibration.of(language) for language in calibration.parts}
    texts |= {f"{language} → en": each for language, each in calibration.reverse.items()}
    texts |= {"English": calibration.english, **calibration.kinds}
    kept = {name: _kept(study, each) for name, each in texts.items()}
    matrix = pd.DataFrame(
        {a: {b: experts.kept_overlap(kept[a], kept[b]) for b in kept} for a in kept},
    )
    study.recorder.table("overlap", matrix.rename_axis("text").reset_index())
    chance = experts.expected_overlap(_counts(study), study.n_experts)
    rng = np.random.default_rng(study.params.seed)
    draws = []
    number = min(map(len, calibration.parts.values()))
    for _ in range(_DRAWS):
        chosen = rng.integers(number, size=number)  # the same sentences in every language
        draws.append(
            _mean_overlap(
                study,
                {
                    language: added([parts[index] for index in chosen])
                    for language, parts in calibration.parts.items()
                },
            )
        )
    low, high = np.quantile(draws, [0.025, 0.975])
    point = _mean_overlap(study, {language: calibration.of(language) for language in calibration.parts})
    n = calibration.pooled.sequences
    languages = stats.Estimate(point, float(low), float(high), n)
    generated = _mean_overlap(study, calibration.generated)
    study.recorder.metric("overlap_languages", languages, "IoU")
    study.recorder.metric("overlap_chance", chance, "IoU")
    study.recorder.metric("overlap_generated", generated, "IoU")
    return Overlap(matrix, chance, languages, generated)


@step
def calibration_size(study: Study, calibration: Calibration) -> pd.DataFrame:
    """Compare the experts kept with few calibration sentences with those kept with other, disjoint ones.

    Returns:
        One row a size: intersection over union of two disjoint draws of so many sentences, all languages pooled,
        mean and range of the middle 95 % over draws.
    """
    columns = list(zip(*calibration.parts.values(), strict=True))  # parts of the same sentences together
    size = columns[0][0].sequences
    rng = np.random.default_rng(study.params.seed)
    rows = []
    count = 1
    while 2 * count <= len(columns):
        agreements = []
        for _ in range(_DRAWS):
            order = rng.permutation(len(columns))
            halves = [
                _kept(study, added([part for index in chosen for part in columns[index]]))
                for chosen in (order[:count], order[count : 2 * count])
            ]
            agreements.append(experts.kept_overlap(*halves))
        low, high = np.quantile(agreements, [0.025, 0.975])
        rows.append(
            {
                "sentences": count * size,
                "overlap": float(np.mean(agreements)),
                "low": float(low),
                "high": float(high),
            }
        )
        count *= 2
    table = pd.DataFrame(rows)
    study.recorder.table("calibration_size", table)
    return table


def _mean_overlap(study: Study, texts: dict[str, experts.RoutingStatistics]) -> float:
    kept = [_kept(study, each) for each in texts.values()]
    return float(np.mean([experts.kept_overlap(a, b) for a, b in combinations(kept, 2)]))


def _kept(study: Study, statistics: experts.RoutingStatistics) -> list[list[int]]:
    mass = experts.scores(statistics, "routing_mass")
    return experts.select(mass, _counts(study), groups=study.layers[0].groups)


def _counts(study: Study) -> list[int]:
    """Equal layer budgets at `SHARE`, or as near to it as the top-k allows."""
    least = len(study.layers) * study.top_k
    total = max(least, round(len(study.layers) * study.n_experts * (1 - SHARE)))
    return experts.allocate_uniform(total, len(study.layers), study.top_k, study.n_experts)
