"""Fine-tuning of a classifier on labels, on the soft targets of a teacher, or on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overparam.compress.distill import losses
from overparam.compress.distill.encoders import forward, token_ids
from overparam.train.distillation import Recipe, fit
from overparam.train.loop import Log

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

UNLABELLED = -100
_MATCHING_TEMPERATURE = 0.1  # temperature of the similarities of pooled hidden states


def train_classifier(
    model: SentenceTransformer,
    texts: Sequence[str],
    labels: NDArray[np.int64],
    recipe: Recipe,
    *,
    teacher_logits: NDArray[np.float32] | None = None,
    teacher_states: NDArray[np.float32] | None = None,
    temperature: float = 2.0,
    soft_weight: float = 0.9,
    checkpoint: Path | None = None,
    label: str = "training a classifier",
) -> Log:
    """Train a classifier in place: a teacher on labels, or a student on labels and its teacher's outputs.

    Args:
        model: From `encoders.as_classifier`.
        texts: Labelled texts, and unlabelled ones if the teacher gives soft targets.
        labels: Class of each text, or `UNLABELLED`. int64 [texts]
        recipe: See `train.distillation.Recipe`.
        teacher_logits: Soft targets (Hinton et al. 2015, arXiv 1503.02531); None to use only labels. [texts, classes]
        teacher_states: Pooled hidden states of the teacher; the student learns the similarities between texts that
            they have. (Token states cannot be compared if the tokenizers differ.) [texts, hidden]
        temperature: Temperature of the soft targets.
        soft_weight: Weight of the soft targets; the labels have the rest.
        checkpoint: See `train.distillation.fit`.
        label: Name shown in the progress display.

    Raises:
        ValueError: Labels are out of range or missing, or logits or states are of other texts or classes.
        FloatingPointError: If the loss is not finite.
    """
    import torch

    classes = model.get_embedding_dimension()
    known = labels[labels != UNLABELLED]
    if len(labels) != len(texts) or not len(known) or known.min() < 0 or known.max() >= classes:
        raise ValueError(
            f"labels must be one of 0..{classes - 1} or {UNLABELLED} for each of {len(texts)} texts, some of them "
            f"labelled; got {len(labels)} with {sorted(set(known.tolist()))[:3]} …"
        )
    if teacher_logits is None and len(known) < len(texts):
        raise ValueError(f"{len(texts) - len(known)} texts have no label and no teacher: give teacher_logits")
    if teacher_logits is not None and teacher_logits.shape != (len(texts), classes):
        raise ValueError(
            f"teacher and student must have the same {classes} classes for the same {len(texts)} texts, the "
            f"teacher's logits are {list(teacher_logits.shape)}"
        )
    if teacher_states is not None and len(teacher_states) != len(texts):
        raise ValueError(
            f"teacher_states must have {len(texts)} rows, one per text, got {len(teacher_states)}"
        )
    ids = token_ids(model, texts)
    device = model.device
    target = torch.from_numpy(labels).to(device)
    soft = None if teacher_logits is None else torch.from_numpy(teacher_logits).to(device)
    states = None if teacher_states is None else torch.from_numpy(teacher_states).to(device)

    def loss(chosen: NDArray[np.int64]) -> torch.Tensor:
        rows = torch.from_numpy(chosen).to(device)
        hidden, logits = forward(model, [ids[text] for text in chosen])
        total = losses.classification(
            logits,
            target[rows],
            None if soft is None else soft[rows],
            temperature=temperature,
            soft_weight=0.0 if soft is None else soft_weight,
        )
        if states is not None:
            total = total + losses.similarity_kl(hidden, states[rows], temperature=_MATCHING_TEMPERATURE)
        return total

    return fit(model, loss, [len(row) for row in ids], recipe, checkpoint=checkpoint, label=label)
