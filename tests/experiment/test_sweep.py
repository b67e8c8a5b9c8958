from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from overparam import models
from overparam.compress import quantize
from overparam.data.parallel import Pair
from overparam.evaluate import likelihood
from overparam.evaluate.embedding import bag_of_words
from overparam.evaluate.generation import Generation
from overparam.experiment import sweep
from overparam.experiment.subjects.base import Subject, System
from overparam.experiment.subjects.decoder import Decoder, Outcome
from overparam.experiment.subjects.encoder import Encoder
from overparam.experiment.subjects.translator import Translator
from overparam.record import stats

TEXTS = ["in the beginning was the word", "and the light shineth in darkness"]


class Hits(Subject):
    """Each run is the hits on two tasks."""

    task = "hits"
    scale = 100.0

    def scored(self, run):
        return {name: Outcome(items) for name, items in zip("ab", run, strict=True)}


@pytest.fixture
def study():
    kept = []
    recorder = SimpleNamespace(keep=lambda items, **columns: kept.append((len(items), columns)))
    return SimpleNamespace(recorder=recorder, kept=kept)


def hits(share, n=400):
    return [(np.arange(n) < share * n).astype(float)[:, None] for _ in "ab"]


def test_systems_are_compared_with_the_first_and_repeats_make_one_row(study):
    systems = [
        System.ready("whole", hits(0.8), columns={"share": 0.0}),
        System.ready("random", hits(0.6), columns={"share": 0.5}, repeat={"seed": 1}),
        System.ready("random", hits(0.2), columns={"share": 0.5}, repeat={"seed": 2}),
        System.ready("same", hits(0.8), columns={"share": 0.5}),
    ]
    found = sweep.sweep(study, Hits(), systems, margin=1.0)
    table = found.table.set_index("system")
    assert list(table) == [
        "share",
        "score",
        "kept",
        "kept_low",
        "kept_high",
        "n",
        "p_holm",
        "within_margin",
        "a",
        "b",
    ]
    assert table["score"].tolist() == pytest.approx([80, 40, 80])
    assert table["kept"].tolist() == pytest.approx([100, 50, 100])
    assert table["within_margin"].tolist() == [True, False, True]
    assert table.loc["random", "p_holm"] < 0.05 < table.loc["same", "p_holm"]
    assert set(found.kept) == {("random", 0.5), ("same", 0.5)}
    assert [columns["task"] for _, columns in study.kept] == ["hits: a"] * 4 + ["hits: b"] * 4
    assert study.kept[2] == (400, {"system": "random", "share": 0.5, "seed": 2, "task": "hits: a"})


def test_an_encoder_opens_one_system_at_a_time_and_widths_may_differ(study):
    opened = []

    @contextmanager
    def masked(width):
        opened.append(width)
        assert len(opened) == 1
        yield width
        opened.remove(width)

    encoder = Encoder(lambda width, texts: bag_of_words(texts)[:, 0, :width], ["LeeSTS"], 20, 42)
    systems = [System(f"{width} words", lambda width=width: masked(width)) for width in (4096, 512)]
    scores = sweep.score(study, encoder, systems)
    assert scores["4096 words",][0]["LeeSTS"].score == pytest.approx(encoder.floor()["LeeSTS"].score)
    assert scores["512 words",][0]["LeeSTS"].score != scores["4096 words",][0]["LeeSTS"].score
    assert np.linalg.norm(encoder.outputs(512, TEXTS), axis=1) == pytest.approx([1, 1])


def test_a_decoder_reads_as_a_plain_forward_does():
    model, tokenizer = models.load("tiny-llama", causal=True)
    decoder, run = Decoder(tokenizer, lambda: {"one": TEXTS[:1], "two": TEXTS[1:]}), quantize.steps_of(model)
    scores = decoder.scored(run)
    expected = likelihood.perplexity(model, tokenizer, TEXTS)
    np.testing.assert_allclose(np.concatenate([each.items for each in scores.values()]), expected, rtol=1e-5)
    assert decoder.points([scores], scores) == pytest.approx(float(stats.STATISTICS["perplexity"](expected)))
    assert decoder.joined().scored(run)["all texts"].items.shape == (2, 2)
    outputs = decoder.outputs(run, TEXTS)
    assert decoder.divergence(outputs, outputs).tolist() == [0, 0]
    assert (decoder.divergence(outputs, [each[:, ::-1] for each in outputs]) > 0).all()


def test_a_translator_that_writes_nothing_at_first_bounds_no_change():
    pairs = {"fr": [Pair("a", "the light", "la lumière du monde"), Pair("b", "the word", "la parole de vie")]}

    def write(run, asked):
        return {
            name: [Generation(pair.target[:run], [], True, 1) for pair in some]
            for name, some in asked.items()
        }

    translator = Translator(write, pairs)
    nothing, half, all_of_it = translator.score([System.ready(str(n), n) for n in (0, 9, 40)])
    assert translator.points([all_of_it], all_of_it) == pytest.approx(100)
    assert 0 < translator.kept([all_of_it], [half]).value < 100
    assert translator.kept([nothing], [half]).high == np.inf
