import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from overparam import models
from overparam.compress import depth
from overparam.record import record, stats
from overparam.record.claims import verdict_table
from overparam.studies.trailing_layer_pruning import (
    Params,
    costs,
    plots,
    recipes,
    rules,
    study,
    training,
    verdicts,
)
from overparam.train import contrastive

TINY = {
    "tasks": ("VerseParaphrase", "VersePairs"),
    "rule_tasks": ("VersePairs",),
    "max_items": 20,
    "max_length": 48,
    "max_chars": 64,
    "loss_triplets": 16,
    "loss_batch_size": 8,
    "train_steps": 4,
    "train_batch_size": 4,
    "warmup_steps": 1,
    "cost_texts": 2,
    "cost_repeats": 3,
    "export": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gemma-3-270n"}, "did you mean 'gemma-3-270m'"),
        ({"tasks": ("LeeST",), "rule_tasks": ()}, "LeeSTS"),
        ({"tasks": ()}, "at least 1"),
        ({"rule_tasks": ("ReutersR8",), "tasks": ("LeeSTS",)}, "'ReutersR8' is not"),
        ({"max_items": 5}, "greater than or equal to 20"),
        ({"train_steps": 0.5}, "integer"),
        ({"train_steps": 3, "warmup_steps": 1}, "at least 4"),
        ({"warmup_steps": 24}, "below train_steps"),
        ({"extra_depths": (0,)}, "greater than or equal to 1"),
        ({"loss_triplets": 32}, "loss_batch_size"),
        ({"random_seeds": 2}, "greater than or equal to 3"),
        ({"pooling": "max"}, "weighted_mean"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"depth": 3}, "Extra inputs"),
        ({"recipe": "paper"}, "plain"),
        ({"chat_template": "[INST]"}, "hold {text} once"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_a_depth_beyond_the_model_is_refused_before_any_long_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"1\.\.6 for tiny-bert, got 7"):
        study.start(Params(model="tiny-bert", extra_depths=(7,), **TINY))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr("overparam.models.memory.required_memory", lambda *_, **__: 10**15)
    with pytest.raises(MemoryError, match="needs about"):
        study.start(Params(model="tiny-bert", **TINY))


@pytest.mark.parametrize(
    ("layers", "share", "keep"),
    [(18, 0.3, 13), (18, 0.8, 4), (32, 0.3, 23), (10, 0.3, 7), (10, 0.8, 2), (4, 0.8, 1)],
)
def test_never_more_than_the_share_is_pruned(layers, share, keep):
    assert training.keep_at_most_pruned(layers, share) == keep
    assert (layers - keep) / layers <= share + 1e-9
    assert (layers - keep + 1) / layers > share


def test_slope_is_one_when_time_is_proportional_and_less_with_a_fixed_cost():
    noise = np.random.default_rng(0).normal(1, 0.01, size=(3, 20))
    proportional = {keep: keep * row for keep, row in zip((4, 9, 18), noise, strict=True)}
    slope = costs.proportionality(proportional)
    assert slope.low < 1 < slope.high
    assert slope.high - slope.low < 0.1
    fixed = {keep: keep + 18 * row for keep, row in zip((4, 9, 18), noise, strict=True)}
    assert costs.proportionality(fixed).value == pytest.approx(0.5, abs=0.02)


