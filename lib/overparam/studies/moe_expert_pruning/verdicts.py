"""The verdict of this run on each published claim."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from overparam.record import ledger, stats
from overparam.record.claims import Claim
from overparam.studies.moe_expert_pruning.comet import CometScores
from overparam.studies.moe_expert_pruning.overlap import Overlap
from overparam.studies.moe_expert_pruning.recovery import Kind, Recovered
from overparam.studies.moe_expert_pruning.study import Baseline, Study, change_in_chrf
from overparam.studies.moe_expert_pruning.sweep import GUARDED, PUBLISHED, SENSITIVE, Quality, Sweep, System

SIZE_SHARE = 0.75  # share pruned at which bytes are compared with parameters
TASKS = ("news", "chat", "documentation", "code")  # other than translation
_IDLE_NOTE = 0.5  # a claim is marked if at least this share of the pruned experts was idle


def published_quality() -> pd.DataFrame:
    """Published xCOMET by the share pruned, with its change in percent of the unpruned model's."""
    table = ledger.points("experts")
    return table.assign(change_percent=100 * (table["xcomet"] / table["xcomet"][0] - 1))


def verdicts(
    study: Study,
    base: Baseline,
    found: Sweep,
    translated: Quality,
    recovered: Recovered,
    agreement: Overlap,
    transferred: pd.DataFrame,
    costs: tuple[pd.DataFrame, pd.DataFrame],
    comet: CometScores | None = None,
) -> list[Claim]:
    """Judge each published claim by its rule, and put it into the record.

    Args:
        study: The started study.
        base: The unpruned model.
        found: From `sweep.sweep`.
        translated: From `sweep.quality`.
        recovered: From `recovery.recover`.
        agreement: From `overlap.overlap`.
        transferred: From `sweep.transfer`.
        costs: From `costs.measure`.
        comet: From `comet.comet_scores`; quality is then judged by COMET, as published.
    """
    params = study.params
    cuts = {
        share: change_in_chrf(study, base.scores, translated.scores[System(share, *PUBLISHED)])
        for share in params.shares
    }
    after = {
        kind.share: change
        for kind, change in recovered.change.items()
        if kind == Kind(kind.share, PUBLISHED[0], "parent")
    }
    if comet:
        name = System(0.0, *PUBLISHED).name
        cuts = {share: comet.change[name, share, "", ""] for share in params.shares}
        how = ("parent", "all parameters")
        after = {share: comet.change[f"recovered, {name}", share, *how] for share in after}
    rows = [
        ("experts-half", 0.5, False, params.negligible_margin),
        ("experts-70", 0.6875, False, params.minor_margin),
        ("experts-75-recovered", 0.75, True, params.recovered_margin),
        ("experts-90-recovered", 0.875, True, params.usable_margin),
    ]
    claims = [
        ledger.judged(
            id,
            measured=(after if tuned else cuts).get(share),
            margin=margin,
            note=_idle(study, found, share)
            + _guarded(translated, recovered, share, recovered_too=tuned)
            + (_control(recovered, share) + _training(study) if tuned else ""),
            words={"unit": "% of COMET" if comet else "% of chrF++"},
        )
        for id, share, tuned, margin in rows
    ]
    claims += [
        _against(study, translated, "reap", "REAP"),
        _against(study, translated, "random", "random experts"),
        _unseen(study, base, translated),
        _shared(study, agreement),
        *size_claims(costs[0]),
        *time_claims(*costs),
        _other_tasks(study, transferred),
    ]
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _idle(study: Study, found: Sweep, share: float) -> str:
    """Describe the cut; if it mostly removed idle experts, the text begins with that."""
    rows = found.table
    published = (rows["method"] == PUBLISHED[0]) & (rows["allocation"] == PUBLISHED[1])
    rows = rows[published & (rows["share_pruned"] == share)]
    cut = f"{_percent(share)} of {study.n_experts} experts in {len(study.layers)} layers pruned"
    if rows.empty:
        return f"{cut}: not among the shares of this run. "
    idle = float(rows["idle_among_pruned"].iloc[0])
    mark = "rests on idle experts: " if idle >= _IDLE_NOTE else ""
    return f"{mark}{cut}, {_percent(round(idle, 2))} of them idle on all texts of the study. "


