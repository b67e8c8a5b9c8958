"""Peak and resident memory of a step, measured in a separate process so that earlier work does not count.

On Linux the kernel's high-water mark of resident memory (`VmHWM`) is reset right before the step. Elsewhere, or if the
reset is refused, the mark of the whole process (`ru_maxrss`, `VmHWM`) is returned, which includes loading.
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
        peak_bytes: Maximum during the step.
        baseline_bytes: Right before the step: interpreter, libraries, and everything the set-up loaded.
        method: The source of `peak_bytes`.
    """

    peak_bytes: int
    baseline_bytes: int
    method: str

    @property
    def step_bytes(self) -> int:
        """Peak minus baseline: what the step added."""
        return max(0, self.peak_bytes - self.baseline_bytes)


def peak_memory(
    target: str, kwargs: Mapping[str, Any] | None = None, *, timeout: float | None = None
) -> Memory:
    """Run a function in a new process and return the peak memory of its step.

    The kind of function defines the step, so that loading a model need not count:

    - for a generator function, everything after its first `yield`;
    - for a function that returns a callable, the call of that callable;
    - for any other function, the whole function.

    Args:
        target: "package.module:function".
        kwargs: Keyword arguments of the function; they must be valid JSON.
        timeout: Seconds after which the child process is killed.

    Raises:
        ValueError: `target` is not of that form, or `kwargs` is not JSON.
        RuntimeError: The child process failed; the message contains its traceback.
        TimeoutError: It took longer than `timeout`.
    """
    return next(iter(peak_memories(target, [kwargs or {}], timeout=timeout)))


def peak_memories(
    target: str, jobs: Iterable[Mapping[str, Any]], *, timeout: float | None = None
) -> Iterator[Memory]:
    """Do the same as `peak_memory` for several sets of arguments, each in a separate process.

    The processes are forked from one that has imported the function's module, so that libraries are loaded once.
    The next arguments are requested when the last result is there.
    """
    for answer in _in_children(target, jobs, _measure, timeout):
        yield Memory(**answer)


def resident_memories(
    target: str, jobs: Iterable[Mapping[str, Any]], *, timeout: float | None = None
) -> Iterator[int]:
    """Yield the bytes that stay resident for the result of a function, such as a loaded model.

    Each set of arguments runs in a separate process, as in `peak_memories`. The function is called twice: the first
    call loads libraries and fills caches, and its result is dropped; the memory added by the second call is counted.
    With glibc, freed memory is returned to the system before each reading (`malloc_trim`), so that only the result
    counts, not the making of it. Of mapped files, the pages in memory count.

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
    """Yield results of `measure`, a function of this module, each from a separate process."""
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
                        f"kwargs must be valid JSON (text, numbers, lists, dicts): {error}"
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # hide what the function prints
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
    """Measure what stays resident for the result of the function's second call."""
    function(**kwargs)
    before = _resident()
    held = function(**kwargs)
    after = _resident()
    del held
    return {"bytes": after - before}


def _resident() -> int:
    """Resident bytes, after freed memory is returned to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _begin() -> tuple[int, bool]:
    """Resident bytes now, and whether the high-water mark was reset to them."""
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
