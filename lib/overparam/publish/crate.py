"""Metadata that make a results folder a Process Run Crate (RO-Crate), ready to be archived.

Each record is a ``CreateAction``, with the notebook as instrument and its files as results.
Source: the profile Process Run Crate 0.5, https://w3id.org/ro/wfrun/process/0.5.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from overparam.publish.citing import LICENSE
from overparam.publish.inventory import Inventory, folder
from overparam.record.record import FILE_NAME, REPORT_FILES, Record
from overparam.support.files import write_changed

FILE = "ro-crate-metadata.json"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_TYPES = {
    ".csv": "text/csv",
    ".ipynb": "application/x-ipynb+json",
    ".json": "application/json",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".pdf": "application/pdf",
    ".png": "image/png",
}


def text(inventory: Inventory) -> str:
    """Return the text of ``ro-crate-metadata.json``; the same records always give the same text."""
    crate = ROCrate()
    name = inventory.root.resolve().name
    root = crate.root_dataset
    root["name"] = f"overparam: results of the {name} profile"
    root["description"] = (
        "Records, figures, tables and per-item scores: how much of a language model can be taken away"
    )
    root["license"] = {"@id": f"https://spdx.org/licenses/{LICENSE}"}
    root["datePublished"] = max((record.started[:10] for record in inventory.studies), default="1970-01-01")
    root["conformsTo"] = {"@id": PROFILE}
    crate.add(_entity(crate, PROFILE, "CreativeWork", name="Process Run Crate", version="0.5"))
    crate.add(
        _entity(crate, f"https://spdx.org/licenses/{LICENSE}", "CreativeWork", name="Apache License 2.0")
    )
    for file in REPORT_FILES:
        if file.endswith((".md", ".json")) and file != FILE:
            crate.add_file(dest_path=file, properties={"name": file, "encodingFormat": _format(file)})
    root["mentions"] = [_action(crate, record, inventory) for record in inventory.records]
    return json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False) + "\n"


def write(inventory: Inventory) -> bool:
    """Write ``ro-crate-metadata.json``, and return whether it changed."""
    return write_changed(inventory.root / FILE, text(inventory).encode())


def _action(crate: ROCrate, record: Record, inventory: Inventory) -> ContextEntity:
    place = folder(record).relative_to(inventory.root)
    results = []
    for name, sha256 in sorted({FILE_NAME: "", **record.files()}.items()):
        path = folder(record) / name
        properties: dict[str, Any] = {"name": name, "encodingFormat": _format(name)}
        if sha256:
            properties["sha256"] = sha256
        if path.is_file():
            properties["contentSize"] = path.stat().st_size
        results.append(crate.add_file(dest_path=(place / name).as_posix(), properties=properties))
    git = record.provenance["git"]
    notebook = _entity(
        crate,
        f"#notebook-{record.study}-{(git['sha'] or 'unknown')[:10]}",
        "SoftwareApplication",
        name=f"notebook of the study {record.study}",
        softwareVersion=f"git {git['sha'] or 'unknown'}{' with uncommitted changes' if git['dirty'] else ''}",
    )
    inputs = [
        _entity(crate, f"#sha256-{sha256}", "CreativeWork", name=name, sha256=sha256)
        for name, sha256 in sorted(record.provenance["inputs"].items())
    ]
    action = _entity(
        crate,
        f"#{record.key}",
        "CreateAction",
        name=f"{record.study}/{record.slug}",
        description=record.command,
        startTime=record.started,
        endTime=(datetime.fromisoformat(record.started) + timedelta(seconds=record.seconds)).isoformat(
            timespec="seconds"
        ),
        actionStatus={"@id": "http://schema.org/CompletedActionStatus"},
    )
    for entity in (notebook, *inputs, action):
        crate.add(entity)
    action["instrument"] = notebook
    action["result"] = results
    if inputs:
        action["object"] = inputs
    return action


def _entity(crate: ROCrate, identifier: str, kind: str, **properties: Any) -> ContextEntity:
    return ContextEntity(crate, identifier, properties={"@type": kind, **properties})


def _format(name: str) -> str:
    return _TYPES.get(name[name.rfind(".") :], "application/octet-stream")
