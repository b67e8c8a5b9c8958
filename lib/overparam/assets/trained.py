"""Where to find the models that this suite trains itself: in the record of the study that trained them."""

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
    started = {
        path.parent: str(json.loads(path.read_text(encoding="utf-8"))["started"])
        for path in RESULTS.glob(
            f"{study}/{name}-{'[0-9a-f]' * 8}/record.json"
        )  # written last: a folder that has it is complete
        if not path.parent.name.endswith((".partial", ".failed"))
    }
    if not started:
        raise FileNotFoundError(
            f"{name} is missing: {RESULTS / study} has no finished record of it. Run `python run_all.py "
            f"--profile reference --only {study}`, or set {variable} to a folder that holds the model"
        )
    return max(started, key=lambda path: (started[path], path.name))


def hashes(name: str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a trained model; an empty dict if the model is missing."""
    try:
        files = sorted(folder(name).glob("*.safetensors"))
    except FileNotFoundError:
        return {}
    return {f"{name}/{file.name}": sha256(file) for file in files}
