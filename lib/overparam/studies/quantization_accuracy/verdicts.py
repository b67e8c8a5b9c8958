"""The verdict of this run on each published claim."""

from __future__ import annotations

import pandas as pd

from overparam.compress import quantize
from overparam.record import ledger, stats
from overparam.record.claims import Claim
from overparam.studies.quantization_accuracy.bits import Curve
from overparam.studies.quantization_accuracy.costs import names_of_calls
from overparam.studies.quantization_accuracy.quality import SCORED, Quality, context, rise
from overparam.studies.quantization_accuracy.study import Study
from overparam.studies.quantization_accuracy.training import QualityByBits

_EIGHT, _FOUR = 8, 4


def verdicts(
    study: Study,
    quality: Quality,
    curve: Curve,
    trained: QualityByBits,
    table: pd.DataFrame,
    faster: dict[str, stats.Estimate],
) -> list[Claim]:
    """Judge each claim by its rule, and put it into the record."""
    params = study.params
    found = []
    for name, kept in quality.kept.items():
        if quantize.SCHEMES[name].weights == _EIGHT:
            found.append(
                ledger.judged(
                    f"quantization-8-bits-{name}",
                    measured=kept.shifted(-100),
                    margin=params.modest_margin,
                    words={"scheme": name},
                    note=f"{params.model}: {study.subject.metric}.",
                )
            )
    sizes = table.set_index("scheme")["disk_bytes"]
    fours = sizes[[name for name in sizes.index if quantize.SCHEMES[name].weights == _FOUR]]
    if len(fours):
        gone = 100 * (1 - fours.min() / sizes[quantize.BASELINE])
        found.append(
            ledger.judged(
                "quantization-4-bits-size",
                measured=stats.Estimate(gone - 75, gone - 75, gone - 75, 1),
                margin=0.0,
                note=f"The smallest of {len(fours)} 4-bit schemes is {fours.idxmin()}; bytes are exact.",
            )
        )
    eights = {name: each for name, each in faster.items() if quantize.SCHEMES[name].weights == _EIGHT}
    if eights:
        best = max(eights, key=lambda name: eights[name].value)
        call = names_of_calls(study)[study.subject.main_call]
        found.append(
            ledger.judged(
                "quantization-speed",
                measured=eights[best].shifted(-2),
                margin=0.0,
                note=f"The fastest of {len(eights)} 8-bit schemes is {best}, for {call}.",
            )
        )
    for bits, gain in curve.mixed.items():
        found.append(
            ledger.judged(
                f"quantization-mixed-{bits}",
                measured=gain,
                margin=0.0,
                words={"bits": bits},
                note="Bits by the divergence of each part when rounded alone; simulated rounding.",
            )
        )
    for bits in params.qat_bits:
        if bits == _EIGHT:
            continue
        closed = trained.gap_closed.get(bits)
        found.append(
            ledger.judged(
                f"quantization-aware-{bits}",
                measured=None if closed is None else closed.shifted(-0.5).scaled(100),
                margin=0.0,
                words={"bits": bits},
                note=study.not_trained or _note(trained, bits),
            )
        )
    found += _against(study, quality, trained, table)
    for claim in found:
        study.recorder.claim(claim)
    return found


def _note(trained: QualityByBits, bits: int) -> str:
    said = (
        f"Rounding after training leaves {trained.after[bits].value:+.1f} %, training with it "
        f"{trained.trained[bits].value:+.1f} %."
    )
    if bits in trained.gap_closed:
        return said
    return said + " The loss from rounding is within its interval: there is no gap to close."


def _against(study: Study, quality: Quality, trained: QualityByBits, table: pd.DataFrame) -> list[Claim]:
    """Judge the claims against quantization."""
    bits = min(study.params.qat_bits, key=lambda bits: abs(bits - _FOUR))
    found = [
        ledger.judged(
            "quantization-flips",
            measured=trained.hidden.get(bits),
            margin=0.0,
            note=study.not_trained or f"{bits} bits, rounded after training.",
        )
    ]
    eights = table[table["scheme"].map(lambda name: quantize.SCHEMES[name].weights == _EIGHT)]
    if len(eights):
        slowest = eights.sort_values("single_speed_up").iloc[0]
        value, low, high = (1 - slowest[f"single_speed_up{end}"] for end in ("", "_high", "_low"))
        found.append(
            ledger.judged(
                "quantization-slower",
                measured=stats.Estimate(value, low, high, study.params.cost_repeats),
                margin=0.0,
                note=f"The slowest of {len(eights)} 8-bit schemes is {slowest['scheme']}.",
            )
        )
    if not quality.read:  # of an encoder
        return found
    views = dict.fromkeys(view for _, view in quality.read)
    others = [view for view in views if view.startswith("verses") and view != "verses, en"]
    short, long = (context(study.params.context_lengths[end]) for end in (0, -1))
    for name in quality.kept:
        if quantize.SCHEMES[name].weights != _FOUR:
            continue
        words = {"scheme": name}
        if others and (quantize.BASELINE, "verses, en") in quality.read:
            english = rise(quality, name, "verses, en")
            pairs = {view: (english, rise(quality, name, view), "mean") for view in others}
            found.append(
                ledger.judged(
                    f"quantization-languages-{name}",
                    measured=stats.suite_difference(pairs),
                    margin=0.0,
                    words=words,
                    note=f"{len(others)} languages, {len(english)} verses each.",
                )
            )
        if long != short:
            found.append(
                ledger.judged(
                    f"quantization-context-{name}",
                    measured=stats.difference(rise(quality, name, short), rise(quality, name, long)),
                    margin=0.0,
                    words=words,
                    note=f"{SCORED * study.params.context_windows} tokens after a {short} and after a {long}.",
                )
            )
    return found
