"""Proofs: a small padded batch that exposes effects of padding, position or length, and comparison of two results.

An operation that should be exact (truncating, saving, exporting, reading every depth at once) is compared with its
plain counterpart on `probe`, once per architecture and process, before long work begins.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Largest relative difference that rounding alone explains, where both sides compute in this dtype.
_TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_SPECIAL_IDS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
    *("unk_token_id", "decoder_start_token_id", "image_token_id", "video_token_id", "audio_token_id"),
)

_SPAN = re.compile("^(?!.*layer).*(window|chunk|index_topk|local_attention|block_size|landmark|stride)")
_LONGEST = 128  # tokens: the probe exceeds attention spans up to this, so that it stays cheap
_spent = 0.0
_running = False


class NotExactError(ValueError):
    """An operation is not exact on this model, which is therefore refused."""


@dataclass(frozen=True)
class Probe:
    """Texts of unequal lengths, padded on the right.

    Attributes:
        input_ids: Ordinary tokens, drawn at random with a fixed seed. int64 [texts, tokens]
        attention_mask: 1 for tokens, 0 for padding. int64 [texts, tokens]
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@contextmanager
def timed() -> Iterator[None]:
    """Add the time of a proof to `seconds`; can be used as a decorator. Nested proofs count once."""
    global _spent, _running
    if _running:
        yield
        return
    started, _running = time.perf_counter(), True
    try:
        yield
    finally:
        _running = False
        _spent += time.perf_counter() - started


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within the block; each module then returns to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def seconds() -> float:
    """Return the time that all proofs of this process have taken."""
    return _spent


def probe(model: PreTrainedModel, lengths: Sequence[int] | None = None) -> Probe:
    """Draw a padded batch for `model`, on its device.

    Args:
        model: Its configuration gives the vocabulary and the special tokens, which are not drawn.
        lengths: Tokens per text. By default two of three texts exceed the attention spans (see `spans`) of at most
            128 tokens.
    """
    import torch
    from torch import nn

    config = model.config.get_text_config()
    lengths = lengths or _lengths(config)
    special: set[int | None] = set()
    for owner in (config, model.config):
        for name in _SPECIAL_IDS:
            ids = getattr(owner, name, None)
            special.update(
                token for token in (ids if isinstance(ids, list | tuple) else [ids]) if token is not None
            )
    table = model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0]) if isinstance(table, nn.Embedding) else int(config.vocab_size)
    ordinary = torch.tensor(
        [token for token in range(min(vocabulary, config.vocab_size)) if token not in special]
    )
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.full((len(lengths), max(lengths)), _padding(model), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = ordinary[torch.randint(len(ordinary), (length,), generator=generator)]
        attention_mask[row, :length] = 1
    return Probe(input_ids.to(model.device), attention_mask.to(model.device))


def difference(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Return the largest difference, relative to the root mean square of `expected`; infinity if a value is not finite.

    Args:
        actual: Any shape.
        expected: Same shape.
        mask: Which entries of the leading dimensions count, such as the attention mask [texts, tokens].
    """
    if actual.shape != expected.shape:
        return float("inf")
    left, right = actual.detach().double().cpu(), expected.detach().double().cpu()
    if mask is not None:
        chosen = mask.bool().cpu()
        left, right = left[chosen], right[chosen]
    if not (left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((left - right).abs().max() / right.square().mean().sqrt().clamp(min=1e-12))


def is_rounding(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether token states differ by no more than rounding in their dtype, relative to the norm of each token.

    In half precision the median token decides, because rounding may route single tokens to another expert.

    Args:
        actual: [..., width]
        expected: Same shape, in the dtype of the computation.
        mask: Which tokens count. [...]
    """
    import torch

    if actual.shape != expected.shape:
        return False
    left, right = actual.detach().double().cpu(), expected.detach().double().cpu()
    errors = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-12)
    if mask is not None:
        errors = errors[mask.bool().cpu()]
    half = expected.dtype in (torch.float16, torch.bfloat16)
    return bool((errors.median() if half else errors.max()) <= tolerance(expected.dtype))


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest `difference` that rounding in `dtype` explains."""
    return _TOLERANCES[str(dtype).removeprefix("torch.")]


def signature(model: PreTrainedModel) -> str:
    """Return what a proof depends on: class, configuration, dtype and attention implementation, but not the weights."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return json.dumps([type(model).__qualname__, str(model.dtype), attention, config], sort_keys=True)


def spans(*places: object) -> set[int]:
    """Return how many tokens attention looks at at once (windows, chunks, keys of sparse attention).

    Args:
        places: Configurations and modules; the names of their attributes tell which numbers are spans.
    """
    return {
        value
        for place in places
        for name, value in vars(place).items()
        if _SPAN.search(name) and isinstance(value, int) and not isinstance(value, bool) and value > 1
    }


def within_positions(config: PreTrainedConfig, length: int) -> int:
    """Return a length in tokens, lowered to just below the number of positions that a configuration has."""
    positions = getattr(config, "max_position_embeddings", None)
    return min(length, positions - 4) if isinstance(positions, int) and positions > 16 else length


def _lengths(config: PreTrainedConfig) -> tuple[int, int, int]:
    span = max([16, *(span for span in spans(config) if span <= _LONGEST)])
    longest = within_positions(config, span + 16)
    return max(longest, 20), 9, max(longest - 8, 12)


def _padding(model: PreTrainedModel) -> int:
    ids = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(ids) if isinstance(ids, int) and ids >= 0 else 0
