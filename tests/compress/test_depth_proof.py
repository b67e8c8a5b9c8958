"""Every depth from one pass: exact, or refused by name, whatever the architecture."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, T5EncoderModel

from overparam import models
from overparam.compress import depth
from overparam.compress.depth import proof, truncation
from overparam.compress.depth.states import no_cache
from overparam.models.proof import NotExactError, probe

TEXTS = ["In the beginning God created the heavens and the earth.", "x", "Au commencement, Dieu créa"]
EXACT = [
    *(
        "bloom",
        "deepseek_v4",
        "distilbert",
        "esmc",
        "falcon",
        "gemma4_text",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gte",
    ),
    *(
        "jamba",
        "jina_embeddings_v3",
        "longformer",
        "mamba2",
        "nomic_bert",
        "opt",
        "roberta",
        "roberta-prelayernorm",
    ),
    *("xlm-roberta-xl", "convbert", "fnet", "yoso"),
]


def alone(model, tokenizer, text):
    """Mean of the model's own output over one text, without any padding. [hidden]"""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, **no_cache(model))[0][0].double().mean(0)


@pytest.mark.parametrize("name", EXACT)
def test_every_depth_is_what_the_truncated_model_gives_for_each_text_alone(name):
    model, tokenizer = models.tiny_twin(name), models.tiny_tokenizer()
    every = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")
    assert every.shape == (3, 5, 32)
    for keep in (1, 3, 4):
        try:
            small = depth.truncated(model, keep)
        except NotExactError:  # of these two, no configuration describes the cut
            assert name in ("esmc", "gemma4_text")
            continue
        for row, text in enumerate(TEXTS):
            np.testing.assert_allclose(every[row, keep], alone(small, tokenizer, text), atol=2e-5)


def test_a_projection_after_the_last_block_is_applied_at_every_depth():
    model, tokenizer = models.tiny_twin("opt", word_embed_proj_dim=16), models.tiny_tokenizer()
    every = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")
    assert every.shape == (3, 5, 16)
    np.testing.assert_allclose(every[0, 2], alone(depth.truncated(model, 2), tokenizer, TEXTS[0]), atol=1e-5)


def test_the_encoder_of_t5_is_read_and_saved(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = T5EncoderModel(models.tiny_config("t5")).eval(), models.tiny_tokenizer()
    every = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")
    small = depth.truncate(model, 2)
    np.testing.assert_allclose(every[0, 2], alone(small, tokenizer, TEXTS[0]), atol=1e-5)
    depth.save(small, tokenizer, tmp_path / "pruned")
    again = T5EncoderModel.from_pretrained(tmp_path / "pruned").eval()
    np.testing.assert_array_equal(alone(small, tokenizer, TEXTS[1]), alone(again, tokenizer, TEXTS[1]))


def test_blocks_that_need_the_first_one_stay_behind_it():
    model = T5EncoderModel(models.tiny_config("t5")).eval()
    with pytest.raises(NotExactError, match="relative_attention_bias"):
        depth.truncate(model, [1, 2])
    assert len(models.blocks(model).layers) == model.config.num_layers == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "bert", "modernbert", "mixtral", "deepseek_v3", "gpt_oss"]
)
def test_rounding_is_no_reason_to_refuse(name, dtype):
    model = models.tiny_twin(name).to(dtype)
    assert proof.reading(model).padding_is_neutral
    assert len(models.blocks(depth.truncated(model, 2)).layers) == 2


@pytest.mark.parametrize("name", ["convbert", "fnet", "nystromformer"])
def test_texts_of_unequal_length_do_not_share_a_batch_where_padding_changes_numbers(name):
    found = proof.reading(models.tiny_twin(name, num_hidden_layers=2))
    assert not found.padding_is_neutral


