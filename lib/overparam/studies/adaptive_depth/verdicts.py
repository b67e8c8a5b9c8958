"""The verdict of this run on what was published about adaptive depth, and on its own conditions."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.stats import Estimate
from overparam.studies.adaptive_depth import FULL, LABELS
from overparam.studies.adaptive_depth.bounds import FIXED, METHOD, RISK, RULE
from overparam.studies.adaptive_depth.retrieval import CALM
from overparam.studies.adaptive_depth.study import Study
from overparam.studies.adaptive_depth.timing import CALIBRATED, DISABLED, NEVER, ONE, TORCH

_ERRORS = 1.96  # standard errors on either side


def verdicts(
    study: Study,
    depths: pd.DataFrame,
    saved: pd.DataFrame,
    controls: pd.DataFrame,
    difficulty: pd.DataFrame,
    timing: pd.DataFrame,
    retrieval: pd.DataFrame,
    tokens: pd.DataFrame,
    speculation: pd.DataFrame,
) -> list[Claim]:
    """Judge each claim and check by its rule, and put it into the record."""
    found = [
        *_simpler(study, difficulty),
        *_savings(study, saved),
        *_bounds(study, saved),
        *_adaptivity(study, controls),
        *_rules(study, saved),
        *_distilled(study, depths),
        *_times(study, timing),
        *_queries(study, retrieval),
        *_decoders(study, tokens, speculation),
    ]
    for claim in found:
        study.recorder.claim(claim)
    return found


def _simpler(study: Study, difficulty: pd.DataFrame) -> list[Claim]:
    rows = _by(difficulty, "task", "measure")
    return [
        ledger.judged(
            f"exits-simpler-{task}",
            measured=_estimate(rows[task, "bag-of-words loss"], "partial", "texts"),
            margin=0.0,
            words={"task": task},
            note=f"{study.params.model}; with rare words {rows[task, 'rare words']['partial']:.2f}, with length alone "
            f"{rows[task, 'words']['rho']:.2f}; where half of the layers are saved.",
        )
        for task in study.params.tasks
    ]


def _savings(study: Study, saved: pd.DataFrame) -> list[Claim]:
    params, found = study.params, []
    rows = _by(_judged(study, saved), "task", "rule")
    for task in params.tasks:
        row, fixed = rows[task, RULE], rows[task, FIXED]
        found.append(
            ledger.judged(
                f"exits-saved-{task}",
                measured=_estimate(row, "judged", "texts").shifted(-params.saving),
                margin=0.0,
                words={
                    "task": task,
                    "saving": params.saving,
                    "alpha": 100 * params.alpha,
                    "delta": 100 * params.delta,
                },
                note=f"{params.model}, rule {RULE!r}, Learn-then-Test, risk {RISK!r}; mean over {row['splits']} splits "
                f"{row['saved']:.1f} %; one depth for all texts, certified so, saves {fixed['saved']:.1f} %.",
            )
        )
    return found


def _bounds(study: Study, saved: pd.DataFrame) -> list[Claim]:
    params = study.params
    rows = saved[(saved["alpha"] == params.alpha) & (saved["risk_of"] == RISK) & (saved["rule"] != FIXED)]
    found = []
    for name, method, column, bound in (
        ("mean", "crc", "risk", params.alpha),
        ("mean-drawn", "crc", "drawn_risk", params.alpha),
        ("share", "ltt", "above", params.delta),
        ("share-drawn", "ltt", "drawn_above", params.delta),
    ):
        own = rows[rows["method"] == method].sort_values(column)
        worst: Any = own.iloc[-1]
        found.append(
            ledger.judged(
                f"exits-bound-{name}",
                measured=_around(100 * bound - own[column].mean(), 0.0, int(worst["splits"])),
                margin=2 * float(own[f"{column}_error"].mean()),
                words={"alpha": 100 * params.alpha, "delta": 100 * params.delta},
                note=f"{own[column].mean():.2f} % is the mean over {len(own)} encoders, tasks, teachings and rules; "
                f"the worst: {worst['encoder']}, {worst['task']}, {worst['rule']}, {worst['teaching']}: "
                f"{worst[column]:.2f} %. All share the pools, so an interval over them would say little; the margin "
                "is two standard errors.",
            )
        )
    return found


def _adaptivity(study: Study, controls: pd.DataFrame) -> list[Claim]:
    rows, found = _by(controls, "task"), []
    for task in study.params.tasks:
        row = rows[task]
        moved = row["saved"] > 0
        for name, words in (("fixed", "one depth for all texts"), ("random", "exits at random")):
            found.append(
                ledger.judged(
                    f"exits-against-{name}-{task}",
                    measured=_estimate(row, name, "texts") if moved else None,
                    margin=0.0,
                    words={"task": task, "control": words},
                    note=f"{row['saved']:.1f} % of the layers saved by both; the rule loses {row['lost']:.2f} % of the "
                    f"texts, the accuracy goes from {row['accuracy']:.1f} to {row['accuracy_early']:.1f} %."
                    if moved
                    else "No text leaves early at the calibrated threshold.",
                )
            )
    return found


def _rules(study: Study, saved: pd.DataFrame) -> list[Claim]:
    params = study.params
    rows = saved[
        (saved["encoder"] == params.model) & (saved["teaching"] == LABELS) & (saved["risk_of"] == RISK)
        & (saved["method"] == METHOD)
    ]  # fmt: skip
    wide = rows.pivot_table(index=["task", "alpha"], columns="rule", values="saved")
    gain = wide["patience"] - wide[RULE]
    spread = _ERRORS * float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else float("inf")
    means = wide.mean().round(1)
    return [
        ledger.judged(
            "exits-patience",
            measured=_around(float(gain.mean()), spread, len(gain)),
            margin=0.0,
            note=f"Mean layers saved: {', '.join(f'{name} {value} %' for name, value in means.items())}; over "
            f"{len(gain)} tasks and bounds.",
        )
    ]


def _distilled(study: Study, depths: pd.DataFrame) -> list[Claim]:
    inner = depths[depths["depth"] < depths["layers"]]
    wide = inner.pivot_table(index=["encoder", "task", "depth"], columns="teaching", values="disagrees")
    gain = wide[LABELS] - wide[FULL]
    by_case = gain.groupby(level=["encoder", "task"]).mean()
    spread = _ERRORS * float(by_case.std(ddof=1)) / len(by_case) ** 0.5 if len(by_case) > 1 else float("inf")
    return [
        ledger.judged(
            "exits-distilled",
            measured=_around(float(by_case.mean()), spread, len(by_case)),
            margin=0.0,
            note=f"Mean over depths; interval over {len(by_case)} encoders and tasks; {study.params.unlabelled} texts "
            "without labels beside the labelled ones.",
        )
    ]


def _times(study: Study, timing: pd.DataFrame) -> list[Claim]:
    params = study.params
    rows = _by(timing[(timing["engine"] == TORCH) & (timing["way"] == ONE)], "setting")
    calm = rows[CALIBRATED]
    return [
        ledger.judged(
            "exits-time",
            measured=_estimate(calm, "time_saved", "texts").shifted(-40),
            margin=0.0,
            words={"alpha": 100 * params.alpha},
            note=f"{params.model}, {params.tasks[0]}, one text at a time, {calm['layers_saved']:.1f} % of the layers "
            f"saved; published with fine-tuned BERT and without a bound.",
        ),
        *(
            _proportion(study, rows[name])
            for name in (*map("{:.0%}".format, params.timed_savings), CALIBRATED)
        ),
        ledger.judged(
            "exits-disabled",
            measured=_estimate(rows[DISABLED], "time_saved", "texts"),
            margin=params.overhead,
            note=f"Exits that are computed and never sure: {-rows[NEVER]['time_saved']:.1f} % slower.",
        ),
    ]


def _proportion(study: Study, row: dict[str, Any]) -> Claim:
    """Judge whether time is saved in proportion to the layers, at one threshold."""
    time, layers, proportion = row["time_saved"], row["layers_saved"], study.params.proportion
    note = f"{layers:.1f} % of the layers and {time:.1f} % of the time saved, exits included; {row['texts']} texts."
    if layers == 0:
        measured = None
        note += " No text left early here."
    elif pd.isna(row.get("ratio")):
        measured = Estimate(time / layers, -math.inf, math.inf, int(row["texts"])).shifted(-proportion)
        note += " So few of them leave early that the ratio is not bounded."
    else:
        measured = _estimate(row, "ratio", "texts").shifted(-proportion)
    return ledger.judged(
        f"exits-time-layers-{row['setting'].rstrip('%')}",
        measured=measured,
        margin=0.0,
        words={"proportion": proportion, "setting": row["setting"]},
        note=note,
    )


def _queries(study: Study, retrieval: pd.DataFrame) -> list[Claim]:
    own = retrieval[(retrieval["encoder"] == study.trained) & (retrieval["system"] == CALM)]
    if own.empty:
        return [ledger.judged("exits-retrieval", measured=None, margin=0.0, note="No second encoder is set.")]
    half = own["layers"].max() / 2
    row: Any = own.assign(far=(own["depth"] - half).abs()).sort_values("far").iloc[0]
    return [
        ledger.judged(
            "exits-retrieval",
            measured=_estimate(row, "gain", "queries"),
            margin=0.0,
            note=f"{study.trained}: {row['recall']:.1f} % found with {row['depth']:.2f} of {row['layers']} layers.",
        )
    ]


def _decoders(study: Study, tokens: pd.DataFrame, speculation: pd.DataFrame) -> list[Claim]:
    names = ("exits-oracle", "exits-speculation-equal", "exits-speculation-speed")
    if speculation.empty:
        return [ledger.judged(name, measured=None, margin=0.0, note="No decoder is set.") for name in names]
    last: Any = _by(tokens.dropna(subset=["oracle_saved"]), "decoder")[study.params.decoder]
    row: Any = speculation.iloc[0]
    return [
        ledger.judged(
            names[0],
            measured=_estimate(last, "oracle_saved", "tokens"),
            margin=5.0,
            note=f"{study.params.decoder}, not trained for exits, read by its final norm and head; "
            "published for a model that was.",
        ),
        ledger.judged(
            names[1],
            measured=_around(row["equal"] - 100, 0.0, int(row["prompts"])),
            margin=0.0,
            note=f"{row['ended']:.0f} of {row['prompts']:.0f} texts end by an end token; a count has no interval.",
        ),
        ledger.judged(
            names[2],
            measured=_estimate(row, "speed", "prompts").shifted(-1.34),
            margin=0.0,
            note=f"The output head is {row['share_of_head']:.0%} of the weights that a token needs, so no more than "
            f"{row['ceiling']:.2f} times is possible with every draft accepted, and {row['ceiling_at_acceptance']:.2f} "
            f"at the measured acceptance of {row['acceptance']:.0%}.",
        ),
    ]


def _judged(study: Study, saved: pd.DataFrame) -> pd.DataFrame:
    params = study.params
    rows: pd.DataFrame = saved[
        (saved["encoder"] == params.model) & (saved["teaching"] == LABELS) & (saved["risk_of"] == RISK)
        & (saved["method"] == METHOD) & (saved["alpha"] == params.alpha)
    ]  # fmt: skip
    return rows


def _by(table: pd.DataFrame, *names: str) -> dict[Any, dict[str, Any]]:
    """The rows of a table by one column, or by several."""
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return {row[names[0]] if len(names) == 1 else tuple(row[name] for name in names): row for row in rows}


def _estimate(row: Any, name: str, n: str) -> Estimate:
    return Estimate(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), int(row[n]))


def _around(value: Any, wide: Any, n: int) -> Estimate:
    return Estimate(float(value), float(value - wide), float(value + wide), n)
