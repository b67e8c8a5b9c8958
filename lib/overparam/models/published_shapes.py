"""Published configurations of language models by name, without their weights; this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from overparam.support.suggest import hint


@dataclass(frozen=True)
class Shape:
    """A published configuration.

    Attributes:
        model_type: Of transformers.
        fields: Of the configuration.
        source: Where they are published.
        billions: Parameters in billions, as published, rounded; of what is built, where that is less.
        published_layers: Layers of the published model, where `fields` has fewer of them.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    billions: float = 0.0
    published_layers: int | None = None

    @property
    def layers(self) -> int:
        """Layers that are built."""
        return int(self.fields["num_hidden_layers"])


def _decoder(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "pad_token_id": 0, **more,
    }  # fmt: skip


_CARD = "config.json of {} on the Hugging Face hub"
SHAPES = {
    "Qwen3-0.6B": Shape(
        "qwen3",
        _decoder(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        _CARD.format("Qwen/Qwen3-0.6B"),
        0.6,
    ),
    "Llama-3.2-1B": Shape(
        "llama",
        _decoder(128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
        _CARD.format("meta-llama/Llama-3.2-1B"),
        1.24,
    ),
    "Llama-3.2-3B": Shape(
        "llama",
        _decoder(128256, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
        _CARD.format("meta-llama/Llama-3.2-3B"),
        3.21,
    ),
    "Phi-3-mini": Shape(
        "phi3",
        _decoder(32064, 3072, 8192, 32, 32, 32, tie_word_embeddings=False),
        _CARD.format("microsoft/Phi-3-mini-4k-instruct"),
        3.82,
    ),
    "Mistral-7B": Shape(
        "mistral",
        _decoder(32000, 4096, 14336, 32, 32, 8, tie_word_embeddings=False, sliding_window=None),
        _CARD.format("mistralai/Mistral-7B-Instruct-v0.2"),
        7.24,
    ),
    "Qwen2-7B": Shape(
        "qwen2",
        _decoder(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
        _CARD.format("Qwen/Qwen2-7B-Instruct"),
        7.62,
    ),
    "Llama-3-8B": Shape(
        "llama",
        _decoder(128256, 4096, 14336, 32, 32, 8, tie_word_embeddings=False),
        _CARD.format("meta-llama/Meta-Llama-3-8B-Instruct"),
        8.03,
    ),
    "Llama-3-70B, 16 layers": Shape(
        "llama",
        _decoder(128256, 8192, 28672, 16, 64, 8, tie_word_embeddings=False),
        _CARD.format("meta-llama/Meta-Llama-3-70B-Instruct"),
        15.8,
        80,
    ),
    "OLMoE-1B-7B": Shape(
        "olmoe",
        _decoder(
            50304, 2048, 1024, 16, 16, 16, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=False
        ),
        _CARD.format("allenai/OLMoE-1B-7B-0924"),
        6.92,
    ),
    "GPT-OSS-20B": Shape(
        "gpt_oss",
        _decoder(
            201088, 2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
            tie_word_embeddings=False,
        ),
        _CARD.format("openai/gpt-oss-20b"),
        20.9,
    ),
    "Qwen3-30B-A3B": Shape(
        "qwen3_moe",
        _decoder(
            151936, 2048, 6144, 48, 32, 4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
        ),
        _CARD.format("Qwen/Qwen3-30B-A3B"),
        30.5,
    ),
}  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of fields


def shape(name: str) -> Shape:
    """Return a published shape, or a tiny one of the same architecture, ``tiny-<name>``.

    Raises:
        ValueError: There is none of that name.
    """
    known = name.removeprefix("tiny-")
    if known not in SHAPES:
        raise ValueError(f"there is no shape {known!r}: {hint(known, SHAPES)}")
    found = SHAPES[known]
    if name == known:
        return found
    small = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16,
             "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
    fields = {key: small.get(key, value) for key, value in found.fields.items()}
    layers = None if found.published_layers is None else 8
    return Shape(found.model_type, fields, f"tiny: {found.source}", published_layers=layers)
