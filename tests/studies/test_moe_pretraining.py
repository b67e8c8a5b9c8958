import re
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from overparam import models
from overparam.compress import experts
from overparam.data import splits
from overparam.data.packing import Tree, pack
from overparam.data.parallel import VERSIONS
from overparam.models import translator
from overparam.record import record
from overparam.record.stats import Estimate
from overparam.runner.plan import load_profile
from overparam.studies.moe_pretraining import (
    Params,
    card,
    corpus,
    expert_load,
    plots,
    quality,
    study,
    training,
    verdicts,
)

RECORDS = [
    path
    for path in (Path(__file__).parents[2] / "results/reference/moe_pretraining").glob("*/record.json")
    if record.load(path).params["version"] == Params().version  # an older recipe cannot be trained again
]
TINY = Params(
    vocabulary=400,
    hidden=32,
    layers=2,
    experts=4,
    top_k=2,
    expert_width=32,
    heads=4,
    key_value_heads=2,
    embedding_donor=None,
    max_texts=60,
    capacity=2.0,
    steps=4,
    rows=4,
    accumulate=1,
    warmup=1,
    decay=2,
    compiled=False,
    checkpoint_every=2,
    validation_batches=1,
    test_verses=3,
    removed_verses=2,
    beams=2,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 32}, "top_k must be below experts = 32"),
        ({"translation_share": 1.0}, "less than 1"),
        ({"architecture": "qwen3_moe"}, "no sinks to leave out and no capacity"),
        ({"compiled": True}, "compiled needs capacity null"),
        ({"hidden": 99}, "multiple of heads"),
        ({"heads": 3, "hidden": 252}, "key_value_heads"),
        ({"warmup": 700, "steps": 100}, "must fit into steps = 100"),
        ({"unseen_share": 1.5}, "less than or equal to 1"),
        ({"row_length": 64}, "greater than or equal to 128"),
        ({"test_verses": 5000}, "less than or equal to 1000"),
        ({"optimizer": "sgd"}, "muon"),
        ({"layer": 3}, "Extra inputs"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_the_folder_of_checkpoints_follows_what_the_weights_depend_on():
    base = training.state_folder(Params())
    for same in ({"steps": 2000, "decay": 100}, {"test_verses": 3}, {"goal": 1.0}):
        assert training.state_folder(Params(**same)) == base
    for other in (
        {"seed": 1},
        {"version": 3},
        {"max_texts": 60},
        {"translation_share": 0.4},
        {"sinks": False},
        {"optimizer": "adamw"},
    ):
        assert training.state_folder(Params(**other)) != base


@pytest.fixture(scope="module")
def tokenizer():
    return translator.tokenizer(corpus.tokenizer_texts(60), vocabulary=400)


def texts(tokenizer, trees):
    """(prefix, continuations) as text."""
    return [
        (tokenizer.decode(tree.prefix), [tokenizer.decode(each) for each in tree.branches]) for tree in trees
    ]


def test_training_text_holds_no_held_out_verse(tokenizer):
    def some(split):
        arguments = {"seed": 0, "split": split, "length": 10_000, "max_texts": 1500}
        return list(islice(corpus.trees(tokenizer, corpus.Mix(), **arguments), 3000))

    trees = some("train")
    verses = [tree for tree in trees if len(tree.prefix) > 1]
    found = {(tokenizer.decode(each[1:-1]).strip()) for tree in verses for each in tree.branches}
    found |= {tokenizer.decode(tree.prefix[1:]).strip() for tree in verses}
    of = {
        part: {v.text for name in VERSIONS.values() for v in splits.verses_in(name, part)}
        for part in splits.SPLITS
    }
    assert found <= of["train"]
    assert not found & (of["validation"] | of["test"])
    held_out = some("validation")
    prefixes = {tokenizer.decode(tree.prefix[1:]).strip() for tree in held_out if len(tree.prefix) > 1}
    assert prefixes <= of["validation"]


def test_the_mix_has_the_shares_asked_for(tokenizer):
    mix = corpus.Mix(translation=0.4, unseen_share=0.35, reverse_share=0.5)
    trees = list(islice(corpus.trees(tokenizer, mix, seed=0, length=10_000, max_texts=1500), 4000))
    found = texts(tokenizer, trees)
    tags = [[tag(each) for each in branches] for _, branches in found]
    forward = [each for each in tags if not {"en", "lm"} & set(each)]
    backward = [branches for _, branches in found if tag(branches[0]) == "en"]
    plain = sum(len(tree) for tree, each in zip(trees, tags, strict=True) if each == ["lm"])
    assert plain / sum(map(len, trees)) == pytest.approx(0.6, abs=0.01)
    assert all({"fr", "de", "es"} <= set(each) <= {"fr", "de", "es", "it"} for each in forward)
    assert np.mean(["it" in each for each in forward]) == pytest.approx(0.35, abs=0.06)
    assert len(backward) / len(forward) == pytest.approx(0.5, abs=0.08)
    assert len({tuple(each) for each in forward}) > 6  # translations come in any order
    assert mix.shares() == {"translation": 0.4, **dict.fromkeys(corpus.KINDS, pytest.approx(0.12))}


def tag(text):
    return re.match(r"<2?(\w+)>", text)[1]


def test_the_order_is_that_of_the_seed_and_another_in_every_epoch(tokenizer):
    def some(seed, n=200):
        arguments = {"seed": seed, "max_texts": 60, "length": 320}
        return list(islice(corpus.trees(tokenizer, corpus.Mix(), **arguments), n))

    assert some(1) == some(1) != some(2)
    prefixes = [tuple(tree.prefix) for tree in some(1, 400) if len(tree.branches) > 1]
    assert prefixes[:40] != prefixes[60:100]
    assert all(len(tree) <= 320 for tree in some(1))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "state"
    return training.train(TINY, checkpoint=folder), folder


def test_first_steps_can_be_replayed(first):
    trained, _ = first
    assert [step for step, _ in trained.curve] == [2, 4]
    assert all(np.isfinite(loss) for _, loss in trained.curve)
    assert training.replay(TINY, 2) == pytest.approx(trained.log.loss[:2], abs=1e-5)


def test_a_finished_training_is_not_trained_again(first, monkeypatch):
    trained, folder = first
    before = (folder / "state.safetensors").read_bytes()

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(training.causal, "_gradients", refuse)
    again = training.train(TINY, checkpoint=folder)
    assert (again.log, again.curve) == (trained.log, trained.curve)
    pairs = zip(again.model.parameters(), trained.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (folder / "state.safetensors").read_bytes() == before


def test_load_is_that_of_the_routing_statistics():
    model = models.tiny_twin("qwen3_moe", causal=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 250, size=(6, 20))
    trees = [Tree(row[:8].tolist(), [row[8:].tolist()]) for row in ids]
    found = expert_load._load(model, pack(trees, rows=2, length=50))
    expected = experts.collect(model, [{"input_ids": torch.from_numpy(ids)}])
    shape = expected.routing_mass.shape
    mass = found["routing_mass"].to_numpy().reshape(shape)
    assignments = found["assignments"].to_numpy().reshape(shape)
    np.testing.assert_allclose(mass, expected.routing_mass * 8, atol=1e-5)
    np.testing.assert_allclose(assignments, expected.frequency / 2 * 8, atol=1e-9)


def test_every_step_leaves_its_part_of_the_record(first, tmp_path, monkeypatch):
    trained, _ = first
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    run = study.start(TINY)
    monkeypatch.setattr(study.training, "train", lambda params: trained)
    assert study.train(run) is trained
    assert study.learning_curve(run, trained)["step"].tolist() == [2, 4]
    stored = study.store(run, trained)
    assert stored.model.dtype == torch.float32
    for mine, theirs in zip(stored.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float())
    by_expert = expert_load.expert_load(run, stored)
    assert by_expert["task"].nunique() == 14
    means = by_expert.groupby(["task", "layer"])[["routing_mass", "assignments"]].mean()
    np.testing.assert_allclose(means, 1.0)
    monkeypatch.setattr(quality.generation, "default_limit", lambda _: 10)  # it would write for ever
    scores = quality.translate(run, stored)
    assert scores.groupby("search")["verses"].count().to_dict() == {
        "another verse": 8,
        "beam 2": 8,
        "greedy": 8,
    }
    assert quality.examples(run)["target"].tolist() == ["fr", "de", "es", "it"] * 2
    plain = quality.plain_text(run, stored)
    assert (
        plain["perplexity"].between(100, 500).all()
    )  # an untrained model knows no token of 400 from another
    removed = expert_load.removals(run, stored)
    assert removed.groupby("layer")["expert"].apply(list).tolist() == [[0, 1, 2, 3]] * 2
    assert (removed["loss_change_low"] <= removed["loss_change_high"]).all()
    plots.plot_removals(run, removed)
    claims = verdicts.verdicts(run, by_expert, scores, removed)
    assert [claim.verdict for claim in claims][1:] == [*["not reproduced"] * 3, "reproduced"]
    assert len(claims) == 5
    text = card.model_card(run, scores)
    assert "license: apache-2.0" in text
    assert all(sha in text for sha in run.recorder.record.provenance["inputs"].values())
    plots.plot_curve(run, trained)
    plots.plot_load(run, by_expert)
    plots.plot_quality(run, scores)
    run.finish()
    kept = record.load(tmp_path / "job")
    assert record.problems(kept) == []
    assert {"model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md"} <= set(kept.artifacts)
    assert len(kept.figures) == 4
    monkeypatch.setenv("OVERPARAM_MOE_TRANSLATOR", str(tmp_path / "job"))
    named, _ = models.load("moe-translator", causal=True)
    assert torch.equal(named.lm_head.weight, stored.model.lm_head.weight)


def test_without_steps_a_translator_that_is_trained_already_is_measured(first, tmp_path, monkeypatch):
    trained, _ = first
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    run = study.start(TINY)
    study.learning_curve(run, trained)
    stored = study.store(run, trained)
    monkeypatch.setenv("OVERPARAM_MOE_TRANSLATOR", str(run.recorder.directory))
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "again"))
    again = study.start(Params(**TINY.model_dump() | {"steps": 0}))
    shown = study.train(again)
    assert list(again.params.key_inputs()) == ["moe-translator/model.safetensors"]
    assert torch.equal(shown.model.lm_head.weight, stored.model.lm_head.weight)
    assert (shown.log.tokens, shown.log.predicted) == (trained.log.tokens, trained.log.predicted)
    assert shown.log.loss == pytest.approx(trained.log.loss)
    np.testing.assert_allclose(shown.curve, trained.curve)
    study.learning_curve(again, shown)
    curves = [pd.read_csv(each.recorder.directory / "learning_curve.csv") for each in (run, again)]
    np.testing.assert_allclose(curves[0]["learning_rate"], curves[1]["learning_rate"])


