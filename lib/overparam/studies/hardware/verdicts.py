"""The verdict of this run on what was published about hardware, and the checks of its own measurements."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.measure import roofline
from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.stats import Estimate
from overparam.studies.hardware.settings import Sweep, Tuning
from overparam.studies.hardware.study import PROMPT, TOKEN, Study

SAME_GOAL = 0.85  # share of comparisons of a thing with itself whose interval must hold 1
_NO_DECODER = "No decoder is set for this part."


def verdicts(
    study: Study,
    limits: pd.DataFrame,
    found: pd.DataFrame,
    same: pd.DataFrame,
    swept: Sweep,
    tuned: Tuning,
    aligned: pd.DataFrame,
    sized: pd.DataFrame,
) -> list[Claim]:
    """Judge each claim and check by its rule, and put it into the record."""
    claims = [_same(same), *_near(study, limits, found), *_tuned(study, swept, tuned), _compiled(swept)]
    claims += [*_alignment(study, aligned), *_sizes(study, sized)]
    claims.append(
        ledger.judged(
            "hw-tpu", measured=None, margin=0.0, note="There is no TPU here, and none can be rented offline."
        )
    )
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _same(same: pd.DataFrame) -> Claim:
    share = float(same["holds"].mean()) - SAME_GOAL
    return ledger.judged(
        "hw-same",
        measured=_exact(100 * share, len(same)),
        margin=0.0,
        note=f"{int(same['holds'].sum())} of {len(same)} intervals hold 1. A count has no interval.",
    )


def _near(study: Study, limits: pd.DataFrame, found: pd.DataFrame) -> list[Claim]:
    """The fastest of all precisions and backends, against the bytes of its own weights."""
    claims, goal = [], study.params.near_bound
    for phase in (PROMPT, TOKEN):
        own = found[(found["model"] == study.params.decoder) & (found["phase"] == phase)]
        own = own[(own["threads"] == study.threads[-1]) & own["times_bound_low"].notna()]
        if own.empty:
            claims.append(
                ledger.judged(
                    f"hw-bound-{phase}", measured=None, margin=0.0, words={"goal": goal}, note=_NO_DECODER
                )
            )
            continue
        row: dict[Any, Any] = own.sort_values("seconds").iloc[0].to_dict()
        here = roofline.limits(limits, study.threads[-1])
        claims.append(
            ledger.judged(
                f"hw-bound-{phase}",
                measured=Estimate(
                    goal - row["times_bound"], goal - row["times_bound_high"], goal - row["times_bound_low"],
                    int(row["rounds"]),
                ),
                margin=0.0,
                words={"goal": goal},
                note=f"{row['scheme']}, {row['threads']:.0f} threads: {row['times_bound']:.2f} times its bound, set by "
                f"{row['bound_by']} ({row['intensity']:.1f} operations a byte; {here.bandwidth / 1e9:.1f} GB/s). The "
                f"fastest round: {row['least_times_bound']:.2f}.",
            )
        )  # fmt: skip
    return claims


def _tuned(study: Study, swept: Sweep, tuned: Tuning) -> list[Claim]:
    params, rows = study.params, _by(tuned.confirmed, "role")
    gained, behind = rows["tuned"], rows["tuned to best"]
    time = f"{tuned.seconds:.0f} s, {tuned.seconds / swept.seconds:.0%} of the full sweep's time"
    note = f"{tuned.chosen}, found in {time}; default: {study.default}. Confirmed on texts it was not chosen with."
    gain = _estimate(gained, "ratio").shifted(-1).scaled(100)
    return [
        ledger.judged("hw-gain", measured=gain, margin=0.0, note=note),
        ledger.judged(
            "hw-gain-goal",
            measured=gain.shifted(-params.gain),
            margin=0.0,
            words={"gain": params.gain},
            note=note,
        ),
        ledger.judged(
            "hw-tuned-best",
            measured=_estimate(behind, "ratio").shifted(-1).scaled(100),
            margin=params.near_best,
            note=f"The sweep's best: {swept.best}. {note}",
        ),
    ]


def _compiled(swept: Sweep) -> Claim:
    joint = swept.table[swept.table["grid"] == "joint"]
    pair = {scheme: joint[joint["scheme"] == scheme] for scheme in ("fp32", "fp32-compiled")}
    if pair["fp32-compiled"]["ratio_low"].notna().sum() == 0:
        reasons = swept.table.loc[swept.table["scheme"] == "fp32-compiled", "status"].tolist()
        return ledger.judged(
            "hw-compile",
            measured=None,
            margin=10.0,
            note=next(iter(reasons), "") or "It was not in this run.",
        )
    default = pair["fp32"].loc[pair["fp32"]["ratio_low"].eq(1) & pair["fp32"]["ratio_high"].eq(1)].iloc[0]
    same = pair["fp32-compiled"]
    same = same[
        (same["batch"] == default["batch"]) & (same["threads"] == default["threads"]) & same["by_length"]
    ]
    row = same.iloc[0].to_dict()
    return ledger.judged(
        "hw-compile",
        measured=_estimate(row, "ratio").shifted(-1).scaled(100),
        margin=10.0,
        note=f"float32, not bfloat16; {row['cell']} against {default['cell']}; compiling took {row['first']:.0f} s at "
        "most, and is left out.",
    )


def _alignment(study: Study, aligned: pd.DataFrame) -> list[Claim]:
    claims, margin = [], study.params.alignment_margin
    for dtype in study.params.shape_dtypes:
        own = aligned[aligned["dtype"] == dtype]
        for layer in ("width", "vocabulary"):
            rows = own[own["layer"] == layer] if "size" in own else own.iloc[:0]
            rows = rows.dropna(subset="size") if len(rows) else rows
            name = f"hw-{layer}-{dtype}"
            if rows.empty:
                note = f"{dtype}: {next(iter(own['status']), 'not in this run')}"
                claims.append(
                    ledger.judged(name, measured=None, margin=margin, words={"dtype": dtype}, note=note)
                )
                continue
            odd = study.params.aligned_width + 1 if layer == "width" else study.params.vocabularies[0]
            if odd not in set(rows["size"]):
                note = f"a width of {odd} is not in this run"
                claims.append(
                    ledger.judged(name, measured=None, margin=margin, words={"dtype": dtype}, note=note)
                )
                continue
            row = rows[rows["size"] == odd].iloc[0].to_dict()
            gain = Estimate(
                100 * (100 / row["speed"] - 1), 100 * (100 / row["speed_high"] - 1), 100 * (100 / row["speed_low"] - 1),
                int(row["rounds"]),
            )  # fmt: skip
            claims.append(
                ledger.judged(
                    name,
                    measured=gain,
                    margin=margin,
                    words={"dtype": dtype},
                    note=f"{dtype}, a single layer of {study.params.shape_rows} rows here; {odd:.0f} against "
                    "the aligned size, a unit of work.",
                )
            )
    return claims


def _sizes(study: Study, sized: pd.DataFrame) -> list[Claim]:
    claims, params = [], study.params
    for row in _ran(sized, "slope"):
        words = {"shape": row["shape"]}
        claims.append(
            ledger.judged(
                f"hw-time-layers-{row['shape']}", measured=_estimate(row, "share"), margin=params.slope_margin,
                words=words, note=f"Random weights, {row['dtype']}; encoding {params.size_tokens} tokens at a time.",
            )
        )  # fmt: skip
    for by in ("layers", "experts"):
        rows = _ran(sized, f"memory by {by}")
        for shape in dict.fromkeys(row["shape"] for row in rows):
            fewest = min((row for row in rows if row["shape"] == shape), key=lambda row: row["kept"])
            if fewest["kept"] == fewest["whole"]:
                continue
            apart = 100 * (fewest["share"] / fewest["expected"] - 1)
            claims.append(
                ledger.judged(
                    f"hw-memory-{by}-{shape}",
                    measured=_exact(apart, 1),
                    margin=params.memory_margin,
                    words={"shape": shape, "by": by},
                    note=f"{fewest['kept']:.0f} of {fewest['whole']:.0f} {by}: {fewest['megabytes']:.0f} MB, "
                    f"{fewest['share']:.1f} % of all, {fewest['expected']:.1f} % of the parameters. Resident bytes of "
                    "a process, less those without a model; measured once.",
                )
            )
    for row in _ran(sized, "token"):
        if row["kept"] == row["whole"]:
            continue
        times = 16 / row["kept"]
        claims.append(
            ledger.judged(
                f"hw-bits-{row['kept']:.0f}-{row['shape']}",
                measured=_estimate(row, "share").shifted(-times),
                margin=0.0,
                words={"shape": row["shape"], "bits": f"{row['kept']:.0f}", "times": times},
                note=f"{row['share']:.2f} times; a token reads {row['expected']:.2f} times fewer bytes. Random "
                "weights, kernels of PyTorch.",
            )
        )
    return claims


def _ran(sized: pd.DataFrame, what: str) -> list[dict[str, Any]]:
    return sized[(sized["what"] == what) & (sized["status"] == "")].to_dict("records")  # type: ignore[return-value]


def _by(table: pd.DataFrame, name: str) -> dict[str, dict[str, Any]]:
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return {str(row[name]): row for row in rows}


def _estimate(row: Any, name: str) -> Estimate:
    return Estimate(
        float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), int(row["rounds"])
    )


def _exact(value: float, n: int) -> Estimate:
    return Estimate(value, value, value, n)
