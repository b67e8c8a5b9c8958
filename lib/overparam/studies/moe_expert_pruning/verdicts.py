"""What was published, and the verdict of this run on it."""

from __future__ import annotations

import pandas as pd

from overparam.report import stats
from overparam.report.claims import Claim, judged
from overparam.studies.moe_expert_pruning.overlap import Overlap
from overparam.studies.moe_expert_pruning.recovery import Recovered
from overparam.studies.moe_expert_pruning.study import Baseline, Study, change_in_chrf
from overparam.studies.moe_expert_pruning.sweep import PUBLISHED, Quality, Sweep, System

PAPER = "Martin, Bandarkar & Peng, arXiv 2605.28042"

# GPT-OSS-20B on FLORES-200, xCOMET; a secondary reading of the paper's tables (version 2).
PUBLISHED_QUALITY = pd.DataFrame(
    [
        (0.0, False, 0.942),
        (0.5, False, 0.930),
        (0.6875, False, 0.859),
        (0.6875, True, 0.904),
        (0.75, True, 0.902),
        (0.875, True, 0.871),
    ],
    columns=["share_pruned", "recovered", "xcomet"],
)
PUBLISHED_OVERLAP = 0.6
_IDLE_NOTE = 0.5  # share of idle experts among the pruned ones from which a claim is marked


def published_change(share: float, *, recovered: bool) -> float:
    """Published change of xCOMET in percent of the unpruned model's."""
    table = PUBLISHED_QUALITY
    full = float(table.loc[table["share_pruned"] == 0, "xcomet"].iloc[0])
    found = table[(table["share_pruned"] == share) & (table["recovered"] == recovered)]
    return 100 * (float(found["xcomet"].iloc[0]) / full - 1)


def verdicts(
    study: Study,
    base: Baseline,
    found: Sweep,
    translated: Quality,
    recovered: Recovered,
    agreement: Overlap,
    costs: pd.DataFrame,
) -> list[Claim]:
    """Judge each published claim by its rule, and put it into the record."""
    params = study.params
    quality = {
        share: change_in_chrf(study, base.scores, translated.scores[System(share, *PUBLISHED)])
        for share in params.shares
    }

    def no_worse(
        id: str, statement: str, published: str, measured: stats.Estimate | None, margin: float, note: str
    ) -> Claim:
        return judged(
            id,
            statement,
            source=f"{PAPER}, abstract and tables",
            published=published,
            kind="no_worse",
            measured=measured,
            margin=margin,
            unit="% of chrF++",
            figure="fig:experts-quality",
            note=note,
        )

    def cut(share: float) -> str:
        return (
            f"{_percent(share)} of the {study.n_experts} experts of {len(study.layers)} layers pruned. "
            + _idle(found, share)
        )

    claims = [
        no_worse(
            "experts-half",
            "Half of the experts go without retraining at negligible loss",
            _published(0.5, recovered=False),
            quality.get(0.5),
            params.negligible_margin,
            cut(0.5),
        ),
        no_worse(
            "experts-70",
            "70 % of the experts go without retraining with minor loss",
            _published(0.6875, recovered=False),
            quality.get(0.6875),
            params.minor_margin,
            cut(0.6875),
        ),
        no_worse(
            "experts-75-recovered",
            "75 % go at baseline quality after a short fine-tuning",
            _published(0.75, recovered=True),
            recovered.change.get((0.75, "parent", False)),
            params.negligible_margin,
            cut(0.75) + _training(study),
        ),
        no_worse(
            "experts-90-recovered",
            "Nearly 90 % go and the translator is still usable after fine-tuning",
            _published(0.875, recovered=True),
            recovered.change.get((0.875, "parent", False)),
            params.usable_margin,
            cut(0.875) + _training(study),
        ),
        _scoring(study, translated),
        _transfer(study, base, translated),
        judged(
            "experts-shared",
            "The experts that stay are largely the same for all languages",
            source=f"{PAPER}, analysis at 75 % pruned",
            published="IoU about 0.6, by chance 0.14",
            kind="difference",
            measured=agreement.languages,
            margin=0.1,
            published_value=PUBLISHED_OVERLAP,
            unit="IoU",
            figure="fig:experts-overlap",
            note=(
                f"By chance {agreement.chance:.2f}; generated tokens alone: {agreement.generated:.2f}. "
                + _order_note(study)
            ),
        ),
        bytes_claim(costs),
        time_claim(costs),
    ]
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _published(share: float, *, recovered: bool) -> str:
    change = f"{published_change(share, recovered=recovered):.1f}".replace("-", "−")
    return f"{change} % of xCOMET (at {_percent(share)})"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _idle(found: Sweep, share: float) -> str:
    rows = found.table
    published = (rows["method"] == PUBLISHED[0]) & (rows["allocation"] == PUBLISHED[1])
    rows = rows[published & (rows["share_pruned"] == share)]
    if rows.empty:
        return "Not among the shares of this run. "
    idle = float(rows["idle_among_pruned"].iloc[0])
    mark = "Rests on idle experts: " if idle >= _IDLE_NOTE else ""
    return f"{mark}{_percent(round(idle, 2))} of the pruned experts were idle on everything anyway. "


