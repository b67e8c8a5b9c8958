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
from overparam.runner.pool import Answer, Order, cores, in_child

_CONNECT = 10.0  # seconds to reach the scheduler
_SAME: tuple[str, ...] = (
    "python",
    "distributed",
    "overparam",
)  # versions that must not differ between client and workers


class Cluster:
    """A dask cluster that is running.

    Args:
        address: Of its scheduler, such as ``tcp://host:8786``.

    Raises:
        BadInput: when there is no scheduler, or its workers have other versions of Python, dask or this package.
    """

    def __init__(self, address: str) -> None:
        logging.getLogger("distributed").setLevel(
            logging.CRITICAL
        )  # what concerns the user is said in our words
        self._futures: list[Future[Answer]] = []
        if address.startswith("local"):
            raise BadInput(
                f"--cluster {address}: several jobs at once on this machine are --jobs N, such as --jobs 2"
            )
        try:
            self._client = Client(address, timeout=_CONNECT)
        except (OSError, ValueError, TimeoutError) as error:
            raise BadInput(
                f"--cluster {address}: no dask scheduler answers there ({error}); start one with `dask scheduler`"
            ) from error
        found = mismatches(self._client.get_versions(packages=["overparam"]))
        if found:
            self.stop()
            raise BadInput(*(f"--cluster {address}: {problem}" for problem in found))

    def check(self, jobs: Sequence[Job]) -> None:
        """Wait for a first worker, and raise BadInput for jobs that no worker has the resources for."""
        said = False
        while not (workers := list(self._client.scheduler_info()["workers"].values())):
            if not said:
                print("the cluster has no worker yet: waiting for one (Ctrl-C ends this)", flush=True)
                said = True
            time.sleep(1)
        found = mismatches(self._client.get_versions(packages=["overparam"])) + [
            f"{job.name} needs a worker with {_needed(job.resources)}, and there is none: start one with "
            f'`dask worker … --resources "{_needed(job.resources)}"`'
            for job in jobs
            if not any(_enough(worker["resources"], job.resources) for worker in workers)
        ]
        if found:
            raise BadInput(*found)

    def submit(self, job: Job, token: str, timeout: float | None) -> Future[Answer]:
        """Attempt a job on the first worker that is free; on another one if that worker dies."""
        if self._client.status != "running":
            gone: Future[Answer] = Future()
            gone.set_exception(ConnectionError("the scheduler is gone"))
            return gone
        order = Order(job, token, timeout, None, os.getcwd())  # noqa: PTH109
        executor = self._client.get_executor(pure=False, resources=job.resources)
        future: Future[Answer] = executor.submit(on_worker, order)
        self._futures.append(future)
        return future

    def stop(self) -> None:
        """End what runs, and run nothing more: workers end jobs that nobody waits for."""
        for future in self._futures:
            future.cancel()
        self._client.close()


def on_worker(order: Order) -> Answer:
    """Attempt a job in a process of the worker's machine, until nobody wants its outcome any more."""
    worker = get_worker()
    key = worker.get_current_task()
    # one worker a machine, with as many threads as it may run jobs at once
    order = replace(order, threads=max(1, cores() // worker.state.nthreads))
    return in_child(order, {}, _unwanted(worker, key))


def _unwanted(worker: Any, key: str) -> Callable[[], bool]:
    def unwanted() -> bool:
        task = worker.state.tasks.get(key)
        ending = worker.status.name in ("closing", "closed", "failed")  # as when its scheduler is gone
        return ending or task is None or task.state == "cancelled"

    return unwanted


def mismatches(versions: Mapping[str, Any]) -> list[str]:
    """Return a line for each version in which scheduler or workers differ from this process.

    Args:
        versions: From ``Client.get_versions``.
    """
    mine = versions["client"]["packages"]
    parties = {"the scheduler": (versions["scheduler"], _SAME[:2])}
    parties |= {f"worker {address}": (found, _SAME) for address, found in versions["workers"].items()}
    return [
        f"{who} has {name} {_version(found['packages'].get(name))}, here is {_version(mine[name])}: "
        "start it in the same environment"
        for who, (found, names) in parties.items()
        for name in names
        if found["packages"].get(name) != mine[name]
    ]


def _version(version: str | None) -> str:
    return version or "missing"


def _enough(offered: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(offered.get(name, 0) >= amount for name, amount in needed.items())


def _needed(resources: Mapping[str, float]) -> str:
    return " ".join(f"{name}={amount:g}" for name, amount in resources.items())
