"""Floating-point operations of a gpt_oss decoder: counted by PyTorch, and by the closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRAINING = 3  # a backward pass computes two products for each one of the forward pass


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
    scores = 4 * heads * width * length
    return PerToken(
        attention=layers * (projections + scores),
        router=layers * 2 * hidden * config.num_local_experts,
        experts=layers * config.num_experts_per_tok * 6 * hidden * config.intermediate_size,
        head=2 * hidden * config.vocab_size,
    )


def counted(model: Any, length: int, *, experts: str = "eager") -> float:
    """Let PyTorch count the operations of a forward pass, a token.

    `FlopCounterMode` counts nothing for grouped products of matrices, nor for the CPU's fused attention: experts must
    be computed one by one, and attention in "eager" mode.

    Args:
        model: A decoder with its head, whose attention is "eager".
        length: Tokens of the sequence.
        experts: "eager", or what is to be shown to count too little.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = model.config
    before = config._experts_implementation_internal
    config._experts_implementation_internal = experts
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.arange(length)[None] % config.vocab_size, use_cache=False)
    finally:
        config._experts_implementation_internal = before
    return float(counter.get_total_flops()) / length
