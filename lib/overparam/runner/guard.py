"""Starts the kernel of a job, whose Python writes in the results folder only where the job's own folder is.

The guard sees what goes through Python's own functions. What a shell command or a compiled library writes is seen
only afterwards: the record of the other job then no longer fits its files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

RUNNER = ".runner"  # as in `report.record`, which the kernel need not load for this
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TARGETS = {  # audit event -> which of its arguments are paths that change
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.truncate": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "shutil.rmtree": (0,),
}


def install(own: Path, told: Path) -> None:
    """Refuse writes into the results folder outside a job's own folder, from here to the end of this process.

    Args:
        own: The folder that the job works in: two levels below the results folder.
        told: File in which every path refused is noted, for a notebook that goes on in spite of the error.
    """
    root = f"{own.parents[1]}{os.sep}"
    free = tuple(f"{folder}{os.sep}" for folder in (own, own.parents[1] / RUNNER))

    def check(path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        full = os.path.realpath(os.fsdecode(path))
        if full.startswith(root) and not f"{full}{os.sep}".startswith(free):
            with told.open("a", encoding="utf-8") as file:
                file.write(f"{full}\n")
            raise PermissionError(
                f"{full} is outside of the job's own folder, where alone it may write: {own}"
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
    # as ipykernel_launcher does: modules beside the runner's working directory must not hide others
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - a plain string test
        del sys.path[0]
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    class Kernel(IPKernelApp):
        """A kernel without configuration files."""

        def load_config_file(self, **_: Any) -> None:  # type: ignore[override]
            """Read no file: neither a user's nor an administrator's taste is part of a run."""

    matplotlib.rcdefaults()  # whatever a matplotlibrc in the working directory says
    install(Path(os.environ["OVERPARAM_JOB_DIR"]), Path(os.environ["OVERPARAM_PROGRESS"] + ".outside"))
    Kernel.launch_instance()
