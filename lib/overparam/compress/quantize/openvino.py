"""Models in OpenVINO, quantized by NNCF, for deployment on CPUs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam import models
from overparam.compress.quantize.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids and attention mask, both int64 [texts, tokens]."""

_NAME = "model.xml"

# Settings that make results independent of the processor: by default OpenVINO computes in bfloat16 on processors with
# instructions for it, keeps a decoder's keys and values in 8 bits, and rounds the inputs of compressed weights.
EXACT = {
    "EXECUTION_MODE_HINT": "ACCURACY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "KEY_CACHE_PRECISION": "f32",
    "VALUE_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


@dataclass(frozen=True)
class Precision:
    """The precision a model computes in, read from the compiled model.

    Attributes:
        computes_in: Precision of activations, such as "float32"; also says if they may be rounded to 8 bits.
        cache_in: Precision of a decoder's keys and values; empty for an encoder.
    """

    computes_in: str
    cache_in: str = ""


class Encoder:
    """A text encoder in OpenVINO: token ids and mask in, hidden states of the last layer out."""

    def __init__(self, model: Any, *, exact: bool = True) -> None:
        """Compile a model for this machine.

        Args:
            model: `openvino.Model` from `exporting.export`, compressed or not.
            exact: Compute in float32 on every machine; otherwise in the precision that OpenVINO chooses for this one.
        """
        self._run = _compiled(model, exact)
        self.precision = _precision(self._run, model)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the hidden states, float32 [texts, tokens, hidden]."""
        import torch

        states = self._run([input_ids.numpy(), attention_mask.numpy()])[0]
        return torch.from_numpy(states)


class Decoder:
    """A decoder in OpenVINO, with its keys and values inside: token ids in, logits out."""

    def __init__(self, model: Any, *, exact: bool = True) -> None:
        """Compile a model for this machine; arguments as for `Encoder`. `exact` applies to keys and values as well."""
        compiled = _compiled(model, exact)
        self._request = compiled.create_infer_request()
        self.precision = _precision(compiled, model)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._seen = 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._seen = 0

    def __call__(self, input_ids: torch.Tensor, *, last: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Read further tokens of one text, [1, tokens], and return their logits, float32 [1, tokens, vocabulary].

        All of them are computed; `last` is ignored.
        """
        total = self._seen + input_ids.shape[1]
        logits = self._read(
            input_ids, np.ones((1, total), dtype=np.int64), np.arange(self._seen, total)[None]
        )
        self._seen = total
        return logits

    def batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of whole texts, padded on either side, [texts, tokens, vocabulary]; then reset."""
        self.reset()
        mask = attention_mask.numpy()
        logits = self._read(input_ids, mask, _positions(mask))
        self.reset()
        return logits

    def _read(
        self, input_ids: torch.Tensor, mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> torch.Tensor:
        import torch

        given = {
            "input_ids": input_ids.numpy(),
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": np.arange(len(input_ids), dtype=np.int32),
        }
        # a model that counts positions itself has no such input
        self._request.infer({name: each for name, each in given.items() if name in self._inputs})
        return torch.from_numpy(self._request.get_tensor("logits").data.copy())


def compressed(model: Any, name: str, calibration: Sequence[Batch] = ()) -> Any:
    """Return a copy of an exported model, quantized by NNCF.

    Args:
        model: From `exporting.export`; it is not changed.
        name: A scheme of "openvino".
        calibration: Batches of real text: "openvino-int8" needs them for the range of activations, AWQ and GPTQ for
            the effect of a weight's error on the outputs.

    Raises:
        ValueError: Calibration is needed but missing.
    """
    if name == "openvino-fp32":
        return model
    nncf = _nncf()
    data = None
    if SCHEMES[name].calibrated:
        if not calibration:
            raise ValueError(f"{name} needs calibration texts: it measures activations on them")
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
    """The inputs of an exported model; for a decoder, of whole texts without a past."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any("beam_idx" in port.get_names() for port in model.inputs):
        inputs["position_ids"] = _positions(attention_mask)
        inputs["beam_idx"] = np.arange(len(input_ids), dtype=np.int32)
    return inputs


def save(model: Any, folder: Path) -> None:
    """Save a model as OpenVINO's model.xml and model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    library().save_model(model, folder / _NAME, compress_to_fp16=False)


def load(folder: Path | str) -> Any:
    """Load a model that `save` wrote."""
    return library().Core().read_model(Path(folder) / _NAME)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide tracing warnings (one for each branch that is fixed by tracing) and warnings of progress bars."""
    with models.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _positions(attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(np.maximum(attention_mask.cumsum(axis=1) - 1, 0))


def _compiled(model: Any, exact: bool) -> Any:
    settings = {"PERFORMANCE_HINT": "LATENCY", **(EXACT if exact else {})}
    return library().Core().compile_model(model, "CPU", settings)


_TYPES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "u8": "8 bits",
    "i8": "8 bits",
    "u4": "4 bits",
}


def _precision(compiled: Any, model: Any) -> Precision:
    def read(name: str) -> str:
        kind = str(compiled.get_property(name).to_string())
        return _TYPES.get(kind, kind)

    computes = read("INFERENCE_PRECISION_HINT")
    group = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    if group and any(node.get_element_type().bitwidth <= 8 for node in _constants(model)):
        computes += f"; may round activations to 8 bits in groups of {group}"
    keys, values = read("KEY_CACHE_PRECISION"), read("VALUE_CACHE_PRECISION")
    stateful = any(node.get_type_name() == "ReadValue" for node in model.get_ops())
    return Precision(computes, (keys if keys == values else f"{keys} and {values}") if stateful else "")


def _constants(model: Any) -> list[Any]:
    return [
        node
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2
    ]


def library() -> Any:
    """Import OpenVINO without its telemetry: nothing is sent anywhere."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _nncf() -> Any:
    library()  # NNCF would load the telemetry too
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
