import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel

from overparam import models
from overparam.compress import depth

TEXTS = [
    "In the beginning God created the heavens and the earth.",
    "Au commencement, Dieu créa les cieux et la terre.",
    "起初,神创造天地。",
    "В начале сотворил Бог небо и землю",
    "x",
    "The earth was formless and empty, and darkness was on the surface of the deep, far from any shore.",
]


@pytest.fixture(params=models.TWINS)
def twin(request):
    return models.tiny_twin(request.param, num_hidden_layers=5)


@pytest.fixture
def tokenizer():
    return models.tiny_tokenizer()


@pytest.mark.parametrize("pooling", depth.POOLINGS)
def test_every_depth_equals_the_truncated_model(twin, tokenizer, pooling):
    every = depth.layer_embeddings(twin, tokenizer, TEXTS, pooling=pooling)
    assert every.shape == (len(TEXTS), 6, 32)
    for keep in range(1, 6):
        small = depth.truncate(copy.deepcopy(twin), keep)
        alone = depth.layer_embeddings(small, tokenizer, TEXTS, pooling=pooling)
        np.testing.assert_array_equal(every[:, keep], alone[:, keep])


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_truncated_model_reloads_exactly(twin, tokenizer, tmp_path, keep):
    small = depth.truncate(twin, keep)
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == keep
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    arguments = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(small(**arguments).last_hidden_state, again(**arguments).last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "qwen3", "bert", "modernbert"])
def test_layers_from_anywhere_reload_exactly(name, tokenizer, tmp_path):
    small = depth.truncate(models.tiny_twin(name, num_hidden_layers=6), [0, 2, 5])
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(
        depth.layer_embeddings(small, tokenizer, TEXTS), depth.layer_embeddings(again, tokenizer, TEXTS)
    )


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (0, ValueError),
        (6, ValueError),
        (0.5, TypeError),
        (True, TypeError),
        ([], ValueError),
        ([1, 1], ValueError),
    ],
)
def test_truncate_refuses_what_is_not_a_count_in_range(keep, error):
    model = models.tiny_twin("llama", num_hidden_layers=5)
    with pytest.raises(error, match=r"1\.\.5|0\.\.4"):
        depth.truncate(model, keep)
    assert model.config.num_hidden_layers == len(model.layers) == 5


@pytest.mark.parametrize("pooling", depth.POOLINGS)
def test_pooling_matches_a_plain_forward_pass(twin, tokenizer, pooling):
    every = depth.layer_embeddings(twin, tokenizer, TEXTS, pooling=pooling)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = twin(input_ids=ids).last_hidden_state[0].double()
        weights = {"mean": torch.ones(len(hidden)), "weighted_mean": torch.arange(1, len(hidden) + 1)}
        single = torch.zeros(len(hidden))
        single[0 if pooling == "cls" else -1] = 1
        weight = weights.get(pooling, single).double()
        expected = (weight[:, None] * hidden).sum(0) / weight.sum()
        np.testing.assert_allclose(every[row, -1], expected, atol=2e-5)


def test_padding_side_does_not_matter(twin, tokenizer):
    right = depth.layer_embeddings(twin, tokenizer, TEXTS)
    tokenizer.padding_side = "left"
    np.testing.assert_array_equal(right, depth.layer_embeddings(twin, tokenizer, TEXTS))


def test_batching_does_not_matter(twin, tokenizer):
    together = depth.layer_embeddings(twin, tokenizer, TEXTS)
    alone = depth.layer_embeddings(twin, tokenizer, TEXTS, batch_tokens=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_instruction_is_attended_to_but_not_pooled(tokenizer):
    model = models.tiny_twin("llama")
    instruction = "Retrieve the same verse:"
    with_prompt = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean", instruction=instruction)
    plain = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")
    prefix = len(tokenizer(instruction)["input_ids"])
    for row, text in enumerate(TEXTS):
        ids = tokenizer(f"{instruction} {text}")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        start = prefix + 1  # the space between them belongs to the prompt
        np.testing.assert_allclose(with_prompt[row, -1], hidden[start:].mean(0), atol=1e-5)
    assert np.abs(with_prompt - plain).max() > 1e-3


@pytest.mark.parametrize("bad", ["", "  \n\t"])
def test_empty_text_is_named(tokenizer, bad):
    with pytest.raises(ValueError, match="index 1"):
        depth.layer_embeddings(models.tiny_twin("llama"), tokenizer, ["good", bad])


def test_long_text_is_cut_at_the_window(tokenizer):
    model = models.tiny_twin("llama")
    long = "word " * 10_000
    cut = depth.layer_embeddings(model, tokenizer, [long], max_length=64)
    np.testing.assert_array_equal(cut, depth.layer_embeddings(model, tokenizer, [long[:300]], max_length=64))


def test_unknown_pooling_is_refused(tokenizer):
    with pytest.raises(ValueError, match="weighted_mean"):
        depth.layer_embeddings(models.tiny_twin("llama"), tokenizer, TEXTS, pooling="max")


def test_nan_is_an_error(tokenizer):
    model = models.tiny_twin("llama")
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="from depth 3 on"):
        depth.layer_embeddings(model, tokenizer, TEXTS)


def test_a_model_with_a_head_is_refused(tokenizer):
    class Headed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = models.tiny_twin("llama")

    with pytest.raises(ValueError, match="without a task head"):
        models.blocks(Headed())


def test_truncated_copy_shares_the_weights_and_leaves_the_model_alone(twin, tokenizer):
    every = depth.layer_embeddings(twin, tokenizer, TEXTS)
    small = depth.truncated(twin, 2)
    assert len(models.blocks(twin).layers) == twin.config.num_hidden_layers == 5
    owned = {tensor.data_ptr() for tensor in twin.parameters()}
    assert all(tensor.data_ptr() in owned for tensor in small.parameters())
    np.testing.assert_array_equal(depth.layer_embeddings(small, tokenizer, TEXTS)[:, -1], every[:, 2])
    np.testing.assert_array_equal(depth.layer_embeddings(twin, tokenizer, TEXTS), every)


def test_only_the_depths_asked_for_are_returned(twin, tokenizer):
    every = depth.layer_embeddings(twin, tokenizer, TEXTS)
    np.testing.assert_array_equal(
        depth.layer_embeddings(twin, tokenizer, TEXTS, depths=[0, 3]), every[:, [0, 3]]
    )
    with pytest.raises(ValueError, match=r"in 0\.\.5"):
        depth.layer_embeddings(twin, tokenizer, TEXTS, depths=[6])
