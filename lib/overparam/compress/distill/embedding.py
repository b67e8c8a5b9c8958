"""Distillation of sentence embeddings: students that reproduce those of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from overparam.compress.distill import losses
from overparam.compress.distill.encoders import forward, token_ids
from overparam.train.distillation import Recipe, fit
from overparam.train.loop import Log

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Objective = Literal["cosine", "relational", "both"]
TEMPERATURE = 0.05  # temperature of the relational loss


def distill_embeddings(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    targets: NDArray[np.float32],
    recipe: Recipe,
    *,
    objective: Objective = "cosine",
    checkpoint: Path | None = None,
    label: str = "distilling embeddings",
) -> Log:
    """Train `encoder` in place to embed texts as the teacher does.

    "cosine" is one minus the cosine to the teacher's embedding (Reimers & Gurevych 2020, arXiv 2004.09813, with
    unit vectors); "relational" compares similarities to the other texts of the batch (`losses.similarity_kl`).

    Args:
        encoder: From `encoders.as_encoder`.
        texts: Texts without labels.
        targets: The teacher's embeddings. float32 [texts, width]
        recipe: See `train.distillation.Recipe`.
        objective: Which loss; "both" adds the two.
        checkpoint: See `train.distillation.fit`.
        label: Name shown in the progress display.

    Raises:
        ValueError: Targets are not one per text, not finite, or of another width than the encoder's embeddings.
        FloatingPointError: If the loss is not finite.
    """
    import torch

    width = encoder.get_embedding_dimension()
    if targets.shape != (len(texts), width) or not np.isfinite(targets).all():
        raise ValueError(
            f"targets must be finite and [{len(texts)} texts, {width}], got {list(targets.shape)}"
        )
    ids = token_ids(encoder, texts)
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).to(encoder.device)

    def loss(chosen: NDArray[np.int64]) -> torch.Tensor:
        _, embeddings = forward(encoder, [ids[text] for text in chosen])
        target = wanted[torch.from_numpy(chosen)]
        parts = []
        if objective != "relational":
            parts.append(losses.cosine_distance(embeddings, target))
        if objective != "cosine":
            parts.append(losses.similarity_kl(embeddings, target, temperature=TEMPERATURE))
        return torch.stack(parts).sum()

    return fit(encoder, loss, [len(row) for row in ids], recipe, checkpoint=checkpoint, label=label)
