"""Parameter counts that say where the parameters are."""

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
        active: What one token uses: all but the embedding tables and the experts it is not routed to.
    """

    total: int
    embedding: int
    block: int
    expert: int
    active: int


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count the parameters of `model`, the embedding table included.

    Published counts of pruned encoders often leave the embedding table out; on a small model with a
    large vocabulary it is most of the model.
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
    return ParameterCounts(total, embedding, block, expert, block + _active_experts(model, expert))


def _active_experts(model: PreTrainedModel, expert: int) -> int:
    if not expert:
        return 0
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next(getattr(config, name) for name in names if getattr(config, name, None))
    return expert * int(config.num_experts_per_tok) // int(experts)
