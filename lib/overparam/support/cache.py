"""Results of costly steps, kept in the user's cache by what they depend on, up to a size limit.

The result of a step (a trained adapter, a training state) is a folder or file ``<kind>/<key>``; the key is a hash of
everything it depends on. It is written atomically, with tensors as safetensors and the rest as JSON. When the cache
grows beyond 20 GB or ``$OVERPARAM_CACHE_LIMIT_GB``, the least recently used results are removed; those in use stay.
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
from types import ModuleType
from typing import TYPE_CHECKING, Any

import platformdirs
from filelock import FileLock, Timeout

from overparam.support import files, progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = {
    "adapters": "adapters of trained encoders",
    "embeddings": "embeddings of texts",
    "students": "states of distillations",
    "training": "states of pre-trainings",
    "splits": "texts and their splits",
}
_LIMIT = 20.0  # GB


@dataclass(frozen=True)
class Entry:
    """One cached step: all paths whose names begin with its key, their size, and the time of its last use."""

    kind: str
    paths: tuple[Path, ...]
    size: int
    used: float


def directory() -> Path:
    """Where packages and cached steps are kept: ``$OVERPARAM_CACHE``, or the user's cache directory."""
    chosen = os.environ.get("OVERPARAM_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("overparam"))


def folder(kind: str) -> Path:
    """Return the folder of one kind of step (a key of `KINDS`); each step is an entry in it."""
    assert kind in KINDS
    return directory() / kind


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; if another process holds it, note what that does (such as "fetches gensim"), and wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"waiting for another process that {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Hold a step while it is made or read: other processes wait for it, and it is not removed.

    At the end, the least recently used steps are removed until the cache is within its limit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock(path), f"makes {path.parent.name}/{path.name}"):
        if path.exists():
            os.utime(path)
        yield
    trim()


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Yield a temporary folder for a step; it is moved to `path` if the block succeeds, and deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        if not path.exists():
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def array(kind: str, parts: Sequence[object], make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the array that `make` returns, from the cache if it was made before.

    Args:
        kind: Kind of the step.
        parts: Everything the array depends on, as plain values.
        make: Computes the array.
    """
    import numpy as np  # imported here: the command line, which only looks at the cache, starts faster without
    from safetensors.numpy import load_file, save_file

    path = folder(kind) / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    with using(path):
        if not path.exists():
            made = make()
            with making(path) as new:
                save_file({"array": np.ascontiguousarray(made)}, new / "array.safetensors")
            return made
        stored: NDArray[np.float32] = load_file(path / "array.safetensors")["array"]
        return stored


def values(name: str, parts: Sequence[object], code: Sequence[ModuleType], make: Callable[[], Any]) -> Any:
    """Return the plain values that `make` returns, about texts, from the cache if they were made before.

    A cache that cannot be read or written costs time alone.

    Args:
        name: The file's name begins with it.
        parts: Everything that the values depend on beside code, as plain values.
        code: Modules that they depend on.
        make: Computes the values, which JSON can hold.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for module in code:
        digest.update(Path(str(module.__file__)).read_bytes())
    file = folder("splits") / f"{name}-{digest.hexdigest()[:16]}.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = make()
        with suppress(OSError):
            files.write_atomic(file, json.dumps(made).encode())
        return made
    with suppress(OSError):
        os.utime(file)
    return stored


def entries() -> list[Entry]:
    """Return all cached steps, the least recently used first."""
    kept = []
    for kind in KINDS:
        groups: dict[str, list[Path]] = {}
        for path in folder(kind).iterdir() if folder(kind).is_dir() else ():
            if not path.name.startswith("."):
                groups.setdefault(path.name.partition(".")[0], []).append(path)
        for paths in groups.values():
            files = [each for path in paths for each in (path, *path.rglob("*"))]
            stats = []
            for file in files:
                with suppress(FileNotFoundError):  # another process is writing or removing it
                    stats.append((file.stat().st_mtime, file.stat().st_size if file.is_file() else 0))
            if stats:
                used, size = max(time_ for time_, _ in stats), sum(size for _, size in stats)
                kept.append(Entry(kind, tuple(sorted(paths)), size, used))
    return sorted(kept, key=lambda entry: entry.used)


def limit() -> int:
    """Return the limit in bytes.

    Raises:
        ValueError: If ``$OVERPARAM_CACHE_LIMIT_GB`` is not a number.
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
    """Remove the least recently used steps until the cache is within its limit; return those removed."""
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
    """Remove all steps that are not in use; return those removed. Fetched weights and texts stay."""
    return [entry for entry in entries() if _remove(entry)]


def describe(removed: list[Entry]) -> str:
    """Describe what was freed, by kind, and what is left."""
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
                # renamed first, so that a reader finds the whole step or nothing
                doomed = path.with_name(f".{path.name}.{time.time_ns()}.partial")
                with suppress(FileNotFoundError):
                    path.rename(doomed)
                    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    except Timeout:
        return False
    return True


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name.partition('.')[0]}.lock")
