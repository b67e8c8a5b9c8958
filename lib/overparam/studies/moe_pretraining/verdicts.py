"""The verdict of this run on each goal that the suite sets for its translator."""

from __future__ import annotations

import pandas as pd

from overparam.record import ledger, stats
from overparam.record.claims import Claim
from overparam.studies.moe_pretraining.expert_load import least
from overparam.studies.moe_pretraining.quality import TARGETS, best_search
from overparam.studies.moe_pretraining.study import Study


def verdicts(
    study: Study, load: pd.DataFrame, translation: pd.DataFrame, removed: pd.DataFrame
) -> list[Claim]:
    """Judge each goal by its rule, and put it into the record."""
    params = study.params
    busy = least(load) >= params.minimum_load
    above = 100 * (float(busy.mean()) - params.minimum_busy)
    found = [
        ledger.judged(
            "moe-pretraining-load",
            measured=stats.Estimate(above, above, above, len(busy)),
            margin=0.0,
            words={"busy": 100 * params.minimum_busy, "load": params.minimum_load},
            note=f"{busy.sum()} of {len(busy)} experts. On held-out text of the training mix; the load is the smaller "
            "of routing mass and share of assignments. Every expert is counted, so there is no interval.",
        )
    ]
    rows = translation[(translation["search"] == best_search(params)) & (translation["source"] == "en")]
    by_target = {row["target"]: row for row in rows.to_dict("records")}
    for target in TARGETS:
        row = by_target[target]
        value, low, high = (float(row[column]) - params.goal for column in ("chrf", "chrf_low", "chrf_high"))
        found.append(
            ledger.judged(
                f"moe-pretraining-{target}",
                measured=stats.Estimate(value, low, high, int(row["verses"])),
                margin=0.0,
                words={"goal": params.goal},
                note=f"chrF++ {row['chrf']:.1f} on {row['verses']} held-out verses, {best_search(params)}. BLEU "
                f"{row['bleu']:.1f}; {100 * row['failed_any']:.1f} % of the translations failed.",
            )
        )
    found.append(_removal(study, removed))
    for claim in found:
        study.recorder.claim(claim)
    return found


def _removal(study: Study, removed: pd.DataFrame) -> Claim:
    """The expert that the model can spare least."""
    margin, measured, note = study.params.removal_margin, None, "Not measured: removed_verses is 0."
    if len(removed):
        most = removed.nlargest(1, "loss_change").to_dict("records")[0]
        layer, ends = most["layer"], ("loss_change", "loss_change_low", "loss_change_high")
        rise, low, high = (float(most[end]) for end in ends)
        measured = stats.Estimate(rise, low, high, study.params.removed_verses).scaled(-1)
        median = removed.loc[removed["layer"] == layer, "loss_change"].median()
        note = (
            f"Expert {most['expert']} of layer {layer}, of {len(removed)}; median of its layer {median:.3f}. The "
            "largest of many, so that its interval is a little too high. From English, mean over languages."
        )
    return ledger.judged(
        "moe-pretraining-removal", measured=measured, margin=margin, words={"margin": margin}, note=note
    )
