"""Costly steps inside of jobs, kept in the user's cache under what they depend on, up to a size limit.

A step (a trained adapter, the state of a training) is a folder or a file ``<kind>/<key>``, where the key is a hash of
all that its outcome depends on. It is written beside its place and renamed, holds tensors as safetensors and the rest
as JSON, and is removed when the limit, 20 GB or ``$OVERPARAM_CACHE_LIMIT_GB``, is passed: what was used least recently
goes first, and what is in use stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from filelock import FileLock, Timeout

from overparam.support import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = {
    "adapters": "adapters of trained encoders",
    "embeddings": "embeddings of texts",
    "students": "states of distillations",
    "training": "states of pre-trainings",
    "splits": "splits of texts",
}
_LIMIT = 20.0  # GB


@dataclass(frozen=True)
class Entry:
    """One step: every path whose name begins with its key, its size, and when it was used last."""

    kind: str
    paths: tuple[Path, ...]
    size: int
    used: float


def directory() -> Path:
    """Where fetched packages and steps live: ``$OVERPARAM_CACHE``, or the user's cache directory."""
    chosen = os.environ.get("OVERPARAM_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("overparam"))


def folder(kind: str) -> Path:
    """Return the folder of one kind of steps, by its name in `KINDS`; a step's path is one below."""
    assert kind in KINDS
    return directory() / kind


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Hold a step while it is made or read: others that need it wait, and it is not removed.

    When it is left, the least recently used steps are removed until the limit is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"waiting for another process that makes {path.parent.name}/{path.name}")
        lock.acquire()
    try:
        if path.exists():
            os.utime(path)
        yield
    finally:
        lock.release()
    trim()


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Give a folder to write a step into; it takes its place when the block ends well, and is gone otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        if not path.exists():
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def array(kind: str, parts: Sequence[object], make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return what `make` returns, from the cache if it was made before.

    Args:
        kind: Kind of the step.
        parts: All that the array depends on, as plain values.
        make: Makes it.
    """
    import numpy as np  # the command line, which only looks at the cache, starts without
    from safetensors.numpy import load_file, save_file

    path = folder(kind) / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    with using(path):
        if not path.exists():
            made = make()
            with making(path) as new:
                save_file({"array": np.ascontiguousarray(made)}, new / "array.safetensors")
            return made
        found: NDArray[np.float32] = load_file(path / "array.safetensors")["array"]
        return found


def entries() -> list[Entry]:
    """Return every step that is kept, the least recently used first."""
    found = []
    for kind in KINDS:
        groups: dict[str, list[Path]] = {}
        for path in folder(kind).iterdir() if folder(kind).is_dir() else ():
            if not path.name.startswith("."):
                groups.setdefault(path.name.partition(".")[0], []).append(path)
        for paths in groups.values():
            files = [each for path in paths for each in (path, *path.rglob("*"))]
            stats = []
            for file in files:
                with suppress(FileNotFoundError):  # another process writes or removes it just now
                    stats.append((file.stat().st_mtime, file.stat().st_size if file.is_file() else 0))
            if stats:
                used, size = max(time_ for time_, _ in stats), sum(size for _, size in stats)
                found.append(Entry(kind, tuple(sorted(paths)), size, used))
    return sorted(found, key=lambda entry: entry.used)


def limit() -> int:
    """Return the limit in bytes.

    Raises:
        ValueError: when ``$OVERPARAM_CACHE_LIMIT_GB`` is no number.
    """
    text = os.environ.get("OVERPARAM_CACHE_LIMIT_GB", str(_LIMIT))
    try:
        value = float(text)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"OVERPARAM_CACHE_LIMIT_GB must be a number of gigabytes, 0 or more, got {text!r}"
        ) from None
    return int(value * 1e9)


def trim() -> list[Entry]:
    """Remove the least recently used steps until the limit is kept; return what went."""
    present = entries()
    over = sum(entry.size for entry in present) - limit()
    removed: list[Entry] = []
    for entry in present:
        if over <= 0:
            break
        if _remove(entry):
            removed.append(entry)
            over -= entry.size
    return removed


def clean() -> list[Entry]:
    """Remove every step that is not in use; return what went. Fetched weights and texts stay."""
    return [entry for entry in entries() if _remove(entry)]


def describe(removed: list[Entry]) -> str:
    """Say what was freed, by kind, and what is left."""
    lines = []
    for kind, about in KINDS.items():
        sizes = [entry.size for entry in removed if entry.kind == kind]
        if sizes:
            lines.append(f"{about}: {len(sizes)} removed, {sum(sizes) / 1e6:,.1f} MB freed")
    left = entries()
    if left:
        lines.append(f"in use, and kept: {len(left)}, {sum(entry.size for entry in left) / 1e6:,.1f} MB")
    where = directory()
    return "\n".join([*(lines or ["nothing to remove"]), f"fetched weights and texts stay in {where}"])


def _remove(entry: Entry) -> bool:
    try:
        with FileLock(_lock(entry.paths[0]), timeout=0):
            for path in entry.paths:
                # under another name first: a reader finds the whole step or none
                doomed = path.with_name(f".{path.name}.{time.time_ns()}.partial")
                with suppress(FileNotFoundError):
                    path.rename(doomed)
                    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    except Timeout:
        return False
    return True


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name.partition('.')[0]}.lock")
