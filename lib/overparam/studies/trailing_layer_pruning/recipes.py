"""What the recipe for reading texts changes: the initial loss a second time, under the other recipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from overparam.compress import depth
from overparam.data.triplets import Triplet
from overparam.experiment.study import step
from overparam.studies.trailing_layer_pruning.study import Study, published_recipe, text_recipe


@dataclass(frozen=True)
class Comparison:
    """The initial loss under both recipes, on the same triplets and with the same factor on the cosine.

    Attributes:
        losses: By the recipe's name; the study's own first.
        cuts: The two picks of each.
        largest_difference: Of the second curve from the first, relative, over depths 1 … L.
        table: The picks, also with the second recipe's own factor where that is another one.
    """

    losses: dict[str, depth.LayerLoss]
    cuts: dict[str, depth.Cuts]
    largest_difference: float
    table: pd.DataFrame


@step
def compare_recipes(study: Study, loss: depth.LayerLoss, cuts: depth.Cuts) -> Comparison:
    """Measure the initial loss under the recipe that the study does not use: plain or published.

    The published one reads instructions and a template besides; they come on top of ``max_length`` where the study is
    plain, so that both read the same words.
    """
    params = study.params
    own, other = text_recipe(params), depth.PLAIN
    chosen = study.triplets(params.loss_triplets, seed=params.seed)
    room = 0
    if own == other:
        other = published_recipe(params)
        room = max(_around(study, triplet, other) for triplet in chosen)
    scales = [loss.scale] + [other.scale] * (other.scale != loss.scale)
    found = depth.initial_losses(
        study.model,
        study.tokenizer,
        chosen,
        scales=scales,
        batch_size=params.loss_batch_size,
        pooling=study.pooling,
        recipe=other,
        seed=params.seed,
        batch_tokens=params.batch_tokens,
        max_length=study.max_length + room,
    )
    difference = float(np.abs(found[0].mean[1:] / loss.mean[1:] - 1).max())
    picks = [(own.name, loss, cuts), *((other.name, each, depth.l3prune(each)) for each in found)]
    table = pd.DataFrame(
        [
            {
                "recipe": name,
                "scale": each.scale,
                "pick_small": pick.small,
                "pick_small_interior": pick.interior_small,
                "pick_large": pick.large,
                "pick_large_interior": pick.interior_large,
                "least_loss": float(each.mean[1:].min()),
            }
            for name, each, pick in picks
        ]
    )
    study.recorder.table("recipes", table)
    study.recorder.metric("recipes_largest_difference", difference, "of the loss")
    for name, _, pick in picks[:2]:
        study.recorder.metric(f"pick_small_{name}", pick.small, "blocks")
        study.recorder.metric(f"pick_large_{name}", pick.large, "blocks")
    losses = {name: each for name, each, _ in picks[:2]}
    return Comparison(losses, {name: pick for name, _, pick in picks[:2]}, difference, table)


@step
def as_read(study: Study) -> pd.DataFrame:
    """One triplet of each source as the published recipe shows it to the model; ⟦what is pooled⟧ is marked."""
    recipe = published_recipe(study.params)
    head, tail = depth.frame(study.tokenizer, recipe.template)
    first: dict[str, Triplet] = {}
    for each in study.triplets(study.params.loss_triplets, seed=study.params.seed):
        first.setdefault(each.source, each)
    rows = []
    for source, one in first.items():
        asked, given = depth.instructions_of(one, recipe)
        rows.append(
            {
                "source": source,
                "query": _shown(head, asked, recipe.separator, one.query, tail),
                "document": _shown(head, given, recipe.separator, one.positive, tail),
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("as_read", table)
    return table


def _shown(head: str, instruction: str | None, separator: str, text: str, tail: str) -> str:
    return head + (f"{instruction}{separator}" if instruction else "") + f"⟦{text}{tail}⟧"


def _around(study: Study, triplet: Triplet, recipe: depth.TextRecipe) -> int:
    """Tokens that a recipe puts around a triplet's texts, at most."""
    head, tail = depth.frame(study.tokenizer, recipe.template)
    longest = max((each or "" for each in depth.instructions_of(triplet, recipe)), key=len)
    return len(study.tokenizer(f"{head}{longest}{recipe.separator}{tail}")["input_ids"])
