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

MARK = "OVERPARAM_JOB_DIR"  # set in the environment of the kernel and of all processes that it starts


class ProcessTree:
    """A kernel and all processes that it started.

    Attributes:
        kill_now: Whether the kernel is killed at once, without asking it to shut down.
    """

    def __init__(self, mark: Path) -> None:
        self.kill_now = False
        self._mark = str(mark.resolve())
        self._kernel: int | None = None
        self._known: set[psutil.Process] = set()

    def started(self, pid: int) -> None:
        """Remember the kernel; it leads its own session."""
        self._kernel = pid

    def update(self) -> None:
        """Remember the kernel's child processes: once it is gone, they cannot be traced to it."""
        if self._kernel is None:
            return
        try:
            kernel = psutil.Process(self._kernel)
            self._known |= {kernel, *kernel.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass

    def kill(self) -> None:
        """Kill every process that is still running, also those left by a killed run."""
        self.update()
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
    folder: Path, log: Path, environment: dict[str, str], processes: ProcessTree
) -> type[AsyncKernelManager]:
    """Return a kernel manager for one job.

    The kernel is always `sys.executable`, whatever kernel specs are installed. Its sockets are files in `folder`, so
    that two kernels cannot compete for a port.

    Args:
        folder: A temporary folder with a short path.
        log: File for output of the kernel's process that does not go through Jupyter.
        environment: Added to `settings.environment`.
        processes: Is told about the kernel and its children.
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
                processes.started(pid)

        async def shutdown_kernel(  # type: ignore[override]
            self, now: bool = False, restart: bool = False
        ) -> None:
            processes.update()
            await super().shutdown_kernel(now=now or processes.kill_now, restart=restart)

    return Kernel
