"""The steps of the trailing-layer pruning study, in the order of the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import depth
from overparam.data import corpora, pairs
from overparam.evaluate import LOCAL_TASKS, embedding
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies import recipes
from overparam.studies.trailing_layer_pruning import Params
from overparam.support import cache, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TRAINING_FACTOR = (
    1.6  # peak of a LoRA step over the weights, batches of the default size (see README, Limits)
)
_SIDES = ("query", "positive", "negative")
_EMBEDDING_VERSION = 1  # raised when `depth.layer_embeddings` returns other numbers

Scores = dict[str, embedding.TaskScore]


@dataclass
class Study(experiment.Study[Params]):
    """A started study: what every step needs, and the per-item scores collected so far.

    Attributes:
        model: The unpruned model; no step changes it.
        tokenizer: Its tokenizer.
        layers: Number of blocks of the unpruned model.
        pooling: See `depth.layer_embeddings`.
        folder_recipe: Of the model's folder, as far as it holds at every depth; None where none is followed.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: int
    pooling: str = "weighted_mean"
    folder_recipe: models.Recipe | None = None

    @property
    def max_length(self) -> int:
        """Tokens of a text: the parameters', or the model's own maximum where that is less."""
        return (
            self.folder_recipe.length(self.params.max_length)
            if self.folder_recipe
            else self.params.max_length
        )

    def triplets(self, n: int, *, seed: int, group: int = 1) -> list[pairs.Triplet]:
        """Training triplets, with the model's own prompt before their texts; `group` as for `triplets`."""
        found = triplets(self.params, n, seed=seed, group=group)
        if not self.folder_recipe or not self.folder_recipe.prompt:
            return found
        return [
            replace(each, **{side: self.folder_recipe.prompt + getattr(each, side) for side in _SIDES})
            for each in found
        ]

    def embedder(self, model: PreTrainedModel, depths: Sequence[int] | None = None) -> embedding.Embed:
        """Return a function that embeds texts at every depth of `model`, or at those given.

        What the unpruned model gives is kept in the cache, for a job that is killed later on.
        """
        import torch
        import transformers

        recipe = replace(
            text_recipe(self.params), separator=" "
        )  # also in the published code, when it embeds

        def embed(texts: list[str], instruction: str | None) -> NDArray[np.float32]:
            own = self.folder_recipe.prompt if self.folder_recipe and not instruction else ""
            found = depth.layer_embeddings(
                model,
                self.tokenizer,
                [own + text for text in texts],
                pooling=self.pooling,
                instruction=instruction,
                recipe=recipe,
                depths=depths,
                batch_tokens=self.params.batch_tokens,
                max_length=self.max_length,
            )
            if self.folder_recipe and self.folder_recipe.unit_length:
                found /= np.linalg.norm(found, axis=-1, keepdims=True)
            return found[..., : self.folder_recipe.width if self.folder_recipe else None]

        if model is not self.model:
            return embed
        settings: list[Any] = [self.pooling, self.params.batch_tokens, self.max_length, str(model.dtype)]
        settings += [str(self.folder_recipe)] if self.folder_recipe else []
        if recipe != depth.PLAIN:
            settings.append(asdict(recipe))
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


