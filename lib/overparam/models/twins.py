"""Tiny twins: randomly initialised models with the exact architecture of large ones, and a byte tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from overparam.models.seeding import seeded
from overparam.models.tiny import VOCABULARY, tiny_config

_SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_NO_HEAD_DIM = {key: value for key, value in _DECODER.items() if key != "head_dim"}
_DEEPSEEK = {
    **_NO_HEAD_DIM,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

# model type -> (model_type of transformers, settings other than its defaults)
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 16}),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", _DECODER),
    "phi3": ("phi3", _NO_HEAD_DIM),
    "gemma3": ("gemma3_text", {**_DECODER, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "bert": ("bert", _ENCODER),
    "modernbert": ("modernbert", {**_ENCODER, "local_attention": 16, "global_attn_every_n_layers": 3}),
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 8}),
    "olmoe": ("olmoe", {**_NO_HEAD_DIM, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_DECODER, **_ROUTED, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("qwen3_moe", {**_DECODER, **_ROUTED}),
    "gpt_oss": (
        "gpt_oss",
        {**_DECODER, "sliding_window": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": ("deepseek_v2", _DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}),
    "granitemoe": ("granitemoe", {**_NO_HEAD_DIM, "num_local_experts": 8}),
}
MOE_TWINS = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "granitemoe",
)


def tiny_twin(model_type: str, *, seed: int = 0, causal: bool = False, **overrides: Any) -> PreTrainedModel:
    """Build a randomly initialised model of a known architecture, small enough for a test.

    Norm weights and the biases of routers and experts are drawn too (transformers sets them to a constant), so that
    code that forgets one gives other results; for an architecture outside of `TWINS`, all constant parameters are.

    Args:
        model_type: One of `TWINS`, or any text architecture of transformers that `tiny_config` knows.
        seed: Seed of the weights.
        causal: Add the language-modelling head (``AutoModelForCausalLM``).
        overrides: Fields of the configuration, such as ``num_hidden_layers=6``.

    Raises:
        ValueError: If the architecture is unknown, or no tiny model of it can be built.
    """
    config = (
        _twin_config(model_type, overrides) if model_type in TWINS else tiny_config(model_type, **overrides)
    )
    with seeded(seed):
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name.lower() and parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif name.endswith(("router.bias", "proj_bias")):
                    parameter.normal_(std=0.05)
                elif (
                    model_type not in TWINS
                    and parameter.numel() > 1
                    and bool((parameter == parameter.flatten()[0]).all())
                ):
                    parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.05)
    return model


def _twin_config(model_type: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    name, fields = TWINS[model_type]
    tokens = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
    if model_type in ("bert", "modernbert"):
        tokens |= {"cls_token_id": 1, "sep_token_id": 2}
    return AutoConfig.for_model(name, vocab_size=VOCABULARY, **tokens, **{**fields, **overrides})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer for any script: 256 bytes and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=2048,
    )
