"""Sparse upcycling: a mixture that begins as a trained dense model, and computes the same at first."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overparam.compress.experts.layout import layers

_SPLIT = {"gate_up_proj": -1, "gate_up_proj_bias": -1, "down_proj": -2}  # dimension of the hidden units


@torch.no_grad()
def upcycle(dense: PreTrainedModel, mixture: PreTrainedModel) -> PreTrainedModel:
    """Fill a gpt_oss mixture with the weights of a dense one: gpt_oss with one expert, ``top_k`` times as wide.

    The dense units are cut into ``top_k`` parts, and consecutive experts get one part each. Experts of such a group
    begin with the same row of the router, so that a token chooses a whole group, which is the dense layer. This is the
    virtual group of arXiv 2410.07524.

    Args:
        dense: The trained model.
        mixture: Changed in place; its routers keep the first row of every group.

    Returns:
        The mixture.

    Raises:
        ValueError: The models do not fit each other.
    """
    whole, parts = layers(dense), layers(mixture)
    top_k, number = parts[0].top_k, parts[0].n_experts
    if number % top_k:
        raise ValueError(f"experts come in groups of top_k = {top_k}, which does not divide {number}")
    own = dict(mixture.named_parameters())
    for name, value in dense.named_parameters():
        if ".experts." not in name and ".router." not in name:
            _same(name, own[name], value.shape)
            own[name].copy_(value)
    for one, many in zip(whole, parts, strict=True):
        for name, parameter in many.experts.named_parameters():
            pieces = _pieces(name, one.experts.get_parameter(name)[0], top_k)
            _same(name, parameter[0], pieces[0].shape)
            for expert in range(number):
                parameter[expert] = pieces[expert % top_k]
        for rows in many.router.parameters():  # weight [experts, hidden] and bias [experts]
            rows.copy_(rows[::top_k].repeat_interleave(top_k, 0))
    return mixture


def _pieces(name: str, value: Tensor, top_k: int) -> list[Tensor]:
    """The parts of a dense layer's tensor; the weights 1/top_k of the router are undone in the second matrix."""
    if name not in _SPLIT:
        return [value] * top_k
    return [part * (top_k if name == "down_proj" else 1) for part in value.chunk(top_k, _SPLIT[name])]


def _same(name: str, found: Tensor, shape: torch.Size) -> None:
    if found.shape != shape:
        raise ValueError(
            f"{name} has shape {list(found.shape)} in the mixture, the dense model needs {list(shape)}"
        )
