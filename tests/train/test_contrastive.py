import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from overparam import models
from overparam.compress import depth
from overparam.train import contrastive

Triplet = namedtuple("Triplet", "query positive negative source")
RECIPE = contrastive.Recipe(steps=6, batch_size=4, learning_rate=1e-2, warmup=1, max_length=64)
TEXTS = ["one two", "three four five, six seven eight", "九"]


@pytest.fixture
def triplets():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    return [
        Triplet(f"{w} one", f"{w} two", f"{w[::-1]} three", source) for source in ("a", "b") for w in words
    ]


@pytest.fixture
def tokenizer():
    return models.tiny_tokenizer()


@pytest.mark.parametrize("name", models.TWINS)
def test_every_projection_in_the_blocks_is_adapted(name):
    model = models.tiny_twin(name)
    targets = contrastive.lora_targets(model)
    inside = sum(isinstance(m, torch.nn.Linear) for m in models.blocks(model).layers.modules())
    assert len(targets) == inside
    assert all(isinstance(model.get_submodule(target), torch.nn.Linear) for target in targets)
    assert not any("pooler" in target for target in targets)


def test_phi3_fused_projections_are_found():
    names = {target.rpartition(".")[2] for target in contrastive.lora_targets(models.tiny_twin("phi3"))}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("pooling", depth.POOLINGS)
@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_wrapped_encoder_equals_layer_embeddings(name, pooling, tokenizer):
    model = depth.truncate(models.tiny_twin(name), 3)
    encoder = contrastive.as_sentence_transformer(model, tokenizer, pooling=pooling)
    ours = depth.layer_embeddings(model, tokenizer, TEXTS, pooling=pooling)[:, -1]
    np.testing.assert_allclose(encoder.encode(TEXTS), ours, atol=1e-5)


@pytest.mark.parametrize("pooling", depth.POOLINGS)
def test_prompts_are_pooled_as_layer_embeddings_does(pooling, tokenizer):
    model = models.tiny_twin("llama")
    encoder = contrastive.as_sentence_transformer(model, tokenizer, pooling=pooling)
    ours = depth.layer_embeddings(model, tokenizer, TEXTS, pooling=pooling, instruction="Find it:")[:, -1]
    np.testing.assert_allclose(encoder.encode(TEXTS, prompt="Find it: "), ours, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "bert"])
def test_training_lowers_the_loss_and_saves_an_ordinary_folder(name, triplets, tokenizer, tmp_path):
    model = depth.truncate(models.tiny_twin(name), 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = contrastive.train(model, tokenizer, triplets, RECIPE)
    assert len(trained.losses) == RECIPE.steps
    assert np.mean(trained.losses[-2:]) < np.mean(trained.losses[:2])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    trained.encoder.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again[0].model.config.num_hidden_layers == 2
    np.testing.assert_allclose(again.encode(TEXTS), trained.encoder.encode(TEXTS), atol=1e-6)
    folder_model, _ = models.load(str(tmp_path / "saved"))
    ours = depth.layer_embeddings(folder_model, tokenizer, TEXTS)[:, -1]
    np.testing.assert_allclose(ours, trained.encoder.encode(TEXTS), atol=1e-5)


def test_same_seed_same_result_and_cached_adapters_equal_it(triplets, tokenizer, tmp_path):
    model = models.tiny_twin("qwen3", num_hidden_layers=2)
    runs = [
        contrastive.train(model, tokenizer, triplets, RECIPE, cache=folder)
        for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b")
    ]
    assert [run.cached for run in runs] == [False, True, False]
    assert runs[0].losses == runs[1].losses == runs[2].losses
    for run in runs[1:]:
        np.testing.assert_array_equal(run.encoder.encode(TEXTS), runs[0].encoder.encode(TEXTS))
    other = contrastive.train(model, tokenizer, triplets[:-1] + triplets[:1], RECIPE, cache=tmp_path / "a")
    assert not other.cached


def test_batches_come_from_one_source(triplets, tokenizer, monkeypatch):
    seen = []
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    original = MultipleNegativesRankingLoss.forward

    def spy(self, features, labels):
        seen.append([feature["input_ids"].clone() for feature in features])
        return original(self, features, labels)

    monkeypatch.setattr(MultipleNegativesRankingLoss, "forward", spy)
    marked = [t._replace(query=f"{t.source * 3} {t.query}") for t in triplets]
    contrastive.train(models.tiny_twin("llama", num_hidden_layers=1), tokenizer, marked, RECIPE)
    assert len(seen) == RECIPE.steps
    for columns in seen:
        assert len(set(columns[0][:, 1].tolist())) == 1  # after <bos>, the mark of the source


def test_a_source_smaller_than_a_batch_is_named(triplets, tokenizer):
    with pytest.raises(ValueError, match="'c' has 1"):
        contrastive.train(
            models.tiny_twin("llama"), tokenizer, [*triplets, Triplet("q", "p", "n", "c")], RECIPE
        )


def test_nan_loss_stops_the_training(triplets, tokenizer):
    model = models.tiny_twin("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        contrastive.train(model, tokenizer, triplets, RECIPE)
