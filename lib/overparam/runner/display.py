"""What a run shows while it works: one status line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any, TextIO

_EVERY = 15.0  # seconds between plain lines of one step


class Display:
    """Shows which job, cell and step is running, read from the progress file that the kernel writes."""

    def __init__(self, out: TextIO):
        self._out = out
        self._live = out.isatty()
        self._lock = threading.Lock()
        self._shown = ("", 0.0)  # last step printed, and when

    def job(self, title: str, progress_file: Path, cells: int) -> JobDisplay:
        """Return a context manager that shows one job until it ends."""
        return JobDisplay(self, title, progress_file, cells)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._out.write(("\r\x1b[K" if self._live else "") + text + "\n")
            self._out.flush()

    def status(self, step: str, rest: str) -> None:
        """Show the current state: rewritten on a terminal, else on a new step and every 15 s."""
        text = f"{step}  {rest}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            with self._lock:
                self._out.write(f"\r{text[:width]}\x1b[K")
                self._out.flush()
            return
        last, when = self._shown
        if step != last or time.monotonic() - when >= _EVERY:
            self._shown = (step, time.monotonic())
            self.line(text)

    def clear(self) -> None:
        """Take the status line away."""
        if self._live:
            with self._lock:
                self._out.write("\r\x1b[K")
                self._out.flush()


class JobDisplay:
    """One job's state; a thread shows it while the `with` block runs."""

    def __init__(self, display: Display, title: str, progress_file: Path, cells: int):
        self.cell = 0
        self._display, self._title, self._file, self._cells = display, title, progress_file, cells
        self._notes_read = 0
        self._started = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> JobDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._notes()
        self._display.clear()

    def _watch(self) -> None:
        while not self._end.wait(0.25):
            self._notes()
            label, rest = _step(_read(self._file))
            where = (
                f"{self._title}  cell {self.cell}/{self._cells}" if self.cell else f"{self._title}  starting"
            )
            elapsed = duration(time.monotonic() - self._started)
            self._display.status(f"{where}  {label}".rstrip(), f"{rest}{elapsed} elapsed")

    def _notes(self) -> None:
        notes = self._file.with_name(self._file.name + ".notes")
        if not notes.exists():
            return
        complete = notes.read_text(encoding="utf-8").split("\n")[:-1]
        for line in complete[self._notes_read :]:
            self._display.line(f"{self._title}  {json.loads(line)['note']}")
        self._notes_read = len(complete)


def duration(seconds: float) -> str:
    """Return 75 as 1:15 and 3675 as 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _read(path: Path) -> dict[str, Any]:
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
