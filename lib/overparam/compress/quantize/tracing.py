"""Transformers models as `openvino.Model`: the modules to trace, with the masks that the model itself requests.

A decoder keeps its keys and values inside, as with OpenVINO's own exporters, so that a step of generation takes one
token and returns its logits.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import DynamicCache, DynamicLayer

from overparam import models
from overparam.compress.quantize.openvino import library

Shape = tuple[int, int]
"""Heads and width of the keys or values of one layer."""

# function of transformers that makes a mask -> from the configuration, which keys a query sees
_MASKS: dict[str, Callable[[Any], Callable[..., torch.Tensor]]] = {
    "create_causal_mask": lambda _: masking_utils.causal_mask_function,
    "create_sliding_window_causal_mask": lambda config: masking_utils.sliding_window_causal_mask_function(
        config.sliding_window
    ),
    "create_bidirectional_mask": lambda _: masking_utils.bidirectional_mask_function,
    "create_bidirectional_sliding_window_mask": lambda config: (
        masking_utils.sliding_window_bidirectional_mask_function(config.sliding_window)
    ),
}


def traced_encoder(model: PreTrainedModel) -> Any:
    """Return a text encoder as `openvino.Model`: input_ids, attention_mask -> last_hidden_state, any sizes."""
    example = {
        "input_ids": torch.ones((2, 8), dtype=torch.long),
        "attention_mask": torch.ones((2, 8), dtype=torch.long),
    }
    converted = _converted(EncoderStep(in_float32(model)), example)
    _name(converted.inputs, list(example))
    _name(converted.outputs, ["last_hidden_state"])
    return converted


def traced_block(model: PreTrainedModel, hidden: int) -> Any:
    """Return an encoder that is given hidden states in place of embeddings: hidden_states, attention_mask -> the same.

    Args:
        model: An encoder whose embeddings return `inputs_embeds` as they are.
        hidden: Width of the states.
    """
    example = {
        "hidden_states": torch.ones((2, 8, hidden)),
        "attention_mask": torch.ones((2, 8), dtype=torch.long),
    }
    converted = _converted(BlockStep(in_float32(model)), example)
    _name(converted.inputs, list(example))
    _name(converted.outputs, ["last_hidden_state"])
    return converted


def traced_decoder(model: PreTrainedModel) -> Any:
    """Return a decoder as stateful `openvino.Model`: input_ids, attention_mask, position_ids, beam_idx -> logits.

    Inputs and states are named as by OpenVINO's exporters; the numbers of texts and tokens are free.

    Raises:
        ValueError: The decoder keeps state other than a key and a value per token.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = in_float32(model)
    shapes = kept_shapes(model)
    past = tuple(tuple(torch.zeros(2, heads, 3, width) for heads, width in layer) for layer in shapes)
    example = {
        "input_ids": torch.ones((2, 2), dtype=torch.long),
        "attention_mask": torch.ones((2, 5), dtype=torch.long),
        "position_ids": torch.tensor([[3, 4], [3, 4]]),
        "past": past,
    }
    converted = _converted(DecoderStep(model), example)
    states = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    _name(
        converted.inputs,
        ["input_ids", "attention_mask", "position_ids", *(f"past.{state}" for state in states)],
    )
    _name(converted.outputs, ["logits", *(f"present.{state}" for state in states)])
    # beam_idx selects rows of the states, as beam search needs; a batch starts with empty states
    chosen = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    _name([chosen.output(0)], ["beam_idx"])
    converted.add_parameters([chosen])
    flat = [part for layer in shapes for part in layer]
    for port, (heads, width) in zip(converted.inputs[3:-1], flat, strict=True):
        shape = port.partial_shape
        shape[1], shape[3] = heads, width
        port.get_node().set_partial_shape(shape)
        targets = port.get_target_inputs()
        gathered = ops.gather(port, chosen, ops.constant(0))
        for target in targets:
            target.replace_source_output(gathered.output(0))
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, {f"past.{state}": f"present.{state}" for state in states})
    _start_empty(converted)
    return converted


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model if all its weights are float32, else a float32 copy: exporters misread other dtypes."""
    floats = (each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point())
    return model if all(each.dtype == torch.float32 for each in floats) else copy.deepcopy(model).float()


class EncoderStep(nn.Module):
    """An encoder as it is traced."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.without_cache = {"use_cache": False} if _takes(model, "use_cache") else {}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of the last layer, [texts, tokens, hidden]."""
        with _traceable_masks(self.model):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, **self.without_cache}
            states: torch.Tensor = self.model(**given).last_hidden_state
        return states


