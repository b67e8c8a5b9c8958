"""Students that give the sentence embeddings of a teacher, as ordinary sentence-transformers models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.distill import losses
from overparam.compress.distill.training import Log, Recipe, fit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Objective = Literal["cosine", "relational", "both"]
TEMPERATURE = 0.05  # of the relational loss


def as_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, width: int, max_length: int, seed: int = 0
) -> SentenceTransformer:
    """Wrap a student as a SentenceTransformer: mean pooling, and a projection where its width is not the teacher's.

    Args:
        model: A text encoder; it is copied.
        tokenizer: Its tokenizer.
        width: Dimensions of the teacher's embeddings.
        max_length: Tokens of a text.
        seed: Of the projection.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=max_length)
    hidden = model.config.hidden_size
    modules: list[nn.Module] = [transformer, Pooling(hidden, "mean")]
    if hidden != width:
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        modules.append(Dense(hidden, width, bias=False, activation_function=nn.Identity()))
        torch.set_rng_state(state)
    return SentenceTransformer(modules=[*modules, Normalize()], device="cpu")


def distill_embeddings(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    targets: NDArray[np.float32],
    recipe: Recipe,
    *,
    objective: Objective = "both",
    checkpoint: Path | None = None,
    label: str = "distilling embeddings",
) -> Log:
    """Train `encoder` in place to embed texts as the teacher does.

    "cosine" is one minus the cosine to the teacher's embedding (Reimers & Gurevych 2020, arXiv 2004.09813, with
    unit vectors); "relational" compares which other texts of the batch are near (`losses.similarity_kl`).

    Args:
        encoder: From `as_encoder`.
        texts: Without labels.
        targets: The teacher's embeddings. float32 [texts, width]
        recipe: See `training.Recipe`.
        objective: Which of the losses; "both" adds them.
        checkpoint: See `training.fit`.
        label: Name of the step in the progress display.

    Raises:
        ValueError: Not one target a text, targets that are not finite, or of another width than the encoder's.
        FloatingPointError: If the loss is not finite.
    """
    width = encoder.get_sentence_embedding_dimension()
    if targets.shape != (len(texts), width) or not np.isfinite(targets).all():
        raise ValueError(
            f"targets must be finite and [{len(texts)} texts, {width}], got {list(targets.shape)}"
        )
    tokenizer, length = encoder.tokenizer, encoder.max_seq_length
    ids = tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]
    wanted = torch.from_numpy(np.ascontiguousarray(targets))

    def loss(chosen: NDArray[np.int64]) -> torch.Tensor:
        features = tokenizer.pad({"input_ids": [ids[text] for text in chosen]}, return_tensors="pt")
        found = encoder({name: tensor.to(encoder.device) for name, tensor in features.items()})
        embeddings, target = found["sentence_embedding"], wanted[torch.from_numpy(chosen)].to(encoder.device)
        parts = []
        if objective != "relational":
            parts.append(losses.cosine_distance(embeddings, target))
        if objective != "cosine":
            parts.append(losses.similarity_kl(embeddings, target, temperature=TEMPERATURE))
        return torch.stack(parts).sum()

    return fit(encoder, loss, [len(row) for row in ids], recipe, checkpoint=checkpoint, label=label)
