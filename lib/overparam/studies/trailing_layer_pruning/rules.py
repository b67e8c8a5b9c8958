"""Selection rules side by side: where to cut, and which layers to cut, each against chance."""

from __future__ import annotations

import numpy as np
import pandas as pd

from overparam.compress import depth
from overparam.experiment.study import step
from overparam.experiment.subjects.base import paired
from overparam.record import stats
from overparam.studies.trailing_layer_pruning.study import Study, ZeroShot, mean_points
from overparam.studies.trailing_layer_pruning.training import (
    NEGLIGIBLE_SHARE,
    TrainedScores,
    keep_at_most_pruned,
)

_TEXTS_OF_SIMILARITY = 96


@step
def where_to_cut(
    study: Study, loss: depth.LayerLoss, cuts: depth.Cuts, zero: ZeroShot, trained: TrainedScores
) -> pd.DataFrame:
    """Compare picks of a depth by the zero-shot score there, and by the trained score where it was measured.

    ``random`` is the mean over all depths of that half: what a blind choice would give.
    """
    total = study.layers
    middle = total // 2
    halves = {"small": range(1, middle + 1), "large": range(middle + 1, total + 1)}
    picks = {
        "L3Prune small": [cuts.small],
        "best small": [max(halves["small"], key=zero.mean)],
        "random small": list(halves["small"]),
        "L3Prune large": [cuts.large],
        "best large": [max(halves["large"], key=zero.mean)],
        "random large": list(halves["large"]),
        "global minimum of the loss": [int(np.argmin(loss.mean[1:])) + 1],
        "no pruning": [total],
    }
    rows = []
    for rule, depths in picks.items():
        after = trained.table.set_index("depth")["score"].reindex(depths)
        rows.append(
            {
                "rule": rule,
                "depth": depths[0] if len(depths) == 1 else float(np.mean(depths)),
                "zero_shot": float(np.mean([zero.mean(keep) for keep in depths])),
                "trained": float(after.iloc[0]) if len(depths) == 1 else float("nan"),
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("where_to_cut", table)
    return table


@step
def which_layers(study: Study, zero: ZeroShot) -> pd.DataFrame:
    """Remove 30 % of the layers by each rule, without training, and compare on the tasks of ``rule_tasks``.

    Trailing layers, Block Influence (ShortGPT) and its inverse, angular distance (Gromov et al.), and random
    choices. Differences are against trailing layers, paired by item.
    """
    params = study.params
    keep = keep_at_most_pruned(study.layers, NEGLIGIBLE_SHARE)
    sample = study.triplets(_TEXTS_OF_SIMILARITY, seed=params.seed)
    similarity = depth.layer_similarity(
        study.model,
        study.tokenizer,
        [triplet.query for triplet in sample],
        batch_tokens=params.batch_tokens,
        max_length=study.max_length,
    )
    study.recorder.table(
        "layer_similarity",
        pd.DataFrame(
            {
                "layer": range(1, study.layers + 1),
                "block_influence": similarity.block_influence,
                "angular_distance_to_next": np.diagonal(similarity.angular_distance, offset=1),
            }
        ),
    )
    rules = {
        "trailing": list(range(keep)),
        "Block Influence": depth.keep_by_block_influence(similarity, keep),
        "angular distance": depth.keep_by_angular_distance(similarity, keep),
        "inverted Block Influence": _inverted(similarity, keep),
    }
    rules |= {
        f"random {number}": depth.keep_random(study.layers, keep, seed=params.seed + number)
        for number in range(1, params.random_seeds + 1)
    }
    tasks = params.rule_tasks
    trailing = {task: zero.by_depth[keep][task] for task in tasks}
    known = {tuple(rules["trailing"]): trailing}
    rows = []
    for rule, kept in rules.items():
        if tuple(kept) not in known:
            pruned = depth.truncated(study.model, kept)
            known[tuple(kept)] = study.score(
                f"rule {rule}", study.embedder(pruned, [keep]), depths=[keep], tasks=tasks
            )[keep]
        scores = known[tuple(kept)]
        change = stats.suite_difference(paired([trailing], [scores])).scaled(100)
        rows.append(
            {
                "rule": rule,
                "kept": " ".join(str(index) for index in kept),
                "score": mean_points(scores),
                **change.columns("change"),
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("which_layers", table)
    return table


def _inverted(similarity: depth.LayerSimilarity, keep: int) -> list[int]:
    """Keep the blocks with the least influence: the control that should be worst."""
    inverted = depth.LayerSimilarity(-similarity.block_influence, similarity.angular_distance)
    return depth.keep_by_block_influence(inverted, keep)
