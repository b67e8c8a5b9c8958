"""The steps of the pre-training study, in the order of the notebook."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from overparam import models
from overparam.data import corpora, kinds
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.record.record import Record
from overparam.studies.moe_pretraining import Params, training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOOTHED_OVER = 20  # steps of the training loss that a reader sees
MODEL_CARD = "MODEL_CARD.md"


@dataclass
class Study(experiment.Study[Params]):
    """A started study.

    Attributes:
        items: Per-sentence results of every search that was scored.
    """

    items: list[pd.DataFrame] = field(default_factory=list)

    def finish(self) -> Record:
        """Write the per-sentence results and the record; its last file is record.json."""
        if not self.recorder.replays:
            self.recorder.items("translations", pd.concat(self.items, ignore_index=True))
        return super().finish()


@dataclass(frozen=True)
class Translator:
    """The translator as it is stored: rounded to bfloat16, read again as float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@begins
def start(params: Params) -> Study:
    """Open the record, with the hashes of the texts and of the donor's weights."""
    donor = models.provenance(params.embedding_donor) if params.embedding_donor else {}
    recorder = experiment.open_record(
        params,
        inputs=corpora.provenance("verses") | kinds.provenance(*kinds.KINDS) | donor,
        seeds=sorted({params.seed, training.VALIDATION_SEED}),
    )
    return Study(params, recorder)


@step
def train(study: Study) -> training.TrainedTranslator:
    """Train the translator, or take it from the cache, or from the repository, when it is trained already."""
    trained = training.train(study.params) if study.params.steps else training.committed(study.params)
    counts = models.count_parameters(trained.model)
    for name in ("total", "embedding", "expert", "active"):
        study.recorder.metric(f"parameters_{name}", getattr(counts, name))
    study.recorder.metric("training_steps", len(trained.log.loss))
    study.recorder.metric("training_tokens", trained.log.tokens[-1])
    study.recorder.metric("training_hours", trained.log.seconds[-1] / 3600, "h")
    if trained.curve:
        study.recorder.metric("validation_loss", trained.curve[-1][1], "nats per token")
    return trained


@step
def learning_curve(study: Study, trained: training.TrainedTranslator) -> pd.DataFrame:
    """Record the learning curve by step; return it at the checkpoints.

    Columns: `loss` and `validation_loss` in nats per predicted token, `smoothed_loss` the mean over the last
    `SMOOTHED_OVER` steps, `balance` the load-balancing loss, `dropped` the share of
    assignments that found their expert full, `tokens` and `minutes` so far.
    """
    log, recipe = trained.log, replace(training.recipe(study.params), steps=len(trained.log.loss))
    steps = range(1, len(log.loss) + 1)
    curve = pd.DataFrame(
        {
            "step": steps,
            "tokens": log.tokens,
            "predicted": log.predicted,
            "minutes": np.array(log.seconds) / 60,
            "learning_rate": [recipe.rate(step - 1) for step in steps],
            "loss": log.loss,
            "smoothed_loss": pd.Series(log.loss).rolling(SMOOTHED_OVER, min_periods=1).mean(),
            "validation_loss": [dict(trained.curve).get(step, np.nan) for step in steps],
            "balance": log.balance,
            "dropped": log.dropped,
        }
    )
    study.recorder.table("learning_curve", curve)
    return curve[curve["validation_loss"].notna()]


@step
def store(study: Study, trained: training.TrainedTranslator) -> Translator:
    """Put model and tokenizer into the record's folder in bfloat16, and load them from there.

    All that is measured from here on is measured with what others will load.
    """
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy.deepcopy(trained.model).to(torch.bfloat16).save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        study.recorder.artifact_folder(folder)
        size = (folder / "model.safetensors").stat().st_size
    study.recorder.metric("model_bytes", size, "bytes")
    return Translator(*models.load(str(study.recorder.directory), causal=True))
