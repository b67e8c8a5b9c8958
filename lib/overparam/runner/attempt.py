"""One attempt of one job: its lock, papermill, the check of its record, and its place among the results.

It runs in a process of its own, started by `pool.in_child` here or on a worker of a cluster: that process gets one
line of JSON, ends its kernel when its input ends (its parent is gone) or its time is over, and answers with one line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from overparam.record import record
from overparam.runner import code, settings, state
from overparam.runner import notebook as notebooks
from overparam.runner.job import Job
from overparam.support import files, progress

if TYPE_CHECKING:
    from overparam.runner.kernel import Family

Ending = Literal["done", "up to date", "failed", "interrupted", "running elsewhere", "not run"]
Answer = tuple[Ending, str]  # and the record's path, or the first line of the error
LOCK_WAIT = 10.0  # seconds in which the processes of a run that was killed are gone
_OWN_WAIT = 120.0  # the same for this very attempt, begun on a worker that was killed


class JobError(Exception):
    """A failure that is told in one line."""


def attempt(
    job: Job,
    environment: Mapping[str, str] | None = None,
    *,
    token: str = "",
    late: Callable[[], str] = lambda: "",
) -> Answer:
    """Run a job to its end, in this process and one kernel.

    Args:
        job: From `plan.plan`.
        environment: For the kernel, beside what every job gets.
        token: Identifies this attempt in its progress file.
        late: Asked when the job was stopped; what it returns makes that a failure.
    """
    from overparam.runner.kernel import Family

    folder = job.beside("lock").parent
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder.with_name(".gitignore")
    if not ignore.exists():
        ignore.write_text("*\n")
    family = Family(job.partial)

    def stop() -> None:
        if not family.hurry:  # once: the end must not be disturbed
            family.hurry = True
            raise KeyboardInterrupt

    try:
        with stopped_by(stop), _lock(job, token):
            return _locked(job, dict(environment or {}), token, family, late)
    except Timeout:
        return "running elsewhere", "another process is running it"
    except KeyboardInterrupt:
        return "interrupted", ""


@contextmanager
def _lock(job: Job, token: str) -> Iterator[None]:
    lock = FileLock(job.beside("lock"))
    try:
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout:
        cell = job.beside("progress.cell")
        if not (token and cell.exists() and token in cell.read_text()):
            raise
        lock.acquire(timeout=_OWN_WAIT)
    try:
        yield
    finally:
        lock.release()


def _locked(
    job: Job, environment: dict[str, str], token: str, family: Family, late: Callable[[], str]
) -> Answer:
    path = str(job.directory / record.FILE_NAME)
    if job.reason != "forced" and _finished_meanwhile(job):
        return "up to date", path
    try:
        for stale in job.beside("lock").parent.glob(f"{job.beside('progress').name}*"):
            stale.unlink()
        with job.beside("log").open("a", encoding="utf-8") as log:
            print(f"\n{datetime.now(UTC).isoformat(timespec='seconds')} {job.command}", file=log)
        if job.partial.exists():
            family.end()  # a kernel whose runner was killed may still write there
            shutil.rmtree(job.partial)
        job.partial.mkdir(parents=True)
        _same_code(job)
        if job.state == "to redraw":
            _take_measured(job)
            environment |= {"OVERPARAM_REPLAY": "1"}
        _execute(job, environment, token, family)
        _seal(job)
        family.hurry = True  # from here on the job is done: a signal comes too late
        files.replace_folder(job.partial, job.directory)
        for old in state.replaced(job.directory, job.slug):
            shutil.rmtree(old)
            progress.note(f"replaced the older {old.name}")
    except KeyboardInterrupt:
        if why := late():
            keep_failure(job, JobError(why))
            return "failed", why
        shutil.rmtree(job.partial, ignore_errors=True)
        return "interrupted", ""
    except Exception as error:
        keep_failure(job, error)
        return "failed", first_line(error)
    return "done", path


def _finished_meanwhile(job: Job) -> bool:
    try:
        found = record.load(job.directory)
    except (FileNotFoundError, ValueError):
        return False
    drawn = found.provenance.get("drawing", {}).get("key") == job.drawing.get("key")
    return found.key == job.key and drawn and not record.problems(found)


def _take_measured(job: Job) -> None:
    """Copy what was measured; figures, claims and the notebook are made from it anew."""
    measured = record.load(job.directory)
    drawn = {name for figure in measured.figures for name in figure.files} | {record.NOTEBOOK_NAME}
    measured.figures, measured.claims, measured.notebook = [], [], None
    for name in measured.files().keys() - drawn:
        shutil.copyfile(job.directory / name, job.partial / name)
    record.write(measured, job.partial)


def _same_code(job: Job) -> None:
    """Refuse to run other code than that which the key stands for: edited since, or a worker's own."""
    code.forget()
    reached = code.reached(job.notebook, job.module)
    drawing = {"notebook": reached.notebook_drawing, "modules": reached.drawing}
    changed = state.changes(job.drawing, {**job.drawing, **drawing})
    if "modules" in job.parts and job.state != "to redraw":
        now = {"notebook": reached.notebook_measuring, "modules": reached.measuring}
        changed |= state.changes(job.parts, {**job.parts, **now})
    if changed:
        what = "; ".join(f"{part} {', '.join(names)}".strip() for part, names in changed.items())
        raise JobError(f"the code here is not what the plan was made with: {what}; run again to plan anew")


