"""What is run when memory is measured, in processes forked from one that has imported this and all that it needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth import layer_embeddings
from overparam.models import blocks, load


def encode_saved(
    folder: str, texts: list[str], dtype: str, batch_tokens: int, max_length: int
) -> Iterator[None]:
    """Load a saved model, then encode: what runs in the process whose memory is measured."""
    model, tokenizer = load(folder, dtype=getattr(torch, dtype))
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
    last = len(blocks(model).layers)
    layer_embeddings(model, tokenizer, texts, depths=[last], batch_tokens=batch_tokens, max_length=max_length)
