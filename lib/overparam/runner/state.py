"""The state of a job before it runs: whether its record exists and is current, and if not, what changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from overparam.record import record
from overparam.runner.errors import BadInput
from overparam.support.files import digest

State = Literal["up to date", "to redraw", "due", "running elsewhere"]
Changes = dict[str, list[str]]  # part of the key -> names that differ; none for "notebook"
_PARTS = {"modules": "code", "params": "parameters", "inputs": "data"}  # part of a key -> its name for users
_SHOWN = 4  # maximum names per line of a table


@dataclass(frozen=True)
class Keys:
    """A job's measuring key and drawing key, and what each is made from."""

    parts: dict[str, Any]
    drawing_parts: dict[str, Any]

    @property
    def key(self) -> str:
        """The measuring key: hash over code that measures, parameters and inputs. A new key needs a new run."""
        return digest(self.parts)

    @property
    def drawing(self) -> str:
        """The drawing key: hash over notebook, code that draws and judges, and claims. A new key needs a redraw."""
        return digest(self.drawing_parts)


@dataclass(frozen=True)
class Existing:
    """The contents of a study's folder: records, and {folder: reason} for records that cannot be read."""

    records: list[record.Record] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)


def find(folder: Path) -> Existing:
    """Read the records of a study.

    Raises:
        BadInput: for a record made by a newer version.
    """
    existing = Existing()
    for path in sorted(folder.glob(f"*/{record.FILE_NAME}")):
        if path.parent.name.endswith(record.UNFINISHED):
            continue
        try:
            existing.records.append(record.load(path))
        except record.SchemaError as error:
            raise BadInput(str(error)) from error
        except ValueError as error:
            existing.broken[path.parent] = str(error)
    return existing


def of(keys: Keys, slug: str, directory: Path, lock: Path, existing: Existing) -> tuple[State, str, Changes]:
    """Return a job's state, the reason in a few words, and what changed since its last record, in full.

    Args:
        keys: Keys of the job.
        slug: Short name of the parameter set.
        directory: Folder of its record, which may not exist yet.
        lock: Lock file, held by the process that runs it.
        existing: Contents of the study's folder.
    """
    if held(lock):
        return "running elsewhere", "another process is running it", {}
    for one in existing.records:
        if one.key == keys.key and one.path is not None and one.path.parent == directory:
            if damage := record.problems(one):
                return "due", f"damaged: {damage[0]}", {}
            return _drawn(one, keys)
    if directory in existing.broken:
        return "due", f"damaged: {existing.broken[directory]}", {}
    alike = [one for one in existing.records if one.slug == slug]
    changed: Changes = {}
    if alike:
        newest = max(alike, key=lambda one: one.started)
        changed = changes(newest.provenance.get("key", {}), keys.parts)
    if (why := failure(directory)) is not None:
        return "due", f"failed last time{why and ': '}{why}", changed
    if not alike:
        return "due", "missing", {}
    return "due", _short(changed), changed


def _drawn(one: record.Record, keys: Keys) -> tuple[State, str, Changes]:
    """Whether a job whose measurements are current must be redrawn; older records have no drawing key."""
    before = one.provenance.get("drawing")
    if before is None or before["key"] == keys.drawing:
        return "up to date", "", {}
    changed = changes(before, keys.drawing_parts)
    # without recorded steps there is nothing to draw from
    return "to redraw" if record.STEPS_NAME in one.artifacts else "due", _short(changed), changed


def held(lock: Path) -> bool:
    """Return whether a running process holds a lock; a killed one no longer does."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only results folder: nothing can run there
        return False


def failure(directory: Path) -> str | None:
    """Return the first line of the error of a job's last run, or None if it did not fail."""
    failed = directory.with_name(f"{directory.name}.failed")
    if not failed.exists():
        return None
    try:
        lines = (failed / "error.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[0] if lines else ""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """List the differences between the parts of two keys."""
    changed: Changes = {"notebook": []} if before.get("notebook") != now.get("notebook") else {}
    for part, word in _PARTS.items():
        old, new = before.get(part, {}), now.get(part, {})
        names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if names and part == "params":
            names = [f"{name} ({_value(old, name)} → {_value(new, name)})" for name in names]
        if names:
            changed[word] = names
    return changed


def replaced(directory: Path, slug: str) -> list[Path]:
    """Return the folders that a finished record replaces: older records of its slug, failed and killed runs."""
    pattern = re.compile(rf"\.?{re.escape(slug)}-[0-9a-f]{{8}}(\.failed|\.partial|\.old\.partial)?")
    ours = lock_of(directory)
    return [
        path
        for path in sorted(directory.parent.iterdir())
        if path != directory
        and pattern.fullmatch(path.name)
        and (lock_of(path) == ours or not held(lock_of(path)))
    ]


def lock_of(folder: Path) -> Path:
    """Return the lock file of a job, from its folder (also the one of a running or failed job)."""
    name = re.sub(r"(\.failed|\.partial|\.old\.partial)$", "", folder.name.removeprefix("."))
    return folder.parents[1] / record.RUNNER / folder.parent.name / f"{name}.lock"


def _short(changed: Changes) -> str:
    texts = []
    for what, names in changed.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        texts.append(f"{what} changed: {', '.join(names[:_SHOWN])}{more}" if names else f"{what} changed")
    return "; ".join(texts) or "changed"


def _value(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"