def _execute(job: Job, environment: dict[str, str], token: str, family: Family) -> None:
    """Run the notebook with papermill; its record and the executed notebook end up in the partial folder."""
    import papermill  # the plan alone needs neither this nor a kernel

    from overparam.runner.kernel import MARK, kernel_class

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that an interrupt leaves behind
    progress_file, log = job.beside("progress"), job.beside("log")
    quiet = log.stat().st_size
    cells = sum(kind == "code" for kind, _, _ in notebooks.sources(job.notebook)) + 1  # the injected one
    environment |= {
        MARK: str(job.partial.resolve()),
        "OVERPARAM_PROFILE": job.profile,
        "OVERPARAM_JOB_KEY": job.key,
        "OVERPARAM_COMMAND": job.command,
        "OVERPARAM_PROGRESS": str(progress_file),
        "PYTHONFAULTHANDLER": "1",
        # bars of libraries, and warnings that are for their developers, make executed notebooks unreadable
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning",
    }
    count = 0

    def show(cell: int) -> None:
        where = {"cell": cell, "cells": cells, "token": token}
        files.write_atomic(job.beside("progress.cell"), json.dumps(where).encode())

    def on_cell_start(**_: object) -> None:
        nonlocal count, quiet
        count += 1
        show(count)
        with log.open("a", encoding="utf-8") as file:
            print(f"{time.strftime('%H:%M:%S')} cell {count}/{cells}", file=file)

    show(0)
    with settings.socket_folder() as folder:
        try:
            papermill.execute_notebook(
                str(job.notebook),
                str(job.partial / record.NOTEBOOK_NAME),
                job.params,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=kernel_class(folder, log, environment, family),
                on_cell_execute=on_cell_start,
            )
        except papermill.PapermillExecutionError:
            raise
        except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that did not start
            said = log.read_bytes()[quiet:].decode(errors="replace")[-2000:]
            raise JobError(f"{error}: the kernel crashed or was killed (out of memory?)\n{said}") from error
        finally:
            family.end()
    outside = job.beside("progress.outside")
    if outside.exists():
        paths = ", ".join(dict.fromkeys(outside.read_text(encoding="utf-8").splitlines()))
        raise JobError(f"the job wrote outside of its own folder: {paths}")


