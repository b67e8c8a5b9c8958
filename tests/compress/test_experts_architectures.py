"""Every mixture-of-experts architecture, built tiny: pruned, saved and read exactly, or refused by name."""

import copy
import dataclasses
import gc
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Ernie4_5_VLMoeTextModel,
)

from overparam import models
from overparam.compress import experts
from overparam.compress.experts import proof
from overparam.models.proof import NotExactError

IDS = torch.randint(3, 240, (2, 16), generator=torch.Generator().manual_seed(0))
FIELDS = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64, "sliding_window": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_shared_experts": 1,
    "num_shared_experts": 1, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260, "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48, "zero_expert_num": 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4}  # attention over a latent has as many keys as heads
MIXED = {"num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}

# model_type -> what differs from FIELDS
NAMED = {
    "glm4_moe": {}, "glm4_moe_lite": LATENT, "dots1": {}, "solar_open": {}, "flex_olmo": {}, "phimoe": {},
    "minimax": {}, "qwen3_next": MIXED, "qwen3_5_moe_text": MIXED, "qwen3_vl_moe_text": {}, "granitemoeshared": {},
    "llama4_text": {}, "ernie4_5_moe": {}, "hunyuan_v1_moe": {}, "minimax_m2": {},
}  # fmt: skip
MORE = {
    "afmoe": {"num_dense_layers": 1}, "aria_text": {}, "axk1": LATENT, "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **MIXED}, "beam": MIXED, "cohere2_moe": {}, "deepseek_v32": LATENT, "exaone_moe": {},
    "flint": MIXED,
    "gemma4_text": {"enable_moe_block": True, "num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}},
    "glm_moe_dsa": LATENT, "granitemoe_swa": {}, "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v3": {}, "hy_v4": LATENT, "jamba": {"use_mamba_kernels": False, "attn_layer_offset": 0, "attn_layer_period": 2},
    "kolibri1": {}, "laguna": {}, "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "mellum": {}, "mimo_v2_flash": {}, "minimax_m3_vl_text": {}, "mistral4": LATENT, "mistral_large4_text": LATENT,
    "muse_spark_text": {"moe_hidden_size": 32}, "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "openai_privacy_filter": {},
}  # fmt: skip
REFUSED = {  # what the error says
    "dbrx": "rows of one matrix",
    "deepseek_v4": r"looks up experts in a table \(tid2eid\)",
    "doge": "no module `experts`",
    "ernie4_5_vl_moe_text": "layer 1 has 2 mixtures of experts",
    "inkling_text": "no matrix of 8 rows",
    "jetmoe": "no router next to its experts",
    "longcat_flash": r"tensors for \[8, 10\] experts",
    "nllb-moe": "its experts are separate modules",
    "switch_transformers": "its experts are separate modules",
    "zaya": "no matrix of 8 rows",
}
ODD = {
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16],
                             "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "longcat_flash": {**LATENT, "num_layers": 1, "num_hidden_layers": 2},
    "nllb-moe": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
                 "encoder_sparse_step": 2, "decoder_sparse_step": 2, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2},
    "switch_transformers": {"d_model": 32, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2,
                            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def config(model_type, **overrides):
    """A small configuration of any architecture: those of the fields that it has."""
    cls = CONFIG_MAPPING[model_type]
    known = {*cls.__dataclass_fields__, *cls.attribute_map}
    fields = {name: value for name, value in FIELDS.items() if name in known}
    return cls(**(fields | overrides))


def drawn(model):
    """The model in evaluation mode, with routers and the biases of experts that are not constant."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if any(name.endswith(each) for each in ("expert_bias", "correction_bias", "router.bias")):
                tensor.normal_(std=0.05)
            elif "per_expert_scale" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("weight") and any(each in name for each in (".gate.", ".router.")):
                tensor.normal_(std=0.3)
    return model.eval()


def tiny(model_type, **overrides):
    torch.manual_seed(0)
    made = config(model_type, **overrides)
    if model_type == "ernie4_5_vl_moe_text":  # no automatic class builds it alone
        return drawn(Ernie4_5_VLMoeTextModel._from_config(made))
    auto = AutoModelForCausalLM if type(made) in AutoModelForCausalLM._model_mapping else AutoModel
    return drawn(auto.from_config(made))


def outputs(model):
    with torch.no_grad():
        result = model(input_ids=IDS, use_cache=False)
    return result.logits if "logits" in result else result.last_hidden_state


def keep_lists(model, counts):
    generator = torch.Generator().manual_seed(0)
    return [
        sorted(torch.randperm(layer.n_experts, generator=generator)[:count].tolist())
        for layer, count in zip(experts.layers(model), counts, strict=False)
    ]


@contextmanager
def without(model, keep):
    """The whole model with the router logits of all experts that are not kept at minus infinity."""
    linear = torch.nn.functional.linear

    def masking(router, dropped, count):
        original = router.forward

        def product(*args, **kwargs):
            result = linear(*args, **kwargs)
            return result.index_fill(-1, dropped, float("-inf")) if result.shape[-1] == count else result

        def forward(*args, **kwargs):
            with mock.patch.object(torch.nn.functional, "linear", product):
                return original(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for layer, kept in zip(experts.layers(model), keep, strict=True):
            dropped = torch.tensor(sorted(set(range(layer.n_experts)) - set(kept)), dtype=torch.long)
            changed = masking(layer.router, dropped, layer.n_experts)
            stack.enter_context(mock.patch.object(layer.router, "forward", changed))
            for name, tensor in (*layer.block.named_parameters(), *layer.block.named_buffers()):
                if name.endswith(("expert_bias", "correction_bias")):  # added to what comes of the logits
                    old = tensor.data
                    tensor.data = old.index_fill(-1, dropped, float("-inf"))
                    stack.callback(setattr, tensor, "data", old)
        yield


def check_exact(model, counts, folder):
    """Pruned, the model equals the whole one that cannot choose the others; saved and read, it equals itself."""
    keep = keep_lists(model, counts)
    before = outputs(model)
    with without(model, keep):
        expected = outputs(model)
    assert torch.equal(outputs(model), before)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-5)
    pruned = experts.prune(model, keep)
    torch.testing.assert_close(outputs(pruned), expected, rtol=1e-4, atol=3e-6)
    again = experts.load_pruned(experts.save_pruned(pruned, folder))
    assert type(again) is type(model)
    assert torch.equal(outputs(again), outputs(pruned))
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in pruned.state_dict().items())
    assert [layer.n_experts for layer in experts.layers(again)] == [len(kept) for kept in keep]


@pytest.mark.parametrize("model_type", [*NAMED, *MORE])
def test_layers_that_differ_are_exact(model_type, tmp_path):
    model = tiny(model_type, **(NAMED | MORE)[model_type])
    check_exact(model, [6, 4, 3, 5], tmp_path / "pruned")


@pytest.mark.parametrize("model_type", NAMED)
def test_layers_alike_are_ordinary_checkpoints(model_type, tmp_path):
    model = tiny(model_type, **NAMED[model_type])
    check_exact(model, [4] * 4, tmp_path / "pruned")
    again = type(model).from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("model_type", [*NAMED, "gemma4_text", "afmoe", "lfm2_moe", "openai_privacy_filter"])
def test_the_score_of_reap_is_the_norm_of_what_an_expert_adds(model_type):
    """Independent of how gates are read: an expert's contribution is what the layer loses without its output."""
    model = tiny(model_type, **(NAMED | MORE)[model_type])
    statistics = experts.collect(model, [{"input_ids": IDS}], reap=True)
    layer = experts.layers(model)[0]
    seen = []
    hooks = [layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args))]
    outputs(model)
    hooks[0].remove()
    down = next(tensor for name, tensor in layer.experts.named_parameters() if name == "down_proj")
    bias = getattr(layer.experts, "down_proj_bias", None)
    with torch.no_grad():
        whole = layer.experts(*seen[0])
        for expert in (0, 3, 7):
            with ExitStack() as stack:
                for tensor in (down, bias):
                    if tensor is not None:
                        stack.callback(tensor[expert].copy_, tensor[expert].clone())
                        tensor[expert] = 0
                lost = (whole - layer.experts(*seen[0])).norm(dim=1).sum().item()
            assert statistics.gated_norm_sum[0, expert] == pytest.approx(lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_sliced_is_refused_by_name(model_type):
    model = tiny(model_type, **ODD.get(model_type, {}))
    before = copy.deepcopy(model.state_dict())
    for use in (
        experts.layers,
        lambda each: experts.prune(each, [[0, 1]]),
        lambda each: experts.collect(each, []),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*{REFUSED[model_type]}"):
            use(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del model
    gc.collect()


def vision_language(model_type):
    text = {
        "llava": ("mixtral", {}),
        "llama4": ("llama4_text", {"num_experts_per_tok": 1}),
        "qwen3_vl_moe": ("qwen3_vl_moe_text", {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}),
    }[model_type]
    vision = {
        "llava": {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 16,
                  "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "projection_dim": 16},
        "llama4": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "image_size": 16, "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16,
                   "projector_output_dim": 16},
        "qwen3_vl_moe": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
                         "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }[model_type]  # fmt: skip
    ids = {"image_token_id": 250, "video_token_id": 251}
    if model_type == "qwen3_vl_moe":
        ids |= {"vision_start_token_id": 252, "vision_end_token_id": 253}
    torch.manual_seed(0)
    made = CONFIG_MAPPING[model_type](
        text_config=config(text[0], **text[1]).to_dict(), vision_config=vision, **ids
    )
    return drawn(AutoModelForImageTextToText.from_config(made))


@pytest.mark.parametrize("counts", [[4, 4], [6, 3]])
@pytest.mark.parametrize("model_type", ["llava", "llama4", "qwen3_vl_moe"])
def test_language_models_of_vision_language_models_are_found(model_type, counts, tmp_path):
    model = vision_language(model_type)
    whole = experts.collect(model, [{"input_ids": IDS}], reap=True)
    language_model = model.language_model if model_type == "llama4" else model.model.language_model
    alone = experts.collect(language_model, [{"input_ids": IDS}], reap=True)
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(alone, field.name))
    check_exact(model, counts, tmp_path / "pruned")


def test_models_with_two_stacks_of_experts_say_where_they_are():
    model = vision_language("llava")
    model.model.vision_tower = models.tiny_twin("mixtral")
    with pytest.raises(
        ValueError,
        match=r"model\.model\.vision_tower\.layers, model\.model\.language_model\.layers.*Pass a model with only one",
    ):
        experts.layers(model)
    assert len(experts.layers(model.model.language_model)) == 2


def unproven(monkeypatch, change):
    """A twin whose first router does more than its tensors say."""
    monkeypatch.setattr(proof, "_proven", set())
    model = models.tiny_twin("mixtral", causal=True)
    router = experts.layers(model)[0].router
    original = router.forward

    def forward(hidden_states):
        logits, weights, indices = original(hidden_states)
        return change(logits, weights, indices)

    router.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda logits, weights, indices: (logits, weights, indices.clamp(max=4)),
            "minus infinity|does not choose",
        ),
        (
            lambda logits, weights, indices: (logits, weights * (1 + indices), indices),
            "do not compute the same",
        ),
        (
            lambda logits, weights, indices: (logits, weights, torch.full_like(indices, 7)),
            "minus infinity|are not there",
        ),
        (lambda logits, weights, indices: (logits, weights * logits[:, 7:8], indices), "fails"),
    ],
)
def test_what_does_more_than_its_tensors_say_is_refused_unchanged(monkeypatch, change, message):
    model = unproven(monkeypatch, change)
    before, expected = copy.deepcopy(model.state_dict()), outputs(model)
    with pytest.raises(NotExactError, match=f"MixtralForCausalLM .*layer 0 .*({message})"):
        experts.prune(model, [[0, 2, 4, 6]] * 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.n_experts for layer in experts.layers(model)] == [8] * 4
    assert model.config.num_local_experts == 8
    assert torch.equal(outputs(model), expected)


