"""Embeddings at every depth from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth.proof import apply_tail, reading
from overparam.compress.depth.states import each_depth, no_cache
from overparam.models import blocks
from overparam.models.proof import evaluating
from overparam.models.reading.recipe import PLAIN, TextRecipe
from overparam.models.reading.tokens import batches
from overparam.models.reading.weights import POOLINGS, pooling_weights
from overparam.support import progress


def layer_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: str = "weighted_mean",
    instruction: str | Sequence[str | None] | None = None,
    recipe: TextRecipe = PLAIN,
    depths: Sequence[int] | None = None,
    batch_tokens: int = 1024,
    max_length: int = 512,
) -> NDArray[np.float32]:
    """Embed `texts` at every depth of `model`, from the embedding layer to the last block, in one pass.

    Row `k` equals the output of the model truncated to its first `k` blocks: if the architecture norms or projects the
    last block's output, every depth is treated the same way. Each depth is pooled as soon as it is computed, so memory
    does not grow with the number of layers. The equality is proved on a small batch, once per architecture and process
    (`proof.reading`). If padding would change a model's results, only texts of equal length share a batch. Dropout is
    off, also for a model in training mode.

    Args:
        model: A text encoder or a decoder without its head (`models.load`).
        tokenizer: The model's tokenizer.
        texts: Non-empty texts; those over `max_length` tokens are cut.
        pooling: ``weighted_mean`` weights token i (from 1) by i, as in L3Prune and sentence-transformers; ``mean``;
            ``last``; or ``cls``, the first pooled token.
        instruction: Put before every text, or one (or None) for each text; attended to, but not pooled. Weights are
            still counted from the first token, as sentence-transformers does when a prompt is excluded, unless
            `recipe` says otherwise.
        recipe: What else surrounds a text, and which tokens are pooled with which weights.
        depths: Which depths to return, in increasing order; all by default. ``[L]`` is plain encoding.
        batch_tokens: Maximum tokens per batch, padding included.
        max_length: Maximum tokens per text.

    Returns:
        float32 [texts, L + 1, hidden], or [texts, depths, hidden]; not normalised.

    Raises:
        ValueError: If a text is empty, the pooling or a depth is unknown, or a number is not finite.
        NotExactError: If the depths of this architecture cannot be read from one pass.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    total = len(blocks(model).layers)
    wanted = list(range(total + 1)) if depths is None else list(depths)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] > total:
        raise ValueError(f"depths must be increasing numbers in 0..{total}, got {wanted}")
    how = reading(model)
    prepared = batches(
        tokenizer,
        texts,
        instruction=instruction,
        recipe=recipe,
        batch_tokens=batch_tokens,
        max_length=max_length,
        padded=how.padding_is_neutral,
    )
    out = np.empty(0, np.float32)
    weights = torch.empty(0)
    pooled: list[torch.Tensor] = []  # embeddings of the current batch, by depth

    def pool(_: int, hidden: torch.Tensor) -> None:
        states = apply_tail(model, how.tail, hidden)[:, : weights.shape[2]]  # [texts, tokens, hidden]
        pooled.append(torch.bmm(weights, states.to(weights.dtype)).squeeze(1))

    with torch.inference_mode(), evaluating(model), each_depth(model, pool, wanted):
        for batch in progress.track(prepared, "embedding every depth"):
            weights = pooling_weights(pooling, batch.attention_mask, batch.pooled_mask, recipe).to(
                model.device
            )
            pooled.clear()
            model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                **no_cache(model),
            )
            rows = torch.stack(pooled, dim=1).float().cpu().numpy()  # [texts, depths, hidden]
            if not out.size:
                out = np.empty((len(texts), *rows.shape[1:]), np.float32)
            out[batch.rows] = rows
    if not np.isfinite(out).all():
        depth = wanted[int(np.argwhere(~np.isfinite(out))[:, 1].min())]
        raise ValueError(
            f"embeddings are not finite from depth {depth} on; load the model in float32 or bfloat16"
        )
    return out
