"""Loading refuses checkpoints that lack what the model computes with, and those whose blocks would be dropped."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from overparam import models
from overparam.models import weights


def saved(model, folder, **fields):
    """Save a model with a tokenizer; `fields` are written into its config.json afterwards."""
    model.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return str(folder)


def edited(folder, change):
    """Rewrite the tensors of a saved model."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(folder)


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def states(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state


IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mistral", "mixtral", "phi3"])
def test_a_decoder_saved_without_its_head_is_refused_where_logits_are_wanted(name, tmp_path):
    folder = saved(models.tiny_twin(name, tie_word_embeddings=False), tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*causal=False"):
        models.load(folder, causal=True)
    models.load(folder)  # as an encoder it is whole


def test_a_tied_decoder_saved_without_its_head_is_whole(tmp_path):
    twin = models.tiny_twin("gemma3")
    model, _ = models.load(saved(twin, tmp_path), causal=True)
    assert torch.equal(model.lm_head.weight, twin.embed_tokens.weight)


@pytest.mark.parametrize("causal", [False, True])
def test_a_tied_decoder_without_its_embeddings_is_refused(causal, tmp_path):
    saved(models.tiny_twin("gemma3", causal=True), tmp_path)
    folder = edited(tmp_path, without("embed_tokens"))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight"):
        models.load(folder, causal=causal)


def test_more_layers_than_the_checkpoint_holds_are_refused(tmp_path):
    folder = saved(models.tiny_twin("bert", num_hidden_layers=6), tmp_path, num_hidden_layers=8)
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.6\..* 28 more\. .*says 8 blocks, the checkpoint holds 6"
    ):
        models.load(folder)


@pytest.mark.parametrize(("name", "causal"), [("bert", False), ("llama", False), ("llama", True)])
def test_fewer_layers_than_the_checkpoint_holds_are_refused(name, causal, tmp_path):
    folder = saved(models.tiny_twin(name, num_hidden_layers=6, causal=causal), tmp_path, num_hidden_layers=4)
    for wanted in {causal, False}:
        with pytest.raises(ValueError, match=r"layers?\.4\..*fewer blocks.*depth\.truncate"):
            models.load(folder, causal=wanted)


def test_blocks_that_predict_further_tokens_may_be_left_over(tmp_path):
    twin = models.tiny_twin("deepseek_v3", causal=True, num_hidden_layers=3)
    saved(twin, tmp_path, num_hidden_layers=2, num_nextn_predict_layers=1)
    model, _ = models.load(str(tmp_path), causal=True)
    assert len(model.model.layers) == 2


def test_a_missing_part_of_one_block_is_refused(tmp_path):
    saved(models.tiny_twin("modernbert"), tmp_path)
    folder = edited(tmp_path, without("layers.2.mlp.Wo"))
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights.*layers\.2\.mlp\.Wo\.weight"):
        models.load(folder)


def test_a_missing_expert_is_refused(tmp_path):
    saved(models.tiny_twin("mixtral", causal=True), tmp_path)
    folder = edited(tmp_path, without("layers.1.block_sparse_moe.experts.3"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts"):
        models.load(folder, causal=True)


def test_a_missing_weight_that_only_chooses_experts_is_refused(tmp_path):
    saved(models.tiny_twin("deepseek_v3", causal=True), tmp_path)
    folder = edited(tmp_path, without("e_score_correction_bias"))
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        models.load(folder, causal=True)


@pytest.mark.parametrize("part", ["embeddings.token_type_embeddings", "embeddings.LayerNorm.bias"])
def test_a_missing_part_of_the_embeddings_is_refused(part, tmp_path):
    saved(models.tiny_twin("bert"), tmp_path)
    with pytest.raises(ValueError, match=part):
        models.load(edited(tmp_path, without(part)))


def test_a_checkpoint_in_four_bits_lacks_nothing_and_says_what_it_lacks(tmp_path):
    saved(models.tiny_twin("gpt_oss", causal=True, intermediate_size=32), tmp_path)
    path = tmp_path / "config.json"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stored = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    edited(tmp_path, in_four_bits)
    model, _ = models.load(str(tmp_path), causal=True)
    assert model.dtype == torch.float32
    edited(tmp_path, without("layers.2.mlp.experts.down_proj_"))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\.down_proj"):
        models.load(str(tmp_path), causal=True)


def in_four_bits(tensors):
    """Experts as MXFP4 stores them: two values a byte, a scale for 32 of them."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32)
            found[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(118, 124, blocks, dtype=torch.uint8)
        else:
            found[name] = tensor
    return found


def test_a_missing_pooler_is_no_fault_and_two_loads_are_alike(tmp_path):
    twin = models.tiny_twin("bert")
    folder = saved(AutoModelForMaskedLM.from_config(twin.config), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, _ = models.load(folder)
    assert torch.equal(torch.rand(1), expected)  # the caller's draws are left alone
    second, _ = models.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in first.parameters())
    plain = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(states(first, IDS), states(plain, IDS))


def test_a_base_model_comes_from_a_whole_decoder(tmp_path):
    twin = models.tiny_twin("llama", causal=True)
    model, _ = models.load(saved(twin, tmp_path))
    assert torch.equal(states(model, IDS), states(twin.model, IDS))


def test_an_encoder_with_a_classifier_is_loaded_without_it(tmp_path):
    from transformers import BertForSequenceClassification

    twin = BertForSequenceClassification(models.tiny_twin("bert").config).eval()
    model, _ = models.load(saved(twin, tmp_path))
    assert torch.equal(states(model, IDS), states(twin.bert, IDS))


def test_a_vocabulary_of_another_size_is_refused_with_both_shapes(tmp_path):
    folder = saved(models.tiny_twin("bert"), tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is \[260, 32\].*\[300, 32\]"):
        models.load(folder)


def test_weights_of_blocks_without_a_place_are_refused_unless_they_are_zero(tmp_path):
    twin = models.tiny_twin("llama", attention_bias=True)
    folder = saved(twin, tmp_path, attention_bias=False)
    models.load(folder)  # the biases of a new model are zero
    edited(tmp_path, lambda tensors: {n: t + n.endswith("q_proj.bias") for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"holds 4 weights.*layers\.0\.self_attn\.q_proj\.bias"):
        models.load(folder)


def test_another_architectures_weights_are_refused(tmp_path):
    saved(models.tiny_twin("bert"), tmp_path)
    models.tiny_twin("modernbert").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another architecture"):
        models.load(str(tmp_path))


def test_a_missing_shard_and_a_cut_file_are_said(tmp_path):
    twin = models.tiny_twin("llama", causal=True)
    models.tiny_tokenizer().save_pretrained(tmp_path)
    twin.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(OSError, match=r"model-00002.*incomplete"):
        models.load(str(tmp_path))
    shards[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(OSError, match="incomplete"):
        models.load(str(tmp_path))


def test_an_encoder_decoder_is_loaded_as_its_encoder(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 260}
    whole = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    model, _ = models.load(saved(whole, tmp_path / "whole"))
    assert isinstance(model, T5EncoderModel)
    assert torch.equal(states(model, IDS), states(whole.encoder, IDS))
    assert models.required_memory(str(tmp_path / "whole")) == 4 * sum(p.numel() for p in model.parameters())
    half, _ = models.load(saved(model, tmp_path / "half"))
    assert torch.equal(states(half, IDS), states(model, IDS))


TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
SIZES = {
    "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "max_position_embeddings": 64, "dim": 32,
    "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "d_model": 32, "d_inner": 48, "emb_dim": 32, "eos_token_id": 2,
    "bos_token_id": 1, "embedding_size": 32,
}  # fmt: skip

UNSETTABLE = {"xlnet": ("max_position_embeddings",), "falcon": ("head_dim",)}


def tiny(model_type, **fields):
    """A small configuration of any architecture: sizes under whatever names it has for them."""
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    for name in UNSETTABLE.get(model_type, ()):
        del sizes[name]
    return AutoConfig.for_model(model_type, **{**TINY, **sizes, **fields})


def looks_ahead(config):
    """Whether a token's hidden state depends on the tokens after it: what encoders do, tried on the model itself."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids = IDS[:, :8].clone()
    before = states(model, ids)
    ids[:, -1] = (ids[:, -1] + 7) % 200 + 3
    return not torch.allclose(states(model, ids)[:, :-2], before[:, :-2], atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((name, {}) for name in ("gpt2", "opt", "gpt_neox", "bloom", "falcon", "llama", "qwen3", "biogpt")),
        *((name, {}) for name in ("eurobert", "bert", "roberta", "mpnet", "modernbert", "distilbert")),
        ("xlnet", {}),
        *((name, {}) for name in ("xlm", "electra", "bert-generation", "modernbert-decoder", "openai-gpt")),
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("bert-generation", {"is_decoder": True}),
        ("xlm", {"causal": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("qwen2", {"is_causal": False}),
    ],
)
def test_decoders_are_told_from_encoders_as_their_attention_does(model_type, fields):
    config = tiny(model_type, **fields)
    assert models.decodes(config) != looks_ahead(config)


def test_what_a_model_is_can_be_said_by_hand(tmp_path):
    folder = saved(AutoModelForCausalLM.from_config(tiny("gpt2")), tmp_path)
    assert models.is_decoder(folder)
    assert not models.is_decoder(folder, kind="encoder")
    assert models.is_decoder("tiny-bert", kind="decoder")


@pytest.mark.parametrize(
    ("model_type", "decoder"),
    [
        *((name, True) for name in ("qwen3_vl_text", "mistral4", "gemma3", "llava")),
        *(
            (name, False)
            for name in ("embedding_gemma2_text", "openai_privacy_filter", "clip_text_model", "dpr")
        ),
    ],
)
def test_architectures_without_a_next_token_head_of_their_own(model_type, decoder):
    assert models.decodes(AutoConfig.for_model(model_type)) == decoder


def test_an_encoder_decoder_is_no_decoder():
    assert not models.decodes(AutoConfig.for_model("t5"))
    assert not models.decodes(AutoConfig.for_model("bart"))


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "model.safetensors")])
def test_an_adapter_is_no_model(beside, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "adapter"
    saved(models.tiny_twin("qwen3"), whole)
    base = AutoModel.from_pretrained(whole)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    for name in beside:
        shutil.copy(whole / name, folder / name)
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\) of .*whole"):
        models.load(str(folder))
    with pytest.raises(ValueError, match="holds an adapter"):
        models.is_decoder(str(folder))


def test_an_adapter_that_transformers_finds_is_refused_too(tmp_path):
    base = AutoModel.from_pretrained(saved(models.tiny_twin("qwen3"), tmp_path / "whole"))
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ValueError, match="holds an adapter, not a whole model"):
        weights.read(AutoModel, folder)


@pytest.mark.parametrize("name", ["bert", "qwen3_moe"])
def test_whole_numbers_without_a_scale_are_refused(name, tmp_path):
    twin = models.tiny_twin(name)
    saved(twin, tmp_path)
    part = "up_proj.weight" if name == "qwen3_moe" else "query.weight"
    edited(
        tmp_path,
        lambda tensors: {n: (100 * t).to(torch.int8) if n.endswith(part) else t for n, t in tensors.items()},
    )
    with pytest.raises(ValueError, match=r"weights as whole numbers.*no quantization_config"):
        models.load(str(tmp_path))


def test_integers_that_are_integers_in_the_model_are_no_fault(tmp_path):
    folder = saved(models.tiny_twin("bert"), tmp_path)
    positions = torch.arange(512)[None]
    edited(tmp_path, lambda tensors: tensors | {"embeddings.position_ids": positions})
    models.load(folder)


def test_a_folder_without_a_transformer_is_said(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json \(the folder is incomplete\)"):
        models.load(str(tmp_path))
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(ValueError, match="holds no transformer: its modules are StaticEmbedding"):
        models.load(str(tmp_path))
