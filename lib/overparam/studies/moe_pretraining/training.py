"""The training itself: weights before the first step, batches, checkpoints, the learning curve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.assets import trained
from overparam.data.packing import IGNORED, Packed, pack
from overparam.data.splits import Split
from overparam.models import translator
from overparam.studies.moe_pretraining import Params, corpus
from overparam.support import cache, files
from overparam.support.allocator import keep_freed_memory
from overparam.train import causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALIDATION_SEED = 1


@dataclass(frozen=True)
class TrainedTranslator:
    """A trained translator.

    Attributes:
        model: In float32, evaluation mode.
        tokenizer: Its tokenizer.
        log: One value a step.
        curve: (step, cross entropy per predicted token of the validation split), one a checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    log: causal.Log
    curve: list[tuple[int, float]]


def recipe(params: Params) -> causal.Recipe:
    """Return the training recipe that the parameters describe."""
    return causal.Recipe(
        steps=params.steps,
        accumulate=params.accumulate,
        learning_rate=params.learning_rate,
        warmup=params.warmup,
        decay=params.decay,
        optimizer=params.optimizer,
        label_smoothing=params.label_smoothing,
        balance=params.balance,
        seed=params.seed,
    )


def untrained(params: Params) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model before its first step, and its tokenizer."""
    tokenizer = translator.tokenizer(corpus.tokenizer_texts(params.max_texts), vocabulary=params.vocabulary)
    model = translator.build(
        architecture=params.architecture,
        sinks=params.sinks,
        vocabulary=params.vocabulary,
        hidden=params.hidden,
        layers=params.layers,
        experts=params.experts,
        top_k=params.top_k,
        expert_width=params.expert_width,
        heads=params.heads,
        key_value_heads=params.key_value_heads,
        seed=params.seed,
    )
    if params.embedding_donor:
        donor, donor_tokenizer = models.load(params.embedding_donor)
        translator.borrow_embeddings(model, tokenizer, donor, donor_tokenizer)
    return model, tokenizer


def batches(
    params: Params, tokenizer: PreTrainedTokenizerBase, *, split: Split = "train", seed: int | None = None
) -> Iterator[Packed]:
    """Yield the batches of the training, or of the same mix of another split."""
    mix = corpus.Mix(
        translation=params.translation_share,
        unseen_share=params.unseen_share,
        reverse_share=params.reverse_share,
    )
    trees = corpus.trees(
        tokenizer,
        mix,
        seed=params.seed if seed is None else seed,
        split=split,
        length=params.row_length,
        max_texts=params.max_texts,
    )
    return pack(trees, rows=params.rows, length=params.row_length)


def state_folder(params: Params) -> Path:
    """Return the folder of the training's checkpoints in the user's cache: one for each recipe.

    The length of the training is not part of its name: a longer run goes on where a shorter one ended.
    """
    schedule = {"steps", "decay", "compiled", "checkpoint_every", "validation_batches"}
    measuring = {"test_verses", "removed_verses", "beams"}
    judging = {"minimum_load", "minimum_busy", "removal_margin", "goal"}
    named = params.model_dump(mode="json", exclude=schedule | measuring | judging)
    return cache.folder("training") / files.digest(named)[:16]


def train(params: Params, *, checkpoint: Path | None = None) -> TrainedTranslator:
    """Train the translator, or go on from its last checkpoint.

    Args:
        params: See `Params`.
        checkpoint: Folder of the state; by default in the user's cache.
    """
    import torch

    keep_freed_memory()
    model, tokenizer = untrained(params)
    held_out = batches(params, tokenizer, split="validation", seed=VALIDATION_SEED)
    validation = list(islice(held_out, params.validation_batches))
    folder = checkpoint or state_folder(params)
    curve_file = folder.with_name(f"{folder.name}.curve.json")
    curve: dict[int, float] = {}
    if curve_file.exists():
        curve = {int(step): loss for step, loss in json.loads(curve_file.read_text()).items()}

    def measure(step: int) -> None:
        curve[step] = validation_loss(model, validation)
        files.write_atomic(curve_file, json.dumps(curve).encode())

    with cache.using(folder):
        log = causal.train(
            model,
            batches(params, tokenizer),
            recipe(params),
            checkpoint=folder,
            every=params.checkpoint_every,
            at_checkpoint=measure,
            compiled=params.compiled,
            capacity=params.capacity,
            bf16=models.working_dtype("auto") == torch.bfloat16,
            label="pre-training",
        )
    points = sorted((step, loss) for step, loss in curve.items() if step <= params.steps)
    return TrainedTranslator(model.eval(), tokenizer, log, points)


def committed(params: Params) -> TrainedTranslator:
    """Return the translator that comes with the repository, and the log of its training."""
    folder = trained.folder(params.slug())
    model, tokenizer = models.load(str(folder), causal=True)
    steps = pd.read_csv(folder / "learning_curve.csv")
    if "dropped" not in steps:  # a training that dropped nothing
        steps["dropped"] = 0.0
    columns: dict[str, Any] = {
        name: steps[name].tolist() for name in ("loss", "balance", "tokens", "predicted", "dropped")
    }
    log = causal.Log(**columns, seconds=(60 * steps["minutes"]).tolist())
    points = steps.loc[steps["validation_loss"].notna(), ["step", "validation_loss"]]
    return TrainedTranslator(model.eval(), tokenizer, log, list(points.itertuples(index=False, name=None)))


def replay(params: Params, steps: int) -> list[float]:
    """Return the losses of the first steps, trained again from the start, without checkpoints."""
    keep_freed_memory()
    model, tokenizer = untrained(params)
    first = replace(recipe(params), steps=steps, decay=0)
    return causal.train(
        model, batches(params, tokenizer), first, capacity=params.capacity, label="replaying"
    ).loss


def validation_loss(model: PreTrainedModel, validation: list[Packed]) -> float:
    """Return the cross entropy per predicted token over batches, in nats."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in validation:
            hidden, _ = causal.hidden_states(model, batch)
            labels = torch.from_numpy(batch.labels).flatten()
            at = (labels != IGNORED).nonzero().squeeze(1)
            logits = model.get_output_embeddings()(hidden.flatten(0, 1)[at])
            total += float(functional.cross_entropy(logits, labels[at], reduction="sum"))
            count += len(at)
    return total / count if count else float(np.nan)
