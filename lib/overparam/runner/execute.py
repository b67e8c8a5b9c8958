"""Running the jobs of a plan, here or on a cluster: several at once, and the rest goes on if one fails."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from overparam.record import record
from overparam.runner import state
from overparam.runner.attempt import LOCK_WAIT, Ending, first_line, stopped_by
from overparam.runner.display import Display, duration
from overparam.runner.errors import BadInput
from overparam.runner.job import Job
from overparam.runner.plan import columns
from overparam.runner.pool import Answer, Local, Pool

ALL_DONE, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_REDRAW_SECONDS = 10.0  # about as long as a redraw takes
_NOT_STARTED = "interrupted before it started"


@dataclass(frozen=True)
class Outcome:
    """How a job ended; `message` is the record's path or the first line of the error."""

    job: Job
    ending: Ending
    seconds: float
    message: str


def run(
    jobs: Sequence[Job],
    *,
    pool: Callable[[], Pool] = Local,
    timeout: float | None = None,
    retries: int = 0,
    replan: Callable[[], Sequence[Job]] | None = None,
    out: TextIO | None = None,
) -> list[Outcome]:
    """Run every job that is due.

    A failed job leaves ``<slug>-<key8>.failed`` with its unfinished notebook and ``error.txt``; jobs that do not need
    it still run. A finished job replaces older records of the same slug. A job that another process is running is left
    alone. Ctrl-C (or SIGTERM) ends every kernel with all its children, leaves nothing that looks finished, and starts
    no further jobs.

    Args:
        jobs: From `plan.plan`.
        pool: Makes the pool that runs due jobs: `pool.Local` or `cluster.Cluster`.
        timeout: Seconds after which a job is ended, with all its children, as failed.
        retries: How often a failed job is tried again.
        replan: Makes the plan again, for jobs whose inputs another job of this run has changed.
        out: Stream for progress; standard output by default.

    Returns:
        One outcome per job, in order.

    Raises:
        BadInput: if the results folder is not writable, or the pool cannot run a job; nothing was run then.
    """
    freed = _freed([job for job in jobs if job.state == "running elsewhere"])
    due = [job for job in jobs if job.state in ("due", "to redraw") or job in freed]
    for job in jobs:
        if job.state == "up to date":  # a run killed just before its end may have left older records
            for old in state.replaced(job.directory, job.slug):
                shutil.rmtree(old)
    outcomes = {job.name: _as_planned(job) for job in jobs if job not in due}
    for folder in {job.directory.parent for job in due}:
        _check_writable(folder)
    if due:
        workers = pool()
        try:
            workers.check(due)
            with Display(out or sys.stdout) as display:
                outcomes |= _Run(workers, display, due, outcomes, timeout, retries, replan).finish()
        finally:
            workers.stop()
    return [outcomes[job.name] for job in jobs]