class BlockStep(EncoderStep):
    """The same of an encoder that is given hidden states."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of the last layer, [texts, tokens, hidden]."""
        with _traceable_masks(self.model):
            given = {
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
                **self.without_cache,
            }
            states: torch.Tensor = self.model(**given).last_hidden_state
        return states


class DecoderStep(nn.Module):
    """A step of a decoder as it is traced, with keys and values in and out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.positions = _takes(model, "position_ids")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    ) -> tuple[torch.Tensor, ...]:
        """Return logits [texts, tokens, vocabulary], and keys and values of every layer."""
        cache = DynamicCache()
        cache.layers = [_layer(key, value) for key, value in past]
        given = {"position_ids": position_ids} if self.positions else {}
        with _traceable_masks(self.model):
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **given,
            )
        present = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
        return (output.logits, *present)


@contextmanager
def _traceable_masks(model: PreTrainedModel) -> Iterator[None]:
    """Replace the functions that make masks by ones that can be traced, with finite values also after a text's end.

    The model decides which masks it requests, and with which window; transformers' own functions say which keys a
    query sees.
    """
    places = {sys.modules[type(each).__module__] for each in model.modules()}
    replaced = [
        (place, name, getattr(place, name)) for place in places for name in _MASKS if hasattr(place, name)
    ]
    try:
        for place, name, _ in replaced:
            setattr(place, name, partial(_mask, _MASKS[name]))
        yield
    finally:
        for place, name, given in replaced:
            setattr(place, name, given)


def _mask(
    kind: Callable[[Any], Callable[..., torch.Tensor]],
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *_: Any,
    encoder_hidden_states: torch.Tensor | None = None,
    or_mask_function: Callable[..., torch.Tensor] | None = None,
    and_mask_function: Callable[..., torch.Tensor] | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    **__: Any,
) -> torch.Tensor:
    """A mask that is added to attention scores, [texts, 1, tokens, all tokens]."""
    if encoder_hidden_states is not None or block_sequence_ids is not None or attention_mask is None:
        raise ValueError("it attends to something other than the tokens of its text")
    if attention_mask.ndim != 2:
        return attention_mask
    total = attention_mask.shape[1]
    text, head = torch.arange(attention_mask.shape[0])[:, None, None, None], torch.zeros((), dtype=torch.long)
    queries = torch.arange(total - inputs_embeds.shape[1], total)[None, None, :, None]
    keys = torch.arange(total)[None, None, None]
    seen = kind(config)(text, head, queries, keys)
    if or_mask_function is not None:
        seen = seen | or_mask_function(text, head, queries, keys)
    if and_mask_function is not None:
        seen = seen & and_mask_function(text, head, queries, keys)
    seen = seen & attention_mask[:, None, None, :].bool() & (queries >= 0)
    return torch.where(seen, torch.zeros(()), torch.full((), torch.finfo(torch.float32).min))


def kept_shapes(model: PreTrainedModel) -> list[tuple[Shape, Shape]]:
    """Heads and widths of the keys and values that each layer keeps, observed on a short text."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones((1, 3), dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = []
    for number, (keys, values) in enumerate(kept):
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != 3 or values.shape[2] != 3:
            raise ValueError(f"layer {number} keeps something other than a key and a value for each token")
        shapes.append(((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])))
    if not shapes:
        raise ValueError("it keeps no keys and values")
    return shapes


def _layer(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _converted(step: nn.Module, example: dict[str, Any]) -> Any:
    with models.quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns about each branch that it fixes
        return library().convert_model(step.eval(), example_input=example)


def _start_empty(model: Any) -> None:
    """Initialise the states with the input's number of texts and no tokens."""
    from openvino import opset13 as ops

    ids = model.input("input_ids")
    texts = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            heads, width = (node.get_output_partial_shape(0)[dim].get_length() for dim in (1, 3))
            sizes = (ops.constant(np.array([n])) for n in (heads, 0, width))
            shape = ops.concat([texts, *sizes], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, dtype=np.float32), shape).output(0)])
    model.validate_nodes_and_infer_types()


def _name(ports: Sequence[Any], names: Sequence[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})
