"""Recipes name cached trainings: a changed name would train again what is in readers' caches."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from overparam import models
from overparam.studies.distillation_retention.study import cached
from overparam.train import causal, contrastive, distillation

SCHEDULED = causal.Recipe(
    steps=7,
    warmup=2,
    decay=3,
    balance=((0, 0.01), (3, 0.02)),
    label_smoothing=0.1,
    learning_rate=1e-2,
    accumulate=2,
    weight_decay=0.05,
)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (distillation.Recipe(steps=3), "ddc5bc7abf8ca335b8373936"),
        (
            distillation.Recipe(steps=12, batch_size=8, learning_rate=0.01, warmup=2),
            "a080a58e579ffcd9ef588358",
        ),
        (causal.Recipe(steps=3), "03268d23a28254b924026e64"),
        (SCHEDULED, "6f95c5281e1c8e72cd22c969"),
    ],
)
def test_a_recipe_keeps_its_name_in_the_cache(recipe, key):
    assert cached(asdict(recipe)).name == key


def test_a_recipe_keeps_the_name_of_its_adapters_in_the_cache(tmp_path):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    triplets = [
        SimpleNamespace(query=f"{w} one", positive=f"{w} two", negative=f"{w[::-1]} three", source=source)
        for source in ("a", "b")
        for w in words
    ]
    recipe = contrastive.Recipe(steps=6, batch_size=4, learning_rate=1e-2, max_length=64, warmup=2)
    model = models.tiny_twin("qwen3", num_hidden_layers=2)
    contrastive.train(
        model, models.tiny_tokenizer(), triplets, recipe, identity="x", instruction="Find:", cache=tmp_path
    )
    assert (tmp_path / "ede9292efcdbd76c0660853c").is_dir()


def test_defaults_are_those_of_the_trainings_that_are_cached():
    assert contrastive.Recipe().stored() == {
        "steps": 1000, "batch_size": 64, "learning_rate": 2e-4, "warmup_steps": 300, "lora_rank": 16,
        "lora_alpha": 32, "lora_dropout": 0.05, "scale": 50.0, "max_length": 512, "seed": 42, "bf16": False,
        "version": 1,
    }  # fmt: skip


def test_the_rate_falls_over_all_that_follows_the_warm_up_or_over_the_decay_of_a_recipe():
    falling = distillation.Recipe(steps=6, warmup=2, learning_rate=1.0)
    assert [falling.rate(step) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    staying = causal.Recipe(steps=6, warmup=2, learning_rate=1.0)
    assert [staying.rate(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