class _Run:
    """One run, with its waiting, running and ended jobs."""

    def __init__(
        self,
        pool: Pool,
        display: Display,
        due: Sequence[Job],
        ended: Mapping[str, Outcome],
        timeout: float | None,
        retries: int,
        replan: Callable[[], Sequence[Job]] | None,
    ) -> None:
        self._pool, self._display, self._replan = pool, display, replan
        self._timeout, self._retries = timeout, retries
        self._titles = {job.name: f"[{i}/{len(due)}] {job.name}" for i, job in enumerate(due, 1)}
        self._waiting = list(due)
        self._running: dict[Future[Answer], tuple[Job, str]] = {}
        self._attempts: Counter[str] = Counter()
        self._ended = dict(ended)
        self._id = uuid.uuid4().hex

    def finish(self) -> dict[str, Outcome]:
        """Run everything; return the outcomes by the jobs' names."""
        stopping = threading.Event()
        with stopped_by(stopping.set):
            while (self._waiting or self._running) and not stopping.is_set():
                self._submit_ready()
                if self._running:
                    self._collect(wait(self._running, timeout=0.2, return_when=FIRST_COMPLETED).done)
            if stopping.is_set():
                self._pool.stop()
                # `wait` would not return for these
                cancelled = {future for future in self._running if future.cancelled()}
                self._collect(cancelled | wait(self._running.keys() - cancelled).done, stopped=True)
        for job in self._waiting:
            self._end(job, Answer("not run", _NOT_STARTED, 0.0))
        return self._ended

    def _submit_ready(self) -> None:
        for job in list(self._waiting):
            before = [each for each in self._known() if each.study in job.needs and each.study != job.study]
            endings = {
                each.name: self._ended[each.name].ending for each in before if each.name in self._ended
            }
            bad = [name for name, ending in endings.items() if ending not in ("done", "up to date")]
            if not bad and len(endings) < len(before):
                continue
            self._waiting.remove(job)
            if bad:
                self._end(job, Answer("not run", f"needs {bad[0]}, which is not done", 0.0))
                continue
            if "done" in endings.values() and self._replan is not None:  # new inputs change the job's key
                job = next(each for each in self._replan() if each.name == job.name)
                if job.state not in ("due", "to redraw"):
                    self._ended[job.name] = _as_planned(job)
                    continue
            self._submit(job)

        waiting = [_expected(job) for job in self._waiting]
        known = [seconds for seconds in waiting if seconds is not None]
        self._display.later = sum(known) if len(known) == len(waiting) else None

    def _known(self) -> list[Job]:
        running = [job for job, _ in self._running.values()]
        return [*self._waiting, *running, *(outcome.job for outcome in self._ended.values())]

    def _submit(self, job: Job) -> None:
        self._attempts[job.name] += 1
        token = f"{self._id}-{job.name}-{self._attempts[job.name]}"
        expected = _expected(job)
        self._display.submitted(self._titles[job.name], token, job.beside("progress"), expected)
        self._running[self._pool.submit(job, token, self._timeout)] = (job, token)

    def _collect(self, done: set[Future[Answer]], *, stopped: bool = False) -> None:
        for future in done:
            job, token = self._running.pop(future)
            title = self._titles[job.name]
            started = self._display.ended(token)
            try:
                answer = future.result()
            except CancelledError:
                answer = Answer("failed", "the scheduler is gone: start it and this command again", 0.0)
                if stopped:
                    answer = (
                        Answer("interrupted", "", 0.0) if started else Answer("not run", _NOT_STARTED, 0.0)
                    )
            except Exception as error:  # raised by the cluster: its workers died, or cannot read the request
                answer = Answer("failed", first_line(error), 0.0)
            if answer.ending == "failed":
                again = self._attempts[job.name] <= self._retries and not stopped
                tries = f"; trying again ({self._attempts[job.name]} of {self._retries})" if again else ""
                self._display.line(f"{title}  failed: {answer.message}{tries}")
                if again:
                    self._submit(job)
                    continue
            elif answer.ending == "running elsewhere":
                self._display.line(f"{title}  is run by another process: left alone")
            self._end(job, answer)

    def _end(self, job: Job, answer: Answer) -> None:
        self._ended[job.name] = Outcome(job, answer.ending, answer.seconds, answer.message)


def _expected(job: Job) -> float | None:
    return job.expected if job.state == "due" else _REDRAW_SECONDS


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table."""
    rows = [(o.job.name, o.ending, duration(o.seconds), o.message) for o in outcomes]
    return columns(("job", "state", "time", "record or error"), rows)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 when all is done, 1 when some failed or were left to another run, 130 when interrupted."""
    endings = {outcome.ending for outcome in outcomes}
    if "interrupted" in endings or any(outcome.message == _NOT_STARTED for outcome in outcomes):
        return INTERRUPTED
    return ALL_DONE if endings <= {"done", "up to date"} else SOME_FAILED


def _freed(jobs: Sequence[Job]) -> list[Job]:
    """Wait a little for jobs that seem to run elsewhere; return those that become free, as after a killed run."""
    locks = {job.name: job.beside("lock") for job in jobs}
    end = time.monotonic() + LOCK_WAIT
    while (held := [name for name, lock in locks.items() if state.held(lock)]) and time.monotonic() < end:
        time.sleep(0.2)
    return [job for job in jobs if job.name not in held]


def _as_planned(job: Job) -> Outcome:
    if job.state == "up to date":
        return Outcome(job, "up to date", 0.0, str(job.directory / record.FILE_NAME))
    return Outcome(job, "running elsewhere", 0.0, job.reason)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", suffix=".partial") as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise BadInput(
            f"cannot write into {folder}: {error.strerror}; choose another with --results"
        ) from error
