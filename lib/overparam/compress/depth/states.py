"""Hidden states between blocks, observed during an ordinary forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.models import blocks
from overparam.models.hooks import hooks


@contextmanager
def each_depth(
    model: PreTrainedModel, visit: Callable[[int, torch.Tensor], None], depths: Sequence[int] | None = None
) -> Iterator[None]:
    """Call ``visit(depth, hidden_states)`` for each depth during every forward pass.

    States are taken before anything that follows the last block, such as a final norm; depth 0 is the embedding layer.
    """
    layers = blocks(model).layers

    def before_first(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(0, args[0] if args else kwargs["hidden_states"])

    def after(depth: int) -> Callable[[Any, Any, Any], None]:
        return lambda _, __, output: visit(depth, first(output))

    handles = []
    for depth in range(len(layers) + 1) if depths is None else depths:
        if depth == 0:
            handles.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
        else:
            handles.append(layers[depth - 1].register_forward_hook(after(depth)))
    with hooks(handles):
        yield


def first(output: Any) -> Any:
    """The first output of a module: the hidden states, if it returns several values."""
    return output[0] if isinstance(output, tuple | list) else output


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments that keep a decoder from storing keys and values, which are not used here."""
    return (
        {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", None) is not None else {}
    )
