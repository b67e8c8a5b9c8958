"""Running the jobs of a plan: one after another, each in a fresh kernel, and to the end whatever fails."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, TextIO

from overparam.report import files, record
from overparam.runner import notebook as notebooks_
from overparam.runner.display import Display, duration
from overparam.runner.errors import BadInput
from overparam.runner.plan import Job, columns

if TYPE_CHECKING:
    from overparam.runner.kernel import Family

Ending = Literal["done", "up to date", "failed", "interrupted", "not run"]
ALL_DONE, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Outcome:
    """How a job ended; `message` is the record's path or the first line of the error."""

    job: Job
    ending: Ending
    seconds: float
    message: str


class _JobError(Exception):
    """A failure that is told in one line."""


def run(jobs: Sequence[Job], *, out: TextIO | None = None) -> list[Outcome]:
    """Run every job that is due.

    A job that fails leaves ``<slug>-<key8>.failed`` with its notebook so far and ``error.txt``; the next job
    is run all the same. A job that succeeds replaces older records of the same slug. Ctrl-C (or SIGTERM) ends
    the kernel with all its children, leaves nothing that looks finished, and the rest is not run.

    Args:
        jobs: From `plan.plan`.
        out: Where progress is shown; standard output by default.

    Returns:
        One outcome a job, in order.

    Raises:
        BadInput: when the results folder cannot be written; nothing was run then.
    """
    display = Display(out or sys.stdout)
    due = [job for job in jobs if job.state == "due"]
    for folder in {job.directory.parent for job in due}:
        _check_writable(folder)
    outcomes: list[Outcome] = []
    stopped = False
    for job in jobs:
        if job.state == "up to date":
            outcomes.append(Outcome(job, "up to date", 0.0, str(job.directory / record.FILE_NAME)))
        elif stopped:
            outcomes.append(Outcome(job, "not run", 0.0, ""))
        else:
            outcomes.append(_run_job(job, f"[{due.index(job) + 1}/{len(due)}] {job.name}", display))
            stopped = outcomes[-1].ending == "interrupted"
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table."""
    rows = [(o.job.name, o.ending, duration(o.seconds), o.message) for o in outcomes]
    return columns(("job", "state", "time", "record or error"), rows)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 when all is done, 1 when some failed, 130 when interrupted."""
    endings = {outcome.ending for outcome in outcomes}
    if "interrupted" in endings:
        return INTERRUPTED
    return SOME_FAILED if "failed" in endings else ALL_DONE


