"""Models in OpenVINO, quantized by NNCF: the deployment path for CPUs.

Export goes through `openvino.convert_model`; a decoder keeps its keys and values inside, as OpenVINO's own exporters
do, so that a step of generation takes one token in and gives its logits out.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from overparam import models
from overparam.compress.quantize.schemes import SCHEMES

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids and attention mask, both int64 [texts, tokens]."""

_NAME = "model.xml"


class Encoder:
    """A text encoder in OpenVINO: token ids and mask in, hidden states of the last layer out."""

    def __init__(self, model: Any, *, exact: bool = False) -> None:
        """Compile a model for this machine.

        Args:
            model: `openvino.Model` of `export_encoder`, compressed or not.
            exact: Compute in float32 also where the machine would rather not.
        """
        self._run = _compiled(model, exact)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the hidden states, float32 [texts, tokens, hidden]."""
        found = self._run([input_ids.numpy(), attention_mask.numpy()])[0]
        return torch.from_numpy(found)


class Decoder:
    """A decoder in OpenVINO, with its keys and values inside: token ids in, logits out."""

    def __init__(self, model: Any, *, exact: bool = False) -> None:
        """Compile a model for this machine; arguments as those of `Encoder`."""
        self._request = _compiled(model, exact).create_infer_request()
        self._seen = 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._seen = 0

    def __call__(self, input_ids: torch.Tensor, *, last: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Read further tokens of one text, [1, tokens], and return their logits, float32 [1, tokens, vocabulary].

        It computes all of them, whatever `last` is.
        """
        tokens = input_ids.shape[1]
        total = self._seen + tokens
        self._request.infer(
            {
                "input_ids": input_ids.numpy(),
                "attention_mask": np.ones((1, total), dtype=np.int64),
                "position_ids": np.arange(self._seen, total, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        self._seen = total
        return torch.from_numpy(self._request.get_tensor("logits").data.copy())


def export_encoder(model: PreTrainedModel) -> Any:
    """Return a text encoder as `openvino.Model`: input_ids, attention_mask -> last_hidden_state, any sizes."""
    example = {
        "input_ids": torch.ones((2, 8), dtype=torch.long),
        "attention_mask": torch.ones((2, 8), dtype=torch.long),
    }
    found = _converted(_EncoderStep(model), example)
    _name(found.inputs, list(example))
    _name(found.outputs, ["last_hidden_state"])
    return found


def export_decoder(model: PreTrainedModel) -> Any:
    """Return a decoder as stateful `openvino.Model`: input_ids, attention_mask, position_ids, beam_idx -> logits.

    Its inputs and states are those that OpenVINO's exporters give a decoder, of any number of texts and tokens.

    Raises:
        ValueError: A decoder whose layers attend in a way other than causally, in full or within a window.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"a decoder with {', '.join(sorted(unknown))} cannot be exported")
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = tuple((torch.zeros(2, heads, 3, width), torch.zeros(2, heads, 3, width)) for _ in range(layers))
    example = {
        "input_ids": torch.ones((2, 2), dtype=torch.long),
        "attention_mask": torch.ones((2, 5), dtype=torch.long),
        "position_ids": torch.tensor([[3, 4], [3, 4]]),
        "past": past,
    }
    found = _converted(_DecoderStep(model, kinds), example)
    states = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    _name(
        found.inputs, ["input_ids", "attention_mask", "position_ids", *(f"past.{state}" for state in states)]
    )
    _name(found.outputs, ["logits", *(f"present.{state}" for state in states)])
    # rows of the states are chosen by beam_idx, as beam search needs them; a batch starts with empty states
    chosen = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    _name([chosen.output(0)], ["beam_idx"])
    found.add_parameters([chosen])
    for port in found.inputs[3:-1]:
        shape = port.partial_shape
        shape[1], shape[3] = heads, width
        port.get_node().set_partial_shape(shape)
        targets = port.get_target_inputs()
        gathered = ops.gather(port, chosen, ops.constant(0))
        for target in targets:
            target.replace_source_output(gathered.output(0))
    found.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(found, {f"past.{state}": f"present.{state}" for state in states})
    _start_empty(found, heads, width)
    return found


def compressed(model: Any, name: str, calibration: Sequence[Batch] = ()) -> Any:
    """Return a copy of an exported model, quantized by NNCF.

    Args:
        model: Of `export_encoder` or `export_decoder`; it is not changed.
        name: A scheme of "openvino".
        calibration: Batches of real text: "openvino-int8" needs them for the range of activations, AWQ and GPTQ for
            what a weight's error does to the outputs.

    Raises:
        ValueError: No calibration where it is needed.
    """
    if name == "openvino-fp32":
        return model
    nncf = _nncf()
    data = None
    if SCHEMES[name].calibrated:
        if not calibration:
            raise ValueError(f"{name} needs calibration texts: it looks at the activations that they lead to")
        data = nncf.Dataset([_inputs(model, *batch) for batch in calibration])
    with _quiet():
        if name == "openvino-int8":
            return nncf.quantize(
                model.clone(), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
            )
        modes = nncf.CompressWeightsMode
        if name == "openvino-int8-weights":
            return nncf.compress_weights(model.clone(), mode=modes.INT8_ASYM)
        return nncf.compress_weights(
            model.clone(),
            mode=modes.INT4_ASYM,
            group_size=SCHEMES[name].group_size,
            ratio=1.0,
            dataset=data,
            subset_size=len(calibration) or 1,
            awq=name == "openvino-int4-awq",
            gptq=name == "openvino-int4-gptq",
        )


def _inputs(model: Any, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> dict[str, Any]:
    """What an exported model reads: of a decoder, whole texts that nothing stands before."""
    found = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any("beam_idx" in port.get_names() for port in model.inputs):
        found["position_ids"] = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
        found["beam_idx"] = np.arange(len(input_ids), dtype=np.int32)
    return found


def save(model: Any, folder: Path) -> None:
    """Save a model as OpenVINO's model.xml and model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    _library().save_model(model, folder / _NAME, compress_to_fp16=False)


def load(folder: Path | str) -> Any:
    """Load a model that `save` wrote."""
    return _library().Core().read_model(Path(folder) / _NAME)


class _EncoderStep(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


class _DecoderStep(nn.Module):
    """A step with keys and values in and out; it makes the masks itself, since those of transformers do not trace."""

    def __init__(self, model: PreTrainedModel, kinds: set[str]) -> None:
        super().__init__()
        self.model = model
        self.kinds = kinds
        self.window = getattr(model.config.get_text_config(), "sliding_window", None)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    ) -> tuple[torch.Tensor, ...]:
        total = attention_mask.shape[1]
        keys = torch.arange(total)[None]  # [1, total]
        queries = torch.arange(total - input_ids.shape[1], total)[:, None]  # [tokens, 1]
        causal = keys <= queries
        allowed = {"full_attention": causal}
        if self.window:
            allowed["sliding_attention"] = causal & (keys > queries - self.window)
        seen = attention_mask[:, None, None, :].bool()
        least = torch.full((), torch.finfo(torch.float32).min)
        masks = {
            kind: torch.where(seen & allowed[kind][None, None], torch.zeros(()), least) for kind in self.kinds
        }
        cache = DynamicCache()
        cache.layers = [_layer(key, value) for key, value in past]
        found = self.model(
            input_ids=input_ids,
            attention_mask=masks
            if len(masks) > 1 or "sliding_attention" in masks
            else masks["full_attention"],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]
        return (found.logits, *present)


def _layer(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def _converted(step: nn.Module, example: dict[str, Any]) -> Any:
    openvino = _library()
    with _quiet(), torch.no_grad():
        return openvino.convert_model(step.eval(), example_input=example)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of tracing, one for each branch that is taken once and for all, and of progress bars."""
    with models.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _start_empty(model: Any, heads: int, width: int) -> None:
    """Let the states begin with as many texts as the input has, and no tokens."""
    from openvino import opset13 as ops

    ids = model.input("input_ids")
    texts = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    shape = ops.concat([texts, *(ops.constant(np.array([n])) for n in (heads, 0, width))], axis=0)
    empty = ops.broadcast(ops.constant(0.0, dtype=np.float32), shape)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def _name(ports: Sequence[Any], names: Sequence[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})


def _compiled(model: Any, exact: bool) -> Any:
    openvino = _library()
    settings = {"PERFORMANCE_HINT": "LATENCY"}
    if exact:  # by default a decoder's keys and values are kept in 8 bits
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return openvino.Core().compile_model(model, "CPU", settings)


def _library() -> Any:
    """OpenVINO, without its telemetry: nothing is sent anywhere."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _nncf() -> Any:
    _library()  # NNCF would load the telemetry too
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
