"""Where a number comes from: code version, packages, machine and thread settings, without loading torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    *(
        "overparam",
        "torch",
        "transformers",
        "sentence-transformers",
        "mteb",
        "peft",
        "accelerate",
        "datasets",
    ),
    *("tokenizers", "safetensors", "gguf", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow"),
    *("matplotlib", "codecarbon", "papermill", "pydantic"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
# These choose CPU instructions, which can change the last bits of numbers.
_INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
                 "OPENBLAS_CORETYPE", "OMP_WAIT_POLICY")  # fmt: skip
_CHANNELS = tuple(
    f"OVERPARAM_{name}"
    for name in ("JOB_DIR", "JOB_KEY", "COMMAND", "PROGRESS", "PROFILE", "REPLAY", "STYLE")
)


def provenance() -> dict[str, Any]:
    """Return versions of the code and packages, and facts about the machine; without host name or paths."""
    return {
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        **machine(),
        "environment": {
            name: "(path)" if os.path.isabs(value) else value  # noqa: PTH117 - a plain string test
            for name, value in sorted(os.environ.items())
            if (name.startswith("OVERPARAM_") and name not in _CHANNELS) or name in _INSTRUCTIONS
        },
    }


def git_state(package: Path) -> dict[str, Any]:
    """Return {"sha", "dirty", "reason"} of the repository that holds the package's own source.

    Without a repository, sha and dirty are None and "reason" says why. Files in ``results/`` do not count as changes.
    """

    def git(*args: str, cwd: Path = package) -> str:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        top = Path(git("rev-parse", "--show-toplevel"))
        changes = git("status", "--porcelain", "--", ".", ":(exclude)results", cwd=top)
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(changes), "reason": ""}
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.TimeoutExpired:
        reason = "git did not answer"
    except subprocess.CalledProcessError:
        reason = "the package's source is not in a git repository"
    return {"sha": None, "dirty": None, "reason": reason}


def machine() -> dict[str, Any]:
    """Return "hardware" and "threads"; GPUs and torch's threads only if torch is loaded."""
    return {"hardware": hardware(), "threads": _threads()}


def hardware() -> dict[str, Any]:
    """Return CPU, cores, memory and, if torch is loaded, GPUs."""
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def _threads() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    settings: dict[str, Any] = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if torch is not None:
        settings["torch"] = torch.get_num_threads()
    return settings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_committed(path: Path) -> bool:
    """Return whether a file is committed to git in its current state."""
    for command in (["ls-files", "--error-unmatch"], ["diff", "--quiet", "HEAD", "--"]):
        try:
            done = subprocess.run(
                ["git", *command, path.name], cwd=path.parent, capture_output=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
    return True