@contextmanager
def stopped_by(action: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM do something else; outside of the main thread, leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        action()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seal(job: Job) -> None:
    """Check that the record is this job's, and complete it with the executed notebook."""
    try:
        left = record.load(job.partial)
    except FileNotFoundError:
        raise JobError("the notebook ended without a record: it must call finish() on its recorder") from None
    if (left.study, left.key) != (job.study, job.key):
        raise JobError(f"the record left is of another job: study {left.study!r}, key {left.key[:8]}")
    if left.params != job.params:
        raise JobError(f"the record's parameters are not the job's: {left.params} instead of {job.params}")
    text = (job.partial / record.NOTEBOOK_NAME).read_text(encoding="utf-8")
    record.seal(
        job.partial, scrub(text, job).encode(), slug=job.slug, key_parts=job.parts, drawing=job.drawing
    )


def scrub(text: str, job: Job) -> str:
    """Take this machine's paths out of an executed notebook (JSON text)."""
    content = json.loads(text)
    about = content["metadata"].setdefault("papermill", {})
    about["input_path"] = f"{job.notebook.parent.name}/{job.notebook.name}"
    about["output_path"] = record.NOTEBOOK_NAME
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    text = re.sub(r"/[^\s\"'\\]*/ipykernel_\d+/\d+\.py", "<cell>", text)
    project = job.notebook.resolve().parent.parent
    places = {
        str(job.partial.resolve()): ".",
        str(project): ".",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
    }
    places |= {tempfile.gettempdir(): "<tmp>", str(Path.home()): "~", str(Path.cwd()): "."}
    for place in sorted(places, key=len, reverse=True):
        if place not in ("/", "/usr", "/usr/local"):
            text = re.sub(rf"{re.escape(json.dumps(place)[1:-1])}(?![\w.-])", places[place], text)
    return text


def keep_failure(job: Job, error: Exception) -> None:
    """Keep the notebook so far, the log and the error beside where the record would be, if the disk allows."""
    failed = job.directory.with_name(f"{job.directory.name}.failed")
    try:
        job.partial.mkdir(parents=True, exist_ok=True)
        text = f"{first_line(error)}\n\n{job.command}\n\n{error}\n"
        (job.partial / "error.txt").write_text(text, encoding="utf-8")
        with job.beside("log").open("a", encoding="utf-8") as log:
            print(f"failed: {error}", file=log)
        shutil.rmtree(failed, ignore_errors=True)
        job.partial.rename(failed)
    except OSError:
        shutil.rmtree(job.partial, ignore_errors=True)


def first_line(error: Exception) -> str:
    """Return what an error says in one line, with its type unless it is ours."""
    name, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    if not name:
        name = "" if isinstance(error, JobError) else type(error).__name__
        value = str(error)
    text = next((line.strip() for line in value.splitlines() if line.strip()), "")
    return ": ".join(part for part in (name, text) if part)


class _Watch(threading.Thread):
    """Stops this process as a signal would when its time is over, or when its parent is gone."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self._late = False

    def run(self) -> None:
        ready, _, _ = select.select([sys.stdin.buffer.fileno()], [], [], self._seconds)
        self._late = not ready
        os.kill(os.getpid(), signal.SIGTERM)

    def reason(self) -> str:
        return f"past its limit of {self._seconds:g} s, and ended" if self._late else ""


def main() -> None:
    """Read a job from standard input, run it, and write how it ended to standard output."""
    order: dict[str, Any] = json.loads(_line(0))
    answer_to = os.fdopen(os.dup(1), "w")
    job = Job.from_dict(order["job"])
    os.dup2(2, 1)  # whatever libraries print goes to the log, as errors do
    os.environ["OVERPARAM_PROGRESS"] = str(job.beside("progress"))
    watch = _Watch(order["timeout"])
    watch.start()
    ending, message = attempt(job, order["environment"], token=order["token"], late=watch.reason)
    answer_to.write(json.dumps({"ending": ending, "message": message[:4000]}))
    answer_to.close()
    os._exit(0)  # nothing that papermill leaves behind may hold this process


def _line(descriptor: int) -> bytes:
    """Read up to a newline without taking more, so that `select` sees what comes after."""
    got = b""
    while not got.endswith(b"\n"):
        part = os.read(descriptor, 1)
        if not part:
            sys.exit("no job was given")
        got += part
    return got


if __name__ == "__main__":
    main()
