"""The verdict of this run on what was published, and said, about parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from overparam.models import anatomy
from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.stats import Estimate
from overparam.studies.anatomy import learning
from overparam.studies.anatomy.study import Study
from overparam.studies.anatomy.tuning import EVERYWHERE, FULL, LORA

_LEFT_OUT = "Left out in this profile."
_POWER = 0.34  # of the parameters in the published law
_PUBLISHED_LORA = 1e-4  # of GPT-3's parameters: "10,000 times fewer"


def verdicts(
    study: Study,
    counts: pd.DataFrame,
    card: pd.DataFrame,
    adapters: pd.DataFrame,
    watched: dict[str, pd.DataFrame],
    capacity: pd.DataFrame,
    overfitting: dict[str, pd.DataFrame],
    tuning: pd.DataFrame,
    law: dict[str, pd.DataFrame],
) -> list[Claim]:
    """Judge each claim and check by its rule, and put it into the record."""
    found = [
        *_totals(study, counts),
        *_training(card),
        *_adapters(adapters),
        *_watched(watched),
        *_capacity(study, capacity),
        *_overfitting(study, overfitting),
        *_tuning(study, tuning),
        *_law(law),
    ]
    for claim in found:
        study.recorder.claim(claim)
    return found


def slug(name: str) -> str:
    """A model's name in the ids of claims."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _exact(value: float, n: int = 1) -> Estimate:
    return Estimate(float(value), float(value), float(value), n)


def _totals(study: Study, counts: pd.DataFrame) -> Iterator[Claim]:
    within = study.params.within
    far: Any = max(counts.to_dict("records"), key=lambda row: abs(row["unexplained"]))
    explained = counts[counts["difference"].abs() > within]
    yield ledger.judged(
        "anatomy-totals",
        measured=_exact(far["unexplained"], len(counts)),
        margin=within,
        note=f"The furthest of {len(counts)} models, {far['model']}. A count has no interval. Beyond {within:g} % as "
        f"published, and explained: {', '.join(f'{m} {d:+.1f} %' for m, d in _pairs(explained)) or 'none'}.",
    )
    yield ledger.judged(
        "anatomy-exact",
        measured=_exact((counts["total"] - counts["built"]).abs().max(), len(counts)),
        margin=0.0,
        note="Sum over components against the sum over the parameters of the built model.",
    )
    known = counts[counts["flops_apart"].notna()]
    yield ledger.judged(
        "anatomy-operations",
        measured=_exact(100 * known["flops_apart"].abs().max(), len(known)),
        margin=0.1,
        note=f"{len(known)} models; an encoder-decoder's depend on two lengths and are not counted.",
    )
    for row in counts.to_dict("records"):
        words = {"model": row["model"], "published": row["published"]}
        note = f"Counted {row['total']:,}, {row['difference']:+.2f} %."
        if row["explanation"] == "table counted twice":
            note += (
                f" The input table, which is the head, too, has {row[anatomy.TABLE]:,}; counted twice, "
                f"{row['unexplained']:+.2f} % are left. The paper's smaller models count it once."
            )
        elif row["explanation"] == "rounded":
            note += " Rounded to as many digits as were published, it is the published number."
        yield ledger.judged(
            f"anatomy-total-{slug(row['model'])}", measured=_exact(row["unexplained"]), margin=within, words=words,
            note=note,
        )  # fmt: skip
    for row in counts[counts["active published"] != ""].to_dict("records"):
        others = ", ".join(f"{name} {row[f'active {name}']:,}" for name in anatomy.DEFINITIONS)
        yield ledger.judged(
            f"anatomy-active-{slug(row['model'])}",
            measured=_exact(row["active difference"]),
            margin=within,
            words={"model": row["model"], "published": row["active published"]},
            note=f"Counted {row['definition']}. All definitions: {others}.",
        )


def _pairs(table: pd.DataFrame) -> list[tuple[str, float]]:
    return list(zip(table["model"], table["difference"], strict=True))


def _training(card: pd.DataFrame) -> Iterator[Claim]:
    rows = {row["model"]: row for row in card.to_dict("records")}
    for row in (each for each in rows.values() if each["hours published"]):
        words = {"model": row["model"]}
        ends = (
            f"{row['million dollars_low']:.3g} to {row['million dollars_high']:.3g} million dollars, "
            f"{row['tonnes CO2e_low']:.3g} to {row['tonnes CO2e_high']:.3g} tonnes CO2e."
        )
        note = (
            f"{row['device days'] / 1000:,.3g} thousand days of one {row['device']}, as published, which implies "
            f"{row['utilisation']:.0%} of its peak. The interval is that of the assumptions: {ends}"
        )
        yield ledger.judged(
            f"anatomy-cost-{slug(row['model'])}", measured=_estimate(row, "million dollars"), margin=10.0, words=words,
            note=note,
        )  # fmt: skip
        yield ledger.judged(
            f"anatomy-carbon-{slug(row['model'])}",
            measured=_estimate(row, "cars"),
            margin=3.0,
            words=words,
            note=note,
        )
    for row in (each for each in rows.values() if np.isfinite(each["updates"])):
        yield ledger.judged(
            f"anatomy-updates-{slug(row['model'])}",
            measured=_exact(row["updates"] / 1000),
            margin=10.0,
            words={"model": row["model"]},
            note=f"{row['tokens']:.4g} tokens ÷ tokens of a step. From 100 on, it is hundreds of thousands.",
        )
    gpt = rows["GPT-3 175B"]
    yield ledger.judged(
        "anatomy-quadrillions",
        measured=_exact(gpt["operations"] / 1e15),
        margin=1.0,
        note=f"6·N·D = {gpt['operations']:.3g} operations for GPT-3 175B. True, and far too little: one text of 2,048 "
        f"tokens takes {6 * gpt['parameters'] * 2048 / 1e15:.2g} quadrillion in training.",
    )
    yield ledger.judged(
        "anatomy-seven-trillion",
        measured=None,
        margin=0.0,
        note="No model of this size has published its shape.",
    )


