"""Small GPT-2 models over bytes or random symbols, trained from scratch, and their losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam.models.seeding import seeded
from overparam.train import causal, loop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BYTES = 256  # symbols of text
HEADS = 4
LAYERS = 2
WINDOW = 64  # bytes of a row
_SCORED = 64  # rows in a pass without gradients


def build(
    width: int, *, symbols: int = BYTES, window: int = WINDOW, dropout: float = 0.0, seed: int
) -> PreTrainedModel:
    """Build an untrained GPT-2 of two layers, whose head is its input table; the symbol after the last begins a row.

    Args:
        width: Of its states; a multiple of 4.
        symbols: Different ones.
        window: Symbols of a row.
        dropout: Of states and attention.
        seed: Of the weights.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=symbols + 1, n_positions=window, n_embd=width, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=symbols, eos_token_id=symbols,
    )  # fmt: skip
    with seeded(seed):
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def size(model: PreTrainedModel) -> int:
    """Parameters of a model."""
    return sum(int(parameter.numel()) for parameter in model.parameters())


def losses(model: PreTrainedModel, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return the cross entropy of every symbol, in nats. [rows, symbols of a row]."""
    import torch
    from torch.nn import functional

    labels = torch.from_numpy(rows)
    first = torch.full((len(rows), 1), model.config.bos_token_id)
    logits = model(input_ids=torch.cat([first, labels[:, :-1]], dim=1), use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def scores(model: PreTrainedModel, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean cross entropy of each row, in nats a symbol."""
    import torch

    with torch.inference_mode(), one_thread():
        parts = [losses(model, rows[at : at + _SCORED]).mean(dim=1) for at in range(0, len(rows), _SCORED)]
    return np.asarray(torch.cat(parts).double().numpy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread in the block: products as small as these lose more to a second one than they gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: PreTrainedModel,
    batches: Iterator[NDArray[np.int64]],
    *,
    steps: int,
    rate: float,
    seed: int,
    decay: int = 0,
    every: int | None = None,
    at: Callable[[int], None] | None = None,
    label: str,
) -> loop.Log:
    """Train with AdamW, after a warm-up at a constant rate that decays to zero over the last `decay` steps.

    Args:
        model: Changed in place.
        batches: Of rows of symbols, one a step.
        steps: Optimizer steps.
        rate: Learning rate.
        seed: Of dropout.
        decay: Steps.
        every: Steps between calls of `at`.
        at: Called with the number of steps done.
        label: Name shown in the progress display.
    """
    recipe = causal.Recipe(
        steps=steps, learning_rate=rate, warmup=max(1, min(20, steps // 10)), seed=seed, decay=decay
    )

    def gradients(_: int, rows: NDArray[np.int64]) -> float:
        loss: Any = losses(model, rows).mean()
        loss.backward()
        return float(loss.detach())

    optimizers = causal.optimizers_of(model, recipe)
    with one_thread():
        return loop.run(
            model,
            optimizers,
            batches,
            gradients,
            recipe,
            loop.Log(),
            every=every or steps,
            at_checkpoint=at,
            label=label,
        )


def shuffled(rows: NDArray[np.int64], batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches for ever, each epoch in another order; the last of an epoch may be smaller."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for at in range(0, len(rows), batch):
            yield rows[order[at : at + batch]]
        epoch += 1


@cache
def _text(split: str) -> bytes:
    from overparam.data import splits

    verses = splits.verses_in("web", split)
    random.Random(0).shuffle(verses)
    return "\n".join(verse.text for verse in verses).encode()


def rows_of_text(split: str, length: int, window: int = WINDOW) -> NDArray[np.int64]:
    """Return rows of bytes of verses of the World English Bible, in an order without their context.

    Args:
        split: "train", "validation" or "test".
        length: Bytes in all.
        window: Bytes of a row.

    Raises:
        ValueError: There is not so much text.
    """
    text = _text(split)
    if not window <= length <= len(text):
        raise ValueError(
            f"{split} has {len(text):,} bytes of verses, asked for {length:,} in rows of {window}"
        )
    whole = np.frombuffer(text[: length // window * window], np.uint8).astype(np.int64)
    return whole.reshape(-1, window)


def weight_places(model: PreTrainedModel, number: int, seed: int) -> list[tuple[str, int]]:
    """Draw weights of the matrices in the blocks, each equally likely: names and flat indices."""
    matrices = [(name, p.numel()) for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    ends = np.cumsum([count for _, count in matrices])
    drawn = np.random.default_rng(seed).choice(int(ends[-1]), size=number, replace=False)
    found = []
    for place in drawn.tolist():
        which = int(np.searchsorted(ends, place, side="right"))
        found.append((matrices[which][0], int(place - (ends[which] - matrices[which][1]))))
    return found


def value(model: Any, name: str) -> torch.Tensor:
    """A parameter's values as a flat view."""
    import torch

    return torch.as_tensor(model.get_parameter(name).data.view(-1))
