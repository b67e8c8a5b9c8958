"""The verdict of this run on each claim."""

from __future__ import annotations

from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.studies.weight_pruning.study import Quality, Study, Times

SHARES = (0.3, 0.5)
JUDGED = ("magnitude", "wanda")
_NAMES = {"magnitude": "magnitude", "wanda": "Wanda"}


def verdicts(study: Study, found: Quality, timed: Times) -> list[Claim]:
    """Judge each claim by its rule, and put it into the record."""
    params = study.params
    unit = "% of the perplexity" if study.decoder else "% of the score"
    words = {"model": params.model}
    claims = []
    for method in JUDGED:
        for share in SHARES:
            kept = found.kept.get((method, share, ""))
            claims.append(
                ledger.judged(
                    f"weights-{share:.0%}".rstrip("%") + f"-{method}",
                    measured=kept.shifted(-100) if kept else None,
                    margin=params.margin,
                    note=_scale(study),
                    words={**words, "method": _NAMES[method], "share": f"{share:.0%}", "unit": unit},
                )
            )
    for id, pair in {"weights-wanda": "wanda over magnitude", "weights-2-4": "free over 2:4"}.items():
        measured = found.against.get(pair)
        claims.append(
            ledger.judged(
                id, measured=measured, margin=0.0, note=_scale(study), words={**words, "unit": unit}
            )
        )
    claims.append(
        ledger.judged(
            "weights-time",
            measured=timed.dense,
            margin=params.time_margin,
            note=f"{study.subject.call_names[study.subject.main_call]}, half of the layers' weights zero.",
            words=words,
        )
    )
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _scale(study: Study) -> str:
    counts = study.recorder.record.metrics
    share = counts["parameters_of_layers"].value / counts["parameters"].value
    text = f"The layers hold {share:.0%} of the parameters; embeddings and head are not pruned. No training afterwards."
    if study.params.model.startswith("gemma-3-270m"):
        text += " The weights had 4 to 6 bits before."
    return text