def _adapters(adapters: pd.DataFrame) -> Iterator[Claim]:
    worst = (adapters["formula"] - adapters["peft"]).abs().max()
    yield ledger.judged(
        "anatomy-lora-exact",
        measured=_exact(worst, len(adapters)),
        margin=0.0,
        note="peft on the meta device.",
    )
    row = adapters[(adapters["model"] == "GPT-3 175B") & (adapters["rank"] == 4)].iloc[0]
    yield ledger.judged(
        "anatomy-lora-share",
        measured=_exact(100 * (row["share"] / 100 / _PUBLISHED_LORA - 1)),
        margin=10.0,
        note=f"Rank 4 on W_q and W_v: {int(row['formula']):,} parameters, {row['share']:.4f} % of all.",
    )


def _watched(watched: dict[str, pd.DataFrame]) -> Iterator[Claim]:
    derivatives, part = watched["derivatives"], watched["parts"].iloc[0]
    yield ledger.judged(
        "anatomy-derivatives",
        measured=_exact(1e5 * derivatives["apart"].max(), len(derivatives)),
        margin=1.0,
        note=f"The worst of {len(derivatives)} weights, float64.",
    )
    yield ledger.judged(
        "anatomy-few-matter",
        measured=_estimate(part, "share", int(part["weights"])),
        margin=50.0,
        note="Weights drawn at random from the matrices of the blocks, set to zero one at a time.",
    )


def _capacity(study: Study, capacity: pd.DataFrame) -> Iterator[Claim]:
    if capacity.empty:
        for name in ("bits", "grows", "strings"):
            yield ledger.judged(f"anatomy-capacity-{name}", measured=None, margin=0.0, note=_LEFT_OUT)
        return
    last = capacity.iloc[-1]
    bits = _estimate(last, "per_parameter", int(last["strings"]))
    note = (
        f"{int(last['parameters']):,} parameters, {study.params.capacity_epochs} epochs (published: 1,000), "
        f"{last['offered']:.1f} bits a parameter offered. On strings that it did not see: "
        f"{last['unseen']:.1f} bits; below 0, it is wrong with confidence."
    )
    yield ledger.judged("anatomy-capacity-bits", measured=bits, margin=0.2, note=note)
    yield ledger.judged("anatomy-capacity-strings", measured=bits, margin=0.2, note=note)
    if len(capacity) < 3:
        yield ledger.judged("anatomy-capacity-grows", measured=None, margin=0.0, note="Needs three sizes.")
        return
    yield ledger.judged(
        "anatomy-capacity-grows",
        measured=learning.growth(capacity).shifted(-1),
        margin=0.1,
        note=f"{len(capacity)} sizes, interval of the slope (Student). A positive number says that larger models store "
        "more bits a parameter.",
    )


def _overfitting(study: Study, found: dict[str, pd.DataFrame]) -> Iterator[Claim]:
    ends = found["ends"]
    if ends.empty:
        for name in ("gap", "stopping", "dropout"):
            yield ledger.judged(f"anatomy-overfitting-{name}", measured=None, margin=0.0, note=_LEFT_OUT)
        return
    plain = ends[ends["dropout"] == 0]
    first, last = plain.iloc[0], plain.iloc[-1]
    with_dropout = ends[ends["dropout"] > 0].iloc[-1]
    seeds = (
        f"{int(last['seeds'])} seed(s), {study.params.epochs} epochs of {study.params.corpus_bytes:,} bytes."
    )
    sizes = f"{int(first['parameters']):,} against {int(last['parameters']):,} parameters"
    yield ledger.judged(
        "anatomy-overfitting-gap",
        measured=_apart(_estimate(last, "gap"), _estimate(first, "gap")),
        margin=0.0,
        note=f"{sizes}; gaps {first['gap']:.2f} and {last['gap']:.2f}. {seeds} The best held-out losses are "
        f"{first['stopped']:.2f} and {last['stopped']:.2f}: more parameters need not be worse if it stops in time.",
    )
    yield ledger.judged(
        "anatomy-overfitting-stopping",
        measured=_estimate(last, "saved"),
        margin=0.0,
        note=f"Stopped at epoch {last['best_epoch']:g} of {study.params.epochs}, chosen on another text. {seeds}",
    )
    yield ledger.judged(
        "anatomy-overfitting-dropout",
        measured=_apart(_estimate(last, "gap"), _estimate(with_dropout, "gap")),
        margin=0.0,
        note=f"Dropout {study.params.dropout:g}; losses at the end {last['last']:.2f} without and "
        f"{with_dropout['last']:.2f} with it. {seeds}",
    )


