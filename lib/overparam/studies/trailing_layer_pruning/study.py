"""The steps of the trailing-layer pruning study, in the order of the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam import cache, models, progress
from overparam.compress import depth
from overparam.data import corpora, pairs
from overparam.evaluate import LOCAL_TASKS, embedding
from overparam.report import record, stats
from overparam.studies.trailing_layer_pruning import Params

_TRAINING_FACTOR = (
    1.6  # peak of a LoRA step over the weights, batches of the default size (see README, Limits)
)
_EMBEDDING_VERSION = 1  # raised when `depth.layer_embeddings` returns other numbers
CURVE_RESAMPLES = 1000  # of the intervals in curves; the verdicts use the defaults of `stats`

Scores = dict[str, embedding.TaskScore]


@dataclass
class Study:
    """A started study: what every step needs, and the per-item scores collected so far.

    Attributes:
        params: The validated parameters.
        recorder: Of the record that the run leaves.
        model: The unpruned model; no step changes it.
        tokenizer: Its tokenizer.
        items: Per-item scores of every system that was evaluated.
    """

    params: Params
    recorder: record.Recorder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def layers(self) -> int:
        """Number of blocks of the unpruned model."""
        return len(models.blocks(self.model).layers)

    def embedder(self, model: PreTrainedModel, depths: Sequence[int] | None = None) -> embedding.Embed:
        """Return a function that embeds texts at every depth of `model`, or at those given.

        What the unpruned model gives is kept in the cache, for a job that is killed later on.
        """

        def embed(texts: list[str], instruction: str | None) -> NDArray[np.float32]:
            return depth.layer_embeddings(
                model,
                self.tokenizer,
                texts,
                pooling=self.params.pooling,
                instruction=instruction,
                depths=depths,
                batch_tokens=self.params.batch_tokens,
                max_length=self.params.max_length,
            )

        if model is not self.model:
            return embed
        settings = [self.params.pooling, self.params.batch_tokens, self.params.max_length, str(model.dtype)]
        versions = [_EMBEDDING_VERSION, torch.__version__, transformers.__version__]
        made_by = [models.provenance(self.params.model), str(model.device), depths, settings, versions]

        def kept(texts: list[str], instruction: str | None) -> NDArray[np.float32]:
            return cache.array("embeddings", [made_by, instruction, texts], lambda: embed(texts, instruction))

        return kept

    def score(
        self,
        system: str,
        embed: embedding.Embed,
        *,
        depths: Sequence[int],
        tasks: Sequence[str] = (),
    ) -> dict[int, Scores]:
        """Score a system on the tasks and keep its per-item scores.

        Args:
            system: Its name in the per-item scores.
            embed: Gives one view for each of `depths`.
            depths: What the views are.
            tasks: All of the study's by default.

        Returns:
            {depth: {task: score}}.
        """
        found: dict[int, Scores] = {}
        for score in embedding.evaluate(
            embed,
            tasks or self.params.tasks,
            max_items=self.params.max_items,
            seed=self.params.seed,
            instructions=self.params.instructions,
        ):
            keep = depths[score.view]
            found.setdefault(keep, {})[score.task] = score
            self.recorder.keep(score.items, system=system, depth=keep, task=score.task)
        return found

    def finish(self) -> record.Record:
        """Write the per-item scores and the record; its last file is record.json."""
        self.recorder.finish()
        return self.recorder.record


def start(params: Params) -> Study:
    """Check what can be checked at once, load the model, and open the record.

    Raises:
        ValueError: If a depth is not in 1…L.
        MemoryError: If the model cannot fit; says what it needs.
    """
    dtype, device = models.working_dtype(params.dtype), models.working_device()
    # the unpruned model stays while a copy of it is trained
    models.check_memory(
        params.model, dtype, times_weights=2 * _TRAINING_FACTOR, purpose="with a copy in training"
    )
    model, tokenizer = models.load(params.model, dtype=dtype, device=device)
    total = len(models.blocks(model).layers)
    for keep in params.extra_depths:
        if keep > total:
            raise ValueError(f"extra_depths must be in 1..{total} for {params.model}, got {keep}")
    if total >= 4:
        depth.truncated(model, total // 2)  # an architecture that no cut leaves as it is, is refused at once
    else:
        raise ValueError(f"the study needs a model of at least 4 blocks, {params.model} has {total}")
    local = set(params.tasks) & set(LOCAL_TASKS) or params.training_data is None
    recorder = record.start(
        "trailing_layer_pruning",
        params.model_dump(mode="json"),
        slug=params.slug(),
        inputs=models.provenance(params.model) | (corpora.provenance() if local else {}),
        seeds=sorted({params.seed, *params.train_seeds}),
    )
    counts = models.count_parameters(model)
    recorder.metric("parameters_total", counts.total)
    recorder.metric("parameters_embedding", counts.embedding)
    recorder.metric("blocks", total)
    return Study(params, recorder, model, tokenizer)


def triplets(params: Params, n: int, *, seed: int) -> list[pairs.Triplet]:
    """Return training triplets, packaged or published, as the parameters say."""
    if params.training_data is None:
        return pairs.triplets(n, seed=seed, max_chars=params.max_chars)
    return pairs.hub_triplets(params.training_data, n, seed=seed)


def initial_loss(study: Study) -> tuple[depth.LayerLoss, depth.Cuts]:
    """Measure the loss of every depth before training, and make the two picks of L3Prune."""
    params = study.params
    loss = depth.initial_loss(
        study.model,
        study.tokenizer,
        triplets(params, params.loss_triplets, seed=params.seed),
        batch_size=params.loss_batch_size,
        scale=params.loss_scale,
        pooling=params.pooling,
        seed=params.seed,
        batch_tokens=params.batch_tokens,
        max_length=params.max_length,
    )
    cuts = depth.l3prune(loss)
    frequencies = depth.pick_frequencies(loss)
    table = pd.DataFrame(
        {
            "depth": range(loss.layers + 1),
            "loss": loss.mean,
            "low": loss.low,
            "high": loss.high,
            "picked_small": frequencies["small"],
            "picked_large": frequencies["large"],
        }
    )
    study.recorder.table("initial_loss", table)
    study.recorder.metric("pick_small", cuts.small, "blocks")
    study.recorder.metric("pick_large", cuts.large, "blocks")
    study.recorder.metric("pick_small_interior", cuts.interior_small)
    study.recorder.metric("pick_large_interior", cuts.interior_large)
    for keep in (cuts.small, cuts.large):
        depth.truncated(study.model, keep)  # a cut that cannot be saved is refused before anything is trained
    return loss, cuts


@dataclass(frozen=True)
class ZeroShot:
    """Scores without any training.

    Attributes:
        by_depth: {depth: {task: score}} of the model.
        untrained: The same of a twin with random weights, up to the `small` pick.
        bag_of_words: {task: score} of hashed word counts.
        table: Mean over tasks by system and depth, in points, with its confidence interval.
    """

    by_depth: dict[int, Scores]
    untrained: dict[int, Scores]
    bag_of_words: Scores
    table: pd.DataFrame

    def mean(self, keep: int) -> float:
        """Mean over tasks at a depth, in points."""
        return mean_points(self.by_depth[keep])


def zero_shot(study: Study, cuts: depth.Cuts) -> ZeroShot:
    """Score every depth without training, from one embedding pass, beside its two floors."""
    by_depth = study.score("zero-shot", study.embedder(study.model), depths=range(study.layers + 1))
    words = study.score("bag of words", embedding.bag_of_words, depths=[0])[0]
    twin = depth.truncate(models.random_twin(study.model, seed=study.params.seed), cuts.small)
    untrained = study.score("random weights", study.embedder(twin), depths=range(cuts.small + 1))
    rows = [
        {"system": system, "depth": keep, **points(suite(scores))}
        for system, found in (
            ("zero-shot", by_depth),
            ("random weights", untrained),
            ("bag of words", {0: words}),
        )
        for keep, scores in progress.track(found.items(), f"intervals of {system}")
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("zero_shot", table)
    return ZeroShot(by_depth, untrained, words, table)


def suite(scores: Scores) -> stats.Estimate:
    """Mean over tasks with its bootstrap interval over items."""
    return stats.suite_score(
        {task: (score.items, score.statistic) for task, score in scores.items()}, n_resamples=CURVE_RESAMPLES
    )


def points(estimate: stats.Estimate) -> dict[str, float]:
    """An estimate as columns of a table, in points (0…100)."""
    return {"score": 100 * estimate.value, "low": 100 * estimate.low, "high": 100 * estimate.high}


def mean_points(scores: Scores) -> float:
    """Mean of mteb's main scores over tasks, in points."""
    return 100 * float(np.mean([score.score for score in scores.values()]))


def scores_table(by_depth: dict[int, Scores]) -> pd.DataFrame:
    """Main score by task (rows) and depth (columns), in points."""
    return pd.DataFrame(
        {
            keep: {task: 100 * score.score for task, score in scores.items()}
            for keep, scores in by_depth.items()
        }
    )