def _guarded(translated: Quality, recovered: Recovered, share: float, *, recovered_too: bool) -> str:
    """The loss at the same share by ways of our own to choose: super experts kept, budgets by sensitivity."""
    table = recovered.table if recovered_too else translated.table
    if table.empty:
        return ""
    text = ""
    for name, (method, allocation) in {
        "With super experts kept and equal budgets": GUARDED,
        "With layer budgets by measured sensitivity": SENSITIVE,
    }.items():
        rows = table[(table["method"] == method) & (table["share_pruned"] == share)]
        if allocation == SENSITIVE[1]:
            rows = rows[rows["allocation"] == allocation] if "allocation" in rows else rows[:0]
        shown = [
            f"{change:.1f} [{low:.1f}, {high:.1f}] % of chrF++"
            for change, low, high in rows[["change_percent", "low", "high"]].itertuples(index=False)
        ]
        alone = f", and pruned for one language at a time {shown[1]}" if len(shown) > 1 else ""
        text += f"{name}: {shown[0]}{alone}. " if shown else ""
    return text


def _control(recovered: Recovered, share: float) -> str:
    """The recovered model against the unpruned one that was trained alike."""
    table = recovered.table
    if "change_from_control" not in table:
        return ""
    rows = table[
        (table["share_pruned"] == share)
        & (table["method"] == PUBLISHED[0])
        & (table["targets"] == "parent")
        & (table["trained"] == "all parameters")
    ].dropna(subset="change_from_control")
    if rows.empty:
        return ""
    change, low, high = rows.filter(like="change_from_control").iloc[0]
    return f"Against the unpruned model trained alike: {change:.1f} [{low:.1f}, {high:.1f}] % of chrF++. "


def _training(study: Study) -> str:
    params = study.params
    return (
        f"{params.recovery_steps} steps on {params.recovery_items} sentences in {len(params.languages)} languages, "
        "translated by the unpruned model (published: 10,000, three epochs). "
        f"{len(params.recovery_seeds)} seed(s)."
    )


def _against(study: Study, translated: Quality, method: str, name: str) -> Claim:
    """The published method against another score with equal budgets, at half of the experts."""
    others = {system: scores for system, scores in translated.scores.items() if system.method == method}
    share = min({system.share for system in others}, key=lambda each: abs(each - 0.5))
    measured = change_in_chrf(
        study,
        [scores for system, scores in others.items() if system.share == share],
        translated.scores[System(share, *PUBLISHED)],
    )
    return ledger.judged(
        f"experts-{method}",
        measured=measured,
        margin=0.0,
        note=f"{_percent(share)} pruned without training, from English; {name} with equal budgets. The difference is "
        "of score and budget together.",
    )


def _unseen(study: Study, base: Baseline, translated: Quality) -> Claim:
    """How much more an unseen language loses than the calibrated ones, at half of the experts."""
    unseen, seen = study.params.unseen, study.params.languages
    gaps = {}
    for how in (PUBLISHED, GUARDED):
        scores = translated.scores.get(System(0.5, *how))
        if not unseen or scores is None:
            continue
        there, here = (change_in_chrf(study, base.scores, scores, each) for each in (unseen, seen))
        gaps[how] = _less(there, here)  # conservative for the same sentences
    measured, guarded = gaps.get(PUBLISHED), gaps.get(GUARDED)
    kept = (
        f" With super experts kept: {guarded.value:.1f} [{guarded.low:.1f}, {guarded.high:.1f}]."
        if guarded
        else ""
    )
    return ledger.judged(
        "experts-unseen",
        measured=measured,
        margin=study.params.transfer_margin,
        note=f"Change of {', '.join(unseen) or 'none'} minus change of {', '.join(seen)}, at half of the experts. The "
        "model was trained on that language; calibration did not use it. The interval treats both as independent."
        + kept,
    )


def _shared(study: Study, agreement: Overlap) -> Claim:
    """Agreement of the kept sets above chance."""
    found, chance = agreement.languages, agreement.chance
    above = stats.Estimate(found.value - chance, found.low - chance, found.high - chance, found.n)
    order = (
        " The language tag follows the source here, so source tokens are routed alike for all languages."
        if study.params.prompt == "tagged"
        else ""
    )
    return ledger.judged(
        "experts-shared",
        measured=above,
        margin=0.1,
        note=f"IoU {found.value:.2f}, by chance {chance:.2f}; with generated tokens alone {agreement.generated:.2f}."
        + order,
    )


