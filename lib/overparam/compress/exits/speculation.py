"""Decoders: the token that every depth would write, and decoding that is drafted by the first layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from overparam.compress.depth.proof import apply_tail, reading
from overparam.compress.depth.states import each_depth
from overparam.models import blocks, quiet
from overparam.models.generating import generation_config
from overparam.models.hooks import hooks


@dataclass(frozen=True)
class Decoded:
    """New tokens, and how often the whole model read to write them."""

    tokens: list[int]
    rounds: int


def next_tokens(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the likeliest token after each, read from every depth by the final norm and the output head.

    Args:
        model: A decoder with its head.
        ids: Of a text.

    Returns:
        int64 [tokens, layers]; the last column is what the model predicts.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    tail, layers = reading(decoder).tail, len(blocks(decoder).layers)
    found: list[torch.Tensor] = []

    def read(_: int, hidden: torch.Tensor) -> None:
        found.append(head(apply_tail(decoder, tail, hidden))[0].argmax(-1))

    with torch.inference_mode(), each_depth(decoder, read, range(1, layers + 1)):
        decoder(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return torch.stack(found, dim=1)


def decode(
    model: PreTrainedModel,
    ids: Sequence[int],
    *,
    new_tokens: int,
    ends: Sequence[int],
    draft_layers: int | None = None,
    drafts: int = 3,
) -> Decoded:
    """Continue a text greedily; with `draft_layers`, its first layers draft tokens that the whole model then checks.

    This is self-speculative decoding (LayerSkip, arXiv 2404.16710) by transformers' ``assistant_early_exit``, which
    shortens the model's configuration while it drafts; it is restored also after an error.

    Args:
        model: A decoder with its head, in evaluation mode.
        ids: Of the text.
        new_tokens: Maximum number of new tokens.
        ends: Tokens that end the text; the first of them is the last of the result.
        draft_layers: 1 to one less than all; None: plain greedy decoding.
        drafts: Tokens drafted at once.

    Raises:
        ValueError: `draft_layers` is out of range, or the model does not read its configuration while it runs, so that
            its first layers cannot be run alone.
    """
    stack = blocks(model.get_decoder()).layers
    settings, own = generation_config(new_tokens, list(ends), ends[0]), model.generation_config
    if draft_layers is not None:
        if not 1 <= draft_layers < len(stack):
            raise ValueError(f"draft_layers must be in 1..{len(stack) - 1}, got {draft_layers}")
        settings.assistant_early_exit = draft_layers
    inner, layers, calls = model.get_decoder().config, len(stack), [0, 0]

    def count(place: int) -> None:
        calls[place] += 1

    counters = [
        stack[0].register_forward_hook(lambda *_: count(0)),
        stack[-1].register_forward_hook(lambda *_: count(1)),
    ]
    try:
        model.generation_config = copy.deepcopy(own)
        model.generation_config.num_assistant_tokens = drafts
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0
        given = torch.tensor([list(ids)])
        with torch.inference_mode(), hooks(counters), quiet():
            output = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    finally:
        model.generation_config, inner.num_hidden_layers = own, layers
    if draft_layers is not None and calls[0] == calls[1]:
        raise ValueError(
            f"{type(model).__name__} has run all its layers to draft: it does not read their number from its "
            "configuration"
        )
    return Decoded(output.sequences[0, len(ids) :].tolist(), calls[1])


def ceiling(layers: int, draft_layers: int, head: float, *, drafts: int, acceptance: float = 1.0) -> float:
    """Return how many times as fast self-speculative decoding can be where reading the weights is all that costs time.

    A round drafts `drafts` tokens by the first layers and the head, and checks them in one pass of the whole model;
    it gives one token more than are accepted. A draft's own cache, and every other cost, only lower this.

    Args:
        layers: Of the model.
        draft_layers: That draft.
        head: Share of the output head in the weights that a token needs, from `share_of_head`.
        drafts: Tokens drafted at once.
        acceptance: Chance that a drafted token is right when those before it were.
    """
    draft = head + (1 - head) * draft_layers / layers
    tokens = sum(acceptance**number for number in range(drafts + 1))
    return float(tokens / (drafts * draft + 1))


def share_of_head(model: PreTrainedModel) -> float:
    """Return the share of the output head in the weights that are read for a token: of it and all layers."""
    head: int = model.get_output_embeddings().weight.numel()
    rest = sum(each.numel() for each in blocks(model.get_decoder()).layers.parameters())
    return head / (head + rest)