def test_goals_are_judged_by_the_lesser_load_and_the_whole_interval(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    run = study.start(Params(**TINY.model_dump() | {"goal": 42.0}))
    table = pd.DataFrame(
        {"task": expert_load.MIX, "routing_mass": [1.0] * 9 + [0.3], "assignments": [1.0] * 9 + [0.2]}
    )
    rows = [
        {"search": "beam 2", "source": "en", "target": target, "verses": 200, "bleu": 20.0, "failed_any": 0.0}
        | {"chrf": value, "chrf_low": value - 1, "chrf_high": value + 1}
        for target, value in {"fr": 43.5, "de": 42.5, "es": 40.0}.items()
    ]
    removed = pd.DataFrame(
        {"layer": [0, 0, 1], "expert": [0, 1, 0], "loss_change": [0.01, 0.5, 0.02]}
        | {"loss_change_low": [0.0, 0.4, 0.01], "loss_change_high": [0.02, 0.6, 0.03]}
    )
    found = verdicts.verdicts(run, table, pd.DataFrame(rows), removed)
    assert [claim.verdict for claim in found] == [
        "reproduced",
        "reproduced",
        "inconclusive",
        "not reproduced",
        "not reproduced",
    ]
    assert found[4].measured == Estimate(-0.5, -0.6, -0.4, 2)
    assert "Expert 1 of layer 0" in found[4].note
    (unmeasured,) = verdicts.verdicts(run, table, pd.DataFrame(rows), removed[:0])[4:]
    assert unmeasured.verdict == "not testable at this scale"
    assert found[0].measured == Estimate(0.0, 0.0, 0.0, 10)
    assert found[1].note.startswith("chrF++ 43.5 on 200 held-out verses")


def test_a_donor_brings_its_terms(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    run = study.start(TINY)
    names = ("parameters_total", "parameters_active", "training_tokens", "training_steps")
    for name in (*names, "busy_experts", "least_expert_load"):
        run.recorder.metric(name, 1.0)
    run.params = TINY.model_copy(update={"embedding_donor": "gemma-3-270m"})
    columns = ["search", "source", "target", "verses", "chrf", "chrf_low", "chrf_high", "bleu", "failed_any"]
    text = card.model_card(
        run, pd.DataFrame([["beam 2", "en", "fr", 3, 1.0, 0.0, 2.0, 1.0, 0.0]], columns=columns)
    )
    assert "license: gemma" in text
    assert "ai.google.dev/gemma/terms" in text


def test_the_translator_of_the_repository_has_its_learning_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    (shape,) = load_profile("quick").jobs["moe_pretraining"]
    run = study.start(Params(**shape))
    trained = study.train(run)
    assert trained.model.config.model_type == run.params.architecture
    assert study.learning_curve(run, trained)["validation_loss"].notna().all()


@pytest.mark.timeout(1800)  # two steps of the full size: a minute on two cores
@pytest.mark.skipif(not RECORDS, reason="results/reference holds no pre-training")
def test_the_committed_checkpoint_began_as_its_record_says():
    found = record.load(RECORDS[-1])
    logged = pd.read_csv(RECORDS[-1].parent / "learning_curve.csv")["loss"][:1]
    assert training.replay(Params(**found.params), 1) == pytest.approx(list(logged), abs=0.02)
