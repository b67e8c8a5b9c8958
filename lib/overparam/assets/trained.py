"""Where the models are that this suite trains itself: in the record of the study that trained them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[3] / "results" / "reference"
_STUDIES = {"moe-translator": "moe_pretraining"}


def folder(name: str) -> Path:
    """Return the folder of a trained model: of the newest finished record in ``results/reference``.

    ``$OVERPARAM_MOE_TRANSLATOR`` (the name in capitals) names another folder, for an installation without the
    repository.

    Raises:
        FileNotFoundError: If there is none; says how to make it.
    """
    variable = f"OVERPARAM_{name.upper().replace('-', '_')}"
    if chosen := os.environ.get(variable):
        path = Path(chosen).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{variable} is {chosen}, which is no folder with a model")
        return path
    study = _STUDIES[name]
    found = {
        path.parent: str(json.loads(path.read_text(encoding="utf-8"))["started"])
        for path in RESULTS.glob(f"{study}/{name}-*/record.json")  # written last: what has one is complete
        if not path.parent.name.endswith((".partial", ".failed"))
    }
    if not found:
        raise FileNotFoundError(
            f"{name} is not there: {RESULTS / study} holds no finished record of it. Run `python run_all.py "
            f"--profile reference --only {study}`, or let {variable} name a folder that holds the model"
        )
    return max(found, key=lambda path: (found[path], path.name))


def hashes(name: str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a trained model; nothing where it is not there yet."""
    try:
        files = sorted(folder(name).glob("*.safetensors"))
    except FileNotFoundError:
        return {}
    return {f"{name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
