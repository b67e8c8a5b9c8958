"""Peak memory of a step, and what stays resident, in a process of its own so that nothing run before counts.

On Linux the kernel's high-water mark of resident memory (`VmHWM`) is reset right before the step; elsewhere,
and where the reset is refused, the mark of the whole process (`ru_maxrss`, `VmHWM`) is returned, which
includes loading.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PARENT = "from overparam.measure.memory import _parent; _parent()"


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
    return next(iter(peak_memories(target, [kwargs or {}], timeout=timeout)))


def peak_memories(
    target: str, jobs: Iterable[Mapping[str, Any]], *, timeout: float | None = None
) -> Iterator[Memory]:
    """Do as `peak_memory` for one set of arguments after the other, each in a process of its own.

    The processes are forks of one that has imported the function's module, so that its libraries are loaded once.
    The next arguments are asked for when the answer to the last ones is there.
    """
    for answer in _in_children(target, jobs, _measure, timeout):
        yield Memory(**answer)


def resident_memories(
    target: str, jobs: Iterable[Mapping[str, Any]], *, timeout: float | None = None
) -> Iterator[int]:
    """Yield the bytes that stay resident for what a function returns, such as a loaded model.

    In a process of its own for each set of arguments, as in `peak_memories`. There the function is called twice:
    the first call loads libraries and fills caches, and its result is dropped; what the second adds is counted.
    Freed memory is given back to the system before each reading where glibc can (`malloc_trim`), so that it is what
    the result needs, not what making it took. Mapped files count as far as their pages are in memory.

    Arguments and errors are those of `peak_memory`.
    """
    for answer in _in_children(target, jobs, _hold, timeout):
        yield answer["bytes"]


def _in_children(
    target: str,
    jobs: Iterable[Mapping[str, Any]],
    measure: Callable[[Any, dict[str, Any]], dict[str, Any]],
    timeout: float | None,
) -> Iterator[dict[str, Any]]:
    """Answers of `measure`, a function of this module, each from a process of its own."""
    module, _, function = target.partition(":")
    if not (module and function.isidentifier()):
        raise ValueError(f"target must look like 'package.module:function', got {target!r}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile() as errors:
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, module, function, measure.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        assert parent.stdin is not None
        assert parent.stdout is not None
        try:
            for kwargs in jobs:
                try:
                    line = json.dumps(dict(kwargs))
                except TypeError as error:
                    raise ValueError(
                        f"kwargs must hold what JSON can (text, numbers, lists, dicts): {error}"
                    ) from error
                with contextlib.suppress(BrokenPipeError):  # its error is read below
                    parent.stdin.write(line.encode() + b"\n")
                    parent.stdin.flush()
                if timeout is not None and not select.select([parent.stdout], [], [], timeout)[0]:
                    raise TimeoutError(f"{target} took longer than {timeout} s")
                answer = json.loads(parent.stdout.readline() or '{"exit": null}')
                if "exit" in answer:
                    errors.seek(0)
                    tail = errors.read().decode(errors="replace")[-2000:]
                    reason = (
                        "killed, probably for lack of memory"
                        if answer["exit"] == -signal.SIGKILL
                        else "ended"
                    )
                    raise RuntimeError(
                        f"the process of {target} was {reason} (exit code {answer['exit']})\n{tail}"
                    )
                if "error" in answer:
                    raise RuntimeError(f"{target} failed in its own process:\n{answer['error']}")
                yield answer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
            parent.stdin.close()
            parent.stdout.close()


def _parent() -> None:
    """Import the module named on the command line, then fork for each line of arguments."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the function prints is no answer
    function = None
    for line in sys.stdin:
        try:
            if function is None:
                function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}), file=answers)
            continue
        child = os.fork()
        if child == 0:
            try:
                answer = globals()[sys.argv[3]](function, json.loads(line))
            except BaseException:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}), file=answers)


def _measure(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Memory`."""
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
        method = "ru_maxrss of the whole process, loading included"
    else:
        peak = _status("VmHWM")
        method = "VmHWM of the step" if reset else "VmHWM of the whole process, loading included"
    return {"peak_bytes": peak, "baseline_bytes": baseline, "method": method}


def _hold(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What stays resident for the result of the function's second call."""
    function(**kwargs)
    before = _resident()
    held = function(**kwargs)
    after = _resident()
    del held
    return {"bytes": after - before}


def _resident() -> int:
    """Resident bytes, freed memory given back."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


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
