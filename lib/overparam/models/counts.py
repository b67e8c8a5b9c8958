"""Parameter counts by part of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has; tied tensors are counted once.

    Attributes:
        total: All parameters.
        embedding: Token, position and type embedding tables.
        block: Everything that is neither an embedding table nor an expert.
        expert: Experts of mixture-of-experts layers.
        active: Parameters that one token uses: all but embedding tables and experts it is not routed to.
    """

    total: int
    embedding: int
    block: int
    expert: int
    active: int


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count the parameters of `model`, the embedding table included.

    Published counts of pruned encoders often leave out the embedding table, which is most of a small model with a
    large vocabulary.
    """
    embedding_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    total = embedding = expert = 0
    for name, parameter in model.named_parameters():  # yields a tied tensor once
        size = parameter.numel()
        total += size
        if id(parameter) in embedding_ids:
            embedding += size
        elif ".experts." in name:
            expert += size
    block = total - embedding - expert
    return ParameterCounts(total, embedding, block, expert, block + _active_experts(model))


def _active_experts(model: PreTrainedModel) -> int:
    """Parameters of the experts that a token is routed to; layers may differ in experts and in top-k."""
    active = 0
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        tensors = list(experts.parameters())
        count = len(experts) if isinstance(experts, nn.ModuleList) else tensors[0].shape[0]
        top_k = next((part.top_k for part in (*block.children(), block) if hasattr(part, "top_k")), None)
        if top_k is None:
            config = model.config.get_text_config()
            top_k = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
        active += sum(tensor.numel() for tensor in tensors) // count * int(top_k)
    return active
