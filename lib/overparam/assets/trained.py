"""Where to find what this suite trains itself, models and tables: in the record of the study that made them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from overparam.support.files import sha256

RESULTS = Path(__file__).resolve().parents[3] / "results" / "reference"
_STUDIES = {"moe-translator": "moe_pretraining"}


def folder(name: str) -> Path:
    """Return the folder of a trained model: the newest finished record in ``results/reference``.

    ``$OVERPARAM_MOE_TRANSLATOR`` (the name in capitals) can point to another folder, for installations without the
    repository.

    Raises:
        FileNotFoundError: If there is none; the message says how to make it.
    """
    variable = f"OVERPARAM_{name.upper().replace('-', '_')}"
    if chosen := os.environ.get(variable):
        path = Path(chosen).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{variable} is {chosen}, which is not a folder with a model")
        return path
    study = _STUDIES[name]
    if found := _newest(study, name):
        return found
    raise FileNotFoundError(
        f"{name} is missing: {RESULTS / study} has no finished record of it. Run `python run_all.py "
        f"--profile reference --only {study}`, or set {variable} to a folder that holds the model"
    )


def table(study: str, slug: str, name: str) -> Path:
    """Return a table of the newest finished record of a study in ``results/reference``.

    Raises:
        FileNotFoundError: If there is none; the message says how to make it.
    """
    if found := _newest(study, slug):
        return found / name
    raise FileNotFoundError(
        f"{RESULTS / study} has no finished record of {slug}, whose {name} is needed: run "
        f"`python run_all.py --profile reference --only {study}` first"
    )


def table_hash(study: str, slug: str, name: str) -> dict[str, str]:
    """Return the SHA-256 of such a table by name; an empty dict if there is none."""
    try:
        file = table(study, slug, name)
    except FileNotFoundError:
        return {}
    return {f"{study}/{file.parent.name}/{name}": sha256(file)}


def _newest(study: str, slug: str) -> Path | None:
    """The folder of the newest finished record, whose name begins with its slug."""
    started = {
        path.parent: str(json.loads(path.read_text(encoding="utf-8"))["started"])
        for path in RESULTS.glob(
            f"{study}/{slug}-{'[0-9a-f]' * 8}/record.json"
        )  # written last: a folder that has it is complete
        if not path.parent.name.endswith((".partial", ".failed"))
    }
    return max(started, key=lambda path: (started[path], path.name), default=None)


def hashes(name: str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a trained model; an empty dict if the model is missing."""
    try:
        files = sorted(folder(name).glob("*.safetensors"))
    except FileNotFoundError:
        return {}
    return {f"{name}/{file.name}": sha256(file) for file in files}