@begins
def start(params: Params) -> Study:
    """Check what can be checked at once, load the model, and open the record.

    Raises:
        ValueError: If a depth is not in 1…L, or the model's own pooling cannot be had at every depth.
        MemoryError: If the model cannot fit; says what it needs.
    """
    dtype, device = models.working_dtype(params.dtype), models.working_device()
    # the unpruned model stays while a copy of it is trained
    models.check_memory(
        params.model, dtype, times_weights=2 * _TRAINING_FACTOR, purpose="with a copy in training"
    )
    model, tokenizer = models.load(params.model, dtype=dtype, device=device)
    own = models.recipe(model)
    pooling, recipe = how_to_embed(params, own)
    total = len(models.blocks(model).layers)
    for keep in params.extra_depths:
        if keep > total:
            raise ValueError(f"extra_depths must be in 1..{total} for {params.model}, got {keep}")
    if total >= 4:
        depth.truncated(model, total // 2)  # an architecture that no cut leaves as it is, is refused at once
    else:
        raise ValueError(f"the study needs a model of at least 4 blocks, {params.model} has {total}")
    local = set(params.tasks) & set(LOCAL_TASKS) or params.training_data is None
    recorder = experiment.open_record(
        params,
        inputs=models.provenance(params.model) | (corpora.provenance() if local else {}),
    )
    counts = models.count_parameters(model)
    recorder.metric("parameters_total", counts.total)
    recorder.metric("parameters_embedding", counts.embedding)
    recorder.metric("blocks", total)
    study = Study(params, recorder, model, tokenizer, total, pooling, recipe)
    here = {"pooling": pooling, "dense": "none", "unit length": "no", "dimensions": "all", "prompt": "none"}
    if own and recipe:
        here = recipe.describe() | {"dense": "left out: trained for the last depth" if own.dense else "none"}
    recipes.keep(recorder, params.model, own, here | {"tokens at most": str(study.max_length)})
    return study


def how_to_embed(params: Params, own: models.Recipe | None) -> tuple[str, models.Recipe | None]:
    """Return the pooling, and the recipe as far as it can be followed at every depth, where it is asked for.

    Raises:
        ValueError: If what the model's folder says cannot be had at every depth; says what to set.
    """
    if params.pooling != "own":
        return params.pooling, None
    if own is None:
        return "weighted_mean", None
    advice = f"set pooling to one of {', '.join(depth.POOLINGS)}, which replaces what the folder says"
    wrong = own.refused
    if not wrong and (len(own.pooling) > 1 or own.pooling[0] not in depth.POOLINGS):
        wrong = f"its pooling is {' and '.join(own.pooling)}"
    if not wrong and own.prompt and not own.include_prompt:
        wrong = "its prompt is not pooled"
    if wrong:
        raise ValueError(
            f"{params.model} cannot be embedded at every depth as its folder says: {wrong}; {advice}"
        )
    return own.pooling[0], own.without_dense()


def published_recipe(params: Params) -> depth.TextRecipe:
    """Return the recipe of L3Prune's code with the chat template of the parameters."""
    return replace(depth.PUBLISHED, template=params.chat_template)


def text_recipe(params: Params) -> depth.TextRecipe:
    """Return how texts are read, pooled and drawn in the initial loss and in training."""
    return published_recipe(params) if params.recipe == "published" else depth.PLAIN


def triplets(params: Params, n: int, *, seed: int, group: int = 1) -> list[pairs.Triplet]:
    """Return training triplets, packaged or published, as the parameters say.

    Packaged sources give as many each; published ones are drawn as the recipe says, those in proportion to size by
    groups of one source, such as the batches of a training.
    """
    if params.training_data is None:
        return pairs.triplets(n, seed=seed, max_chars=params.max_chars)
    draw = text_recipe(params).draw
    return pairs.hub_triplets(params.training_data, n, seed=seed, draw=draw, group=group)


@step
def initial_loss(study: Study) -> tuple[depth.LayerLoss, depth.Cuts]:
    """Measure the loss of every depth before training, and make the two picks of L3Prune."""
    params = study.params
    loss = depth.initial_loss(
        study.model,
        study.tokenizer,
        study.triplets(params.loss_triplets, seed=params.seed),
        batch_size=params.loss_batch_size,
        scale=params.loss_scale,
        pooling=study.pooling,
        recipe=text_recipe(params),
        seed=params.seed,
        batch_tokens=params.batch_tokens,
        max_length=study.max_length,
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


@step
def zero_shot(study: Study, cuts: depth.Cuts) -> ZeroShot:
    """Score every depth without training, from one embedding pass, beside its two floors."""
    by_depth = study.score("zero-shot", study.embedder(study.model), depths=range(study.layers + 1))
    words = study.score("bag of words", embedding.bag_of_words, depths=[0])[0]
    twin = depth.truncate(models.random_twin(study.model, seed=study.params.seed), cuts.small)
    untrained = study.score("random weights", study.embedder(twin), depths=range(cuts.small + 1))
    rows = [
        {"system": system, "depth": keep, **points(scores)}
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


def points(scores: Scores) -> dict[str, float]:
    """Mean over tasks with its bootstrap interval over items, as columns of a table, in points (0…100)."""
    tasks = {task: (score.items, score.statistic) for task, score in scores.items()}
    estimate = stats.suite_score(tasks, n_resamples=CURVE_RESAMPLES).scaled(100)
    return {"score": estimate.value, "low": estimate.low, "high": estimate.high}


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
