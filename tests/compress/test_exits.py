import numpy as np
import pytest
import torch
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression

from overparam import models
from overparam.compress import depth, exits
from overparam.compress.exits import heads
from overparam.models.proof import NotExactError

TEXTS = [f"{word} {number} of the things that are here{' and there' * (number % 4)}"
         for number in range(30) for word in ("red", "blue")]  # fmt: skip
LABELS = ["red" if text.startswith("red") else "blue" for text in TEXTS]


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def encoder(request):
    model, tokenizer = models.tiny_twin(request.param), models.tiny_tokenizer()
    return model.eval(), tokenizer, depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")


@pytest.fixture(scope="module")
def fitted(encoder):
    model, _, states = encoder
    return exits.fit(states, LABELS, of=model)


def batch(tokenizer, texts=TEXTS):
    found = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def with_threshold(found, threshold):
    return heads.replace(found, threshold=threshold)


def test_regressions_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 60, 5)).astype(np.float32) * [[[3.0]], [[0.2]]]
    y = draw.integers(3, size=60)
    targets = torch.nn.functional.one_hot(torch.tensor(y), 3).float()
    weights, biases = heads.regressions(torch.tensor(x).float(), targets, torch.tensor([0.1, 0.01]))
    for k, strength in enumerate((0.1, 0.01)):
        z = (x[k] - x[k].mean(0)) / x[k].std(0)
        other = LogisticRegression(C=1 / (strength * 60), tol=1e-8, max_iter=5000).fit(z, y)
        mine = (torch.tensor(x[k]).float() @ weights[k] + biases[k]).softmax(-1)
        np.testing.assert_allclose(mine, other.predict_proba(z), atol=2e-3)


@pytest.mark.parametrize("rule", exits.RULES)
@pytest.mark.parametrize("regroup", [True, False])
def test_a_run_that_stops_gives_what_full_passes_give(encoder, fitted, rule, regroup):
    model, tokenizer, states = encoder
    found = fitted.with_rule(rule, states)
    logits = found.logits(states)
    sure = exits.confidences(logits, rule, found.learned)
    for threshold in np.quantile(sure[:, :-1], (0.3, 0.8)):
        ran = with_threshold(found, float(threshold) + 1e-6).run(model, batch(tokenizer), regroup=regroup)
        left = exits.leave(sure, float(threshold) + 1e-6)
        near = np.abs(sure - threshold).min(1) < 1e-4  # rounding may decide there
        np.testing.assert_array_equal(ran.depths[~near], left[~near] + 1)
        classes = logits[np.arange(len(left)), left].argmax(-1)
        assert [ran.classes[i] == found.classes[classes[i]] for i in np.flatnonzero(~near)].count(False) == 0
    plain = model(**batch(tokenizer, TEXTS[:3])).last_hidden_state
    assert plain.shape[0] == 3  # the model is as it was


def test_blocks_that_are_not_needed_are_not_computed(encoder, fitted):
    model, tokenizer, _ = encoder
    seen = []
    layers = models.blocks(model).layers
    handles = [
        each.register_forward_hook(lambda _, a, __, k=k: seen.append((k, len(a[0]))))
        for k, each in enumerate(layers)
    ]
    try:
        ran = with_threshold(fitted, 0.0).run(model, batch(tokenizer))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [(0, len(TEXTS))]
    assert set(ran.depths) == {1}


def test_openvino_blocks_give_the_same(fitted, encoder):
    model, tokenizer, states = encoder
    if model.config.model_type == "modernbert":
        with pytest.raises(NotExactError, match="run it in PyTorch"):
            exits.Segments(model)
        return
    segments = exits.Segments(model)
    middle = float(np.median(exits.confidences(fitted.logits(states), "probability")[:, 0]))
    for regroup in (True, False):
        found = with_threshold(fitted, middle)
        one, other = (found.run(each, batch(tokenizer), regroup=regroup) for each in (model, segments))
        assert (one.depths == other.depths).mean() > 0.95
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=0.05)
    full = fitted.run(segments, batch(tokenizer))
    assert set(full.depths) == {len(models.blocks(model).layers)}


