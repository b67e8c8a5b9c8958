"""One attempt at a job: take its lock, run papermill, check the record, and move it to the results.

Each attempt is a separate process, started by `pool.in_child` on this machine or on a cluster's worker. It reads one
line of JSON, and answers with one line. It ends its kernel at the time limit, or when its input closes (its parent has
died).
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
    from overparam.runner.kernel import ProcessTree

Ending = Literal["done", "up to date", "failed", "interrupted", "running elsewhere", "not run"]
Result = tuple[Ending, str]  # with the record's path, or the first line of the error
LOCK_WAIT = 10.0  # seconds after which the processes of a killed run are gone
_OWN_WAIT = 120.0  # the same for this attempt itself, if its first worker was killed


class JobError(Exception):
    """A failure with a message of one line."""


def attempt(
    job: Job,
    environment: Mapping[str, str] | None = None,
    *,
    token: str = "",
    late: Callable[[], str] = lambda: "",
) -> Result:
    """Run a job to its end, in this process and one kernel.

    Args:
        job: From `plan.plan`.
        environment: Extra environment variables of the kernel.
        token: Identifies this attempt in its progress file.
        late: Called if the job was stopped; a reason that it returns (the time limit) makes the job a failure.
    """
    from overparam.runner.kernel import ProcessTree

    folder = job.beside("lock").parent
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder.with_name(".gitignore")
    if not ignore.exists():
        ignore.write_text("*\n")
    processes = ProcessTree(job.partial)

    def stop() -> None:
        if not processes.kill_now:  # only once: a second signal must not interrupt the cleanup
            processes.kill_now = True
            raise KeyboardInterrupt

    try:
        with stopped_by(stop), _lock(job, token):
            return _locked(job, dict(environment or {}), token, processes, late)
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
    job: Job, environment: dict[str, str], token: str, processes: ProcessTree, late: Callable[[], str]
) -> Result:
    path = str(job.directory / record.FILE_NAME)
    if job.reason != "forced" and _is_done(job):
        return "up to date", path
    try:
        for stale in job.beside("lock").parent.glob(f"{job.beside('progress').name}*"):
            stale.unlink()
        with job.beside("log").open("a", encoding="utf-8") as log:
            print(f"\n{datetime.now(UTC).isoformat(timespec='seconds')} {job.command}", file=log)
        if job.partial.exists():
            processes.kill()  # a kernel whose runner was killed may still write there
            shutil.rmtree(job.partial)
        job.partial.mkdir(parents=True)
        _check_code(job)
        if job.state == "to redraw":
            _copy_measurements(job)
            environment |= {"OVERPARAM_REPLAY": "1"}
        _execute(job, environment, token, processes)
        _seal(job)
        processes.kill_now = True  # the job is done: ignore signals from here on
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


def _is_done(job: Job) -> bool:
    """Whether another process has finished the job since the plan was made."""
    try:
        existing = record.load(job.directory)
    except (FileNotFoundError, ValueError):
        return False
    drawn = existing.provenance.get("drawing", {}).get("key") == job.drawing.get("key")
    return existing.key == job.key and drawn and not record.problems(existing)


def _copy_measurements(job: Job) -> None:
    """Copy the measurements of the existing record, without its figures, claims and notebook."""
    measured = record.load(job.directory)
    drawn = {name for figure in measured.figures for name in figure.files} | {record.NOTEBOOK_NAME}
    measured.figures, measured.claims, measured.notebook = [], [], None
    for name in measured.files().keys() - drawn:
        shutil.copyfile(job.directory / name, job.partial / name)
    record.write(measured, job.partial)


def _check_code(job: Job) -> None:
    """Refuse to run if the code differs from the plan's: edited since, or another version on a worker."""
    code.forget()
    reached = code.reached(job.notebook, job.module)
    drawing = {"notebook": reached.notebook_drawing, "modules": reached.drawing}
    changed = state.changes(job.drawing, {**job.drawing, **drawing})
    if "modules" in job.parts and job.state != "to redraw":
        now = {"notebook": reached.notebook_measuring, "modules": reached.measuring}
        changed |= state.changes(job.parts, {**job.parts, **now})
    if changed:
        what = "; ".join(f"{part} {', '.join(names)}".strip() for part, names in changed.items())
        raise JobError(f"the code has changed since the plan was made: {what}; start the run again")


