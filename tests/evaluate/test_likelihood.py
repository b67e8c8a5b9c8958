import math
import random

import numpy as np
import pytest
import torch

from overparam import models
from overparam.evaluate.likelihood import negative_log_likelihood, perplexity
from overparam.record import stats


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(0)
    words = ["den", "Anfang", "schuf", "Gott", "日", "é"]
    made = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(24)]
    return [f"{text}<2de>" for text in made[:12]], made[12:]


def plain(model, ids, start):
    """One sequence, all logits, one log-softmax."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "qwen3"])
def test_scores_are_those_of_one_sequence_after_the_other(model_type, pairs):
    overrides = {"final_logit_softcapping": 0.05} if model_type == "gemma3" else {}
    model = models.tiny_twin(model_type, causal=True, **overrides)
    tokenizer = models.tiny_tokenizer()
    items = negative_log_likelihood(model, tokenizer, *pairs, batch_tokens=200)
    assert items.shape == (12, 2)
    assert items.dtype == np.float64
    for prompt, target, (loss, count) in zip(*pairs, items, strict=True):
        first = tokenizer(prompt).input_ids
        ids = [*first, *tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert first[0] == tokenizer.bos_token_id
        assert count == len(ids) - len(first)
        assert loss == pytest.approx(plain(model, ids, len(first)), rel=1e-5)


def test_padding_and_batches_change_nothing(pairs):
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    alone = negative_log_likelihood(model, tokenizer, *pairs, batch_tokens=1)
    together = negative_log_likelihood(model, tokenizer, *pairs, batch_tokens=100_000)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_the_head_sees_target_places_only(pairs):
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda _, args, output: seen.append(output.shape[:-1].numel())
    )
    items = negative_log_likelihood(model, tokenizer, *pairs)
    handle.remove()
    assert sum(seen) == items[:, 1].sum()
    # and afterwards the model is what it was
    assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.shape[:2] == (1, 3)
    assert not model.lm_head._forward_pre_hooks


def test_perplexity_scores_all_tokens_but_the_first(pairs):
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    items = perplexity(model, tokenizer, pairs[1], max_length=20)
    for text, (loss, count) in zip(pairs[1], items, strict=True):
        ids = tokenizer(text).input_ids[:20]
        assert count == len(ids) - 1
        assert loss == pytest.approx(plain(model, ids, 1), rel=1e-5)
    mean = items[:, 0].sum() / items[:, 1].sum()
    assert stats.bootstrap(items, statistic="nll_per_token", n_resamples=50).value == pytest.approx(mean)
    estimate = stats.bootstrap(items, statistic="perplexity", n_resamples=50)
    assert estimate.value == pytest.approx(math.exp(mean))
    assert estimate.low < estimate.value < estimate.high


def test_a_prefix_is_read_and_not_scored(pairs):
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    items = perplexity(model, tokenizer, pairs[1], prefix="lm: ")
    for text, (loss, count) in zip(pairs[1], items, strict=True):
        ids = tokenizer(f"lm: {text}").input_ids
        start = len(tokenizer("lm: ").input_ids)
        assert count == len(ids) - start
        assert loss == pytest.approx(plain(model, ids, start), rel=1e-5)


def test_bad_input_is_named(pairs):
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    with pytest.raises(ValueError, match="equal in number, at least 1, got 2 and 1"):
        negative_log_likelihood(model, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="at least 1, got 0 and 0"):
        negative_log_likelihood(model, tokenizer, [], [])
    with pytest.raises(ValueError, match="1 of 2 targets are empty, the first at index 1"):
        negative_log_likelihood(model, tokenizer, ["a", "b"], ["c", ""])
    with pytest.raises(ValueError, match="no texts"):
        perplexity(model, tokenizer, [])
    with pytest.raises(ValueError, match="text 1 has fewer than two tokens"):
        perplexity(model, tokenizer, ["a", ""])
    broken = models.tiny_twin("llama", causal=True)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        negative_log_likelihood(broken, tokenizer, *pairs)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        negative_log_likelihood(model, tokenizer, *pairs)