def _run_job(job: Job, title: str, display: Display) -> Outcome:
    started = time.monotonic()
    partial = job.directory.with_name(f".{job.directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _execute(job, partial, title, display)
        _seal(job, partial)
        files.publish(partial, job.directory)
        for old in _replaced(job):
            shutil.rmtree(old)
            display.line(f"{title}  replaced the older {old.name}")
    except KeyboardInterrupt:
        shutil.rmtree(partial, ignore_errors=True)
        return Outcome(job, "interrupted", time.monotonic() - started, "")
    except Exception as error:
        message = _first_line(error)
        display.line(f"{title}  failed: {message}")
        _keep_failure(job, partial, error)
        return Outcome(job, "failed", time.monotonic() - started, message)
    return Outcome(job, "done", time.monotonic() - started, str(job.directory / record.FILE_NAME))


def _execute(job: Job, partial: Path, title: str, display: Display) -> None:
    """Run the notebook with papermill; its record and the executed notebook end up in `partial`."""
    import papermill  # the plan alone needs neither this nor a kernel

    from overparam.runner.kernel import LOG, Family, kernel_class

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that an interrupt leaves behind
    family = Family()
    code_cells = [i for i, (kind, source, _) in enumerate(notebooks_.sources(job.notebook)) if kind == "code"]
    with (
        tempfile.TemporaryDirectory(prefix="overparam-", ignore_cleanup_errors=True) as name,
        _stoppable(family),
    ):
        folder = Path(name)
        environment = {
            "OVERPARAM_JOB_DIR": str(partial.resolve()),
            "OVERPARAM_PROFILE": job.profile,
            "OVERPARAM_JOB_KEY": job.key,
            "OVERPARAM_COMMAND": job.command,
            "OVERPARAM_PROGRESS": str(folder / "progress"),
            "PYTHONFAULTHANDLER": "1",
            # bars of libraries, and warnings that are for their developers, make executed notebooks unreadable
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning",
        }
        # the injected cell with the parameters is one more
        with display.job(title, folder / "progress", len(code_cells) + 1) as shown:

            def on_cell_start(**_: object) -> None:
                shown.cell += 1

            try:
                papermill.execute_notebook(
                    str(job.notebook),
                    str(partial / record.NOTEBOOK_NAME),
                    job.params,
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    kernel_manager_class=kernel_class(folder, environment, family),
                    on_cell_execute=on_cell_start,
                )
            except papermill.PapermillExecutionError:
                raise
            except RuntimeError as error:  # nbclient's DeadKernelError, or a kernel that did not start
                log = (folder / LOG).read_text(errors="replace")[-2000:] if (folder / LOG).exists() else ""
                raise _JobError(
                    f"{error}: the kernel crashed or was killed (out of memory?)\n{log}"
                ) from error
            finally:
                family.end()


@contextmanager
def _stoppable(family: Family) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt and a quick end; ignore more of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if not family.hurry:
            family.hurry = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seal(job: Job, partial: Path) -> None:
    """Check that the record is this job's, and complete it with the executed notebook."""
    try:
        left = record.load(partial)
    except FileNotFoundError:
        raise _JobError(
            "the notebook ended without a record: it must call finish() on its recorder"
        ) from None
    if (left.study, left.key) != (job.study, job.key):
        raise _JobError(f"the record left is of another job: study {left.study!r}, key {left.key[:8]}")
    if left.params != job.params:
        raise _JobError(f"the record's parameters are not the job's: {left.params} instead of {job.params}")
    text = (partial / record.NOTEBOOK_NAME).read_text(encoding="utf-8")
    record.seal(partial, scrub(text, job, partial).encode(), slug=job.slug, key_parts=job.parts)


def scrub(text: str, job: Job, partial: Path) -> str:
    """Take this machine's paths out of an executed notebook (JSON text)."""
    content = json.loads(text)
    about = content["metadata"].setdefault("papermill", {})
    about["input_path"] = f"{job.notebook.parent.name}/{job.notebook.name}"
    about["output_path"] = record.NOTEBOOK_NAME
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    text = re.sub(r"/[^\s\"'\\]*/ipykernel_\d+/\d+\.py", "<cell>", text)
    project = job.notebook.resolve().parent.parent
    places = {
        str(partial.resolve()): ".",
        str(project): ".",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
    }
    places |= {tempfile.gettempdir(): "<tmp>", str(Path.home()): "~", str(Path.cwd()): "."}
    for place in sorted(places, key=len, reverse=True):
        if place not in ("/", "/usr", "/usr/local"):
            text = re.sub(rf"{re.escape(json.dumps(place)[1:-1])}(?![\w.-])", places[place], text)
    return text


def _replaced(job: Job) -> list[Path]:
    """Return older folders of the same slug: records made by other code or parameters, and failures."""
    old = [
        found.path.parent
        for found in record.find(job.directory.parent)
        if found.slug == job.slug and found.key != job.key and found.path is not None
    ]
    failures = job.directory.parent.glob("*.failed")
    pattern = re.compile(rf"{re.escape(job.slug)}-[0-9a-f]{{8}}\.failed")
    return old + [path for path in failures if pattern.fullmatch(path.name)]


def _keep_failure(job: Job, partial: Path, error: Exception) -> None:
    """Keep the notebook so far and the error beside where the record would be, if the disk allows."""
    failed = job.directory.with_name(f"{job.directory.name}.failed")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "error.txt").write_text(f"{job.command}\n\n{error}\n", encoding="utf-8")
        shutil.rmtree(failed, ignore_errors=True)
        partial.rename(failed)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)


def _first_line(error: Exception) -> str:
    name, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    if not name:
        name = "" if isinstance(error, _JobError) else type(error).__name__
        value = str(error)
    text = next((line.strip() for line in value.splitlines() if line.strip()), "")
    return ": ".join(part for part in (name, text) if part)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", suffix=".partial") as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise BadInput(
            f"cannot write into {folder}: {error.strerror}; choose another with --results"
        ) from error