def test_exits_are_saved_and_loaded_exactly(encoder, fitted, tmp_path):
    model, tokenizer, states = encoder
    for found in (fitted, with_threshold(fitted.with_rule("learned", states), 0.7)):
        again = exits.load(found.save(tmp_path / "exits"))
        assert again.classes == found.classes
        one, other = (each.run(model, batch(tokenizer)) for each in (found, again))
        np.testing.assert_array_equal(one.depths, other.depths)
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    with pytest.raises(FileNotFoundError, match="no exits in"):
        exits.load(tmp_path / "nothing")


def test_distilled_exits_keep_the_full_model_and_follow_it(encoder, fitted):
    _, _, states = encoder
    taught = exits.distilled(fitted, states)
    np.testing.assert_allclose(taught.logits(states)[:, -1], fitted.logits(states)[:, -1], atol=1e-5)
    agree = [
        (e.logits(states).argmax(-1) == fitted.logits(states)[:, -1:].argmax(-1)).mean()
        for e in (taught, fitted)
    ]
    assert agree[0] >= agree[1] - 0.05


def test_bad_exits_are_refused(encoder, fitted):
    model, tokenizer, states = encoder
    with pytest.raises(ValueError, match="at least 2 classes, got 60 of \\['red'\\]"):
        exits.fit(states, ["red"] * 60, of=model)
    with pytest.raises(ValueError, match=r"states must be \[texts, layers \+ 1, hidden\]"):
        exits.fit(states[:, 1:], LABELS, of=model)
    with pytest.raises(ValueError, match="not trained on \\['green'\\]"):
        fitted.calibrated(states, ["green"] * 60, alpha=0.2)
    with pytest.raises(ValueError, match="other weights"):
        fitted.run(models.tiny_twin(model.config.model_type, seed=7), batch(tokenizer))
    wide = models.tiny_twin(model.config.model_type, num_hidden_layers=len(models.blocks(model).layers) + 1)
    with pytest.raises(ValueError, match="these exits are of a model of"):
        fitted.run(wide, batch(tokenizer))
    with pytest.raises(ValueError, match="width"):
        fitted.logits(states[:, :, :-1])
    with pytest.raises(ValueError, match="rule must be one of"):
        fitted.with_rule("hope")
    with pytest.raises(ValueError, match="'learned' needs states"):
        fitted.with_rule("learned")


def test_a_model_that_cannot_be_stopped_is_refused():
    from transformers import AlbertConfig, AlbertModel

    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 50,
        "embedding_size": 8,
    }
    albert = AlbertModel(AlbertConfig(**sizes))
    with pytest.raises(ValueError, match="no single stack of blocks"):
        exits.fit(np.zeros((2, 2, 8)), [0, 1], of=albert)


def test_thresholds_that_never_fire_are_said(encoder, fitted):
    _, _, states = encoder
    wrong = [{"red": "blue", "blue": "red"}[label] for label in LABELS]
    with pytest.warns(UserWarning, match="every text runs at full depth"):
        found = heads.replace(fitted, rule="patience").calibrated(
            np.random.default_rng(0).normal(size=states.shape).astype(np.float32),
            wrong,
            alpha=0.05,
            risk="disagreement",
        )
    assert found.threshold == float("inf")


