"""Tiny configurations of any text architecture of transformers, set by the names of its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig

from overparam.support.suggest import hint

VOCABULARY = 260  # of `tiny_tokenizer`: 256 bytes and four special tokens
_SPECIAL_IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "decoder_start_token_id": 1,
    "eod_token_id": 2,
}
# value -> fields that get it, under all names that transformers uses for them
_SIZES: dict[int, str] = {
    260: (
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size src_vocab_size tgt_vocab_size "
        "decoder_vocab_size"
    ),
    32: (
        "hidden_size n_embd d_model dim emb_dim embedding_dim word_embed_proj_dim output_embedding_size "
        "lru_width attention_hidden_size true_hidden_size pooler_hidden_size dim_model_base "
        "moe_hidden_size index_topk encoder_hidden_size"
    ),
    48: (
        "intermediate_size intermediate_size_mlp ffn_hidden_size ffn_dim hidden_dim dff d_ff d_inner "
        "dim_ff decoder_ffn_dim encoder_ffn_dim feed_forward_size dense_intermediate_size n_inner"
    ),
    16: (
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size q_lora_rank "
        "kv_lora_rank o_lora_rank embedding_size input_embedding_size sliding_window sliding_window_size "
        "local_attention attention_window_size attention_chunk_size mamba_d_state state_size "
        "ssm_state_size laurel_rank hidden_size_per_layer_input adapter_rank gated_norm_rank "
        "bottleneck_size intra_bottleneck_size entity_emb_size embedding_rank router_hidden_size "
        "num_landmarks segment_means_seq_len keep_window_size time_step_rank mamba_dt_rank window_size "
        "chunk_size mamba_chunk_size hc_lowrank attention_head_dim ple_embed_dim attention_window "
        "block_size index_block_size"
    ),
    8: (
        "head_dim swa_head_dim kv_channels d_kv d_head dim_head v_head_dim qk_nope_head_dim mamba_d_head "
        "mamba_headdim mamba_head_dim mamba_n_heads mamba_num_heads n_mamba_heads index_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim num_experts n_routed_experts "
        "num_local_experts moe_num_experts zero_expert_num attention_head_size rotary_dim d_rel"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_hidden_layers n_layer n_layers num_layers encoder_layers "
        "decoder_layers num_encoder_layers num_decoder_layers num_blocks qk_rope_head_dim "
        "linear_num_heads linear_num_value_heads linear_num_key_heads index_n_heads num_query_groups "
        "layer_group_size max_window_layers"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k n_group num_expert_group n_groups num_nextn_predict_layers "
        "num_kv_shared_layers num_layers_per_stack"
    ),
    1: "topk_group",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}


# sizes that are set although they are optional in the architecture
_GIVEN = ("head_dim", "num_experts_per_tok", "n_routed_experts")
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_HALF = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 0],
    "partial_rotary_factor": 0.5,
}
_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_BY_TYPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    for kind in ("sliding_attention", "full_attention")
}
# settings that an architecture needs besides its sizes
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": _BY_TYPE,
    },
    "deepseek_v2": {"head_dim": None},
    "dots1": {"n_shared_experts": 1},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [2, 2]},
    "glm4v_moe_text": {"rope_parameters": _HALF},
    "glm4v_text": _AXES,
    "glm_image_text": _AXES,
    "glm_ocr_text": _AXES,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 4},
    "luke": {"entity_vocab_size": 16},
    "mamba2": {"num_heads": 8},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl_text": _AXES,
    "qwen2_vl_text": _AXES,
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_buckets": 4,
    },
    "roc_bert": {
        "shape_vocab_size": 260,
        "pronunciation_vocab_size": 260,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "squeezebert": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID},
    "xlstm": {"hidden_size": 64, "num_heads": 2, "qk_dim_factor": 1.0},
    "zaya": {"num_experts_per_tok": 1},
}
# architectures whose base model needs more than token ids, or cannot be made tiny
_NO_TEXT = {
    "dots3_note_text": "has sizes for each of its sliding layers: no tiny model",
    "blip_2_qformer": "reads query embeddings",
    "bros": "reads boxes",
    "fastspeech2_conformer": "reads phonemes, and gives speech",
    "layoutlmv2": "reads boxes and images",
    "layoutlmv3": "reads boxes and images",
    "lxmert": "reads visual features",
    "qwen4_exp_text": "has separate sizes for its attention: no tiny model",
    "seamless_m4t": "reads speech",
    "seamless_m4t_v2": "reads speech",
    "udop": "reads boxes",
    "vilt": "reads images",
    "vits": "reads characters, and gives speech",
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a configuration of `model_type`: four layers of width 32, and the vocabulary of `tiny_tokenizer`.

    Every field that is a size, a count or a rank is set to a small value, whatever its name (``hidden_size``,
    ``n_embd``, ``d_model``); other fields keep the architecture's default.

    Args:
        model_type: A text architecture of transformers, such as ``"gpt_neox"``.
        overrides: Fields of the configuration, such as ``num_hidden_layers=6``.

    Raises:
        ValueError: If transformers has no such architecture, it does not read token ids, or its configuration
            refuses small sizes; the message gives the reason.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no architecture {model_type!r}: {hint(model_type, CONFIG_MAPPING.keys())}"
        )
    kind = CONFIG_MAPPING[model_type]
    _check_reads_text(model_type, kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    values = {
        name: _small(name, default, defaults) for name, default in defaults.items() if _is_size(name, default)
    }
    values |= {name: token for name, token in _SPECIAL_IDS.items() if name in defaults}
    values |= _FIELDS.get(model_type, {})
    try:
        return kind(**{**values, **overrides})
    except Exception as error:
        raise ValueError(f"no tiny configuration of {model_type!r}: {error}") from error


def _check_reads_text(model_type: str, kind: type[PreTrainedConfig]) -> None:
    if kind not in MODEL_MAPPING:
        raise ValueError(f"{model_type!r} has no base model in transformers (AutoModel)")
    models = MODEL_MAPPING[kind]
    model = models[0] if isinstance(models, tuple) else models
    if model_type in _NO_TEXT:
        raise ValueError(f"{model_type!r} {_NO_TEXT[model_type]}")
    if kind.sub_configs:
        parts = ", ".join(kind.sub_configs)
        raise ValueError(f"{model_type!r} is made of several models ({parts}), not a text model alone")
    if model.main_input_name != "input_ids" or "vocab_size" not in {
        *kind.__dataclass_fields__,
        *kind.attribute_map,
    }:
        raise ValueError(
            f"{model_type!r} reads {model.main_input_name}, not token ids: it is not a text model"
        )


def _is_size(name: str, default: object) -> bool:
    if name in _GIVEN and default is None:
        return True
    return name in _SMALL and isinstance(default, int) and not isinstance(default, bool) and default > 0


def _small(name: str, default: Any, defaults: dict[str, Any]) -> int:
    """The tiny value of a size; with as many key-value heads as query heads by default, so has the tiny model."""
    if name in ("num_key_value_heads", "swa_num_key_value_heads") and default == defaults.get(
        name.replace("key_value", "attention")
    ):
        return _SMALL["num_attention_heads"]
    return _SMALL[name]
