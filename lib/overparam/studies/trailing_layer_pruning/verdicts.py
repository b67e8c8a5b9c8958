"""What was published, and the verdict of this run on it."""

from __future__ import annotations

import pandas as pd

from overparam.compress import depth
from overparam.report import stats
from overparam.report.claims import Claim, judged
from overparam.studies.trailing_layer_pruning.study import Study
from overparam.studies.trailing_layer_pruning.training import (
    MODEST_SHARE,
    NEGLIGIBLE_SHARE,
    Trained,
    keep_at_most_pruned,
)

PAPER = "L3Prune, arXiv 2410.14578"

# Table of the paper: model, picks as layers kept of total, change of the mean score in points.
PUBLISHED = pd.DataFrame(
    [
        ("Llama-3-8B", "large", 25, 32, -1.5),
        ("Llama-3-8B", "small", 5, 32, -6.9),
        ("Mistral-7B", "large", 22, 32, -0.1),
        ("Mistral-7B", "small", 8, 32, -4.2),
        ("Qwen2-7B", "large", 25, 28, 0.3),
        ("Qwen2-7B", "small", 10, 28, -3.3),
        ("Phi-3-mini", "large", 25, 32, -0.1),
        ("Phi-3-mini", "small", 8, 32, -6.3),
    ],
    columns=["model", "pick", "kept", "layers", "change"],
)
LARGE_CHANGE, SMALL_CHANGE = -0.3, -5.1  # means over the four models, in points (abstract)
COST_MARGIN = 0.1  # of a slope of 1: what "proportional" means here


def verdicts(study: Study, cuts: depth.Cuts, trained: Trained, cost_slope: stats.Estimate) -> list[Claim]:
    """Judge each published claim by its rule, and put it into the record."""
    params, total = study.params, study.layers
    negligible, modest = (keep_at_most_pruned(total, share) for share in (NEGLIGIBLE_SHARE, MODEST_SHARE))
    conditions = _conditions(study)

    def kept(keep: int) -> str:
        return f"{keep} of {total} layers kept. {conditions}"

    def pick(keep: int, interior: bool) -> str:
        edge = "" if interior else " The pick is no local minimum of the loss, only the least of its half."
        return kept(keep) + edge

    found = [
        judged(
            "l3prune-negligible-30",
            "Up to 30 % of the layers go with negligible loss",
            source=f"{PAPER}, abstract",
            published="negligible",
            kind="no_worse",
            measured=trained.change[negligible],
            margin=params.negligible_margin,
            figure="fig:layers-trained",
            note=kept(negligible),
        ),
        judged(
            "l3prune-modest-80",
            "Up to 80 % of the layers go with a modest loss",
            source=f"{PAPER}, abstract",
            published="modest",
            kind="no_worse",
            measured=trained.change[modest],
            margin=params.modest_margin,
            figure="fig:layers-trained",
            note=kept(modest),
        ),
        judged(
            "l3prune-large",
            "The `large` pick (−21 % of the parameters) costs 0.3 points",
            source=f"{PAPER}, abstract",
            published="−0.3 points",
            kind="difference",
            measured=trained.change[cuts.large] if cuts.large < total else None,
            margin=params.negligible_margin + LARGE_CHANGE,
            published_value=LARGE_CHANGE,
            direction_within=params.modest_margin,
            figure="fig:layers-trained",
            note=pick(cuts.large, cuts.interior_large),
        ),
        judged(
            "l3prune-small",
            "The `small` pick (−74 % of the parameters) costs 5.1 points",
            source=f"{PAPER}, abstract",
            published="−5.1 points",
            kind="difference",
            measured=trained.change[cuts.small],
            margin=params.modest_margin + SMALL_CHANGE,
            published_value=SMALL_CHANGE,
            figure="fig:layers-trained",
            note=pick(cuts.small, cuts.interior_small),
        ),
        judged(
            "l3prune-cost",
            "Encoding time falls in proportion to the layers",
            source=f"{PAPER}, abstract",
            published="proportional",
            kind="proportional",
            measured=cost_slope,
            margin=COST_MARGIN,
            unit="(slope)",
            figure="fig:layers-cost",
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