def _training(study: Study) -> str:
    params = study.params
    return (
        f"{params.recovery_steps} steps on {params.recovery_items} sentences in {len(params.languages)} languages, "
        f"translated by the unpruned model (published: 10,000, three epochs); {len(params.recovery_seeds)} seed(s)."
    )


def _order_note(study: Study) -> str:
    if study.params.prompt != "tagged":
        return ""
    return "The language tag follows the source, so that source tokens are routed alike for all languages."


def _scoring(study: Study, translated: Quality) -> Claim:
    """The published method against REAP with equal budgets, at half of the experts."""
    ours = [s for s in translated.scores if (s.method, s.allocation) == PUBLISHED]
    reap = [s for s in translated.scores if s.method == "reap"]
    share = reap[0].share
    base = next(translated.scores[s] for s in ours if s.share == share)
    better = change_in_chrf(study, translated.scores[reap[0]], base)
    return judged(
        "experts-score",
        "Routing mass with budgets by divergence translates better than REAP",
        source=f"{PAPER}, ablation at 50 % pruned",
        published="+7.9 % of xCOMET (0.864 against 0.801)",
        kind="difference",
        measured=better,
        margin=2.0,
        published_value=7.9,
        unit="% of chrF++",
        figure="fig:experts-methods",
        note=f"At {_percent(share)} pruned; REAP with equal budgets, both calibrated on the same text.",
    )


def _transfer(study: Study, base: Baseline, translated: Quality) -> Claim:
    """How much more an unseen language loses than the seen ones, at half of the experts."""
    unseen = study.params.unseen
    system = next(
        (s for s in translated.scores if (s.method, s.allocation) == PUBLISHED and s.share == 0.5), None
    )
    measured = None
    if unseen and system is not None:
        kept = [
            change_in_chrf(study, base.scores, translated.scores[system], languages)
            for languages in (unseen, study.params.languages)
        ]
        # two disjoint sets of languages on the same sentences: the wider of the sums of both half-widths
        gap = kept[0].value - kept[1].value
        low = gap - ((kept[0].value - kept[0].low) ** 2 + (kept[1].high - kept[1].value) ** 2) ** 0.5
        high = gap + ((kept[0].high - kept[0].value) ** 2 + (kept[1].value - kept[1].low) ** 2) ** 0.5
        measured = stats.Estimate(gap, low, high, kept[0].n)
    return judged(
        "experts-unseen",
        "The cut carries over to languages that calibration never saw",
        source=f"{PAPER}, analysis",
        published="unseen languages follow the same curve",
        kind="no_worse",
        measured=measured,
        margin=study.params.minor_margin,
        unit="% of chrF++",
        figure="fig:experts-elsewhere",
        note=(
            f"Change of {', '.join(unseen) or 'none'} less change of the seen languages, at half of the experts; "
            "the model was trained on that language, the calibration was not."
        ),
    )


def bytes_claim(costs: pd.DataFrame) -> Claim:
    """Slope of relative bytes on disk over relative parameters."""
    full = costs.loc[costs["share_pruned"] == 0].iloc[0]
    rest = costs[costs["share_pruned"] > 0]
    slopes = (1 - rest["folder_bytes"] / full["folder_bytes"]) / (1 - rest["parameters"] / full["parameters"])
    return judged(
        "experts-bytes",
        "Memory falls with the experts",
        source=f"{PAPER}, memory table",
        published="proportional to the parameters",
        kind="proportional",
        measured=stats.Estimate(float(slopes.mean()), float(slopes.min()), float(slopes.max()), len(slopes)),
        margin=0.03,
        unit="(slope)",
        figure="fig:experts-cost",
        note="Saved bytes over saved parameters, range over shares; resident memory is in the table of costs.",
    )


def time_claim(costs: pd.DataFrame) -> Claim:
    """Relative change of the time of a generated token at the largest share."""
    full = costs.loc[costs["share_pruned"] == 0].iloc[0]
    last = costs.sort_values("share_pruned").iloc[-1]
    change, low, high = (
        100 * (last[f"generate_all_seconds{pruned}"] / full[f"generate_all_seconds{unpruned}"] - 1)
        for pruned, unpruned in (("", ""), ("_low", "_high"), ("_high", "_low"))
    )
    return judged(
        "experts-time",
        "Computation per token does not fall, since a token uses as many experts as before",
        source=f"{PAPER}; inferred from the fixed top-k",
        published="0 %",
        kind="difference",
        measured=stats.Estimate(change, low, high, 1),
        margin=10.0,
        published_value=0.0,
        unit="% of decoding time",
        figure="fig:experts-cost",
        note=f"At {_percent(last['share_pruned'])} pruned; the active parameters of a token are the same.",
    )
