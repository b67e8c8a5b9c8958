"""Finding the blocks of a transformer."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

_LISTS = ("layers", "layer", "h", "blocks", "block")  # names of the list of blocks
# names of the number of blocks in configurations
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "encoder_layers")
_REASONS = {  # model type -> why it has no stack of blocks
    "albert": "all its layers are one layer with shared weights, so that a cut removes none",
    "flaubert": "the parts of a layer lie in separate lists",
    "funnel": "its blocks pool tokens, so that depths differ in length",
    "hrm_text": "its two stacks take turns several times",
    "xlm": "the parts of a layer lie in separate lists",
}


@dataclass(frozen=True)
class Blocks:
    """The stack of blocks of one model.

    Attributes:
        layers: The blocks, first to last.
        path: Dotted path of `layers` inside the model.
        counts: Fields of the configuration that hold the number of blocks.
    """

    layers: nn.ModuleList
    path: str
    counts: tuple[str, ...]


def blocks(model: PreTrainedModel) -> Blocks:
    """Find the blocks of a text encoder or of a decoder without its head.

    Raises:
        ValueError: If the model has a head, contains other models, or has no single stack of blocks.
    """
    if hasattr(model, "get_base_model"):  # the model has adapters of peft
        model = model.get_base_model()
    _check_is_text_model(model)
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and path.rpartition(".")[2] in _LISTS
        and next(module.parameters(), None) is not None
    }
    outer = {
        path: stacks[path] for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)
    }
    counted = {path: counts for path, layers in outer.items() if (counts := _counts(model, len(layers)))}
    if len(outer) > 1:
        outer = {path: outer[path] for path in counted}
    if len(outer) == 1:
        path, layers = next(iter(outer.items()))
        return Blocks(layers, path, counted.get(path, ()))
    children = ", ".join(name for name, _ in model.named_children())
    reason = _REASONS.get(model.config.model_type, f"its parts are: {children}")
    raise ValueError(
        f"{type(model).__name__} has no single stack of blocks: {reason}. Use a text encoder or decoder that has one, "
        "loaded with AutoModel, without a task head"
    )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` that shares its parameters and buffers, and so needs no memory of its own.

    Replacing a module or tensor of the copy (truncating, slicing) does not change the original; writing into a tensor
    (training) changes both.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _counts(model: PreTrainedModel, number: int) -> tuple[str, ...]:
    """Fields of the configuration, by their stored names, that hold this number of blocks."""
    names = dict.fromkeys(model.config.attribute_map.get(name, name) for name in COUNTS)
    return tuple(name for name in names if getattr(model.config, name, None) == number)


def _check_is_text_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is not a model of transformers: load it with AutoModel, without a task head"
        )
    if model.base_model is not model:
        raise ValueError(
            f"{name} has a task head: load it with AutoModel, without a task head, or pass model.base_model"
        )
    text = model.config.get_text_config()
    if text is not model.config:
        inside = [
            path
            for path, part in model.named_modules()
            if isinstance(part, PreTrainedModel) and part.config is text
        ]
        where = f"pass model.{inside[0]}" if inside else "load only its text model"
        raise ValueError(f"{name} is made of several models: for its text model, {where}")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} has an encoder and a decoder: pass a model that is one of them, such as T5EncoderModel"
        )