def test_proof_is_made_once(monkeypatch):
    monkeypatch.setattr(proof, "_proven", set())
    model = models.tiny_twin("gpt_oss")
    calls = []
    monkeypatch.setattr(proof, "_prove", lambda *_: calls.append(1))
    for _ in range(2):
        experts.prove(model)
    assert len(calls) == 1
    experts.prove(models.tiny_twin("gpt_oss", num_experts_per_tok=1))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_experts_rated_alike_in_half_precision_do_not_refuse_a_model(name, dtype, monkeypatch):
    monkeypatch.setattr(proof, "_proven", set())
    many = {"num_experts_per_tok": 8} | {
        field: 32
        for field in ("num_experts", "num_local_experts", "n_routed_experts")
        if field in models.TWINS[name][1]
    }
    experts.prove(models.tiny_twin(name, **many).to(dtype))


def test_configurations_that_build_other_tensors_are_not_saved(tmp_path):
    model = experts.prune(models.tiny_twin("mixtral", causal=True), [[0, 1, 2]] * 4)
    model.config.num_local_experts = 8
    with pytest.raises(NotExactError, match=r"would build \d+ other tensors.*\(3, "):
        experts.save_pruned(model, tmp_path / "pruned")
    assert not list(tmp_path.iterdir())


def test_top_k_of_the_configuration_cannot_differ_between_layers():
    model = tiny("gemma4_text", **MORE["gemma4_text"])
    with pytest.raises(ValueError, match=r"read one top-k for all layers.*\[1, 2\]"):
        experts.prune(model, [[0], [1, 2]], lower_top_k=True)
    before = models.count_parameters(model)
    assert (before.active - before.block) * 8 == before.expert * 2
    experts.prune(model, [[0], [1]], lower_top_k=True)
    assert model.config.top_k_experts == 1
    assert outputs(model).isfinite().all()