def _apart(one: Estimate, other: Estimate) -> Estimate:
    """Difference of two estimates, with the ends of both joined: wider than a paired interval."""
    return Estimate(one.value - other.value, one.low - other.high, one.high - other.low, min(one.n, other.n))


def _tuning(study: Study, tuning: pd.DataFrame) -> Iterator[Claim]:
    if tuning.empty:
        for name in ("quality", "forgets", "memory"):
            words = {"where": "attention"}
            yield ledger.judged(
                f"anatomy-lora-{name}-attention", measured=None, margin=0.0, words=words, note=_LEFT_OUT
            )
        return
    rows = {row["method"]: row for row in tuning.to_dict("records")}
    full = rows[FULL]
    for method, word in ((LORA, "attention"), (EVERYWHERE, "experts")):
        lora = rows[method]
        texts = int(full["texts"])
        note = (
            f"{study.params.model}, {study.params.tuning_pairs} pairs, {int(lora['trained']):,} against "
            f"{int(full['trained']):,} trained parameters; a step takes {lora['seconds']:.2f} and "
            f"{full['seconds']:.2f} s."
        )
        words = {"where": "attention" if method == LORA else "attention and experts"}
        yield ledger.judged(
            f"anatomy-lora-quality-{word}", measured=_negative(_estimate(lora, "worse_than_full", texts)),
            margin=study.params.on_par, words=words,
            note=f"Loss {lora['test']:.3f} against {full['test']:.3f}; on training texts {lora['train']:.3f} against "
            f"{full['train']:.3f}. {note}",
        )  # fmt: skip
        yield ledger.judged(
            f"anatomy-lora-forgets-{word}", measured=_estimate(lora, "full_forgot_more", texts),
            margin=0.0, words=words,
            note=f"Rise of the loss on verses: {lora['forgot']:.3f} with LoRA, {full['forgot']:.3f} in full, each at "
            f"the rate and epoch that are best for the new texts. {note}",
        )  # fmt: skip
        yield ledger.judged(
            f"anatomy-lora-memory-{word}",
            measured=_exact(100 * (1 - lora["state_bytes"] / full["state_bytes"])),
            margin=66.0,
            words=words,
            note=f"{lora['state_bytes'] / 1e6:.1f} against {full['state_bytes'] / 1e6:.1f} MB of gradients and states "
            "of AdamW, exact; weights and activations come on top of both.",
        )


def _law(law: dict[str, pd.DataFrame]) -> Iterator[Claim]:
    if law["points"].empty:
        for name in ("predicts", "power"):
            yield ledger.judged(f"anatomy-law-{name}", measured=None, margin=0.0, note=_LEFT_OUT)
        return
    held = law["held_out"].iloc[-1]
    constants = {row["constant"]: row for row in law["fit"].to_dict("records")}
    miss = [
        100 * (held["measured"] / held[name] - 1) for name in ("predicted", "predicted_high", "predicted_low")
    ]
    sizes = law["points"]["parameters"]
    yield ledger.judged(
        "anatomy-law-predicts",
        measured=Estimate(miss[0], miss[1], miss[2], len(law["points"])),
        margin=2.0,
        note=f"Fitted to sizes up to {int(sorted(sizes.unique())[-2]):,}, tested on {int(sizes.max()):,}; measured "
        f"{held['measured']:.3f}, predicted {held['predicted']:.3f} nats a byte. One seed. {_steeper(law['points'])}",
    )
    power, floor = constants["a"], constants["E"]
    yield ledger.judged(
        "anatomy-law-power",
        measured=Estimate(power["value"], power["low"], power["high"], len(law["points"])).shifted(-_POWER),
        margin=0.05,
        note=f"Sizes {int(sizes.min()):,} to {int(sizes.max()):,}, tables included; E = {floor['value']:.2f} "
        f"[{floor['low']:.2f}, {floor['high']:.2f}] is hardly identified.",
    )


def _steeper(points: pd.DataFrame) -> str:
    """Say how loss falls with the size after the least and after the most text."""
    powers = []
    for seen in (points["bytes"].min(), points["bytes"].max()):
        own = points[points["bytes"] == seen]
        powers.append(-np.polyfit(np.log(own["parameters"]), np.log(own["loss"]), 1)[0])
    said = f"Loss falls with the power {powers[0]:.3f} of the size after the least text, {powers[1]:.3f} after the most"
    if powers[1] > powers[0]:
        said += ": size and text act on each other, which a sum of a part for each cannot say"
    return f"{said}."


def _estimate(row: Any, name: str, n: int | None = None) -> Estimate:
    count = int(row.get("seeds", 1)) if n is None else n
    return Estimate(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), count)


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.n)
