"""Proofs: a small padded batch that exposes what depends on padding, position or length, and whether two results agree.

An operation that is exact by design (truncating, saving, exporting, reading every depth at once) is compared with its
plain counterpart on `probe`, once for each architecture in a process, before long work begins.
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

_LOOKS = re.compile("^(?!.*layer).*(window|chunk|index_topk|local_attention|block_size|landmark|stride)")
_LONGEST = 128  # tokens of a window that the probe exceeds: it must be cheap
_spent = 0.0
_running = False


class NotExactError(ValueError):
    """An operation does not give what it must give on this model, which is therefore refused."""


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
    """Count the time of a proof, for `seconds`; also a decorator. A proof within a proof counts once."""
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
    """Without dropout and router noise; each module goes back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def seconds() -> float:
    """Return what all proofs of this process have taken."""
    return _spent


def probe(model: PreTrainedModel, lengths: Sequence[int] | None = None) -> Probe:
    """Draw a padded batch for `model`, on its device.

    Args:
        model: Its configuration gives the vocabulary and the special tokens, which are left out.
        lengths: Tokens of each text. By default two of three exceed what attention looks at once (a window, a chunk,
            the keys of a sparse kind), where that is at most 128 tokens.
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


def difference(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Return the largest difference, relative to the root mean square of `expected`; infinite where one is not finite.

    Args:
        found: Any shape.
        expected: The same shape.
        mask: Which entries count, of the leading dimensions, such as the attention mask [texts, tokens].
    """
    if found.shape != expected.shape:
        return float("inf")
    left, right = found.detach().double().cpu(), expected.detach().double().cpu()
    if mask is not None:
        chosen = mask.bool().cpu()
        left, right = left[chosen], right[chosen]
    if not (left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((left - right).abs().max() / right.square().mean().sqrt().clamp(min=1e-12))


def is_rounding(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether states of tokens differ as little as rounding in their dtype explains, each token measured by its length.

    In half precision the typical token decides: rounding may send single tokens to another expert.

    Args:
        found: [..., width]
        expected: The same shape, dtype of the computation.
        mask: Which tokens count. [...]
    """
    import torch

    if found.shape != expected.shape:
        return False
    left, right = found.detach().double().cpu(), expected.detach().double().cpu()
    errors = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-12)
    if mask is not None:
        errors = errors[mask.bool().cpu()]
    half = expected.dtype in (torch.float16, torch.bfloat16)
    return bool((errors.median() if half else errors.max()) <= tolerance(expected.dtype))


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest `difference` that rounding in `dtype` explains."""
    return _TOLERANCES[str(dtype).removeprefix("torch.")]


def signature(model: PreTrainedModel) -> str:
    """Return what a proof depends on: class, configuration, dtype, kind of attention. Not the weights."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return json.dumps([type(model).__qualname__, str(model.dtype), attention, config], sort_keys=True)


def _lengths(config: PreTrainedConfig) -> tuple[int, int, int]:
    looks = [
        value
        for name, value in vars(config).items()
        if _LOOKS.search(name)
        and not isinstance(value, bool)
        and isinstance(value, int)
        and value <= _LONGEST
    ]
    reach = max([16, *looks])
    most = getattr(config, "max_position_embeddings", None)
    longest = reach + 16 if not isinstance(most, int) or most < 24 else min(reach + 16, most - 4)
    return max(longest, 20), 9, max(longest - 8, 12)


def _padding(model: PreTrainedModel) -> int:
    ids = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(ids) if isinstance(ids, int) and ids >= 0 else 0
