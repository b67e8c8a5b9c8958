"""Translations scored by COMET, the metric of the paper, if the parameters name a COMET model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.evaluate.comet import comet
from overparam.experiment.study import step
from overparam.experiment.subjects.translator import relative_change
from overparam.record import stats
from overparam.studies.moe_expert_pruning.study import Study

_SYSTEM = ["system", "share", "targets", "trained"]  # repeats of one system differ in their seed
Items = dict[str, list[NDArray[np.float64]]]  # test -> scores of every repeat, each [n, 1]


@dataclass(frozen=True)
class CometScores:
    """Scores by COMET.

    Attributes:
        table: One row per system: score, and its change against the unpruned model with interval.
        change: Relative change in percent by (system, share, what it was recovered on, way of training).
    """

    table: pd.DataFrame
    change: dict[tuple[str, float, str, str], stats.Estimate]


@step
def comet_scores(study: Study) -> CometScores | None:
    """Score every translation made so far, and record the scores, also per item.

    Failed generations score 0, as in the paper.

    Returns:
        None if the parameters name no model.

    Raises:
        RuntimeError: The command failed.
    """
    params = study.params
    if params.comet is None:
        return None
    written = pd.concat(study.written, ignore_index=True)
    for column in ("targets", "trained"):
        written[column] = written[column].fillna("") if column in written else ""
    written["system"] = written["system"].str.replace(r"^random \d+", "random", regex=True)
    texts = [list(written[name]) for name in ("source", "translation", "reference")]
    failed = [reason or None for reason in written["failure"]]
    written["comet"] = comet(*texts, failures=failed, model=params.comet)[:, 0]
    study.recorder.items("comet", written[[*_SYSTEM, "seed", "test", "item", "comet"]])
    tests = [f"translated en-{language}" for language in params.languages]
    items: dict[tuple[str, float, str, str], Items] = {}
    for key, rows in written[written["test"].isin(tests)].groupby([*_SYSTEM, "test"], sort=False):
        system, cut, targets, trained, test = map(str, key)
        repeats = [
            part["comet"].to_numpy(np.float64)[:, None] for _, part in rows.groupby("seed", dropna=False)
        ]
        items.setdefault((system, float(cut), targets, trained), {})[test] = repeats
    base = items["unpruned", 0.0, "", ""]
    table, change = [], {}
    for (system, share, targets, trained), found in items.items():
        pairs = {test: (base[test], found[test], "mean") for test in tests}
        change[system, share, targets, trained] = relative_change(pairs)
        table.append(
            {
                "share_pruned": share,
                "system": system,
                "targets": targets,
                "trained": trained,
                "comet": float(np.mean([np.mean(repeats) for repeats in found.values()])),
                **change[system, share, targets, trained].columns("change_percent"),
            }
        )
    scores = CometScores(pd.DataFrame(table), change)
    study.recorder.table("comet", scores.table)
    return scores
