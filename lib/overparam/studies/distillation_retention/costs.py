"""What a student costs to run: parameters, bytes, time of one text and of a batch, energy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from overparam.compress.distill import encoders
from overparam.experiment.study import step
from overparam.measure import disk, energy, speed
from overparam.record import stats
from overparam.studies.distillation_retention.general import Students
from overparam.studies.distillation_retention.study import Study
from overparam.support import progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@step
def costs(study: Study, students: Students) -> tuple[pd.DataFrame, dict[float, stats.Estimate]]:
    """Measure the teacher and every distilled student on the same texts; they take turns while they are timed.

    Returns:
        A row a model, and how many times as fast as the teacher each student encodes a batch, by share, with a
        bootstrap interval over rounds.
    """
    params = study.params
    texts = study.texts[: params.cost_texts]
    named: dict[float, SentenceTransformer] = {1.0: study.encoder}
    named |= {share: several[0] for share, several in students.distilled.items()}
    timings = {
        size: speed.interleaved(
            {str(share): _encoding(encoder, texts[:size]) for share, encoder in named.items()},
            repeats=params.cost_repeats,
        )
        for size in (1, len(texts))
    }
    rows = []
    for share, encoder in progress.track(named.items(), "measuring energy"):
        with energy.energy() as used:
            for _ in range(params.cost_repeats):
                _encoding(encoder, texts)()
        batch, single = (timings[size][str(share)] for size in (len(texts), 1))
        rows.append(
            {
                "share": share,
                "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
                "disk_bytes": _bytes(encoder),
                "single_seconds": single.median,
                "batch_seconds": batch.median,
                "batch_seconds_low": batch.low,
                "batch_seconds_high": batch.high,
                "texts_per_second": len(texts) / batch.median,
                "kwh_per_million_texts": used.kwh / (params.cost_repeats * len(texts)) * 1e6,
                "energy_method": used.method,
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("costs", table)
    raw = [
        {"share": float(share), "texts": size, "seconds": seconds}
        for size, found in timings.items()
        for share, timing in found.items()
        for seconds in timing.values
    ]
    study.recorder.table("latencies", pd.DataFrame(raw))
    batch_seconds = {share: np.array(timings[len(texts)][str(share)].values) for share in named}
    faster = {share: speed_up(batch_seconds[1.0], batch_seconds[share]) for share in students.distilled}
    for share, found in faster.items():
        study.recorder.metric(f"speed_up_{share:g}", found, "times the teacher's speed")
    return table, faster


def speed_up(teacher: np.ndarray, student: np.ndarray) -> stats.Estimate:
    """How many times as fast the student is, paired by round."""
    return stats.retention(student, teacher)


def _encoding(encoder: SentenceTransformer, texts: list[str]) -> Callable[[], None]:
    def encode() -> None:
        encoders.outputs(encoder, texts, batch_size=len(texts))

    return encode


def _bytes(encoder: SentenceTransformer) -> int:
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        encoder.save(folder, create_model_card=False)
        return disk.disk_bytes(Path(folder))
