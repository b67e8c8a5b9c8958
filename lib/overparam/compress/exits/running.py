"""An encoder that stops computing: texts leave after any block, and the others go on without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.depth.proof import apply_tail, reading
from overparam.compress.depth.states import first, no_cache
from overparam.models import blocks
from overparam.models.hooks import hooks
from overparam.models.reading.weights import pooling_weights

Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class _AllLeft(Exception):  # noqa: N818, no error: it ends the pass
    """Ends a forward pass in which no text is left."""


def early(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    visit: Visit,
    *,
    pooling: str = "mean",
    exits: range | None = None,
    regroup: bool = True,
) -> None:
    """Run an encoder block by block until every text has left.

    The blocks, their masks and positions are those of the model's own forward pass, which ends by an exception inside
    of it. Texts that have left take their rows of the hidden states, and of everything that is handed to later blocks,
    with them.

    Args:
        model: A text encoder, in evaluation mode.
        input_ids: [texts, tokens].
        attention_mask: [texts, tokens].
        visit: Called after every block in `exits` with the number of the exit, the numbers of the texts that are left
            [rows] and their pooled states [rows, hidden]; returns which of them leave, bool [rows], or None for all.
        pooling: See `depth.layer_embeddings`.
        exits: Blocks after which texts may leave; all by default. All texts leave after the last.
        regroup: Take texts that have left out of the batch. Otherwise they are computed until all have left.

    Raises:
        ValueError: The model has no stack of blocks that can be stopped; or padding changes its results, and texts
            have unequal lengths.
        NotExactError: Depths of this architecture cannot be read from one pass.
    """
    how, layers, size = reading(model), blocks(model).layers, len(input_ids)
    if not how.padding_is_neutral and not bool(attention_mask.all()):
        raise ValueError(
            f"{type(model).__name__} gives other results with padding: run texts of one length together"
        )
    weights = pooling_weights(pooling, attention_mask, attention_mask).to(model.device)  # [texts, 1, tokens]
    there = torch.arange(size)  # texts in the batch
    inside = torch.ones(size, dtype=torch.bool)  # of these, the texts that have not left
    ends = range(len(layers)) if exits is None else exits

    def after(exit: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            nonlocal there, inside, weights
            hidden = first(output)
            states = torch.bmm(weights, apply_tail(model, how.tail, hidden).to(weights.dtype)).squeeze(1)
            everyone = bool(inside.all())
            gone = visit(exit, there if everyone else there[inside], states if everyone else states[inside])
            if gone is None or exit == len(layers) - 1 or bool(gone.all()):
                raise _AllLeft
            if not bool(gone.any()):
                return None
            inside = inside.clone()
            inside[inside.clone()] = ~gone
            if not regroup:
                return None
            stay = inside
            there, weights, inside = there[stay], weights[stay], torch.ones(int(stay.sum()), dtype=torch.bool)
            return (hidden[stay], *output[1:]) if isinstance(output, tuple | list) else hidden[stay]

        return hook

    def without_the_gone(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(there) == size:
            return None
        return tuple(map(theirs, args)), {name: theirs(value) for name, value in kwargs.items()}

    def theirs(value: Any) -> Any:
        """The rows of a mask, or of positions, of the texts that are left; the hidden states have no others."""
        if isinstance(value, tuple | list):
            return type(value)(map(theirs, value))
        per_text = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == size
        return value[there] if per_text else value

    handles = [layers[exit].register_forward_hook(after(exit)) for exit in sorted({*ends, len(layers) - 1})]
    if regroup and size > 1:
        handles += [each.register_forward_pre_hook(without_the_gone, with_kwargs=True) for each in layers[1:]]
    with torch.inference_mode(), hooks(handles):
        try:
            model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                **no_cache(model),
            )
        except _AllLeft:
            return
