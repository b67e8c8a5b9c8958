"""Teacher-forced negative log-likelihood, per text, of translations and of plain texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam.models.reading.tokens import groups
from overparam.support import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def negative_log_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_tokens: int = 1024,
    add_special_tokens: bool = True,
    end_token: bool = True,
    label: str = "scoring translations",
) -> NDArray[np.float64]:
    """Compute the negative log-likelihood of each target after its prompt.

    The ids are those of the prompt, then those of the target without special tokens, then the end token. Logits are
    computed only for target tokens.

    Args:
        model: A decoder with its language-modelling head.
        tokenizer: Its tokenizer, which has an end token.
        prompts: Texts before the targets.
        targets: Texts to score, one per prompt.
        batch_tokens: Maximum tokens per batch, padding included. A batch's logits take up to 8 bytes times its target
            tokens times the vocabulary: 2 GB for 1,024 target tokens and a vocabulary of 262,144.
        add_special_tokens: Whether the tokenizer adds its own special tokens to prompts.
        end_token: Whether the end token after a target is scored, too.
        label: Text of the progress bar.

    Returns:
        float64 [n, 2]: negative log-likelihood in nats, number of target tokens. Their sums give the mean per token
        and the perplexity (`record.stats` statistics "nll_per_token" and "perplexity").

    Raises:
        ValueError: No prompts, unequal numbers of prompts and targets, an empty target, or no end token.
    """
    if len(prompts) != len(targets) or not prompts or isinstance(prompts, str):
        raise ValueError(
            f"prompts and targets must be equal in number, at least 1, got {len(prompts)} and {len(targets)}"
        )
    if empty := [index for index, target in enumerate(targets) if not target.strip()]:
        raise ValueError(f"{len(empty)} of {len(targets)} targets are empty, the first at index {empty[0]}")
    if end_token and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token_id) to score after each target")
    before = tokenizer(list(prompts), add_special_tokens=add_special_tokens).input_ids
    after = tokenizer(list(targets), add_special_tokens=False).input_ids
    if bare := [index for index, ids in enumerate(before) if not ids]:
        raise ValueError(f"prompt {bare[0]} has no token: nothing predicts the first target token")
    end = [tokenizer.eos_token_id] if end_token else []
    rows = [([*first, *second, *end], len(first)) for first, second in zip(before, after, strict=True)]
    return _score(model, rows, batch_tokens, label)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prefix: str = "",
    max_length: int = 512,
    batch_tokens: int = 1024,
    label: str = "scoring texts",
) -> NDArray[np.float64]:
    """Compute the negative log-likelihood of each text: of every token but the first (<bos>, if there is one).

    Args:
        model: A decoder with its language-modelling head.
        tokenizer: Its tokenizer.
        texts: Texts of at least two tokens.
        prefix: Text before each text that is not scored, such as a tag that requests plain text.
        max_length: Maximum tokens per text, special tokens and prefix included; longer texts are cut. No end token is
            added.
        batch_tokens: As in `negative_log_likelihood`.
        label: Text of the progress bar.

    Returns:
        float64 [n, 2]: negative log-likelihood in nats, number of tokens scored; see `negative_log_likelihood`.

    Raises:
        ValueError: No texts, or a text of fewer than two tokens.
    """
    if not texts or isinstance(texts, str):
        raise ValueError("there are no texts to score: give a list of texts")
    ids = tokenizer([prefix + text for text in texts], truncation=True, max_length=max_length).input_ids
    start = len(tokenizer(prefix).input_ids) if prefix else 1
    if short := [index for index, row in enumerate(ids) if len(row) <= start]:
        raise ValueError(f"text {short[0]} has fewer than two tokens: nothing in it can be predicted")
    return _score(model, [(row, start) for row in ids], batch_tokens, label)


def _score(
    model: PreTrainedModel, rows: list[tuple[list[int], int]], batch_tokens: int, label: str
) -> NDArray[np.float64]:
    """Score each row, given as (ids, index of the first target token)."""
    import torch

    items = np.zeros((len(rows), 2))
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    with torch.inference_mode():
        for group in progress.track(list(groups(order, [ids for ids, _ in rows], batch_tokens)), label):
            losses = _losses(model, [rows[row] for row in group])
            for row, loss in zip(group, losses, strict=True):
                items[row] = loss.sum(), len(loss)
    if not np.isfinite(items).all():
        raise ValueError("the loss is not finite; load the model in float32 or bfloat16")
    return items


def _losses(model: PreTrainedModel, rows: list[tuple[list[int], int]]) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of every target token of each row. Padding is on the right, where it has no effect."""
    import torch
    from torch.nn import functional

    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    scored = torch.zeros((len(rows), width), dtype=torch.bool)  # positions that predict a target token
    for at, (ids, start) in enumerate(rows):
        input_ids[at, : len(ids)] = torch.tensor(ids)
        mask[at, : len(ids)] = 1
        scored[at, start - 1 : len(ids) - 1] = True
    expected = input_ids[:, 1:][scored[:, :-1]].to(model.device)  # [targets]
    with _head_sees(model, scored.to(model.device)):
        logits = model(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits[0]  # [targets, vocabulary]
    losses = functional.cross_entropy(logits.float(), expected, reduction="none").cpu().numpy()
    counts = [len(ids) - start for ids, start in rows]
    return np.split(losses.astype(np.float64), np.cumsum(counts)[:-1])


@contextmanager
def _head_sees(model: PreTrainedModel, places: torch.Tensor) -> Iterator[None]:
    """Pass only the hidden states at `places` to the head; the model's own code computes the logits."""

    def select(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][places][None],)  # [1, targets, hidden]

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
