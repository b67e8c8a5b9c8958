"""Models quantized in PyTorch: by torchao, by bitsandbytes, or cast or compiled."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from overparam import models
from overparam.compress.quantize.schemes import SCHEMES, torchao_config
from overparam.models.weights import read


def in_torch(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a quantized copy of a model.

    A copy by torchao or bitsandbytes is loaded through transformers, so that its `save_pretrained` writes an ordinary
    folder that `from_pretrained` reads.

    Args:
        model: The model; it is not changed.
        name: A scheme of "torch", "torchao" or "bitsandbytes".
    """
    if name == "fp32":
        return models.sharing_copy(model).eval()
    if name == "bf16":
        return copy.deepcopy(model).to(torch.bfloat16).eval()
    if name == "fp32-compiled":
        return compiled(models.sharing_copy(model).eval())
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        model.save_pretrained(folder)
        return load(folder, type(model), config=_config(name), device=model.device)


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    """Let `torch.compile` compile a model on its first run, for batches of any size."""
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


def load(
    folder: Path | str, kind: type[PreTrainedModel], *, config: Any = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a saved quantized model; with `config`, load an unquantized one and quantize it.

    Args:
        folder: Written by `save_pretrained`.
        kind: Class of the model.
        config: A quantization configuration of transformers.
        device: Device of the model.
    """
    with models.quiet():
        return read(kind, folder, quantization_config=config, local_files_only=True, device_map=str(device))


def _config(name: str) -> Any:
    if SCHEMES[name].library == "torchao":
        return TorchAoConfig(torchao_config(name))
    return BitsAndBytesConfig(load_in_8bit=name == "bitsandbytes-int8", load_in_4bit=name == "bitsandbytes-nf4",
                              bnb_4bit_quant_type="nf4")  # fmt: skip
