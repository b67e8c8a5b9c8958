"""Progress of a run: a live table of all jobs on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_EVERY = 15.0  # seconds between plain lines about the same step
_LOOK = 0.25  # seconds between looks at the progress files


@dataclass
class _Shown:
    """What is shown of one submitted attempt."""

    title: str
    token: str
    file: Path
    expected: float | None
    started: float | None = None  # time at which its process was first seen working
    notes_read: int = 0
    cell: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    left: str = ""  # remaining time of this step
    line: tuple[str, float] = ("", 0.0)  # last step printed, and its time

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.started is not None else 0.0

    @property
    def remaining(self) -> float | None:
        """Expected remaining seconds; None if unknown or exceeded."""
        return self.expected - self.elapsed if self.expected and self.expected > self.elapsed else None


class Display:
    """Shows which jobs, cells and steps are running, read from the progress files that kernels write.

    A thread reads the files during the `with` block; they may be written by other machines on a shared disk.

    Attributes:
        later: Seconds that jobs not submitted yet will take; None if unknown.
    """

    def __init__(self, out: TextIO):
        self.later: float | None = 0.0
        self._out = out
        self._jobs: dict[str, _Shown] = {}
        self._lock = threading.RLock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._out.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._out, highlight=False, markup=False, soft_wrap=True)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._live is not None:
            self._live.stop()

    def submitted(self, title: str, token: str, progress_file: Path, expected: float | None = None) -> None:
        """Show an attempt once its process starts to work.

        Args:
            title: Beginning of its lines.
            token: Identifies the attempt in its progress files.
            progress_file: File with its step; ``.cell`` and ``.notes`` beside it hold its cell and its notes.
            expected: Seconds that the job will take; None if unknown.
        """
        with self._lock:
            self._jobs[token] = _Shown(title, token, progress_file, expected)

    def ended(self, token: str) -> bool:
        """Show the last notes of an attempt and remove it; return whether it had started."""
        with self._lock:
            shown = self._jobs.pop(token)
            self._read(shown)
        return shown.started is not None

    def line(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(text)
            else:
                print(text, file=self._out, flush=True)

    def _watch(self) -> None:
        while not self._end.wait(_LOOK):
            with self._lock:
                for shown in self._jobs.values():
                    self._read(shown)
                    if self._live is None and shown.started is not None:
                        self._plain(shown)
                if self._live is not None:
                    self._live.update(self._table(), refresh=True)

    def _read(self, shown: _Shown) -> None:
        cell = _content(shown.file.with_name(f"{shown.file.name}.cell"))
        if cell.get("token") != shown.token:  # still queued, or the file is from another run
            return
        if shown.started is None:
            shown.started = time.monotonic()
        shown.cell = cell
        shown.step, shown.left = _step(_content(shown.file))
        notes = shown.file.with_name(f"{shown.file.name}.notes")
        if notes.exists():
            complete = notes.read_text(encoding="utf-8").split("\n")[:-1]
            for line in complete[shown.notes_read :]:
                self.line(f"{shown.title}  {json.loads(line)['note']}")
            shown.notes_read = len(complete)

    def _plain(self, shown: _Shown) -> None:
        step = f"{shown.title}  {_where(shown)}  {shown.step}".rstrip()
        last, when = shown.line
        if step != last or time.monotonic() - when >= _EVERY:
            shown.line = (step, time.monotonic())
            self.line(
                f"{step}  {shown.left}{duration(shown.elapsed)} elapsed{_about(shown)}{self._for_all()}"
            )

    def _table(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for shown in self._jobs.values():
            if shown.started is not None:
                rest = f"{shown.left}{duration(shown.elapsed)} elapsed{_about(shown)}"
                table.add_row(shown.title, _where(shown), shown.step, rest)
        queued = sum(shown.started is None for shown in self._jobs.values())
        if queued:
            table.add_row(f"{queued} more to start{self._for_all()}")
        return table

    def _for_all(self) -> str:
        """Expected remaining time of all jobs, if there are several and each time is known."""
        jobs = self._jobs.values()
        expected = [shown.expected for shown in jobs if shown.expected is not None]
        if self.later is None or len(expected) < len(jobs) or (len(jobs) == 1 and not self.later):
            return ""
        left = [max(0.0, (shown.expected or 0.0) - shown.elapsed) for shown in jobs]
        at_once = max(1, sum(shown.started is not None for shown in jobs))
        return f", about {duration(max(*left, (sum(left) + self.later) / at_once))} for all jobs"


def duration(seconds: float) -> str:
    """Return 75 as 1:15 and 3675 as 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _where(shown: _Shown) -> str:
    return f"cell {shown.cell['cell']}/{shown.cell['cells']}" if shown.cell.get("cell") else "starting"


def _about(shown: _Shown) -> str:
    return f", about {duration(shown.remaining)} left" if shown.remaining is not None else ""


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _step(progress: dict[str, Any]) -> tuple[str, str]:
    """Return the label and progress of the current step; empty between steps."""
    done, total = progress.get("done", 0), progress.get("total")
    if not progress.get("label") or (total and done >= total):
        return "", ""
    rest = f"{done}/{total}, " if total else f"{done} done, "
    if progress.get("remaining") is not None:
        rest += f"{duration(progress['remaining'])} left in this step, "
    return str(progress["label"]), rest