def _execute(job: Job, environment: dict[str, str], token: str, processes: ProcessTree) -> None:
    """Run the notebook with papermill; record and executed notebook are written to the partial folder."""
    import papermill  # imported here: a plan alone does not need it

    from overparam.runner.kernel import MARK, kernel_class

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that an interrupt leaves behind
    progress_file, log = job.beside("progress"), job.beside("log")
    seen = log.stat().st_size  # bytes of the log from before the current cell
    cells = sum(kind == "code" for kind, _, _ in notebooks.sources(job.notebook)) + 1  # the injected one
    environment |= {
        MARK: str(job.partial.resolve()),
        "OVERPARAM_PROFILE": job.profile,
        "OVERPARAM_JOB_KEY": job.key,
        "OVERPARAM_COMMAND": job.command,
        "OVERPARAM_PROGRESS": str(progress_file),
        "PYTHONFAULTHANDLER": "1",
        # progress bars of libraries, and warnings for developers, make executed notebooks unreadable
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning",
    }
    count = 0

    def show(cell: int) -> None:
        where = {"cell": cell, "cells": cells, "token": token}
        files.write_atomic(job.beside("progress.cell"), json.dumps(where).encode())

    def on_cell_start(**_: object) -> None:
        nonlocal count
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
                kernel_manager_class=kernel_class(folder, log, environment, processes),
                on_cell_execute=on_cell_start,
            )
        except papermill.PapermillExecutionError:
            raise
        except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that did not start
            output = log.read_bytes()[seen:].decode(errors="replace")[-2000:]
            raise JobError(f"{error}: the kernel crashed or was killed (out of memory?)\n{output}") from error
        finally:
            processes.kill()
    outside = job.beside("progress.outside")
    if outside.exists():
        paths = ", ".join(dict.fromkeys(outside.read_text(encoding="utf-8").splitlines()))
        raise JobError(f"the job wrote outside its own folder: {paths}")


@contextmanager
def stopped_by(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` on SIGINT and SIGTERM within the block; outside the main thread, change nothing."""
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
    """Check that the record belongs to this job, and add the executed notebook to it."""
    try:
        made = record.load(job.partial)
    except FileNotFoundError:
        raise JobError("the notebook ended without a record: it must call finish() on its recorder") from None
    if (made.study, made.key) != (job.study, job.key):
        raise JobError(f"the record is of another job: study {made.study!r}, key {made.key[:8]}")
    if made.params != job.params:
        raise JobError(
            f"the record's parameters differ from the job's: {made.params} instead of {job.params}"
        )
    text = (job.partial / record.NOTEBOOK_NAME).read_text(encoding="utf-8")
    record.seal(
        job.partial, scrub(text, job).encode(), slug=job.slug, key_parts=job.parts, drawing=job.drawing
    )


def scrub(text: str, job: Job) -> str:
    """Remove this machine's paths from an executed notebook (JSON text)."""
    content = json.loads(text)
    metadata = content["metadata"].setdefault("papermill", {})
    metadata["input_path"] = f"{job.notebook.parent.name}/{job.notebook.name}"
    metadata["output_path"] = record.NOTEBOOK_NAME
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
    """Keep the unfinished notebook and the error in ``<slug>-<key8>.failed``, if the disk allows."""
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
    """Return the first line of an error's message, with its type unless it is a `JobError`."""
    name, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    if not name:
        name = "" if isinstance(error, JobError) else type(error).__name__
        value = str(error)
    text = next((line.strip() for line in value.splitlines() if line.strip()), "")
    return ": ".join(part for part in (name, text) if part)


class _Watch(threading.Thread):
    """Ends this process with SIGTERM at its time limit, or when its parent has died."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self._late = False

    def run(self) -> None:
        ready, _, _ = select.select([sys.stdin.buffer.fileno()], [], [], self._seconds)
        self._late = not ready
        os.kill(os.getpid(), signal.SIGTERM)

    def reason(self) -> str:
        return f"ended at its limit of {self._seconds:g} s" if self._late else ""


def main() -> None:
    """Read a job from standard input, run it, and write how it ended to standard output."""
    request: dict[str, Any] = json.loads(_line(0))
    answer = os.fdopen(os.dup(1), "w")
    job = Job.from_dict(request["job"])
    os.dup2(2, 1)  # what libraries print goes to the log, like errors
    os.environ["OVERPARAM_PROGRESS"] = str(job.beside("progress"))
    watch = _Watch(request["timeout"])
    watch.start()
    ending, message = attempt(job, request["environment"], token=request["token"], late=watch.reason)
    answer.write(json.dumps({"ending": ending, "message": message[:4000]}))
    answer.close()
    os._exit(0)  # threads that papermill leaves behind must not keep this process alive


def _line(descriptor: int) -> bytes:
    """Read up to a newline and no further, so that `select` sees what comes after."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            sys.exit("no job was given")
        line += byte
    return line


if __name__ == "__main__":
    main()
