import itertools

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from overparam import models
from overparam.compress.distill import encoders
from overparam.compress.distill.classifier import UNLABELLED, train_classifier
from overparam.compress.distill.embedding import distill_embeddings
from overparam.train import distillation as training
from overparam.train.distillation import Recipe, fit

TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(("red", "blue"), ("car", "boat", "house"), "abcd")]


@pytest.fixture
def encoder():
    model, tokenizer = models.tiny_twin("bert"), models.tiny_tokenizer()
    return encoders.as_encoder(model, tokenizer, width=24, max_length=16, seed=1)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def toy(model, inputs, bad=None):
    calls = itertools.count(1)

    def loss(rows):
        value = (model(inputs[torch.from_numpy(rows)]) - 1).square().mean()
        return value * float("nan") if next(calls) == bad else value

    return loss


INPUTS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(steps=12, batch_size=8, learning_rate=0.05, warmup=2)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [RECIPE.rate(step) for step in range(12)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == rates[1] == pytest.approx(0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.005)


def test_batches_hold_every_text_once_an_epoch_and_texts_of_similar_length():
    lengths = list(range(100)) * 10
    stream = training.batches(lengths, 20, seed=0)
    epoch = [next(stream) for _ in range(50)]
    assert sorted(np.concatenate(epoch).tolist()) == list(range(1000))
    spread = [np.ptp([lengths[row] for row in batch]) for batch in epoch]
    assert np.mean(spread) < 20  # of 99 in batches by chance
    second = [next(stream) for _ in range(50)]
    assert not np.array_equal(np.concatenate(epoch), np.concatenate(second))
    assert next(training.batches([3, 1], 20, seed=0)).tolist() in ([0, 1], [1, 0])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    states = []
    for _ in range(2):
        model = linear()
        before = torch.get_rng_state()
        log = fit(model, toy(model, INPUTS), [1] * 40, RECIPE)
        assert torch.get_rng_state().equal(before)
        states.append(weights(model))
        assert len(log.loss) == 12
        assert log.loss[-1] < log.loss[0]
    assert same(*states)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = linear()
    fit(whole, toy(whole, INPUTS), [1] * 40, RECIPE)
    killed = linear()
    with pytest.raises(FloatingPointError, match="step 9"):
        fit(killed, toy(killed, INPUTS, bad=9), [1] * 40, RECIPE, checkpoint=tmp_path / "state", every=4)
    resumed = linear()
    log = fit(resumed, toy(resumed, INPUTS), [1] * 40, RECIPE, checkpoint=tmp_path / "state", every=4)
    assert same(weights(resumed), weights(whole))
    assert len(log.loss) == 12
    again = linear()  # a finished training is taken from its checkpoint
    fit(again, toy(again, INPUTS, bad=1), [1] * 40, RECIPE, checkpoint=tmp_path / "state", every=4)
    assert same(weights(again), weights(whole))


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was():
    model, stopped = linear(), linear()
    short = Recipe(**{**RECIPE.__dict__, "steps": 12})
    with pytest.raises(FloatingPointError, match="nan at step 3"):
        fit(stopped, toy(stopped, INPUTS, bad=3), [1] * 40, short)
    values = []

    def first_two(rows):
        values.append(rows)
        if len(values) == 3:
            raise KeyboardInterrupt
        return (model(INPUTS[torch.from_numpy(rows)]) - 1).square().mean()

    with pytest.raises(KeyboardInterrupt):
        fit(model, first_two, [1] * 40, short)
    assert same(weights(model), weights(stopped))
    assert not stopped.training


def test_nothing_to_train_on_is_named():
    model = linear()
    with pytest.raises(ValueError, match="no texts"):
        fit(model, toy(model, INPUTS), [], RECIPE)


def test_an_encoder_is_mean_pooling_projection_and_unit_length(encoder, tmp_path):
    found = encoders.outputs(encoder, TEXTS[:3])
    assert found.shape == (3, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    transformer, tokenizer = encoders.transformer(encoder), models.tiny_tokenizer()
    batch = tokenizer([TEXTS[0]], return_tensors="pt")
    with torch.no_grad():
        hidden = transformer(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state.mean(dim=1)
        expected = torch.nn.functional.normalize(encoder[2].linear(hidden), dim=1)
    np.testing.assert_allclose(found[:1], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoders.pooled(encoder, TEXTS[:1]), hidden.numpy(), atol=1e-5)
    encoder.save(str(tmp_path / "student"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    np.testing.assert_array_equal(encoders.outputs(again, TEXTS[:3]), found)


def test_a_student_of_the_teachers_width_has_no_projection():
    model, tokenizer = models.tiny_twin("bert"), models.tiny_tokenizer()
    plain = encoders.as_encoder(model, tokenizer, width=model.config.hidden_size, max_length=16)
    assert len(plain) == 3
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("objective", ["cosine", "relational", "both"])
def test_a_student_comes_nearer_to_its_teacher(encoder, objective):
    rng = np.random.default_rng(0)
    words = {word: rng.standard_normal(24) for word in " ".join(TEXTS).split()}
    targets = np.stack([sum(words[word] for word in text.split()) for text in TEXTS]).astype(np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)

    def distance():
        mine = encoders.outputs(encoder, TEXTS)
        if objective == "relational":
            off = ~np.eye(len(TEXTS), dtype=bool)
            return -np.corrcoef((mine @ mine.T)[off], (targets @ targets.T)[off])[0, 1]
        return 1 - (mine * targets).sum(axis=1).mean()

    before = distance()
    recipe = Recipe(steps=40, batch_size=12, learning_rate=3e-3, warmup=4)
    log = distill_embeddings(encoder, TEXTS, targets, recipe, objective=objective)
    assert np.mean(log.loss[-5:]) < np.mean(log.loss[:5])
    assert distance() < before - 0.1


def test_targets_of_another_width_are_refused(encoder):
    with pytest.raises(ValueError, match=r"\[24 texts, 24\], got \[24, 8\]"):
        distill_embeddings(encoder, TEXTS, np.zeros((24, 8), dtype=np.float32), RECIPE)
    broken = np.full((24, 24), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="finite"):
        distill_embeddings(encoder, TEXTS, broken, RECIPE)


LABELS = np.array([int(text.startswith("blue")) for text in TEXTS])


def test_a_classifier_learns_its_labels_and_does_not_touch_the_encoder(encoder):
    before = weights(encoder)
    model = encoders.as_classifier(encoder, 2, seed=0)
    train_classifier(model, TEXTS, LABELS, Recipe(steps=40, batch_size=12, learning_rate=3e-3, warmup=4))
    assert (encoders.outputs(model, TEXTS).argmax(axis=1) == LABELS).mean() > 0.9
    assert same(weights(encoder), before)


def test_a_student_learns_from_soft_targets_on_text_without_labels(encoder):
    teacher = np.stack([5.0 - 10 * LABELS, 10 * LABELS - 5.0], axis=1).astype(np.float32)
    labels = np.where(np.arange(len(TEXTS)) % 4 == 0, LABELS, UNLABELLED)
    model = encoders.as_classifier(encoder, 2, seed=0)
    recipe = Recipe(steps=40, batch_size=12, learning_rate=3e-3, warmup=4)
    states = np.random.default_rng(0).standard_normal((len(TEXTS), 6)).astype(np.float32)
    log = train_classifier(model, TEXTS, labels, recipe, teacher_logits=teacher, teacher_states=states)
    assert len(log.loss) == 40
    assert (encoders.outputs(model, TEXTS).argmax(axis=1) == LABELS).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS + 1}, r"one of 0\.\.1"),
        ({"labels": np.full(len(TEXTS), UNLABELLED)}, "some of them labelled"),
        ({"labels": LABELS[:3]}, "for each of 24 texts"),
        ({"labels": np.where(LABELS == 1, UNLABELLED, 0)}, "give teacher_logits"),
        ({"teacher_logits": np.zeros((len(TEXTS), 3), dtype=np.float32)}, "same 2 classes"),
        ({"teacher_states": np.zeros((2, 4), dtype=np.float32)}, "24 rows, one per text, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(encoder, change, message):
    model = encoders.as_classifier(encoder, 2)
    with pytest.raises(ValueError, match=message):
        train_classifier(model, TEXTS, change.pop("labels", LABELS), RECIPE, **change)


def test_one_class_is_no_classification(encoder):
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        encoders.as_classifier(encoder, 1)
