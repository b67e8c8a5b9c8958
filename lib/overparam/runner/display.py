"""What a run shows while it works: one live table for all jobs on a terminal, plain lines elsewhere."""

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

_EVERY = 15.0  # seconds between plain lines of one step
_LOOK = 0.25  # seconds between looks at the progress files


@dataclass
class _Shown:
    """One attempt that was handed out, and what is known of it."""

    title: str
    token: str
    file: Path
    expected: float | None
    started: float | None = None  # when its process was first seen at work
    notes_read: int = 0
    cell: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    left: str = ""  # in this step
    line: tuple[str, float] = ("", 0.0)  # last step printed, and when

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.started is not None else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until the job is as old as expected."""
        return self.expected - self.elapsed if self.expected and self.expected > self.elapsed else None


class Display:
    """Shows which job, cell and step is running, read from the progress files that kernels write.

    A thread looks at the files while the `with` block runs; they may be on another machine's side of a shared disk.

    Attributes:
        later: Seconds that jobs not handed out yet will take; None where that is not known.
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
        """Show an attempt from when its process starts to work.

        Args:
            title: What its lines begin with.
            token: Stands in the progress file once it is this attempt's.
            progress_file: Its step; beside it, with more endings, are its cell and its notes.
            expected: Seconds that the job takes; None where that is not known.
        """
        with self._lock:
            self._jobs[token] = _Shown(title, token, progress_file, expected)

    def ended(self, token: str) -> bool:
        """Show what an attempt still had to say, and then no more of it; return whether it had begun."""
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
        if cell.get("token") != shown.token:  # queued, or the file is another run's
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
        """How long the whole plan still takes, where it has more than one job and the time of each is known."""
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
    """Return the running step's label, and how far it is; empty between steps."""
    done, total = progress.get("done", 0), progress.get("total")
    if not progress.get("label") or (total and done >= total):
        return "", ""
    rest = f"{done}/{total}, " if total else f"{done} done, "
    if progress.get("remaining") is not None:
        rest += f"{duration(progress['remaining'])} left in this step, "
    return str(progress["label"]), rest
