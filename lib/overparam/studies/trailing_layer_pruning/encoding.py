"""What is run when costs are measured; light, since a fresh process loads it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam import models
from overparam.compress import depth


def encode_saved(
    folder: str, texts: list[str], dtype: str, batch_tokens: int, max_length: int
) -> Iterator[None]:
    """Load a saved model, then encode: what runs in the process whose memory is measured."""
    model, tokenizer = models.load(folder, dtype=getattr(torch, dtype))
    encode(model, tokenizer, texts[:2], batch_tokens, max_length)  # library set-up is not the step's
    yield
    encode(model, tokenizer, texts, batch_tokens, max_length)


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_tokens: int,
    max_length: int,
) -> None:
    """Encode at the last depth only: what a user of a truncated model runs."""
    last = len(models.blocks(model).layers)
    depth.layer_embeddings(
        model, tokenizer, texts, depths=[last], batch_tokens=batch_tokens, max_length=max_length
    )
