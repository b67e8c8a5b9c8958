"""Published language models: their configurations, and what was said about their size.

Configurations are those of the models' own config.json files or papers; only shapes matter here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from overparam.models.anatomy import BOTH, NO_INPUT, Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Explanation = Literal["", "rounded", "table counted twice"]
_UNITS = {"M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Published:
    """A model, and what was published about it.

    Attributes:
        name: As it is called.
        kind: Name of the class of its configuration in transformers.
        shape: Arguments of that class.
        total: Parameters as published, such as "6.9 B".
        source: Where.
        year: Of the publication.
        active: Parameters that a token uses, as published; empty for a dense model.
        definition: Which of `anatomy.DEFINITIONS` that figure is.
        explanation: What explains a difference of more than 2 %.
        tokens: Tokens that it was trained on; 0: not published.
        batch: Tokens of an optimizer step; 0: not published, or it changed.
        device_hours: Hours of all devices together, as published.
        device: Which device: a name in `budget.DEVICES`.
    """

    name: str
    kind: str
    shape: dict[str, Any] = field(repr=False)
    total: str
    source: str
    year: int
    active: str = ""
    definition: str = BOTH
    explanation: Explanation = ""
    tokens: float = 0
    batch: float = 0
    device_hours: float = 0
    device: str = ""

    def config(self) -> PreTrainedConfig:
        """Return the configuration."""
        import transformers

        config: PreTrainedConfig = getattr(transformers, self.kind)(**self.shape)
        return config

    def difference(self, anatomy: Anatomy) -> float:
        """Return exact ÷ published − 1 of the total, in percent."""
        return 100 * (anatomy.total / number(self.total) - 1)

    def unexplained(self, anatomy: Anatomy) -> float:
        """Return the difference that is left after the explanation, in percent."""
        published = number(self.total)
        if self.explanation == "table counted twice":
            return 100 * ((anatomy.total + anatomy.table) / published - 1)
        if self.explanation == "rounded" and rounded(anatomy.total, self.total) == published:
            return 0.0
        return self.difference(anatomy)

    def active_difference(self, anatomy: Anatomy) -> dict[str, float]:
        """Return exact ÷ published − 1 of the active parameters, in percent, by definition."""
        return {name: 100 * (size / number(self.active) - 1) for name, size in anatomy.active.items()}


def number(text: str) -> float:
    """Return "6.9 B" as 6.9e9."""
    value, unit = text.split()
    return float(value) * _UNITS[unit]


def rounded(exact: int, text: str) -> float:
    """Return an exact number rounded to as many decimals as a published one has."""
    value, unit = text.split()
    decimals = max(0, -int(Decimal(value).as_tuple().exponent))
    return round(exact / _UNITS[unit], decimals) * _UNITS[unit]


def models() -> tuple[Published, ...]:
    """Return all of them, family by family."""
    return _MODELS


def find(name: str) -> Published:
    """Return one of them.

    Raises:
        ValueError: There is none of this name.
    """
    for each in _MODELS:
        if each.name == name:
            return each
    raise ValueError(
        f"no published model is called {name!r}: use one of {', '.join(m.name for m in _MODELS)}"
    )


def _gpt(layers: int, width: int, heads: int, context: int = 1024) -> dict[str, Any]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context}


def _bert(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "architectures": ["BertModel"]}  # fmt: skip


def _t5(layers: int, width: int, feed: int, heads: int, head: int = 64) -> dict[str, Any]:
    return {"num_layers": layers, "d_model": width, "d_ff": feed, "num_heads": heads, "d_kv": head, "vocab_size": 32128,
            "feed_forward_proj": "relu", "tie_word_embeddings": True}  # fmt: skip


def _llama(
    layers: int,
    width: int,
    heads: int,
    key_heads: int,
    feed: int,
    vocabulary: int,
    *,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "intermediate_size": feed, "vocab_size": vocabulary,
            "tie_word_embeddings": tied, **more}  # fmt: skip


def _qwen_moe(layers: int, width: int, heads: int, expert: int) -> dict[str, Any]:
    return _llama(layers, width, heads, 4, 3 * width, 151936, head_dim=128, moe_intermediate_size=expert,
                  num_experts=128, num_experts_per_tok=8)  # fmt: skip


def _oss(layers: int, experts: int) -> dict[str, Any]:
    return _llama(
        layers, 2880, 64, 8, 2880, 201088, head_dim=64, num_local_experts=experts, num_experts_per_tok=4
    )


_GPT2 = "Radford et al. 2019, repository openai/gpt-2, names of the checkpoints"
_GPT3 = "Brown et al. 2020, arXiv 2005.14165, table 2.1"
_BERT = "Devlin et al. 2018, arXiv 1810.04805, section 3"
_T5 = "Raffel et al. 2019, arXiv 1910.10683, section 3.7"
_LLAMA2 = "Touvron et al. 2023, arXiv 2307.09288, tables 1 and 2"
_LLAMA3 = "Llama team 2024, arXiv 2407.21783, and the model cards"
_MIXTRAL = "Mistral AI, announcements of the models"
_QWEN3 = "Qwen team 2025, arXiv 2505.09388, and the model cards"
_OSS = "OpenAI 2025, model card of gpt-oss, table 1"
_MODELS = (
    Published("GPT-2", "GPT2Config", _gpt(12, 768, 12), "124 M", _GPT2, 2019),
    Published("GPT-2 medium", "GPT2Config", _gpt(24, 1024, 16), "355 M", _GPT2, 2019),
    Published("GPT-2 large", "GPT2Config", _gpt(36, 1280, 20), "774 M", _GPT2, 2019),
    Published("GPT-2 XL", "GPT2Config", _gpt(48, 1600, 25), "1558 M", _GPT2, 2019),
    Published("GPT-3 6.7B", "GPT2Config", _gpt(32, 4096, 32, 2048), "6.7 B", _GPT3, 2020, tokens=300e9, batch=2e6),
    Published("GPT-3 175B", "GPT2Config", _gpt(96, 12288, 96, 2048), "175 B", _GPT3, 2020, tokens=300e9, batch=3.2e6,
              device_hours=3_552_000, device="V100"),  # Patterson et al. 2021, arXiv 2104.10350, table 4
    Published("BERT-base", "BertConfig", _bert(12, 768, 12), "110 M", _BERT, 2018),
    Published("BERT-large", "BertConfig", _bert(24, 1024, 16), "340 M", _BERT, 2018),
    Published("T5-small", "T5Config", _t5(6, 512, 2048, 8), "60 M", _T5, 2019),
    Published("T5-base", "T5Config", _t5(12, 768, 3072, 12), "220 M", _T5, 2019),
    Published("T5-large", "T5Config", _t5(24, 1024, 4096, 16), "770 M", _T5, 2019, explanation="table counted twice"),
    Published("T5-3B", "T5Config", _t5(24, 1024, 16384, 32, 128), "2.8 B", _T5, 2019),
    Published("T5-11B", "T5Config", _t5(24, 1024, 65536, 128, 128), "11 B", _T5, 2019, explanation="rounded"),
    Published("Pythia-70M", "GPTNeoXConfig", _llama(6, 512, 8, 8, 2048, 50304), "70 M",
              "Biderman et al. 2023, arXiv 2304.01373, table 1", 2023, tokens=299.9e9, batch=2097152),
    Published("Llama-2-7B", "LlamaConfig", _llama(32, 4096, 32, 32, 11008, 32000), "7 B", _LLAMA2, 2023,
              explanation="rounded", tokens=2e12, batch=4e6, device_hours=184_320, device="A100"),
    Published("Llama-2-70B", "LlamaConfig", _llama(80, 8192, 64, 8, 28672, 32000), "70 B", _LLAMA2, 2023,
              tokens=2e12, batch=4e6, device_hours=1_720_320, device="A100"),
    Published("Llama-3-8B", "LlamaConfig", _llama(32, 4096, 32, 8, 14336, 128256), "8 B", _LLAMA3, 2024, tokens=15e12),
    Published("Llama-3-70B", "LlamaConfig", _llama(80, 8192, 64, 8, 28672, 128256), "70 B", _LLAMA3, 2024,
              tokens=15e12),
    Published("Llama-3.1-405B", "LlamaConfig", _llama(126, 16384, 128, 8, 53248, 128256), "405 B", _LLAMA3, 2024,
              tokens=15.6e12, device_hours=30_840_000, device="H100"),
    Published("Llama-3.2-1B", "LlamaConfig", _llama(16, 2048, 32, 8, 8192, 128256, tied=True), "1.23 B", _LLAMA3, 2024),
    Published("Mistral-7B", "MistralConfig", _llama(32, 4096, 32, 8, 14336, 32000), "7.3 B", _MIXTRAL, 2023),
    Published("Gemma 3 270M", "Gemma3TextConfig",
              _llama(18, 640, 4, 1, 2048, 262144, tied=True, head_dim=256), "270 M",
              "Google 2025, announcement of Gemma 3 270M", 2025, tokens=6e12),
    Published("Mixtral-8x7B", "MixtralConfig",
              _llama(32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2), "46.7 B",
              _MIXTRAL, 2023, active="12.9 B"),
    Published("Mixtral-8x22B", "MixtralConfig",
              _llama(56, 6144, 48, 8, 16384, 32768, num_local_experts=8, num_experts_per_tok=2), "141 B",
              _MIXTRAL, 2024, active="39 B"),
    Published("OLMoE-1B-7B", "OlmoeConfig",
              _llama(16, 2048, 16, 16, 1024, 50304, num_experts=64, num_experts_per_tok=8), "6.9 B",
              "Muennighoff et al. 2024, arXiv 2409.02060, table 1", 2024, active="1.3 B", tokens=5.1e12),
    Published("Qwen3-30B-A3B", "Qwen3MoeConfig", _qwen_moe(48, 2048, 32, 768), "30.5 B", _QWEN3, 2025, active="3.3 B",
              tokens=36e12),
    Published("Qwen3-235B-A22B", "Qwen3MoeConfig", _qwen_moe(94, 4096, 64, 1536), "235 B", _QWEN3, 2025,
              active="22 B", tokens=36e12),
    Published("GPT-OSS-20B", "GptOssConfig", _oss(24, 32), "20.9 B", _OSS, 2025, active="3.6 B", definition=NO_INPUT),
    Published("GPT-OSS-120B", "GptOssConfig", _oss(36, 128), "116.8 B", _OSS, 2025, active="5.1 B",
              definition=NO_INPUT),
    Published("DeepSeek-V3", "DeepseekV3Config", {"tie_word_embeddings": False}, "671 B",
              "DeepSeek-AI 2024, arXiv 2412.19437, sections 1 and 4", 2024, active="37 B", tokens=14.8e12,
              device_hours=2_664_000, device="H800"),
)  # fmt: skip
