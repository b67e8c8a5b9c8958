import math
from collections import namedtuple

import numpy as np
import pytest
import torch

from overparam import models
from overparam.compress import depth
from overparam.compress.depth.selection import info_nce

Triplet = namedtuple("Triplet", "query positive negative")


def curve(values):
    mean = np.asarray(values, dtype=np.float64)
    return depth.LayerLoss(mean[None].repeat(4, 0), mean, mean, mean, seed=0, batch_size=2, scale=20.0)


@pytest.fixture
def triplets():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    return [Triplet(f"{w} one", f"{w} two", f"{w[::-1]} three") for w in words]


def test_info_nce_equals_cross_entropy():
    torch.manual_seed(0)
    q, p, n = (torch.nn.functional.normalize(torch.randn(3, 5, 8).double(), dim=-1) for _ in range(3))
    ours = info_nce(q, p, n, scale=20.0)
    for layer in range(3):
        logits = 20.0 * q[layer] @ torch.cat([p[layer], n[layer]]).T
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
        np.testing.assert_allclose(ours[:, layer], expected, rtol=1e-6)


def test_info_nce_closed_form():
    """Orthogonal documents: the loss is log(e^s + 2B − 1) − s."""
    eye = torch.eye(8)
    loss = info_nce(eye[None, :4], eye[None, :4], eye[None, 4:], scale=3.0)
    np.testing.assert_allclose(loss, math.log(math.exp(3.0) + 7) - 3.0)


def test_initial_loss_returns_the_whole_curve(triplets):
    model, tokenizer = models.tiny_twin("qwen3", num_hidden_layers=5), models.tiny_tokenizer()
    loss = depth.initial_loss(model, tokenizer, triplets, batch_size=5)
    assert loss.per_query.shape == (10, 6)
    assert (loss.low <= loss.mean).all()
    assert (loss.mean <= loss.high).all()
    again = depth.initial_loss(model, tokenizer, triplets, batch_size=5)
    np.testing.assert_array_equal(loss.mean, again.mean)
    with_prompt = depth.initial_loss(model, tokenizer, triplets, batch_size=5, instruction="Find:")
    assert np.abs(with_prompt.mean - loss.mean).max() > 1e-4


def test_last_small_batch_is_left_out(triplets):
    model, tokenizer = models.tiny_twin("llama"), models.tiny_tokenizer()
    assert depth.initial_loss(model, tokenizer, triplets, batch_size=4).n == 8


def test_too_few_triplets(triplets):
    with pytest.raises(ValueError, match="got 10"):
        depth.initial_loss(models.tiny_twin("llama"), models.tiny_tokenizer(), triplets, batch_size=64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # two valleys: depths 2 and 5 of 6
        ([9, 3, 1, 2, 3, 1.5, 2], depth.Cuts(2, 5, True, True)),
        # monotone: only edges
        ([9, 8, 7, 6, 5, 4, 3], depth.Cuts(3, 6, False, False)),
        # ties go to the shallower depth
        ([9, 3, 1, 1, 3, 2, 2], depth.Cuts(2, 5, False, False)),
        # odd number of blocks: the first half is the smaller
        ([9, 1, 2, 3, 2, 5], depth.Cuts(1, 4, True, True)),
    ],
)
def test_l3prune_picks(values, expected):
    assert depth.l3prune(curve(values)) == expected


def test_l3prune_never_picks_nan():
    with pytest.raises(ValueError, match=r"not finite at depths \[2\]"):
        depth.l3prune(curve([3, 2, math.nan, 1, 1]))


def test_l3prune_needs_two_blocks():
    with pytest.raises(ValueError, match="at least 2 blocks"):
        depth.l3prune(curve([2, 1]))


def test_pick_frequencies_follow_the_evidence():
    generator = np.random.default_rng(0)
    base = np.array([9, 3, 1, 2, 3, 1.50, 1.51])
    noisy = base + generator.normal(0, 1.5, size=(200, 7))
    loss = depth.LayerLoss(noisy, noisy.mean(0), noisy.mean(0), noisy.mean(0), 0, 2, 20.0)
    frequencies = depth.pick_frequencies(loss)
    assert frequencies["small"][2] > 0.99
    assert 0.05 < frequencies["large"][5] < 0.95  # a tie within the noise
    assert frequencies["large"].sum() == pytest.approx(1)


def test_similarity_matches_hidden_states():
    model, tokenizer = models.tiny_twin("llama"), models.tiny_tokenizer()
    texts = ["one two three", "four", "five six"]
    ours = depth.layer_similarity(model, tokenizer, texts)
    cosines, angles = [], []
    for text in texts:
        states = []
        with torch.no_grad():
            handles = [
                layer.register_forward_hook(
                    lambda m, a, o, states=states: states.append(o[0] if isinstance(o, tuple) else o)
                )
                for layer in model.layers
            ]
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            model(input_ids=ids)
            states.insert(0, model.embed_tokens(ids))
            for handle in handles:
                handle.remove()
        stacked = torch.cat(states).double()  # [L + 1, tokens, hidden]
        cosines.append(torch.cosine_similarity(stacked[:-1], stacked[1:], dim=-1))
        last = stacked[:, -1]
        angles.append(
            torch.arccos(torch.cosine_similarity(last[:, None], last[None], dim=-1).clamp(-1, 1)) / math.pi
        )
    np.testing.assert_allclose(ours.block_influence, 1 - torch.cat(cosines, 1).mean(1), atol=1e-5)
    np.testing.assert_allclose(ours.angular_distance, torch.stack(angles).mean(0), atol=1e-5)


def test_rules_keep_the_layers_they_should():
    similarity = depth.LayerSimilarity(
        np.array([0.9, 0.1, 0.5, 0.2]),
        np.array([[abs(i - j) for j in range(5)] for i in range(5)], dtype=float),
    )
    assert depth.keep_by_block_influence(similarity, 2) == [0, 2]
    similarity.angular_distance[1, 3] = 0.01
    assert depth.keep_by_angular_distance(similarity, 2) == [0, 3]
    assert depth.keep_random(4, 2, seed=1) == depth.keep_random(4, 2, seed=1)
    assert depth.keep_by_angular_distance(similarity, 4) == [0, 1, 2, 3]