def size_claims(costs: pd.DataFrame) -> list[Claim]:
    """Reduction of bytes on disk and in memory, divided by the reduction of parameters."""
    full = costs.loc[costs["share_pruned"] == 0].iloc[0]
    share = min(costs["share_pruned"], key=lambda each: abs(each - SIZE_SHARE))
    cut = costs.loc[costs["share_pruned"] == share].iloc[0]
    claims = []
    for column in ("folder_bytes", "resident_bytes"):
        ratio = (1 - cut[column] / full[column]) / (1 - cut["parameters"] / full["parameters"])
        claims.append(
            ledger.judged(
                f"experts-{column.replace('_', '-')}",
                measured=stats.Estimate(float(ratio), float(ratio), float(ratio), 1),
                margin=0.03,
                note=f"{_percent(share)} pruned: {cut[column] / full[column]:.3f} of the bytes for "
                f"{cut['parameters'] / full['parameters']:.3f} of the parameters. Exact counts, no interval.",
            )
        )
    return claims


def time_claims(costs: pd.DataFrame, latencies: pd.DataFrame) -> list[Claim]:
    """Time to translate, and parameters that a token uses, at the largest share against the unpruned model."""
    share = costs["share_pruned"].max()
    rounds = latencies[latencies["step"] == "generate_all"].groupby("share_pruned")["seconds"]
    seconds = {key: values.to_numpy() for key, values in rounds}
    active = costs.set_index("share_pruned")["active_parameters"]
    change = stats.retention(seconds[0.0], seconds[share]).shifted(-1).scaled(100)
    fewer = float(100 * (1 - active[share] / active[0.0]))
    pruned = f"{_percent(share)} pruned"
    return [
        ledger.judged(
            "experts-time",
            measured=change,
            margin=10.0,
            note=f"{pruned}; active parameters of a token {-fewer:.1f} %. Time includes reading the prompts. On a CPU, "
            "fewer experts also mean more tokens per expert at once.",
        ),
        ledger.judged(
            "experts-faster",
            measured=change.scaled(-1),
            margin=10.0,
            note=f"{pruned}, a batch of translations in one go; the same times as those of experts-time.",
        ),
        ledger.judged(
            "experts-active",
            measured=stats.Estimate(fewer, fewer, fewer, 1),
            margin=1.0,
            note=f"{pruned}. A token still uses as many experts as before; exact count, embeddings excluded.",
        ),
    ]


def _other_tasks(study: Study, transferred: pd.DataFrame) -> Claim:
    """What translation loses, minus what other tasks lose when each is pruned for itself, in nats a token."""
    seen = [f"en-{language}" for language in study.params.languages]
    by_text = dict(list(transferred.set_index("test").groupby("calibration")))
    own = pd.concat([by_text[kind].loc[[kind]] for kind in TASKS])
    here, there = (_independent_mean(rows) for rows in (by_text["all languages"].loc[seen], own))
    shown = ", ".join(f"{kind} {rise:.2f}" for kind, rise in own["loss_change"].items())
    chance = by_text["none (random)"]["loss_change"]
    return ledger.judged(
        "experts-other-tasks",
        measured=_less(here, there),
        margin=study.params.task_margin,
        note=f"{_percent(transferred['share_pruned'].iloc[0])} of the experts pruned for each kind of text by itself, "
        f"super experts kept, equal budgets. Rise of the loss: translation {here.value:.2f}, {shown}; with random "
        f"experts translation {chance[seen].mean():.2f}, the others {chance[list(TASKS)].mean():.2f} nats a token.",
    )


def _less(one: stats.Estimate, other: stats.Estimate) -> stats.Estimate:
    """One estimate minus another, with their intervals combined as if they were independent."""
    value = one.value - other.value
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return stats.Estimate(value, low, high, one.n)


def _independent_mean(rows: pd.DataFrame) -> stats.Estimate:
    """Mean of independent estimates."""
    value, n = float(rows["loss_change"].mean()), len(rows)
    low, high = (float(np.linalg.norm(rows["loss_change"] - rows[end])) / n for end in ("low", "high"))
    return stats.Estimate(value, value - low, value + high, n)
