import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import rankdata, spearmanr

from overparam.compress.exits import Exits
from overparam.evaluate import topics
from overparam.record import record
from overparam.studies.adaptive_depth import FULL, LABELS, Params, bounds, decoders, study, timing

TINY = Params(
    model="tiny-bert", small=None, tasks=("ReutersR8",), pool=400, calibration=0.5, resplits=60,
    alphas=(0.02, 0.05), alpha=0.05, timed_texts=3, timed_batch=4, repeats=2, decoder=None, translator=None,
)  # fmt: skip
LAYERS, CLASSES = 6, 4


@pytest.fixture(autouse=True)
def no_runner(monkeypatch):
    for name in ("JOB_DIR", "JOB_KEY", "COMMAND", "PROGRESS", "PROFILE"):
        monkeypatch.delenv(f"OVERPARAM_{name}", raising=False)


@pytest.fixture
def started(tmp_path):
    """A study whose exits are made up: every text has a layer from which on its class is right and sure."""
    draw = np.random.default_rng(0)
    n = TINY.pool
    labels = draw.integers(CLASSES, size=n)
    hard = draw.integers(LAYERS - 1, size=n)
    sharp = np.where(np.arange(LAYERS) >= hard[:, None], 6.0, 0.5)[:, :, None]
    guess = draw.integers(CLASSES, size=(n, LAYERS))
    says = np.where(np.arange(LAYERS) >= hard[:, None], labels[:, None], guess)
    logits = (sharp * np.eye(CLASSES)[says]).astype(np.float32)
    texts = [" ".join(["word"] * 5 + [f"rare{i}"] * int(h)) for i, h in enumerate(hard)]
    exits = Exits(
        torch.zeros(LAYERS, 2, CLASSES), torch.zeros(LAYERS, CLASSES), tuple(range(CLASSES)), "made up"
    )
    table = np.zeros((LAYERS, 5))
    case = study.Case(
        exits, dict.fromkeys((LABELS, FULL), logits), dict.fromkeys((LABELS, FULL), table), texts, labels
    )
    recorder = record.start("adaptive_depth", {"model": "tiny"}, slug="tiny", directory=tmp_path)
    return study.Study(TINY, recorder, {}, {("tiny-bert", "ReutersR8"): case}), hard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.03}, "alpha must be among alphas"),
        (
            {"pool": 100, "calibration": 0.5},
            "50 of 100 texts calibrate, which allows no alpha below 0.0450, got 0.01",
        ),
        ({"alphas": (0.0, 0.01)}, "greater than 0"),
        ({"delta": 1.0}, "less than 1"),
        ({"delta": 0.0}, "greater than 0"),
        ({"tasks": ()}, "at least 1 item"),
        ({"tasks": ("ReutersR9",)}, "'ReutersR9' is not"),
        ({"timed_savings": (0.5, 0.25)}, "must increase"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_a_model_without_a_stack_is_refused(monkeypatch):
    from transformers import AlbertConfig, AlbertModel

    small = AlbertConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9, embedding_size=8
    )
    monkeypatch.setattr(study, "texts_of", lambda *_: None)
    monkeypatch.setattr(study.models, "load", lambda *_, **__: (AlbertModel(small), None))
    with pytest.raises(ValueError, match="no single stack of blocks"):
        study.start(TINY)


def test_sure_texts_leave_as_soon_as_they_are_right(started):
    made, hard = started
    table = bounds.saved(made, pd.DataFrame())
    sure = table[
        (table["rule"] == "probability") & (table["teaching"] == LABELS) & (table["risk_of"] == "newly wrong")
    ]
    assert (sure["risk"] == 0).all()
    np.testing.assert_allclose(sure["saved"], 100 * (1 - (hard + 1).mean() / LAYERS), atol=3)
    judged = sure[(sure["method"] == "ltt") & (sure["alpha"] == 0.05)].iloc[0]
    assert judged["judged_low"] <= judged["judged"] <= judged["judged_high"]
    fixed = table[table["rule"] == bounds.FIXED]
    assert (fixed["saved"] < sure["saved"].min()).all()
    assert (
        table[table["method"] == "crc"]["risk"] <= 100 * table[table["method"] == "crc"]["alpha"] + 0.5
    ).all()


def test_halves_share_no_text_and_every_split_is_another(started):
    made, _ = started
    split = bounds.halves(made)
    assert split.calibrates.shape == (60, 400)
    assert (split.calibrates.sum(1) == split.n).all()
    assert len(np.unique(split.calibrates, axis=0)) == 60
    assert not split.calibrates[0][split.test].any()


def test_controls_of_the_same_mean_depth_lose_more_where_texts_differ(started):
    made, _ = started
    row = bounds.controls(made, pd.DataFrame()).iloc[0]
    assert row["saved"] > 30
    assert row["lost"] == 0
    assert row["fixed_low"] > 0
    assert row["random_low"] > 0
    points = bounds.curves(made, pd.DataFrame())
    assert set(points["system"]) >= {bounds.FIXED, bounds.RANDOM, bounds.SHUFFLED, bounds.ORACLE, "patience"}
    best = points[points["system"] == bounds.ORACLE]["saved"].iloc[0]
    free = points[(points["lost"] == 0) & points["system"].isin(["probability"])]["saved"].max()
    assert free <= best + 1e-9


def test_harder_texts_stay_longer(started, monkeypatch):
    made, hard = started
    found = topics.Topics(
        "ReutersR8", tuple("abcd"), ["word word"] * 40, np.arange(40) % 4, [], [], np.zeros(0, int)
    )
    monkeypatch.setattr(bounds, "texts_of", lambda *_: found)
    table = bounds.difficulty(made, pd.DataFrame()).set_index("measure")
    assert table.loc["words", "rho_low"] > 0.5
    assert table.loc["words", "fifth_5"] > table.loc["words", "fifth_1"]
    first = bounds.examples(made, pd.DataFrame())
    assert first["layers"].tolist() == sorted(first["layers"][:5]) + sorted(first["layers"][5:], reverse=True)
    assert first["layers"][4] < first["layers"][5]
    assert len(hard) == 400


def test_partial_correlation_is_that_of_residuals_of_ranks():
    draw = np.random.default_rng(4)
    z = draw.normal(size=200)
    x, y = z + draw.normal(size=200), z + draw.normal(size=200)
    ranks = [rankdata(each) for each in (x, y, z)]
    rest = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    assert bounds.partial_spearman(x, y, z) == pytest.approx(np.corrcoef(rest)[0, 1])
    assert bounds.partial_spearman(x, y, draw.normal(size=200)) == pytest.approx(spearmanr(x, y)[0], abs=0.1)
    assert bounds.partial_spearman(np.ones(200), y, z) == 0


def test_time_saved_by_hand():
    found = timing._saved(np.array([2.0, 2.0]), np.array([1.0, 1.0]), np.array([0.25, 0.25]), 0)
    assert found["time_saved"] == found["time_saved_low"] == 50
    assert found["layers_saved"] == 75
    assert found["ratio"] == pytest.approx(2 / 3)
    assert "ratio" not in timing._saved(np.ones(2), np.ones(2), np.ones(2), 0)


@pytest.mark.parametrize(("chance", "drafts"), [(0.0, 3), (0.4, 2), (1.0, 4)])
def test_the_chance_of_a_draft_is_found_from_the_number_accepted(chance, drafts):
    accepted = sum(chance**number for number in range(1, drafts + 1))
    assert decoders.accepted_chance(accepted, drafts) == pytest.approx(chance, abs=1e-6)
