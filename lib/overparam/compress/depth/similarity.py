"""How much each layer changes its input: the scores of ShortGPT and of Gromov et al., and random controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth.proof import reading
from overparam.compress.depth.states import each_depth, no_cache
from overparam.compress.depth.truncation import kept_indices
from overparam.models.proof import evaluating
from overparam.models.reading.tokens import batches
from overparam.support import progress


@dataclass(frozen=True)
class LayerSimilarity:
    """How layers change the residual stream, averaged over texts.

    Attributes:
        block_influence: 1 − mean cosine between a block's input and output over all tokens (ShortGPT, eq. 1).
            float64 [L]
        angular_distance: Mean of arccos(cos) / π at the last token between the states at depth i and depth j
            (Gromov et al., eq. 7). float64 [L + 1, L + 1]
    """

    block_influence: NDArray[np.float64]
    angular_distance: NDArray[np.float64]


def layer_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_tokens: int = 1024,
    max_length: int = 512,
) -> LayerSimilarity:
    """Measure both scores in one streaming pass over `texts`, on the residual stream before the final norm.

    Raises:
        NotExactError: If the depths of this architecture cannot be read from one pass.
    """
    padded = reading(model).padding_is_neutral
    states: list[torch.Tensor] = []  # states of the last token by depth, for the current batch
    previous = torch.empty(0)
    mask = torch.empty(0)
    cosine_sums: list[float] = []
    angular: list[NDArray[np.float64]] = []
    tokens = 0

    def visit(depth: int, hidden: torch.Tensor) -> None:
        nonlocal previous
        hidden = hidden[:, : mask.shape[1]].flatten(2)  # several streams per token are treated as one
        if depth:
            cosine = torch.nn.functional.cosine_similarity(previous.float(), hidden.float(), dim=-1)
            if len(cosine_sums) < depth:
                cosine_sums.append(0.0)
            cosine_sums[depth - 1] += float((cosine * mask).sum(dtype=torch.float64))
        previous = hidden
        last = mask.sum(1).long() - 1
        states.append(hidden[torch.arange(len(last), device=last.device), last].double())

    with torch.inference_mode(), evaluating(model), each_depth(model, visit):
        for batch in progress.track(
            batches(tokenizer, texts, batch_tokens=batch_tokens, max_length=max_length, padded=padded),
            "comparing layers",
        ):
            states.clear()
            mask = batch.attention_mask.to(model.device)
            model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, **no_cache(model))
            tokens += int(mask.sum())
            unit = torch.nn.functional.normalize(torch.stack(states, dim=1), dim=-1)  # [texts, L + 1, hidden]
            cosines = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
            angular.append((torch.arccos(cosines) / torch.pi).cpu().numpy())
    mean = np.concatenate(angular).mean(axis=0)
    np.fill_diagonal(mean, 0.0)
    return LayerSimilarity(1.0 - np.asarray(cosine_sums) / tokens, mean)


def keep_by_block_influence(similarity: LayerSimilarity, keep_layers: int) -> list[int]:
    """Keep the `keep_layers` blocks with the highest Block Influence, at any position; indices from 0."""
    influence = similarity.block_influence
    count = len(kept_indices(keep_layers, len(influence)))
    return sorted(int(index) for index in np.argsort(-influence, kind="stable")[:count])


def keep_by_angular_distance(similarity: LayerSimilarity, keep_layers: int) -> list[int]:
    """Remove the run of blocks whose ends are closest in angle; return the kept indices (from 0)."""
    total = len(similarity.block_influence)
    removed = total - len(kept_indices(keep_layers, total))
    distances = [similarity.angular_distance[start, start + removed] for start in range(total - removed + 1)]
    start = int(np.argmin(distances))
    return [index for index in range(total) if not start <= index < start + removed]


def keep_random(total: int, keep_layers: int, *, seed: int) -> list[int]:
    """Keep `keep_layers` of `total` blocks at random, in order; indices from 0."""
    count = len(kept_indices(keep_layers, total))
    return sorted(int(i) for i in np.random.default_rng(seed).choice(total, count, replace=False))