@pytest.mark.parametrize("name", ["convbert", "yoso"])
def test_padding_is_seen_in_half_precision_too(name):
    model = models.tiny_twin(name).to(torch.bfloat16)
    assert not proof.reading(model).padding_is_neutral
    assert model.dtype == next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("albert", "shared weights"),
        ("xlm", "separate lists"),
        ("funnel", "pool tokens"),
        ("bart", "an encoder and a decoder"),
        ("t5", "T5EncoderModel"),
        ("gemma3n_text", "more than a chain of modules"),
        ("squeezebert", "does not call its last block"),
        ("xlnet", "more than a chain of modules"),
    ],
)
def test_models_without_depths_are_refused_by_name(name, reason):
    model = models.tiny_twin(name)
    with pytest.raises(ValueError, match=reason) as raised:
        depth.layer_embeddings(model, models.tiny_tokenizer(), TEXTS)
    assert type(model).__name__ in str(raised.value)
    with pytest.raises(ValueError, match=type(model).__name__):
        depth.layer_similarity(model, models.tiny_tokenizer(), TEXTS)


def test_a_model_with_a_head_says_how_to_load_it():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has a task head.*AutoModel.*without a task head"):
        depth.truncate(models.tiny_twin("llama", causal=True), 2)


def test_the_language_model_of_a_vision_language_model_is_pointed_at():
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=models.tiny_config("llama"), image_token_index=3)
    model, tokenizer = AutoModel.from_config(config).eval(), models.tiny_tokenizer()
    with pytest.raises(ValueError, match=r"model\.language_model"):
        depth.layer_embeddings(model, tokenizer, TEXTS)
    assert depth.layer_embeddings(model.language_model, tokenizer, TEXTS).shape == (3, 5, 32)


class Scaled(torch.nn.Module):
    """A norm that also scales, by how often it was called: what no trace can show."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.calls = norm, 0

    def forward(self, hidden):
        self.calls += 1
        return self.norm(hidden) * self.calls


def test_rows_that_differ_from_the_model_are_refused_with_the_difference():
    model = models.tiny_twin("llama", rms_norm_eps=1.23e-5)
    model.norm = Scaled(model.norm)
    with pytest.raises(NotExactError, match=r"LlamaModel: depth \d of 4, read from one pass, differs from"):
        depth.layer_embeddings(model, models.tiny_tokenizer(), TEXTS)


def test_the_proof_runs_once_for_an_architecture_and_leaves_the_model_as_it_was(monkeypatch):
    passes = []
    model, twin = (models.tiny_twin("llama", seed=seed, rms_norm_eps=1.5e-5).train() for seed in (0, 1))
    before = model.config.to_json_string(use_diff=False)
    monkeypatch.setattr(proof, "_prove", lambda model, real=proof._prove: (passes.append(1), real(model))[1])
    for one in (model, twin, model):
        proof.reading(one)
    assert len(passes) == 1
    assert model.training
    assert model.layers[0].training
    assert model.config.to_json_string(use_diff=False) == before
    proof.reading(depth.truncate(model, 2))
    assert len(passes) == 2


def test_the_proof_takes_as_long_as_a_few_small_batches():
    model = models.tiny_twin("gemma3", num_hidden_layers=12, rms_norm_eps=1.7e-6)
    runs, batch = [], probe(model)
    handle = (
        models.blocks(model)
        .layers[0]
        .register_forward_hook(
            lambda _, __, out: runs.append(out[0].shape if isinstance(out, tuple) else out.shape)
        )
    )
    proof.reading(model)
    handle.remove()
    tokens = sum(math.prod(shape[:2]) for shape in runs)
    assert tokens <= 5 * batch.input_ids.numel()


def test_one_proof_of_a_cut_serves_all_models_of_its_architecture(monkeypatch):
    built = []
    real = truncation.rebuilt
    monkeypatch.setattr(truncation, "rebuilt", lambda *args: (built.append(1), real(*args))[1])
    for seed in range(3):
        depth.truncate(models.tiny_twin("qwen3", seed=seed, rms_norm_eps=1.9e-6), 2)
    assert len(built) == 1


def test_a_model_in_training_is_read_without_dropout_and_stays_in_training():
    model, tokenizer = models.tiny_twin("bert"), models.tiny_tokenizer()
    expected = depth.layer_embeddings(model, tokenizer, TEXTS)
    influence = depth.layer_similarity(model, tokenizer, TEXTS).block_influence
    model.train()
    model.embeddings.eval()
    assert np.array_equal(depth.layer_embeddings(model, tokenizer, TEXTS), expected)
    assert np.array_equal(depth.layer_similarity(model, tokenizer, TEXTS).block_influence, influence)
    assert model.encoder.layer[0].training
    assert not model.embeddings.training
