"""The verdict of this run on what was published about sparse activation; every cost says of what it is a part."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.stats import Estimate
from overparam.studies.sparse_activation import ACTIVE, MIXTURE, RANDOM, TOTAL
from overparam.studies.sparse_activation.inference import ALL, AT_RANDOM, RANDOM_ROUTER, SHUFFLED, SMALLEST
from overparam.studies.sparse_activation.study import Study

HALF = 0.5  # share of zeros that was published
PUBLISHED_SPEED = 1.8  # times, there


def verdicts(
    study: Study,
    operations: pd.DataFrame,
    final: pd.DataFrame,
    savings: pd.DataFrame,
    equivalent: pd.DataFrame,
    routing: pd.DataFrame,
    activations: pd.DataFrame,
    decoding: pd.DataFrame,
) -> list[Claim]:
    """Judge each claim and check by its rule, and put it into the record."""
    params = study.params
    seeds = (
        f"{int(final['seeds'].max())} seeds" if final["seeds"].max() > 1 else "one seed, which bounds nothing"
    )
    note = f"{seeds}; constant learning rate, so that every point of a curve is a training that ends there."
    found = [_counted(study, operations)]
    ends = _by(final[final["kind"] == "all"], "arm")
    found += [
        ledger.judged("sparse-loss-active", measured=_estimate(ends[ACTIVE], "above"), margin=0.0, note=note),
        ledger.judged(
            "sparse-loss-total",
            measured=_negative(_estimate(ends[TOTAL], "above")),
            margin=0.0,
            note=note,
        ),
    ]
    lowest = _by(savings[savings["lowest"]], "base", "cost")
    for base, word in ((TOTAL, "total"), (ACTIVE, "active")):
        row = lowest[base, "flops"]
        blocks = lowest[base, "flops_blocks"]["saved"]
        found.append(
            ledger.judged(
                f"sparse-compute-{word}",
                measured=_estimate(row, "saved").shifted(-params.saving),
                margin=0.0,
                words={"saving": params.saving},
                note=f"Saved {row['saved']:.1f} % of the dense model's training operations until both have "
                f"{row['loss']:.3f} nats a token; {blocks:.1f} % without the output embeddings. {note}",
            )
        )
        row = lowest[base, "seconds"]
        found.append(
            ledger.judged(
                f"sparse-time-{word}",
                measured=_estimate(row, "saved"),
                margin=0.0,
                note=f"Until both have {row['loss']:.3f} nats a token; median time of a step. {note}",
            )
        )
    found += _against_equal_dense(study, equivalent, note)
    found += _routed(study, ends, routing)
    found += _zeros(study, activations, decoding)
    for claim in found:
        study.recorder.claim(claim)
    return found


def _counted(study: Study, operations: pd.DataFrame) -> Claim:
    apart = 100 * (operations["counted"] / operations["total"] - 1)
    worst = max(apart.tolist(), key=abs)
    seen = _by(operations, "arm")[MIXTURE]
    return ledger.judged(
        "sparse-operations",
        measured=Estimate(worst, worst, worst, len(apart)),
        margin=study.params.flops_margin,
        note=f"Routers included. With grouped products PyTorch counts {seen['counted_grouped'] / seen['total']:.0%} of "
        "the mixture's operations. A count has no interval.",
    )


def _against_equal_dense(study: Study, equivalent: pd.DataFrame, note: str) -> list[Claim]:
    rows = _by(equivalent, "cost")
    outside = int(equivalent["outside"].max())
    where = f"; {outside} seeds lie outside of the two dense models" if outside else ""
    compute, memory = rows["total"], rows["bytes"]
    return [
        ledger.judged(
            "sparse-compute-token",
            measured=_estimate(compute, "saved").shifted(-study.params.saving),
            margin=0.0,
            words={"saving": study.params.saving},
            note=f"{compute['mixture'] / 1e6:.2f} against {compute['dense'] / 1e6:.2f} million operations a token, "
            f"output embeddings included; {rows['blocks']['saved']:.1f} % saved without{where}. {note}",
        ),
        ledger.judged(
            "sparse-memory",
            measured=_negative(_estimate(memory, "saved")),
            margin=0.0,
            note=f"{memory['mixture'] / 1e6:.2f} against {memory['dense'] / 1e6:.2f} MB{where}. {note}",
        ),
    ]


def _routed(study: Study, ends: dict[Any, dict[str, Any]], routing: pd.DataFrame) -> list[Claim]:
    rows = _by(routing, "system")
    trained = _estimate(ends[RANDOM], "above") if RANDOM in ends else None
    found = [
        ledger.judged(
            "sparse-random-router",
            measured=trained,
            margin=0.0,
            note="" if trained else "The mixture with a random router was not trained.",
        )
    ]
    for name, word in ((SHUFFLED, "shuffled"), (RANDOM_ROUTER, "random")):
        row = rows[name]
        found.append(
            ledger.judged(
                f"sparse-routing-{word}",
                measured=_estimate(row, "lost", int(row["verses"])),
                margin=0.0,
                words={"system": name},
                note=f"{study.params.routed_model}, {int(row['seeds'])} seeds.",
            )
        )
    return found


def _zeros(study: Study, activations: pd.DataFrame, decoding: pd.DataFrame) -> list[Claim]:
    params = study.params
    quality = _by(activations, "choice", "part", "share")
    time = _by(decoding, "part", "share")
    if (SMALLEST, ALL, HALF) not in quality:
        left_out = "No model, or no share of 0.5, is set for this part."
        names = ("sparse-activation-quality", "sparse-activation-random", "sparse-activation-speed")
        return [ledger.judged(name, measured=None, margin=0.0, note=left_out) for name in names]
    teal, random = (quality[choice, ALL, HALF] for choice in (SMALLEST, AT_RANDOM))
    fast = time[ALL, HALF]
    worse = _estimate(teal, "worse", int(teal["texts"]))
    return [
        ledger.judged(
            "sparse-activation-quality",
            measured=_negative(worse),
            margin=params.margin,
            note=f"{params.model}; thresholds from {params.calibration_kind}, tested on {params.test_kind}, where they "
            f"make {teal['found']:.1%} of the inputs zero.",
        ),
        ledger.judged(
            "sparse-activation-random",
            measured=Estimate(
                random["worse"] - worse.value,
                random["worse_low"] - worse.high,
                random["worse_high"] - worse.low,
                worse.n,
            ),
            margin=0.0,
            note="The interval joins the ends of both, and is wider than a paired one.",
        ),
        ledger.judged(
            "sparse-activation-speed",
            measured=_estimate(fast, "token", int(fast["repeats"])).shifted(-PUBLISHED_SPEED),
            margin=0.0,
            note=f"Products alone {fast['product']:.2f} times, {fast['part_of_token']:.0%} of a token's time; "
            f"one text, {fast['dtype']}. Computed from measured parts: no model here runs with such products.",
        ),
    ]


def _by(table: pd.DataFrame, *names: str) -> dict[Any, dict[str, Any]]:
    """The rows of a table by one column, or by several."""
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return {row[names[0]] if len(names) == 1 else tuple(row[name] for name in names): row for row in rows}


def _estimate(row: Any, name: str, n: int | None = None) -> Estimate:
    count = int(row["seeds"]) if n is None else n
    return Estimate(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), count)


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.n)