def published_data(folder):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    for source in ("nq", "squad"):
        rows = [
            {"query": f"what is {a} {b}", "positive": f"{a} {b} is this", "negative": f"{b[::-1]} is not {a}"}
            for a in words
            for b in words[:6]
        ]
        (folder / f"{source}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def test_every_step_of_the_paper_profile_runs_on_a_tiny_twin(tmp_path, monkeypatch):
    """Published triplets and recipe, instructions and bfloat16: the paths that the paper profile takes."""
    data = tmp_path / "echo-data"
    data.mkdir()
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    params = Params(
        model="tiny-phi3",
        dtype="bfloat16",
        recipe="published",
        chat_template="<user>{text}</user>",
        instructions=True,
        training_data=published_data(data),
        **TINY | {"max_length": 256},  # an instruction takes a token a byte
    )
    run = study.start(params)
    loss, cuts = study.initial_loss(run)
    assert 1 <= cuts.small <= 3 < cuts.large <= 6
    assert loss.scale == 50.0
    comparison = recipes.compare_recipes(run, loss, cuts)
    assert list(comparison.table["scale"]) == [50.0, 50.0, 20.0]
    assert (
        recipes.as_read(run)
        .set_index("source")
        .loc["squad", "query"]
        .startswith("<user>Retrieve Wikipedia passages that answer the question; ⟦what is ")
    )
    zero = study.zero_shot(run, cuts)
    assert set(zero.by_depth) == set(range(7))
    trained = training.train_and_evaluate(run, cuts, zero)
    assert trained.change[6] == stats.Estimate(0.0, 0.0, 0.0, trained.change[6].n)
    assert set(trained.scores) >= {6, 5, 2, cuts.small, cuts.large}
    where = rules.where_to_cut(run, loss, cuts, zero, trained).set_index("rule")
    assert where.loc["best large", "zero_shot"] >= where.loc["L3Prune large", "zero_shot"]
    by_rule = rules.which_layers(run, zero)
    assert (by_rule["kept"].str.split().str.len() == 5).all()
    table, slope = costs.costs(run, [6, 2])
    assert table["parameters"].is_monotonic_decreasing
    claims = verdicts.verdicts(run, cuts, trained, slope)
    assert len(verdict_table(claims)) == 5
    for draw in (
        lambda: plots.plot_initial_loss(run, loss, cuts),
        lambda: plots.plot_recipes(run, comparison),
        lambda: plots.plot_zero_shot(run, zero, cuts),
        lambda: plots.plot_tasks(run, zero),
        lambda: plots.plot_trained(run, trained),
        lambda: plots.plot_rules(run, by_rule),
        lambda: plots.plot_cost(run, table),
    ):
        draw()
    run.finish()
    kept = record.load(tmp_path / "job")
    assert len(kept.figures) == 7
    assert record.problems(kept) == []
    items = pd.read_parquet(tmp_path / "job" / "items.parquet")
    paraphrase = items[(items["system"] == "zero-shot") & (items["task"] == "VerseParaphrase")]
    means = 100 * paraphrase.groupby("depth")["value_0"].mean()
    expected = [100 * zero.by_depth[keep]["VerseParaphrase"].score for keep in range(7)]
    np.testing.assert_allclose(means, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_both_recipes_are_compared_on_the_same_triplets(name, tmp_path, monkeypatch):
    """Also where the window of the plain recipe has no room for an instruction."""
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    run = study.start(Params(model=f"tiny-{name}", dtype="float32", **TINY))
    loss, cuts = study.initial_loss(run)
    assert loss.scale == 20.0
    comparison = recipes.compare_recipes(run, loss, cuts)
    assert list(comparison.losses) == ["plain", "published"]
    assert comparison.cuts["plain"] == cuts
    assert list(comparison.table["scale"]) == [20.0, 20.0, 50.0]
    again = depth.initial_loss(
        run.model,
        run.tokenizer,
        study.triplets(run.params, 16, seed=42),
        batch_size=8,
        scale=20.0,
        recipe=depth.PUBLISHED,
        max_length=512,  # cuts nothing: texts have 64 characters
    )
    longer = run.params.model_copy(update={"max_length": 512})
    run.params = longer
    plain = study.initial_loss(run)[0]
    comparison = recipes.compare_recipes(run, plain, cuts)
    np.testing.assert_allclose(comparison.losses["published"].mean, again.mean, atol=1e-6)
    expected = np.abs(again.mean[1:] / plain.mean[1:] - 1).max()
    assert comparison.largest_difference == pytest.approx(expected, rel=1e-4)
    assert run.recorder.record.metrics["recipes_largest_difference"].value == comparison.largest_difference
    read = recipes.as_read(run).set_index("source")
    assert set(read.index) == {"paraphrase", "topic", "fr", "de"}
    assert read.loc["fr", "query"].startswith(
        "Given a Bible verse in English, find the same verse in French; ⟦"
    )
    assert read.loc["fr", "document"].startswith("⟦")
    assert "⟦" in read.loc["topic", "document"][1:]


@pytest.mark.parametrize("recipe", ["plain", "published"])
def test_an_exported_encoder_embeds_as_the_trained_one(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    monkeypatch.setattr("overparam.support.cache.directory", lambda: tmp_path)
    run = study.start(Params(model="tiny-llama", dtype="float32", recipe=recipe, **TINY))
    texts = study.text_recipe(run.params)
    encoder = contrastive.as_sentence_transformer(
        depth.truncated(run.model, 2), run.tokenizer, text_recipe=texts
    )
    training._export(run, encoder, 2)
    name = "tiny-llama-2-of-6" + ("-published" if recipe == "published" else "")
    model, tokenizer = models.load(str(tmp_path / "encoders" / name))
    found = depth.layer_embeddings(model, tokenizer, ["light and water"], recipe=texts)[:, -1]
    np.testing.assert_allclose(found, encoder.encode(["light and water"]), atol=1e-5)
