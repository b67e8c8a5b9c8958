"""Names of the models that come with the suite. Imports no heavy library, so that a plan can be checked quickly."""

from __future__ import annotations

from pathlib import Path

from overparam.support.suggest import hint

PACKAGED: dict[str, str] = {  # model -> package set that holds its weights
    "gemma-3-270m": "gemma-3-270m-gguf",
    "all-MiniLM-L6-v2": "all-minilm-l6-v2",
    "all-mpnet-base-v2": "all-mpnet-base-v2",
}
TRAINED = ("moe-translator",)  # by a study of this suite; the weights are in its record
TINY = "tiny-"
TWIN_NAMES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "bert", "modernbert"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe"),
)
BUNDLED = (*PACKAGED, *TRAINED, *(TINY + name for name in TWIN_NAMES))


def check_model_name(name: str) -> str:
    """Return `name` if it can name a model: a bundled one, an existing folder, or a hub id ``owner/model``.

    Raises:
        ValueError: Otherwise; the message suggests the closest bundled model.
    """
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name in BUNDLED or Path(name).expanduser().is_dir() or looks_like_hub:
        return name
    raise ValueError(
        f"unknown model {name!r}: {hint(name, BUNDLED)} It is neither bundled "
        f"({', '.join((*PACKAGED, *TRAINED))}, {TINY}<architecture>), nor an existing folder, nor a hub id owner/model"
    )


def published(model: str) -> bool:
    """Return whether a model comes from the hub, as in the published studies, rather than with the suite."""
    return model not in BUNDLED and not Path(model).expanduser().is_dir()
