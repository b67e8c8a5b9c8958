"""Texts to batches of tokens, longest first, by a budget of tokens; padding is always on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Padded texts of similar length.

    Attributes:
        rows: Which texts these are. [texts]
        input_ids: Token ids. [texts, tokens]
        attention_mask: 1 for tokens, 0 for padding. [texts, tokens]
        pooled_mask: 1 for the tokens that are pooled: no padding, no instruction. [texts, tokens]
    """

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pooled_mask: torch.Tensor


def batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str | None = None,
    batch_tokens: int = 1024,
    max_length: int = 512,
    padded: bool = True,
) -> list[Batch]:
    """Tokenize `texts` and group them, longest first, so that no batch holds more than `batch_tokens` tokens.

    Padding is on the right whatever the tokenizer's own side: with an attention mask and positions counted from the
    first token, it does not change the numbers of most architectures.

    Args:
        tokenizer: A fast tokenizer (character offsets tell the instruction's tokens).
        texts: What to encode; texts longer than `max_length` tokens are cut.
        instruction: Put before every text; attended to, not pooled.
        batch_tokens: Tokens of a batch, padding included; a longer text makes a batch of its own.
        max_length: Tokens of a text, special tokens and the instruction included.
        padded: Texts of unequal length may share a batch. False for architectures whose numbers padding changes.

    Raises:
        ValueError: If there are no texts, one is empty, or the instruction fills the window.
    """
    if not texts:
        raise ValueError("there are no texts to encode")
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"{len(empty)} of {len(texts)} texts are empty, the first at index {empty[0]}")
    prefix = f"{instruction} " if instruction else ""
    encoded = tokenizer(
        [prefix + text for text in texts],
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=bool(prefix),
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    keep = [_after(offsets, len(prefix)) for offsets in encoded["offset_mapping"]] if prefix else None
    if keep is not None and not all(any(row) for row in keep):
        raise ValueError(f"the instruction alone fills the window of {max_length} tokens")
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # stable: equal lengths keep their order
    return [_pad(tokenizer, rows, ids, keep) for rows in _groups(order, ids, batch_tokens, padded)]


def _after(offsets: list[tuple[int, int]], prefix: int) -> list[bool]:
    """Tokens that end beyond the prefix; special tokens have no width and count only after the text began."""
    kept, begun = [], False
    for _, end in offsets:
        begun = begun or end > prefix
        kept.append(begun)
    return kept


def _groups(
    order: Sequence[int], ids: list[list[int]], batch_tokens: int, padded: bool
) -> Iterator[list[int]]:
    group: list[int] = []
    for row in order:
        width = len(ids[group[0]]) if group else len(ids[row])
        if group and (width * (len(group) + 1) > batch_tokens or not (padded or len(ids[row]) == width)):
            yield group
            group = []
        group.append(row)
    yield group


def _pad(
    tokenizer: PreTrainedTokenizerBase, rows: list[int], ids: list[list[int]], keep: list[list[bool]] | None
) -> Batch:
    width = len(ids[rows[0]])
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = np.full((len(rows), width), padding, dtype=np.int64)
    attention = np.zeros((len(rows), width), dtype=np.int64)
    pooled = np.zeros((len(rows), width), dtype=np.int64)
    for at, row in enumerate(rows):
        length = len(ids[row])
        input_ids[at, :length] = ids[row]
        attention[at, :length] = 1
        pooled[at, :length] = 1 if keep is None else keep[row]
    return Batch(rows, torch.from_numpy(input_ids), torch.from_numpy(attention), torch.from_numpy(pooled))
