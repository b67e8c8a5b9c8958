"""Peak memory of a step, in a process of its own so that nothing run before counts.

On Linux the kernel's high-water mark of resident memory (`VmHWM`) is reset right before the step; elsewhere,
and where the reset is refused, the mark of the whole process (`ru_maxrss`, `VmHWM`) is returned, which
includes loading.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CHILD = "from overparam.measure.memory import _child; _child()"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a child process, in bytes.

    Attributes:
        peak_bytes: The most that was resident during the step.
        baseline_bytes: Resident right before the step: interpreter, libraries, and what the set-up loaded.
        method: What `peak_bytes` was read from.
    """

    peak_bytes: int
    baseline_bytes: int
    method: str

    @property
    def step_bytes(self) -> int:
        """What the step added at its peak."""
        return max(0, self.peak_bytes - self.baseline_bytes)


def peak_memory(
    target: str, kwargs: Mapping[str, Any] | None = None, *, timeout: float | None = None
) -> Memory:
    """Run a function in a fresh process and return the peak memory of its step.

    What the step is follows from the function, so that loading a model need not count:

    - a generator function: all that comes after its first `yield`;
    - a function that returns a callable: the call of what it returned;
    - any other function: the whole of it.

    Args:
        target: "package.module:function".
        kwargs: Keyword arguments of the function, such as JSON can hold.
        timeout: Seconds after which the child is ended.

    Raises:
        ValueError: `target` is not of that form, or `kwargs` is not JSON.
        RuntimeError: The child failed; the message holds its traceback.
        TimeoutError: It took longer than `timeout`.
    """
    module, _, function = target.partition(":")
    if not (module and function.isidentifier()):
        raise ValueError(f"target must look like 'package.module:function', got {target!r}")
    try:
        job = json.dumps(
            {"module": module, "function": function, "kwargs": dict(kwargs or {}), "path": sys.path}
        )
    except TypeError as error:
        raise ValueError(f"kwargs must hold what JSON can (text, numbers, lists, dicts): {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            ended = subprocess.run(
                [sys.executable, "-c", _CHILD, str(answer)],
                input=job.encode(),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{target} took longer than {timeout} s") from None
        if not answer.exists():
            reason = "killed, probably for lack of memory" if ended.returncode == -9 else "ended"
            tail = ended.stderr.decode(errors="replace")[-2000:]
            raise RuntimeError(f"the process of {target} was {reason} (exit code {ended.returncode})\n{tail}")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise RuntimeError(f"{target} failed in its own process:\n{result['error']}")
    return Memory(**result)


def _child() -> None:
    """Read a job from standard input and write the answer to the file named on the command line."""
    job = json.loads(sys.stdin.read())
    sys.path[:] = job["path"]
    try:
        answer = asdict(
            _measure(getattr(importlib.import_module(job["module"]), job["function"]), job["kwargs"])
        )
    except BaseException:
        answer = {"error": traceback.format_exc()}
    file = Path(sys.argv[1])
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(answer))
    temporary.replace(file)


def _measure(function: Any, kwargs: dict[str, Any]) -> Memory:
    baseline, reset = _begin()
    prepared = function(**kwargs)
    if inspect.isgenerator(prepared):
        next(prepared, None)
        baseline, reset = _begin()
        for _ in prepared:
            pass
    elif callable(prepared):
        baseline, reset = _begin()
        prepared()
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(peak, baseline, "ru_maxrss of the whole process, loading included")
    method = "VmHWM of the step" if reset else "VmHWM of the whole process, loading included"
    return Memory(_status("VmHWM"), baseline, method)


def _begin() -> tuple[int, bool]:
    """Resident bytes now, and whether the high-water mark was set back to them."""
    gc.collect()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return psutil.Process().memory_info().rss, False
    return _status("VmRSS"), True


def _status(field: str) -> int:
    """One field of /proc/self/status, in bytes; the kernel gives kB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
