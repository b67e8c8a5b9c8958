"""Where attempts run: in separate processes on this machine, a few at once (`Local`).

`cluster.Cluster` runs the same function, `in_child`, on the workers of a dask cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from overparam.runner.attempt import Ending, JobError, keep_failure
from overparam.runner.errors import BadInput
from overparam.runner.job import Job

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_GRACE = 20.0  # seconds that a process told to stop has to end by itself
_LATE = 60.0  # seconds after its limit at which a process that did not end itself is killed


@dataclass(frozen=True)
class Request:
    """Everything that a process needs for one attempt at a job.

    Attributes:
        job: The job.
        token: Identifies the attempt.
        timeout: Time limit in seconds.
        threads: Its share of the cores; None for no limit.
        folder: Working directory.
    """

    job: Job
    token: str
    timeout: float | None
    threads: int | None
    folder: str


@dataclass(frozen=True)
class Answer:
    """How an attempt ended; `message` is the record's path or the first line of the error."""

    ending: Ending
    message: str
    seconds: float


class Pool(Protocol):
    """The interface through which `execute.run` runs jobs."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise BadInput for jobs that could never run here."""

    def submit(self, job: Job, token: str, timeout: float | None) -> Future[Answer]:
        """Attempt a job as soon as there is room."""

    def stop(self) -> None:
        """End what runs, and run nothing more."""


class Local:
    """This machine, with `jobs` jobs at once, each with its share of the cores and its own GPUs."""

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs
        self._executor = ThreadPoolExecutor(jobs, thread_name_prefix="job")
        self._stopped = threading.Event()
        self._all = gpus()
        self._free, self._changed = list(self._all), threading.Condition()

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise BadInput for jobs that need more GPUs than there are."""
        self._jobs = min(self._jobs, len(jobs))  # the jobs that share the cores
        problems = [
            f"{job.name} needs {job.resources['GPU']:g} GPU, this machine has {len(self._all)}: leave it out with "
            "--only, or name a cluster with --cluster"
            for job in jobs
            if job.resources.get("GPU", 0) > len(self._all)
        ]
        if problems:
            raise BadInput(*problems)

    def submit(self, job: Job, token: str, timeout: float | None) -> Future[Answer]:
        """Attempt a job as soon as there is room."""
        threads = max(1, cores() // self._jobs) if self._jobs > 1 else None
        return self._executor.submit(self._run, Request(job, token, timeout, threads, os.getcwd()))  # noqa: PTH109

    def stop(self) -> None:
        """End what runs, and run nothing more."""
        self._stopped.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: Request) -> Answer:
        with self._gpus(int(request.job.resources.get("GPU", self._jobs > 1))) as mine:
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
            return in_child(request, environment, self._stopped.is_set)

    @contextmanager
    def _gpus(self, count: int) -> Iterator[list[str]]:
        if not self._all or not count:
            yield []
            return
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count or self._stopped.is_set())
            mine = [self._free.pop(0) for _ in range(min(count, len(self._free)))]
        try:
            yield mine
        finally:
            with self._changed:
                self._free += mine
                self._changed.notify_all()


def in_child(request: Request, environment: dict[str, str], stopped: Callable[[], bool]) -> Answer:
    """Attempt a job in a separate process, and wait for it to end.

    Args:
        request: The job and its limits.
        environment: Extra environment variables of the kernel.
        stopped: Polled; once it returns true, the process and its kernel are ended.
    """
    started = time.monotonic()
    job, limit = request.job, request.timeout
    if request.threads:
        environment = environment | dict.fromkeys(THREADS, str(request.threads))
    job.beside("log").parent.mkdir(parents=True, exist_ok=True)
    line = {"job": job.to_dict(), "token": request.token, "timeout": limit, "environment": environment}
    with job.beside("log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "overparam.runner.attempt"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=request.folder,
            start_new_session=True,  # Ctrl-C reaches only the runner, which then ends its processes
        )
    with process:
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        kill_at = None if limit is None else started + limit + _LATE
        try:
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # it ended at once; its error is in the log
            pass
        hung = False
        while process.poll() is None:
            time.sleep(0.03)
            if stopped() and not process.stdin.closed:
                process.stdin.close()  # tells the attempt to end
                kill_at = time.monotonic() + _GRACE
            if kill_at is not None and time.monotonic() > kill_at:
                hung = True
                process.kill()
                process.wait()
        output = process.stdout.read()
        if not process.stdin.closed:
            process.stdin.close()
    seconds = time.monotonic() - started
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        return _without_answer(job, process.returncode, seconds, stopped=stopped(), hung=hung)
    return Answer(answer["ending"], answer["message"], seconds)


def _without_answer(job: Job, code: int, seconds: float, *, stopped: bool, hung: bool) -> Answer:
    from overparam.runner.kernel import ProcessTree

    ProcessTree(job.partial).kill()
    if stopped:
        shutil.rmtree(job.partial, ignore_errors=True)
        return Answer("interrupted", "", seconds)
    how = f"by signal {-code} (out of memory?)" if code < 0 else f"with exit code {code}"
    why = "it did not end at its limit and was killed" if hung else f"its process ended {how}"
    error = JobError(f"{why}; see {job.beside('log')}")
    keep_failure(job, error)
    return Answer("failed", str(error), seconds)


def cores() -> int:
    """Return the number of cores that this process may use, which a batch system may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Return the GPUs that this process may use, without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.split() if result.returncode == 0 else []
