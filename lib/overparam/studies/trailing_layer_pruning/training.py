"""Prune, train and evaluate at several depths, against the unpruned model trained the same way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from overparam import models
from overparam.compress import depth
from overparam.experiment.study import step
from overparam.experiment.subjects.base import paired
from overparam.record import stats
from overparam.studies.trailing_layer_pruning.study import (
    Scores,
    Study,
    ZeroShot,
    mean_points,
    text_recipe,
)
from overparam.support import cache, progress
from overparam.train import contrastive

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NEGLIGIBLE_SHARE = 0.30  # of the layers, said to go with negligible loss
MODEST_SHARE = 0.80  # of the layers, said to go with a modest one


@dataclass(frozen=True)
class TrainedScores:
    """Scores after training, by depth and seed.

    Attributes:
        scores: {depth: [{task: score}, …]}, one a training seed.
        change: {depth: mean over tasks minus the trained unpruned model's}, in points, paired by item and seed.
        retention: {depth: mean over tasks over the trained unpruned model's}.
        table: One row a depth.
    """

    scores: dict[int, list[Scores]]
    change: dict[int, stats.Estimate]
    retention: dict[int, stats.Estimate]
    table: pd.DataFrame


def keep_at_most_pruned(layers: int, share: float) -> int:
    """Fewest blocks to keep so that no more than `share` of them is pruned (30 % of 18: keep 13)."""
    return layers - math.floor(share * layers + 1e-9)


def trained_depths(study: Study, cuts: depth.Cuts) -> list[int]:
    """Depths to train at: all, the two picks, the deepest cuts of the two general claims, and those asked for."""
    total = study.layers
    claims = (keep_at_most_pruned(total, NEGLIGIBLE_SHARE), keep_at_most_pruned(total, MODEST_SHARE))
    return sorted({total, cuts.small, cuts.large, *claims, *study.params.extra_depths}, reverse=True)


@step
def train_and_evaluate(study: Study, cuts: depth.Cuts, zero: ZeroShot) -> TrainedScores:
    """Truncate, train with LoRA and score, at each depth and with each seed; the same recipe everywhere."""
    params = study.params
    identity = str(models.provenance(params.model))
    scores: dict[int, list[Scores]] = {}
    losses: list[dict[str, float]] = []
    cost: dict[int, list[float]] = {}
    for keep in trained_depths(study, cuts):
        for seed in params.train_seeds:
            recipe = contrastive.Recipe(
                steps=params.train_steps,
                batch_size=params.train_batch_size,
                learning_rate=params.learning_rate,
                warmup=params.warmup_steps,
                lora_dropout=params.lora_dropout,
                scale=params.train_scale,
                max_length=study.max_length,
                seed=seed,
                bf16=models.bf16_is_fast() and params.dtype != "float32",
            )
            trained = contrastive.train(
                depth.truncated(study.model, keep),
                study.tokenizer,
                study.triplets(
                    params.train_steps * params.train_batch_size, seed=seed, group=params.train_batch_size
                ),
                recipe,
                pooling=study.pooling,
                text_recipe=text_recipe(params),
                cache=cache.folder("adapters"),
                identity=identity,
                label=f"training {keep} of {study.layers} layers, seed {seed}",
            )
            losses += [
                {"depth": keep, "seed": seed, "step": step, "loss": loss}
                for step, loss in enumerate(trained.losses, 1)
            ]
            cost.setdefault(keep, []).append(trained.seconds)
            encoder = trained.encoder[0].model
            found = study.score(f"trained, seed {seed}", study.embedder(encoder, [keep]), depths=[keep])
            scores.setdefault(keep, []).append(found[keep])
            if params.export and seed == params.train_seeds[0] and keep in (cuts.small, cuts.large):
                _export(study, trained.encoder, keep)
            del trained, encoder  # or the next one is trained beside it
    study.recorder.table("training_loss", pd.DataFrame(losses))
    return _compare(study, scores, cost, zero)


def _export(study: Study, encoder: SentenceTransformer, keep: int) -> None:
    """Save a trained encoder: a folder of sentence-transformers, which has no module for the published pooling."""
    params = study.params
    folder = cache.directory() / "encoders" / f"{params.slug()}-{keep}-of-{study.layers}"
    if params.recipe == "plain":
        depth.save_encoder(_as_measured(study, encoder), folder, replace=True)
        progress.note(f"saved the encoder with {keep} layers at {folder}")
        return
    folder = folder.with_name(f"{folder.name}-published")
    depth.save(encoder[0].model, study.tokenizer, folder, replace=True)
    progress.note(
        f"saved the model with {keep} layers at {folder}, a folder of transformers: sentence-transformers cannot pool "
        "as the published recipe does; embed with depth.layer_embeddings(..., recipe=depth.PUBLISHED)"
    )


def _as_measured(study: Study, encoder: SentenceTransformer) -> SentenceTransformer:
    """The encoder with the prompt and the unit length that its embeddings were measured with."""
    from sentence_transformers.models import Normalize

    if study.folder_recipe and study.folder_recipe.prompt:
        encoder.prompts |= {"default": study.folder_recipe.prompt}
        encoder.default_prompt_name = "default"
        encoder.set_pooling_include_prompt(True)
    if study.folder_recipe and study.folder_recipe.unit_length:
        encoder.append(Normalize())
    if study.folder_recipe and study.folder_recipe.width:
        encoder.truncate_dim = study.folder_recipe.width
    return encoder


def _compare(
    study: Study, scores: dict[int, list[Scores]], cost: dict[int, list[float]], zero: ZeroShot
) -> TrainedScores:
    full = scores[study.layers]
    change, retention, rows = {}, {}, []
    for keep, found in progress.track(scores.items(), "comparing with the unpruned model"):
        pairs = paired(full, found)
        change[keep] = stats.suite_difference(pairs).scaled(100)
        retention[keep] = stats.suite_retention(pairs)
        means = [mean_points(one) for one in found]
        rows.append(
            {
                "depth": keep,
                "pruned": 1 - keep / study.layers,
                "score": sum(means) / len(means),
                "score_lowest_seed": min(means),
                "score_highest_seed": max(means),
                "zero_shot": zero.mean(keep),
                **change[keep].columns("change"),
                **retention[keep].columns("retention"),
                "training_seconds": sum(cost[keep]) / len(cost[keep]),
            }
        )
        study.recorder.metric(f"change_at_{keep}", change[keep], "points")
        study.recorder.metric(f"retention_at_{keep}", retention[keep])
    table = pd.DataFrame(rows)
    study.recorder.table("trained", table)
    return TrainedScores(scores, change, retention, table)
