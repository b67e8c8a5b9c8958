"""Floating-point operations of a forward pass: the closed form from a configuration, and PyTorch's own count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRAINING = 3  # a backward pass computes two products for each one of the forward pass
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # layers whose scores are counted


@dataclass(frozen=True)
class PerToken:
    """Operations of a forward pass, a token: two for each weight that is used, multiply and add.

    Attributes:
        attention: Projections, and scores and sums over the whole context, as eager attention computes them.
        router: Of all layers.
        experts: Those that a token uses; a dense layer is one expert.
        head: The product with the table of output embeddings.
    """

    attention: float
    router: float
    experts: float
    head: float

    @property
    def blocks(self) -> float:
        """All but the head."""
        return self.attention + self.router + self.experts

    @property
    def total(self) -> float:
        """All of them. Looking up input embeddings is free."""
        return self.blocks + self.head


def per_token(config: Any, length: int) -> PerToken:
    """Return the closed form.

    Args:
        config: Of a gpt_oss decoder whose layers all have full attention.
        length: Tokens of the sequence.
    """
    hidden, layers, width = config.hidden_size, config.num_hidden_layers, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    projections = 2 * hidden * width * (2 * heads + 2 * key_heads)
    return PerToken(
        attention=layers * projections + attention_scores(config, length),
        router=layers * 2 * hidden * config.num_local_experts,
        experts=layers * config.num_experts_per_tok * 6 * hidden * config.intermediate_size,
        head=2 * hidden * config.vocab_size,
    )


def attention_scores(config: Any, length: int) -> float:
    """Return the operations a token of attention's scores and weighted sums, which no parameter takes part in.

    Every token is compared with every other, as eager attention computes it; kernels that skip what a causal mask or a
    sliding window hides need fewer.

    Args:
        config: Of a transformer with one stack of layers.
        length: Tokens of the sequence.

    Raises:
        ValueError: The configuration lacks a field that is needed, or has layers without such scores.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(text, "model_type", type(text).__name__)
    if others := sorted({*(getattr(text, "layer_types", None) or ())} - {*_ATTENTION}):
        raise ValueError(f"{kind} has layers of type {others[0]!r}, whose operations are not counted here")
    layers, heads = (_field(text, kind, name) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(text, "head_dim", None) or _field(text, kind, "hidden_size") // heads
    keys = (getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0)) or width
    values = getattr(text, "v_head_dim", None) or width
    return 2.0 * layers * heads * (keys + values) * length


def _field(config: Any, kind: str, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the configuration of {kind} has no {name}: operations cannot be counted without")
    return value


def counted(model: Any, length: int, *, experts: str = "eager") -> float:
    """Let PyTorch count the operations of a forward pass, a token.

    `FlopCounterMode` counts nothing for grouped products of matrices, nor for the CPU's fused attention: experts must
    be computed one by one ("eager", which looks at values) or as batched products ("batched_mm", which also runs on
    the meta device), and attention in "eager" mode.

    Args:
        model: A decoder with its head or an encoder without one, whose attention is "eager"; on the meta device, no
            weights are needed.
        length: Tokens of the sequence.
        experts: "eager", "batched_mm", or what is to be shown to count too little.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = model.config
    before = config._experts_implementation_internal
    config._experts_implementation_internal = experts
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ids = torch.arange(length, device=model.device)[None] % config.vocab_size
            if model.get_output_embeddings() is None:  # an encoder
                model(input_ids=ids)
            else:  # without a mask, decoders look at the positions, which have no values on the meta device
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        config._experts_implementation_internal = before
    return float(counter.get_total_flops()) / length
