"""What is known of a job before it runs: is its record there and current, and if not, what changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from overparam.record import record
from overparam.runner.errors import BadInput
from overparam.support.files import digest

State = Literal["up to date", "to redraw", "due", "running elsewhere"]
Changes = dict[str, list[str]]  # part of the key -> what of it differs; "notebook" has no more to say
_PARTS = {"modules": "code", "params": "parameters", "inputs": "data"}  # of a key -> the user's word
_SHOWN = 4  # names of what changed in a table


@dataclass(frozen=True)
class Keys:
    """A job's two keys and what they were made from: of what is measured, and of how it is drawn and judged."""

    parts: dict[str, Any]
    drawing_parts: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash over code that measures, parameters and inputs: another one is another run."""
        return digest(self.parts)

    @property
    def drawing(self) -> str:
        """Hash over the notebook, the code that draws and judges, and the claims: another one needs no new run."""
        return digest(self.drawing_parts)


@dataclass(frozen=True)
class Found:
    """What a study's folder holds: records, and the folders whose record cannot be read, with the reason."""

    records: list[record.Record] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)


def find(folder: Path) -> Found:
    """Read the records of a study.

    Raises:
        BadInput: for a record that a newer version made.
    """
    found = Found()
    for path in sorted(folder.glob(f"*/{record.FILE_NAME}")):
        if path.parent.name.endswith(record.UNFINISHED):
            continue
        try:
            found.records.append(record.load(path))
        except record.SchemaError as error:
            raise BadInput(str(error)) from error
        except ValueError as error:
            found.broken[path.parent] = str(error)
    return found


def of(keys: Keys, slug: str, directory: Path, lock: Path, found: Found) -> tuple[State, str, Changes]:
    """Return a job's state, the reason in a few words, and what changed since its last record, in full.

    Args:
        keys: Of the job.
        slug: Short name of the parameter set.
        directory: Where its record is, or will be.
        lock: Held by the process that runs it.
        found: What the study's folder holds.
    """
    if held(lock):
        return "running elsewhere", "another process is running it", {}
    for one in found.records:
        if one.key == keys.key and one.path is not None and one.path.parent == directory:
            if damage := record.problems(one):
                return "due", f"damaged: {damage[0]}", {}
            return _drawn(one, keys)
    if directory in found.broken:
        return "due", f"damaged: {found.broken[directory]}", {}
    alike = [one for one in found.records if one.slug == slug]
    changed: Changes = {}
    if alike:
        newest = max(alike, key=lambda one: one.started)
        changed = changes(newest.provenance.get("key", {}), keys.parts)
    if (why := failure(directory)) is not None:
        return "due", f"failed last time{why and ': '}{why}", changed
    if not alike:
        return "due", "missing", {}
    return "due", "; ".join(_short(what, names) for what, names in changed.items()) or "changed", changed


def _drawn(one: record.Record, keys: Keys) -> tuple[State, str, Changes]:
    """Whether a record that is measured is drawn as its code says today; an older one has no drawing key."""
    before = one.provenance.get("drawing")
    if before is None or before["key"] == keys.drawing:
        return "up to date", "", {}
    changed = changes(before, keys.drawing_parts)
    if record.STEPS_NAME not in one.artifacts:  # nothing to draw from: a study whose steps take no time
        return "due", "; ".join(_short(what, names) for what, names in changed.items()) or "changed", changed
    return (
        "to redraw",
        "; ".join(_short(what, names) for what, names in changed.items()) or "changed",
        changed,
    )


def held(lock: Path) -> bool:
    """Return whether a living process has a lock; one that was killed has none."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a results folder that is only read: nobody runs there
        return False


def failure(directory: Path) -> str | None:
    """Return the first line of the error that a job ended with last time, or None if it did not fail."""
    failed = directory.with_name(f"{directory.name}.failed")
    if not failed.exists():
        return None
    try:
        lines = (failed / "error.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[0] if lines else ""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Compare what two keys were made from."""
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
    """Return what a finished record replaces: older records of its slug, its failures, and what was killed."""
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
    """Return the lock of a job, from its folder or one of those that it has while it runs or when it failed."""
    name = re.sub(r"(\.failed|\.partial|\.old\.partial)$", "", folder.name.removeprefix("."))
    return folder.parents[1] / record.RUNNER / folder.parent.name / f"{name}.lock"


def _short(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} changed: {', '.join(names[:_SHOWN])}{more}" if names else f"{what} changed"


def _value(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"
