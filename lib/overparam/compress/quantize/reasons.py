"""Why a scheme cannot be used with a model: determined before any long work begins."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.quantize import coverage
from overparam.compress.quantize.exporting import export
from overparam.compress.quantize.schemes import SCHEMES, refuse_quantized, torchao_config
from overparam.compress.quantize.weights import routers, weights
from overparam.models.proof import NotExactError


def reason_against(
    name: str, model: PreTrainedModel, *, decoder: bool, exported: Callable[[], Any] | None = None
) -> str | None:
    """Return why a scheme cannot be used with this model on this machine, or would not do what it says; None if it can.

    For a scheme of OpenVINO the model is exported and compared with PyTorch, which takes seconds to minutes.

    Args:
        name: One of `SCHEMES`.
        model: The model that would be quantized, on the device where it would run.
        decoder: Whether the model is to generate text.
        exported: Returns the result of `export`, if the caller keeps it; None to export the model here.
    """
    scheme, cuda = SCHEMES[name], model.device.type == "cuda"
    try:
        refuse_quantized(model)
    except ValueError as error:
        return str(error)
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
    if scheme.weights == torch.finfo(model.dtype).bits < 32:
        return f"the model is in {str(model.dtype).removeprefix('torch.')} already: there is nothing to round"
    if scheme.library in ("torchao", "bitsandbytes") and (
        reason := coverage.unreached(model, scheme.library)
    ):
        return reason
    if scheme.group_size and scheme.library != "bitsandbytes":
        choosing = routers(model)
        for weight in weights(model):
            columns = prod(weight.parameter.shape[dim] for dim in weight.columns)
            if weight.role == "matrix" and columns % scheme.group_size and weight.name not in choosing:
                layer = weight.name.removesuffix(".weight")
                return f"groups of {scheme.group_size} do not divide the {columns} columns of {layer}"
    if scheme.library == "torchao":
        return coverage.failing(model, torchao_config(name))
    if scheme.library == "openvino":
        try:
            exported() if exported else export(model, decoder=decoder)
        except NotExactError as error:
            return str(error)
    return None
