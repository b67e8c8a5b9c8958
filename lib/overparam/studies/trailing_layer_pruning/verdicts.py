"""The verdict of this run on each published claim."""

from __future__ import annotations

from overparam.compress import depth
from overparam.record import ledger, stats
from overparam.record.claims import Claim
from overparam.studies.trailing_layer_pruning.study import Study
from overparam.studies.trailing_layer_pruning.training import (
    MODEST_SHARE,
    NEGLIGIBLE_SHARE,
    TrainedScores,
    keep_at_most_pruned,
)

COST_MARGIN = 0.1  # "proportional" means a slope of 1 within this margin


def verdicts(
    study: Study, cuts: depth.Cuts, trained: TrainedScores, cost_slope: stats.Estimate
) -> list[Claim]:
    """Judge each published claim by its rule, and put it into the record."""
    params, total = study.params, study.layers
    negligible, modest = (keep_at_most_pruned(total, share) for share in (NEGLIGIBLE_SHARE, MODEST_SHARE))
    conditions = _conditions(study)

    def kept(keep: int) -> str:
        return f"{keep} of {total} layers kept. {conditions}"

    def pick(keep: int, interior: bool) -> str:
        edge = (
            "" if interior else " The pick is not a local minimum of the loss, only the lowest in its half."
        )
        return kept(keep) + edge

    found = [
        ledger.judged(
            "l3prune-negligible-30",
            measured=trained.change[negligible],
            margin=params.negligible_margin,
            note=kept(negligible),
        ),
        ledger.judged(
            "l3prune-modest-80",
            measured=trained.change[modest],
            margin=params.modest_margin,
            note=kept(modest),
        ),
        ledger.judged(
            "l3prune-large",
            measured=trained.change[cuts.large] if cuts.large < total else None,
            margin=params.negligible_margin + ledger.published_value("l3prune-large"),
            direction_within=params.modest_margin,
            note=pick(cuts.large, cuts.interior_large),
        ),
        ledger.judged(
            "l3prune-small",
            measured=trained.change[cuts.small],
            margin=params.modest_margin + ledger.published_value("l3prune-small"),
            note=pick(cuts.small, cuts.interior_small),
        ),
        ledger.judged(
            "l3prune-cost",
            measured=cost_slope,
            margin=COST_MARGIN,
            note="Slope of relative encoding time over relative depth; the embedding layer is not pruned.",
        ),
    ]
    for claim in found:
        study.recorder.claim(claim)
    return found


def _conditions(study: Study) -> str:
    params = study.params
    return (
        f"Trained for {params.train_steps} steps of {params.train_batch_size} triplets "
        f"(published: 1000 of 64 or more), {len(params.train_seeds)} seed(s), {len(params.tasks)} tasks."
    )
