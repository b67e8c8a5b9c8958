"""Starts the kernel of a job, and keeps its Python code from writing into results of other jobs.

Only writes through Python's own functions are seen. If a shell command or a compiled library writes there, it is
noticed later: the other job's files no longer match the hashes in its record.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

RUNNER = ".runner"  # as in `record.record`, which is not imported so that the kernel starts faster
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TARGETS = {  # audit event -> positions of its arguments that are changed paths
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.truncate": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "shutil.rmtree": (0,),
}


def install(own: Path, log: Path) -> None:
    """Refuse writes into the results folder outside a job's own folder, for the rest of this process.

    Args:
        own: The job's folder, two levels below the results folder.
        log: File that lists every refused path, in case the notebook catches the error and goes on.
    """
    root = f"{own.parents[1]}{os.sep}"
    free = tuple(f"{folder}{os.sep}" for folder in (own, own.parents[1] / RUNNER))

    def check(path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        full = os.path.realpath(os.fsdecode(path))
        if full.startswith(root) and not f"{full}{os.sep}".startswith(free):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{full}\n")
            raise PermissionError(
                f"{full} is outside the job's own folder, the only one it may write to: {own}"
            )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if args[2] & _WRITING:
                check(args[0])
        elif event in _TARGETS:
            for at in _TARGETS[event]:
                check(args[at])

    sys.addaudithook(hook)


if __name__ == "__main__":
    # as in ipykernel_launcher: modules in the working directory must not hide others
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - a plain string test
        del sys.path[0]
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    class Kernel(IPKernelApp):
        """A kernel without configuration files."""

        def load_config_file(self, **_: Any) -> None:  # type: ignore[override]
            """Read no file: personal or system-wide settings must not affect a run."""

    matplotlib.rcdefaults()  # whatever a matplotlibrc in the working directory says
    install(Path(os.environ["OVERPARAM_JOB_DIR"]), Path(os.environ["OVERPARAM_PROGRESS"] + ".outside"))
    Kernel.launch_instance()