def test_rules_by_hand():
    logits = np.log([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.1, 0.9, 1e-9]]])
    assert exits.confidences(logits, "probability")[0].round(3).tolist() == [0.5, 0.8, 0.9]
    assert exits.confidences(logits, "margin")[0].round(3).tolist() == [0.2, 0.7, 0.8]
    assert exits.confidences(logits, "patience")[0].tolist() == [1 / 3, 1 / 3, 2 / 3]
    entropy = -(np.array([0.5, 0.3, 0.2]) * np.log([0.5, 0.3, 0.2])).sum() / np.log(3)
    assert exits.confidences(logits, "entropy")[0, 0] == pytest.approx(1 - entropy)
    assert exits.leave(exits.confidences(logits, "probability"), [np.inf, 0.85, 0.6, 0.1]).T.tolist() == [
        [2, 2, 1, 0]
    ]


def test_the_learned_rule_knows_when_exits_agree():
    draw = np.random.default_rng(1)
    full = draw.integers(2, size=400)
    sharp = np.where(draw.random(400) < 0.5, 4.0, 0.1)  # sure exits agree, others guess
    says = np.where(sharp > 1, full, draw.integers(2, size=400))
    early = sharp[:, None] * np.eye(2)[says]
    logits = np.stack([early, 9 * np.eye(2)[full]], axis=1)
    table = exits.predictor(logits)
    sure = exits.confidences(logits, "learned", table)
    agrees = says == full
    assert sure[agrees, 0].mean() > sure[~agrees, 0].mean() + 0.2
    assert (sure[:, 1] > 0.99).all()


def test_fixed_oracle_and_losses_by_hand():
    predicted, labels = np.array([[0, 1, 1], [2, 2, 2], [1, 1, 0]]), [1, 0, 0]
    newly = exits.losses(predicted, labels, "newly wrong")
    assert newly.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert exits.losses(predicted, None, "disagreement").tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert exits.oracle(newly).tolist() == [1, 0, 2]
    assert exits.fixed(newly, 0.25).tolist() == [0.75, 0, 1]
    with pytest.raises(ValueError, match="needs labels"):
        exits.losses(predicted, None, "newly wrong")


def test_learn_then_test_is_the_exact_binomial_test_in_order():
    n, alpha, delta = 300, 0.05, 0.1
    counts = [0, 3, 8, 9, 20, 4]
    table = np.zeros((len(counts), n))
    for row, count in zip(table, counts, strict=True):
        row[:count] = 1
    upper = [beta.ppf(1 - delta, count + 1, n - count) for count in counts]  # Clopper–Pearson
    first_bad = next(k for k, bound in enumerate(upper) if bound > alpha)
    assert exits.calibrate(table, alpha=alpha, delta=delta, method="ltt") == first_bad - 1 < 4


def test_risk_control_is_its_formula_and_keeps_the_mean_risk():
    draw = np.random.default_rng(2)
    table = np.zeros((3, 99))
    table[1, :3], table[2, :5] = 1, 1
    assert exits.calibrate(table, alpha=0.05, method="crc") == 1  # (3 + 1) / 100
    assert exits.calibrate(table, alpha=0.06, method="crc") == 2
    loses_from = draw.integers(1, 40, size=4000)  # losses that grow with the threshold's position
    every = (np.arange(40)[:, None] >= loses_from).astype(float)
    found, risks, share = [], [], []
    for _ in range(300):
        chosen = draw.permutation(4000)[:100]
        rest = np.setdiff1d(np.arange(4000), chosen)
        at = exits.calibrate(every[:, chosen], alpha=0.1, method="crc")
        risks.append(every[at, rest].mean())
        strict = exits.calibrate(every[:, chosen], alpha=0.1, delta=0.1, method="ltt")
        share.append(every[strict, rest].mean() > 0.1)
        found.append(at >= strict)
    assert np.mean(risks) <= 0.1 + 2 * np.std(risks) / np.sqrt(300)
    assert np.mean(share) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 300)
    assert all(found)


