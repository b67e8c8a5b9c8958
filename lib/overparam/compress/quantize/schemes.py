"""The schemes: each a maintained library's, named by library, bits and kind."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        name: Of the scheme.
        library: "torch", "torchao", "openvino" or "bitsandbytes".
        weights: Bits of the weights of linear layers.
        activations: Bits of what goes into linear layers.
        about: What is done, in words.
        group_size: Neighbouring weights that share a scale; None: a row.
        calibrated: Whether it needs texts that show what activations look like.
    """

    name: str
    library: str
    weights: int
    activations: int
    about: str
    group_size: int | None = None
    calibrated: bool = False


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", "torch", 32, 32, "as it is, eager"),
        Scheme("bf16", "torch", 16, 16, "bfloat16, eager"),
        Scheme("fp32-compiled", "torch", 32, 32, "torch.compile"),
        Scheme("torchao-int8", "torchao", 8, 32, "weights of linear layers, symmetric by row"),
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
        ),
        Scheme(
            "openvino-int8-weights", "openvino", 8, 32, "OpenVINO, NNCF weight compression, embeddings too"
        ),
        Scheme(
            "openvino-int4-weights",
            "openvino",
            4,
            32,
            "OpenVINO, NNCF weight compression, embeddings in 8 bits",
            32,
        ),
        Scheme(
            "openvino-int4-awq", "openvino", 4, 32, "the same, scales by AWQ on calibration texts", 32, True
        ),
        Scheme(
            "openvino-int4-gptq",
            "openvino",
            4,
            32,
            "the same, rounded by GPTQ on calibration texts",
            32,
            True,
        ),
        Scheme("bitsandbytes-int8", "bitsandbytes", 8, 8, "LLM.int8()"),
        Scheme("bitsandbytes-nf4", "bitsandbytes", 4, 16, "4-bit NormalFloat in groups of 64", 64),
    )
}
BASELINE = "fp32"


def reason_against(name: str, model: PreTrainedModel, *, decoder: bool) -> str | None:
    """Say why a scheme cannot run with this model on this machine; None when it can.

    Args:
        name: One of `SCHEMES`.
        model: What would be quantized; its device counts.
        decoder: Whether it is to generate text.
    """
    scheme, cuda = SCHEMES[name], model.device.type == "cuda"
    if scheme.library == "bitsandbytes" and not cuda:
        return "bitsandbytes is measured on a CUDA device, and the model is on the CPU"
    if scheme.library == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        return "the package bitsandbytes is not installed"
    if name == "torchao-fp8" and not (cuda and torch.cuda.get_device_capability() >= (8, 9)):
        return "float8 needs a CUDA device of compute capability 8.9 or more"
    if name == "fp32-compiled" and decoder:
        return "the keys and values of a decoder grow with every token, and torch.compile would compile for each length"
    if name == "fp32-compiled" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))
    ):
        return "torch.compile needs a C++ compiler, and there is none"
    if scheme.library == "openvino" and cuda:
        return "OpenVINO runs on the CPU, and the model is on a CUDA device"
    if name == "openvino-int8" and decoder:
        return "activations of a decoder differ between prompt and answer: OpenVINO's way for it is weight compression"
    if name == "openvino-int4-awq" and not decoder:
        return "NNCF's AWQ scales what goes into gated feed-forward layers, and finds none in a text encoder"
    if scheme.group_size and scheme.library != "bitsandbytes":
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.in_features % scheme.group_size:
                return (
                    f"groups of {scheme.group_size} do not divide the {module.in_features} columns of {layer}"
                )
    return None


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise a ValueError for a model whose weights are quantized already: a second rounding would be measured as one.

    A model that was quantized and then stored in full precision, as a GGUF file that was read back, cannot be told.
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
    """The torchao configuration of a scheme."""
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
