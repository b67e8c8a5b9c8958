"""Progress of long work: a progress bar in interactive use, a status file for the batch runner.

If ``$OVERPARAM_PROGRESS`` names a file (the runner sets it), nothing is printed, so that executed notebooks stay
readable; the file always holds one JSON line about the current step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_WRITE_EVERY = 0.5  # seconds


def note(text: str) -> None:
    """Show a message about something that happens once, such as a download or a conversion."""
    target = _status_file()
    if target is None:
        tqdm.write(text)
        return
    with target.with_name(target.name + ".notes").open("a") as notes:
        notes.write(json.dumps({"note": text}) + "\n")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while showing how many are done and how much time is left.

    Args:
        items: What to loop over.
        label: Name of the step.
        total: Number of items, if `items` has no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    target = _status_file()
    if target is None:
        yield from tqdm(items, desc=label, total=total, leave=False)
        return
    started = last = time.monotonic()
    _write(target, label, 0, total, 0.0)
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _WRITE_EVERY or done == total:
            _write(target, label, done, total, now - started)
            last = now


def _status_file() -> Path | None:
    name = os.environ.get("OVERPARAM_PROGRESS")
    return Path(name) if name else None


def _write(target: Path, label: str, done: int, total: int | None, seconds: float) -> None:
    remaining = seconds / done * (total - done) if total and done else None
    line = {"label": label, "done": done, "total": total, "seconds": seconds, "remaining": remaining}
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(line))
    temporary.replace(target)
