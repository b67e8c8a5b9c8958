"""Batches of tokenized texts, longest first, with a token budget per batch; padding is always on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from overparam.models.reading.recipe import PLAIN, TextRecipe, frame

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Padded texts of similar length.

    Attributes:
        rows: Indices of the texts. [texts]
        input_ids: Token ids. [texts, tokens]
        attention_mask: 1 for tokens, 0 for padding. [texts, tokens]
        pooled_mask: 1 for the tokens to pool: neither padding nor instruction. [texts, tokens]
    """

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pooled_mask: torch.Tensor


def batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str | Sequence[str | None] | None = None,
    recipe: TextRecipe = PLAIN,
    batch_tokens: int = 1024,
    max_length: int = 512,
    padded: bool = True,
) -> list[Batch]:
    """Tokenize `texts` and group them, longest first, so that no batch holds more than `batch_tokens` tokens.

    Padding is on the right whatever the tokenizer's own side: with an attention mask and positions counted from the
    first token, it does not change the results of most architectures.

    Args:
        tokenizer: A fast tokenizer (character offsets locate the instruction's tokens).
        texts: Texts to encode; those longer than `max_length` tokens are cut.
        instruction: Put before every text, or one for each text; attended to, not pooled.
        recipe: What else surrounds a text, and which tokens are pooled.
        batch_tokens: Maximum tokens per batch, padding included; a longer text is a batch by itself.
        max_length: Maximum tokens per text, special tokens and instruction included.
        padded: Whether texts of unequal length may share a batch. False for architectures whose results depend on
            padding.

    Raises:
        ValueError: If there are no texts, one is empty, or the instruction alone has `max_length` tokens.
    """
    if not texts:
        raise ValueError("there are no texts to encode")
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"{len(empty)} of {len(texts)} texts are empty, the first at index {empty[0]}")
    ids, keep = read(tokenizer, texts, instruction=instruction, recipe=recipe, max_length=max_length)
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # stable: equal lengths keep their order
    return [pad(tokenizer, rows, ids, keep) for rows in groups(order, ids, batch_tokens, padded=padded)]


def read(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str | Sequence[str | None] | None = None,
    recipe: TextRecipe = PLAIN,
    max_length: int = 512,
) -> tuple[list[list[int]], list[list[bool]] | None]:
    """Tokenize texts with everything around them; return the ids, and which tokens are pooled (None for all)."""
    if instruction is None or isinstance(instruction, str):
        instruction = [instruction] * len(texts)
    each = list(instruction)
    if len(each) != len(texts):
        raise ValueError(
            f"there must be one instruction for all texts or one for each, got {len(each)} for {len(texts)}"
        )
    head, tail = frame(tokenizer, recipe.template)
    prefixes = [head + (f"{one}{recipe.separator}" if one else "") for one in each]
    bodies = [text.strip() + tail for text in texts] if head + tail else list(texts)
    find = _by_offsets if recipe.pool_bos else _by_counts
    ids, keep = find(tokenizer, prefixes, bodies, max_length)
    if keep is not None and not all(any(row) for row in keep):
        raise ValueError(f"the instruction alone fills the window of {max_length} tokens")
    return ids, keep


def _by_offsets(
    tokenizer: PreTrainedTokenizerBase, prefixes: list[str], bodies: list[str], max_length: int
) -> tuple[list[list[int]], list[list[bool]] | None]:
    """Pool the tokens that end after the prefix; without a prefix all of them, also special tokens."""
    encoded = tokenizer(
        [prefix + body for prefix, body in zip(prefixes, bodies, strict=True)],
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=any(prefixes),
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    if not any(prefixes):
        return ids, None
    rows = zip(encoded["offset_mapping"], prefixes, strict=True)
    return ids, [
        _after(offsets, len(prefix)) if prefix else [True] * len(offsets) for offsets, prefix in rows
    ]


def _by_counts(
    tokenizer: PreTrainedTokenizerBase, prefixes: list[str], bodies: list[str], max_length: int
) -> tuple[list[list[int]], list[list[bool]] | None]:
    """Pool as many tokens from the end as the text has by itself, plus tokens that the tokenizer appends.

    Where prefix and text meet, a tokenizer may split the text differently than by itself; this is the published rule
    for that case. A text that is too long is cut on the right.
    """
    quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    alone: list[list[int]] = tokenizer(bodies, add_special_tokens=False, **quiet)["input_ids"]
    whole = tokenizer(
        [prefix + body for prefix, body in zip(prefixes, bodies, strict=True)],
        return_special_tokens_mask=True,
        **quiet,
    )
    ids, keep = [], []
    for tokens, special, own in zip(whole["input_ids"], whole["special_tokens_mask"], alone, strict=True):
        before, after = _run(special), _run(special[::-1])
        first = max(len(tokens) - after - len(own), before)
        body = tokens[: min(len(tokens), max_length) - after]
        ids.append(body + tokens[len(tokens) - after :])
        keep.append([place >= first and first < len(body) for place in range(len(ids[-1]))])
    return ids, keep


def _run(flags: list[int]) -> int:
    """How many leading entries are set."""
    return next((place for place, flag in enumerate(flags) if not flag), len(flags))


def _after(offsets: list[tuple[int, int]], prefix: int) -> list[bool]:
    """Whether each token ends after the prefix; special tokens have no width and count only once the text has begun."""
    kept, begun = [], False
    for _, end in offsets:
        begun = begun or end > prefix
        kept.append(begun)
    return kept


def groups(
    order: Sequence[int], ids: Sequence[Sequence[int]], batch_tokens: int, *, padded: bool = True
) -> Iterator[list[int]]:
    """Group rows, longest first, so that no group has more than `batch_tokens` tokens, padding included.

    Args:
        order: Rows, longest first.
        ids: Token ids of every row.
        batch_tokens: Maximum tokens per group; a longer row is a group by itself.
        padded: Whether rows of unequal length may share a group.
    """
    group: list[int] = []
    for row in order:
        width = len(ids[group[0]]) if group else len(ids[row])
        if group and (width * (len(group) + 1) > batch_tokens or not (padded or len(ids[row]) == width)):
            yield group
            group = []
        group.append(row)
    yield group


def pad(
    tokenizer: PreTrainedTokenizerBase, rows: list[int], ids: list[list[int]], keep: list[list[bool]] | None
) -> Batch:
    """Pad the chosen texts on the right, to the length of the longest."""
    import torch

    width = max(len(ids[row]) for row in rows)
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
