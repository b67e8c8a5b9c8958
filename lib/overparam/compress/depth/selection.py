"""L3Prune: where to cut a model, by the contrastive loss of every depth before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth.embeddings import layer_embeddings
from overparam.data.triplets import Triplet
from overparam.models.reading.recipe import PLAIN, TextRecipe, instructions_of


@dataclass(frozen=True)
class LayerLoss:
    """The initial loss of every depth.

    Attributes:
        per_query: InfoNCE of each query at each depth, in nats. float64 [n, L + 1]
        mean: Its mean over queries. float64 [L + 1]
        low: Lower end of the 95 % percentile bootstrap interval of the mean over queries (candidates held
            fixed). float64 [L + 1]
        high: Its upper end. float64 [L + 1]
        seed: Seed of the shuffling into batches and of the bootstrap.
        batch_size: Queries that share candidates: each has `batch_size` positives and as many negatives.
        scale: Factor on the cosine (1 / temperature).
    """

    per_query: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seed: int
    batch_size: int
    scale: float

    @property
    def n(self) -> int:
        """Number of queries."""
        return len(self.per_query)

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return int(self.per_query.shape[1]) - 1


@dataclass(frozen=True)
class Cuts:
    """The two cuts of L3Prune, as numbers of kept blocks.

    Attributes:
        small: Depth of lowest loss in the first half, 1 … L // 2.
        large: Depth of lowest loss in the second half, L // 2 + 1 … L.
        interior_small: Whether `small` is a local minimum of the whole curve, not just the edge of its half.
        interior_large: The same for `large`. False if `large` = L: then nothing is pruned.
    """

    small: int
    large: int
    interior_small: bool
    interior_large: bool


def initial_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    *,
    batch_size: int = 64,
    scale: float | None = None,
    pooling: str = "weighted_mean",
    instruction: str | None = None,
    recipe: TextRecipe = PLAIN,
    seed: int = 42,
    batch_tokens: int = 1024,
    max_length: int = 512,
) -> LayerLoss:
    """Measure the contrastive loss of every depth of an untrained encoder (L3Prune, arXiv 2410.14578).

    Queries are shuffled into batches over all sources, as in the official code. Within a batch, each query is scored
    against all positives and all hard negatives by cosine × `scale`; the loss is the cross-entropy of its own
    positive. Each distinct text is encoded once, for all depths together.

    Args:
        model: A text encoder or a decoder without its head.
        tokenizer: The model's tokenizer.
        triplets: Objects with ``query``, ``positive`` and ``negative`` texts, and optionally ``query_instruction`` and
            ``document_instruction``.
        batch_size: Queries per batch. An incomplete last batch is left out: its loss would be on another scale.
        scale: By default the recipe's: 20 as in the official README, or 50 as in the official training script.
        pooling: See `layer_embeddings`.
        instruction: Put before queries, not before documents, instead of the triplets' own instructions.
        recipe: `PUBLISHED` puts the triplets' instructions and the chat template around the texts, does not pool
            ``<bos>`` and counts weights from the text's first token; `PLAIN` does none of this.
        seed: Seed of the shuffling and the bootstrap.
        batch_tokens: See `layer_embeddings`.
        max_length: See `layer_embeddings`.

    Raises:
        ValueError: If there are fewer triplets than one batch needs, or a loss is not finite.
    """
    return initial_losses(
        model,
        tokenizer,
        triplets,
        scales=(recipe.scale if scale is None else scale,),
        batch_size=batch_size,
        pooling=pooling,
        instruction=instruction,
        recipe=recipe,
        seed=seed,
        batch_tokens=batch_tokens,
        max_length=max_length,
    )[0]


def initial_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    *,
    scales: Sequence[float],
    batch_size: int = 64,
    pooling: str = "weighted_mean",
    instruction: str | None = None,
    recipe: TextRecipe = PLAIN,
    seed: int = 42,
    batch_tokens: int = 1024,
    max_length: int = 512,
) -> list[LayerLoss]:
    """Measure `initial_loss` for each of several factors on the cosine; the texts are encoded only once."""
    if len(triplets) < batch_size or batch_size < 2:
        raise ValueError(
            f"initial_loss needs at least one batch of {batch_size} (2 or more) triplets, got {len(triplets)}"
        )
    order = np.random.default_rng(seed).permutation(len(triplets))[: len(triplets) // batch_size * batch_size]
    chosen = [triplets[index] for index in order]
    asked, given = zip(*(instructions_of(each, recipe, instruction) for each in chosen), strict=True)
    shown = list(  # instruction and text
        zip(
            asked + given + given,
            [t.query for t in chosen] + [t.positive for t in chosen] + [t.negative for t in chosen],
            strict=True,
        )
    )
    distinct = list(dict.fromkeys(shown))
    row = {each: index for index, each in enumerate(distinct)}
    vectors = layer_embeddings(
        model,
        tokenizer,
        [text for _, text in distinct],
        pooling=pooling,
        instruction=[before for before, _ in distinct],
        recipe=recipe,
        batch_tokens=batch_tokens,
        max_length=max_length,
    )
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1)
    every = unit[[row[each] for each in shown]].transpose(0, 1)  # [L + 1, texts, hidden]
    count = len(chosen)
    queries, positives, negatives = (every[:, part * count : (part + 1) * count] for part in range(3))
    losses = []
    for scale in scales:
        per_query = np.concatenate(
            [
                info_nce(
                    *(side[:, start : start + batch_size] for side in (queries, positives, negatives)),
                    scale=scale,
                )
                for start in range(0, len(chosen), batch_size)
            ]
        )
        if not np.isfinite(per_query).all():
            depth = int(np.argwhere(~np.isfinite(per_query))[0][1])
            raise ValueError(
                f"the loss at depth {depth} is not finite; load the model in float32 or bfloat16"
            )
        generator = np.random.default_rng(seed)
        generator.permutation(len(triplets))  # the bootstrap continues with the state that the shuffling left
        low, high = np.percentile(_resampled_means(per_query, generator), [2.5, 97.5], axis=0)
        losses.append(LayerLoss(per_query, per_query.mean(axis=0), low, high, seed, batch_size, scale))
    return losses


def info_nce(
    queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, *, scale: float
) -> NDArray[np.float64]:
    """InfoNCE of each query against all positives and negatives of its batch, query to document only.

    Args:
        queries: Unit vectors. [depths, batch, hidden]
        positives: [depths, batch, hidden]
        negatives: [depths, batch, hidden]
        scale: Factor on the cosine.

    Returns:
        float64 [batch, depths], in nats.
    """
    logits = scale * (queries @ torch.cat([positives, negatives], dim=1).transpose(1, 2)).double()
    own = torch.diagonal(logits, dim1=1, dim2=2)  # [depths, batch]
    return (torch.logsumexp(logits, dim=2) - own).T.numpy()


def l3prune(layer_loss: LayerLoss) -> Cuts:
    """Pick the depth of lowest loss in each half of the model (L3Prune, algorithm 1); of ties, the shallower.

    Raises:
        ValueError: If the model has fewer than two blocks or a mean loss is not finite.
    """
    mean = layer_loss.mean
    if not np.isfinite(mean).all():
        raise ValueError(f"the loss is not finite at depths {np.flatnonzero(~np.isfinite(mean)).tolist()}")
    if len(mean) < 3:
        raise ValueError(f"l3prune needs at least 2 blocks, got {len(mean) - 1}")
    small, large = _halves(mean[None])[0]
    return Cuts(int(small), int(large), _is_interior(mean, int(small)), _is_interior(mean, int(large)))


def pick_frequencies(layer_loss: LayerLoss, *, n_resamples: int = 2000) -> dict[str, NDArray[np.float64]]:
    """Return how often each depth is picked when queries are resampled: the stability of the two cuts.

    Returns:
        ``{"small": [L + 1], "large": [L + 1]}``; each sums to one.
    """
    means = _resampled_means(layer_loss.per_query, np.random.default_rng(layer_loss.seed), n_resamples)
    picks = _halves(means)
    size = layer_loss.layers + 1
    return {
        name: np.bincount(picks[:, column], minlength=size) / len(picks)
        for column, name in enumerate(("small", "large"))
    }


def _halves(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """Depth of lowest loss in each half. [resamples, L + 1] -> [resamples, 2]."""
    middle = (means.shape[1] - 1) // 2
    small = means[:, 1 : middle + 1].argmin(axis=1) + 1
    large = means[:, middle + 1 :].argmin(axis=1) + middle + 1
    return np.stack([small, large], axis=1)


def _is_interior(mean: NDArray[np.float64], depth: int) -> bool:
    if depth == len(mean) - 1:
        return False
    return bool(mean[depth - 1] > mean[depth] and mean[depth] < mean[depth + 1])


def _resampled_means(
    per_query: NDArray[np.float64], generator: np.random.Generator, n_resamples: int = 2000
) -> NDArray[np.float64]:
    """Means over resampled queries. [n, depths] -> [n_resamples, depths]."""
    counts = generator.multinomial(
        len(per_query), np.full(len(per_query), 1 / len(per_query)), size=n_resamples
    )
    return np.asarray(counts @ per_query / len(per_query))
