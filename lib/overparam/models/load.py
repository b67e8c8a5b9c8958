"""One loader for bundled models, hub ids and local folders."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from overparam import packages
from overparam.models import gguf
from overparam.models.twins import TWINS, tiny_tokenizer, tiny_twin

_TINY = "tiny-"

# name -> (package set, folder of the checkpoint)
_PACKAGED: dict[str, tuple[str, Callable[[], Path]]] = {
    "gemma-3-270m": (gguf.PACKAGE, gguf.converted_folder),
    "all-MiniLM-L6-v2": ("all-minilm-l6-v2", lambda: _checkpoint("all-minilm-l6-v2")),
    "all-mpnet-base-v2": ("all-mpnet-base-v2", lambda: _checkpoint("all-mpnet-base-v2")),
}
BUNDLED: tuple[str, ...] = (*_PACKAGED, *(_TINY + name for name in TWINS))


def load(
    name: str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder (or a decoder without its head) and its tokenizer.

    Args:
        name: A bundled name (`BUNDLED`), a local folder, or a hub id ``owner/model``.
        dtype: Of the weights; float32 by default.
        device: Where to put the model; the CPU by default.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the name is neither bundled, nor a folder, nor a hub id.
        OSError: If a hub model is neither cached nor within reach.
    """
    dtype = dtype or torch.float32
    if name in BUNDLED and name.startswith(_TINY):
        model = tiny_twin(name.removeprefix(_TINY), num_hidden_layers=6).to(dtype=dtype)
        return model.to(device or "cpu"), tiny_tokenizer()
    source = _source(name)
    local = isinstance(source, Path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        model = AutoModel.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=local
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        advice = "the folder is incomplete" if local else "it needs a network, or a copy in the hub's cache"
        raise OSError(f"cannot load {name!r}: {first} ({advice})") from error
    return model.to(device or "cpu").eval(), tokenizer


def provenance(name: str) -> dict[str, str]:
    """Return what identifies the weights of `name`: SHA-256 per file, or the hub commit."""
    if name.startswith(_TINY):
        return {name: "random weights, seed 0"}
    if name in _PACKAGED:
        return packages.hashes(_PACKAGED[name][0])
    source = _source(name)
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors"))
        return {file.name: _sha256(file) for file in files}
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return {name: f"hub commit {getattr(config, '_commit_hash', None)}"}


def required_memory(name: str, *, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that the weights of `name` take in memory, without loading them."""
    if name.startswith(_TINY):
        model, _ = load(name)
    else:
        config = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    return sum(int(p.numel()) for p in model.parameters()) * (dtype or torch.float32).itemsize


def random_twin(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Return a model of the same configuration with random weights: what the architecture gives untrained."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        twin: PreTrainedModel = AutoModel.from_config(model.config, dtype=model.dtype).to(model.device)
        return twin.eval()
    finally:
        torch.set_rng_state(state)


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, or a recent GPU)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _source(name: str) -> Path | str:
    if name in _PACKAGED:
        return _PACKAGED[name][1]()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    near = difflib.get_close_matches(name, BUNDLED, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown model {name!r}{hint} It is neither bundled ({', '.join(_PACKAGED)}, {_TINY}<architecture>), "
        "nor a folder here, nor a hub id of the form owner/model."
    )


def _checkpoint(package: str) -> Path:
    configs = packages.fetch(package).rglob("config.json")  # its modules have theirs in folders below
    return min(configs, key=lambda path: len(path.parts)).parent


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
