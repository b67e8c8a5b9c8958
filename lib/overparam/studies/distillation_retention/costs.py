"""What a student costs to run: parameters, bytes, time of one text and of a batch, energy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from overparam.compress.distill import encoders
from overparam.experiment import costs as measuring
from overparam.experiment.study import step
from overparam.measure import disk
from overparam.record import stats
from overparam.studies.distillation_retention.general import Students
from overparam.studies.distillation_retention.study import Study

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
    found = measuring.measure(
        "share",
        {
            share: {
                "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
                "disk_bytes": _bytes(encoder),
            }
            for share, encoder in named.items()
        },
        {
            name: measuring.Step({share: _encoding(each, some) for share, each in named.items()}, len(some))
            for name, some in (("single", texts[:1]), ("batch", texts))
        },
        repeats=params.cost_repeats,
        energy_step="batch",
        energy_repeats=params.cost_repeats,
        unit="texts",
        units=len(texts),
    )
    table = found.table.assign(texts_per_second=len(texts) / found.table["batch_seconds"])
    study.recorder.table("costs", table)
    study.recorder.table("latencies", found.latencies)
    faster = {
        share: each for share, each in found.faster("batch", 1.0).items() if share in students.distilled
    }
    for share, each in faster.items():
        study.recorder.metric(f"speed_up_{share:g}", each, "times the teacher's speed")
    return table, faster


def _encoding(encoder: SentenceTransformer, texts: list[str]) -> Callable[[], None]:
    def encode() -> None:
        encoders.outputs(encoder, texts, batch_size=len(texts))

    return encode


def _bytes(encoder: SentenceTransformer) -> int:
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        encoder.save(folder, create_model_card=False)
        return disk.disk_bytes(Path(folder))