def test_many_sets_are_calibrated_at_once_as_one_by_one():
    draw = np.random.default_rng(3)
    table = np.maximum.accumulate(np.vstack([np.zeros(80), draw.random((6, 80)) < 0.05]), axis=0).astype(
        float
    )
    masks = np.stack([draw.permutation(80) < 50 for _ in range(8)])
    for method in exits.METHODS:
        together = exits.positions(table @ masks.T, 50, alpha=0.1, delta=0.2, method=method)
        alone = [exits.calibrate(table[:, mask], alpha=0.1, delta=0.2, method=method) for mask in masks]
        assert together.tolist() == alone


def test_risks_grow_as_thresholds_fall():
    left = np.array([[2, 2], [1, 2], [0, 1]])
    losses = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert exits.risks(left, losses).tolist() == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.001}, "needs more than the 200 texts .* smallest alpha that ltt allows is 0.0114"),
        ({"alpha": 0.001, "method": "crc"}, "smallest alpha that crc allows is 0.0050"),
        ({"alpha": 1.5}, "alpha must lie between 0 and 1"),
        ({"alpha": 0.0}, "alpha must lie between 0 and 1"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
        ({"method": "luck"}, "method must be one of"),
    ],
)
def test_bad_calibrations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exits.calibrate(np.zeros((3, 200)), **{"alpha": 0.05, **change})


def test_losses_that_no_test_is_exact_for_are_refused():
    with pytest.raises(ValueError, match="use method='crc'"):
        exits.calibrate(np.full((2, 99), 0.5), alpha=0.9)
    with pytest.raises(ValueError, match="must lose nothing"):
        exits.calibrate(np.ones((2, 99)), alpha=0.1, method="crc")


@pytest.fixture(scope="module")
def decoder():
    return models.tiny_twin("llama", causal=True, num_hidden_layers=4).eval()


def test_every_depth_reads_what_the_truncated_model_would_write(decoder):
    ids = list(range(5, 25))
    found = exits.next_tokens(decoder, ids)
    for layers in (1, 3, 4):
        inner = depth.truncated(decoder.get_decoder(), layers) if layers < 4 else decoder.get_decoder()
        with torch.no_grad():
            expected = decoder.lm_head(inner(input_ids=torch.tensor([ids])).last_hidden_state)[0].argmax(-1)
        assert found[:, layers - 1].tolist() == expected.tolist()


def test_self_speculation_writes_what_greedy_decoding_writes(decoder):
    ended = 0
    for start in range(12):
        ids = list(range(4 + start, 14 + start))
        free = exits.decode(decoder, ids, new_tokens=12, ends=[2])
        ends = [free.tokens[min(5, len(free.tokens) - 1)], 2]  # a token that it does write
        plain = exits.decode(decoder, ids, new_tokens=12, ends=ends)
        for layers in (1, 3):
            early = exits.decode(decoder, ids, new_tokens=12, ends=ends, draft_layers=layers, drafts=3)
            assert early.tokens == plain.tokens
            assert early.rounds <= plain.rounds + 1
        ended += plain.tokens[-1] in ends
    assert ended == 12
    assert decoder.config.num_hidden_layers == 4


def test_speculation_leaves_the_model_as_it_was_also_after_an_error(decoder, monkeypatch):
    own = decoder.generation_config
    monkeypatch.setattr(decoder, "generate", lambda *_, **__: 1 / 0)
    decoder.config.num_hidden_layers = 4
    with pytest.raises(ZeroDivisionError):
        exits.decode(decoder, [5, 6, 7], new_tokens=3, ends=[2], draft_layers=2)
    assert decoder.generation_config is own
    with pytest.raises(ValueError, match=r"draft_layers must be in 1\.\.3, got 4"):
        exits.decode(decoder, [5, 6, 7], new_tokens=3, ends=[2], draft_layers=4)


def test_the_ceiling_of_speculation_by_hand():
    assert exits.ceiling(18, 6, 168 / (18 * 5.57 + 168), drafts=5) == pytest.approx(1.26, abs=0.01)
    assert exits.ceiling(10, 5, 0.0, drafts=1, acceptance=0.0) == pytest.approx(1 / 1.5)
