"""The Jupyter kernel of one job: this interpreter, reached over files instead of ports, with guaranteed cleanup."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from overparam.runner import settings

MARK = "OVERPARAM_JOB_DIR"  # in the environment of the kernel and of all that it starts


class Family:
    """A kernel and all processes that it started.

    Attributes:
        hurry: End the kernel at once instead of asking it.
    """

    def __init__(self, mark: Path) -> None:
        self.hurry = False
        self._mark = str(mark.resolve())
        self._kernel: int | None = None
        self._known: set[psutil.Process] = set()

    def born(self, pid: int) -> None:
        """Remember the kernel; it leads a session of its own."""
        self._kernel = pid

    def count(self) -> None:
        """Remember who is there, since orphans cannot be traced to a kernel that is gone."""
        if self._kernel is None:
            return
        try:
            kernel = psutil.Process(self._kernel)
            self._known |= {kernel, *kernel.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass

    def end(self) -> None:
        """Kill every process of the family that is still there, also those of a run that was killed."""
        self.count()
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self._kernel or process.environ().get(MARK) == self._mark
            except (OSError, psutil.Error):
                continue
            if ours and process.pid != os.getpid():
                self._known.add(process)
        alive = [process for process in self._known if process.is_running()]
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=5)


def kernel_class(
    folder: Path, log: Path, environment: dict[str, str], family: Family
) -> type[AsyncKernelManager]:
    """Return a kernel manager for one job.

    Whatever kernel specs are installed, the kernel is `sys.executable`; its sockets are files in `folder`, so
    that no two kernels can want the same port.

    Args:
        folder: A short-lived folder with a short path.
        log: Gets what the kernel's process prints past Jupyter.
        environment: Added to `settings.environment`.
        family: Learns of the kernel and its children.
    """

    class Kernel(AsyncKernelManager):
        def __init__(self, **kwargs: Any):
            super().__init__(transport="ipc", connection_file=str(folder / "k.json"), **kwargs)

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "overparam.runner.guard", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

        async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
            with log.open("ab") as file:
                env = {**settings.environment(folder), **environment}
                await super().start_kernel(**{**kwargs, "env": env, "stdout": file, "stderr": file})
            if self.provisioner is not None and (pid := getattr(self.provisioner, "pid", None)):
                family.born(pid)

        async def shutdown_kernel(  # type: ignore[override]
            self, now: bool = False, restart: bool = False
        ) -> None:
            family.count()
            await super().shutdown_kernel(now=now or family.hurry, restart=restart)

    return Kernel
