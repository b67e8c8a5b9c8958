"""Jobs on the workers of a dask cluster, through its `concurrent.futures` interface."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from distributed import Client, get_worker

from overparam.runner.errors import BadInput
from overparam.runner.job import Job
from overparam.runner.pool import Answer, Request, cores, in_child

_CONNECT = 10.0  # seconds to reach the scheduler
# packages whose versions must be the same on client and workers
_SAME: tuple[str, ...] = ("python", "distributed", "overparam")


class Cluster:
    """A running dask cluster.

    Args:
        address: Address of its scheduler, such as ``tcp://host:8786``.

    Raises:
        BadInput: if there is no scheduler, or its workers have other versions of Python, dask or this package.
    """

    def __init__(self, address: str) -> None:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # errors for users are raised here
        self._futures: list[Future[Answer]] = []
        if address.startswith("local"):
            raise BadInput(
                f"--cluster {address}: to run several jobs at once on this machine, use --jobs N, such as --jobs 2"
            )
        try:
            self._client = Client(address, timeout=_CONNECT)
        except (OSError, ValueError, TimeoutError) as error:
            raise BadInput(
                f"--cluster {address}: no dask scheduler answers there ({error}); start one with `dask scheduler`"
            ) from error
        problems = mismatches(self._client.get_versions(packages=["overparam"]))
        if problems:
            self.stop()
            raise BadInput(*(f"--cluster {address}: {problem}" for problem in problems))

    def check(self, jobs: Sequence[Job]) -> None:
        """Wait for a first worker, and raise BadInput for jobs that no worker has the resources for."""
        noted = False
        while not (workers := list(self._client.scheduler_info()["workers"].values())):
            if not noted:
                print("the cluster has no worker yet: waiting for one (Ctrl-C to stop)", flush=True)
                noted = True
            time.sleep(1)
        problems = mismatches(self._client.get_versions(packages=["overparam"])) + [
            f"{job.name} needs a worker with {_needed(job.resources)}, and there is none: start one with "
            f'`dask worker … --resources "{_needed(job.resources)}"`'
            for job in jobs
            if not any(_enough(worker["resources"], job.resources) for worker in workers)
        ]
        if problems:
            raise BadInput(*problems)

    def submit(self, job: Job, token: str, timeout: float | None) -> Future[Answer]:
        """Attempt a job on the first free worker, and on another one if that worker dies."""
        if self._client.status != "running":
            gone: Future[Answer] = Future()
            gone.set_exception(ConnectionError("the scheduler is gone"))
            return gone
        request = Request(job, token, timeout, None, os.getcwd())  # noqa: PTH109
        executor = self._client.get_executor(pure=False, resources=job.resources)
        future: Future[Answer] = executor.submit(on_worker, request)
        self._futures.append(future)
        return future

    def stop(self) -> None:
        """End what runs, and run nothing more: workers end cancelled jobs."""
        for future in self._futures:
            future.cancel()
        self._client.close()


def on_worker(request: Request) -> Answer:
    """Attempt a job in a process on the worker's machine; end it if the job is cancelled."""
    worker = get_worker()
    key = worker.get_current_task()
    # one worker per machine, with as many threads as jobs it may run at once
    request = replace(request, threads=max(1, cores() // worker.state.nthreads))
    return in_child(request, {}, _cancelled(worker, key))


def _cancelled(worker: Any, key: str) -> Callable[[], bool]:
    def cancelled() -> bool:
        task = worker.state.tasks.get(key)
        ending = worker.status.name in ("closing", "closed", "failed")  # also if its scheduler is gone
        return ending or task is None or task.state == "cancelled"

    return cancelled


def mismatches(versions: Mapping[str, Any]) -> list[str]:
    """Return a line for each version that differs between this process and the scheduler or a worker.

    Args:
        versions: From ``Client.get_versions``.
    """
    mine = versions["client"]["packages"]
    parties = {"the scheduler": (versions["scheduler"], _SAME[:2])}
    parties |= {f"worker {address}": (theirs, _SAME) for address, theirs in versions["workers"].items()}
    return [
        f"{who} has {name} {_version(theirs['packages'].get(name))}, here is {_version(mine[name])}: "
        "start it in the same environment"
        for who, (theirs, names) in parties.items()
        for name in names
        if theirs["packages"].get(name) != mine[name]
    ]


def _version(version: str | None) -> str:
    return version or "missing"


def _enough(offered: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(offered.get(name, 0) >= amount for name, amount in needed.items())


def _needed(resources: Mapping[str, float]) -> str:
    return " ".join(f"{name}={amount:g}" for name, amount in resources.items())
