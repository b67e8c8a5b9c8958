"""The loader for bundled models, hub ids and local folders."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from overparam.assets import packages
from overparam.assets.catalogue import PACKAGED, TINY
from overparam.models import source as sources
from overparam.models import weights
from overparam.models.folder_recipe import follow, recipe
from overparam.models.kinds import has_encoder_of_its_own
from overparam.models.twins import tiny_tokenizer, tiny_twin
from overparam.support.files import sha256


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    causal: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder (or a decoder without its head) and its tokenizer.

    A sentence-transformers folder is loaded with its recipe: the tokenizer cuts texts to the recipe's length and
    lower-cases them if the recipe says so; `recipe` returns the rest for the loaded model.

    Args:
        name: A bundled name (`catalogue.BUNDLED`), a local folder, or a hub id ``owner/model``.
        dtype: Dtype of the weights; float32 by default.
        device: Device of the model; the CPU by default.
        causal: Load the decoder with its language-modelling head, to score and generate text.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the name is neither bundled, nor a folder, nor a hub id; or if the checkpoint lacks weights that
            the model uses, holds more blocks than its configuration says, or is an adapter.
        OSError: If a hub model is neither cached nor reachable, or a model that the suite trains is missing.
    """
    dtype = dtype or torch.float32
    if name.startswith(TINY):
        model = tiny_twin(name.removeprefix(TINY), num_hidden_layers=6, causal=causal).to(dtype=dtype)
        return model.to(device or "cpu"), tiny_tokenizer()
    source = sources.source(name)
    local = isinstance(source, Path)
    try:
        config = sources.config(name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        model = weights.read(
            _class(config, causal=causal),
            source,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=local,
            **_dequantized(config),
        )
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        advice = "the folder is incomplete" if local else "it needs a network, or a copy in the hub's cache"
        raise OSError(f"cannot load {name!r}: {first} ({advice})") from error
    own = recipe(name)
    if own is not None:
        follow(own, model, tokenizer)
    return model.to(device or "cpu").eval(), tokenizer


def provenance(name: str) -> dict[str, str]:
    """Return what identifies the weights of `name`: SHA-256 per file, or the hub commit."""
    if name.startswith(TINY):
        return {name: "random weights, seed 0"}
    if name in PACKAGED:
        return packages.hashes(PACKAGED[name])
    root = sources.root(name)
    if isinstance(root, Path):
        own = recipe(name)
        files = sorted(Path(sources.source(name)).glob("*.safetensors"))
        heads = [root / dense.path / "model.safetensors" for dense in (own.dense if own else ())]
        files += [
            head for head in heads if head.is_file()
        ]  # a missing head is an error only where it is needed
        return {str(file.relative_to(root)): sha256(file) for file in files}
    return {name: f"hub commit {getattr(sources.config(name), '_commit_hash', None)}"}


def required_memory(name: str, *, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that the weights of `name` take in memory, without loading them."""
    config = sources.config(name)
    with torch.device("meta"):
        model = _class(config).from_config(config)
    return sum(int(p.numel()) for p in model.parameters()) * (dtype or torch.float32).itemsize


def random_twin(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Return an untrained model of the same configuration, with random weights."""
    from overparam.models.seeding import seeded

    with seeded(seed):
        twin: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return twin.to(model.device).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' messages while a model is loaded or traced, except errors."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, or a recent GPU)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _class(config: PreTrainedConfig, *, causal: bool = False) -> Any:
    """The class that loads a checkpoint; for an encoder-decoder such as T5, that of its encoder if there is one."""
    if causal:
        return AutoModelForCausalLM
    return AutoModelForTextEncoding if has_encoder_of_its_own(config) else AutoModel


def _dequantized(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that load an MXFP4 checkpoint (GPT-OSS) as plain tensors, which can be watched and sliced."""
    stored = getattr(config, "quantization_config", None) or {}
    return (
        {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == "mxfp4" else {}
    )
