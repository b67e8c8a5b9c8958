"""The quantization schemes, all from maintained libraries, named by library, bits and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        name: Name of the scheme.
        library: "torch", "torchao", "openvino" or "bitsandbytes".
        weights: Bits of the matrices that inputs are multiplied with: linear layers, experts.
        activations: Bits of the inputs of linear layers.
        about: Description.
        group_size: Neighbouring weights that share a scale; None for a whole row.
        calibrated: Whether it needs calibration texts, to measure activations.
        tables: Bits of embedding tables and of the output layer; NNCF treats an encoder's last matrix as one.
    """

    name: str
    library: str
    weights: int
    activations: int
    about: str
    group_size: int | None = None
    calibrated: bool = False
    tables: int = 32


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", "torch", 32, 32, "as it is, eager"),
        Scheme("bf16", "torch", 16, 16, "bfloat16, eager", tables=16),
        Scheme("fp32-compiled", "torch", 32, 32, "torch.compile"),
        Scheme(
            "torchao-int8",
            "torchao",
            8,
            32,
            "weights of linear layers, symmetric by row; embeddings and head as they are",
        ),
        Scheme("torchao-int8-dynamic", "torchao", 8, 8, "the same, and activations by token while it runs"),
        Scheme("torchao-int4-g32", "torchao", 4, 32, "weights of linear layers in groups of 32", 32),
        Scheme("torchao-int4-g128", "torchao", 4, 32, "weights of linear layers in groups of 128", 128),
        Scheme(
            "torchao-int4-hqq",
            "torchao",
            4,
            32,
            "in groups of 32, scales by half-quadratic optimisation (HQQ)",
            32,
        ),
        Scheme("torchao-fp8", "torchao", 8, 8, "float8 weights and activations"),
        Scheme("openvino-fp32", "openvino", 32, 32, "OpenVINO, as it is"),
        Scheme(
            "openvino-int8",
            "openvino",
            8,
            8,
            "OpenVINO, NNCF post-training quantization on calibration texts",
            calibrated=True,
            tables=8,
        ),
        Scheme(
            "openvino-int8-weights",
            "openvino",
            8,
            32,
            "OpenVINO, NNCF weight compression, embeddings too",
            tables=8,
        ),
        Scheme(
            "openvino-int4-weights",
            "openvino",
            4,
            32,
            "OpenVINO, NNCF weight compression, embeddings and the last layer in 8 bits",
            32,
            tables=8,
        ),
        Scheme(
            "openvino-int4-awq",
            "openvino",
            4,
            32,
            "the same, scales by AWQ on calibration texts",
            32,
            True,
            8,
        ),
        Scheme(
            "openvino-int4-gptq",
            "openvino",
            4,
            32,
            "the same, rounded by GPTQ on calibration texts",
            32,
            True,
            8,
        ),
        Scheme("bitsandbytes-int8", "bitsandbytes", 8, 8, "LLM.int8()"),
        Scheme("bitsandbytes-nf4", "bitsandbytes", 4, 16, "4-bit NormalFloat in groups of 64", 64),
    )
}
BASELINE = "fp32"


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that is already quantized: two roundings would be measured as if they were one.

    A model that was quantized and then stored in full precision, such as a converted GGUF file, is not recognised.
    """
    already = getattr(model.config, "quantization_config", None)
    if already is not None:
        config = already if isinstance(already, dict) else already.to_dict()
        method = str(getattr(config["quant_method"], "value", config["quant_method"]))
        raise ValueError(
            f"{model.config.name_or_path or type(model).__name__} is quantized already ({method}): "
            "start from its full precision"
        )


def torchao_config(name: str) -> Any:
    """Return the torchao configuration of a scheme."""
    import torch
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    if name == "torchao-int8":
        return Int8WeightOnlyConfig()
    if name == "torchao-int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig()
    if name == "torchao-fp8":
        return Float8DynamicActivationFloat8WeightConfig()
    group = PerGroup(SCHEMES[name].group_size or 32)
    chosen = {"intx_choose_qparams_algorithm": "hqq_scale_only"} if name == "torchao-int4-hqq" else {}
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=group, **chosen)  # noqa: B009
