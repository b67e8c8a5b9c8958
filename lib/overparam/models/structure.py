"""Where a transformer keeps its blocks and its final norm."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# (path of the block list, path of the norm that follows the last block), looked up in this order.
_LAYOUTS: tuple[tuple[str, str | None], ...] = (
    ("layers", "norm"),  # llama, mistral, qwen2, qwen3, phi3, gemma3
    ("layers", "final_norm"),  # modernbert
    ("encoder.layer", None),  # bert, mpnet: each block ends in its own norm
)


@dataclass(frozen=True)
class Blocks:
    """The stack of blocks of one model.

    Attributes:
        layers: The blocks, first to last.
        path: Dotted path of `layers` inside the model.
        norm: The norm after the last block, or None where each block ends in its own.
    """

    layers: nn.ModuleList
    path: str
    norm: nn.Module | None


def blocks(model: PreTrainedModel) -> Blocks:
    """Find the blocks and the final norm of a text encoder or of a decoder without its head.

    Raises:
        ValueError: If the model has none of the known layouts.
    """
    for path, norm_path in _LAYOUTS:
        layers = _get(model, path)
        norm = _get(model, norm_path) if norm_path else None
        if isinstance(layers, nn.ModuleList) and (norm is not None or norm_path is None):
            return Blocks(layers, path, norm)
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"{type(model).__name__} has no stack of blocks at {', '.join(path for path, _ in _LAYOUTS)}; "
        f"its parts are: {children}. Load it with AutoModel, without a task head."
    )


def _get(module: nn.Module, path: str) -> nn.Module | None:
    current: nn.Module | None = module
    for name in path.split("."):
        current = getattr(current, name, None)
    return current


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` that shares its parameters and buffers, so that it takes no memory of its own.

    What replaces a module or a tensor of the copy (truncating, slicing) leaves the original as it is; what writes
    into a tensor (training) changes both.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
