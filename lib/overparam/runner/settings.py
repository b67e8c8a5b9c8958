"""Environment variables of a kernel: the same for everybody, whatever the user's own settings.

Kept are the user's settings of paths, caches, proxies, threads and devices.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from overparam.support import cache

# personal files of matplotlib and IPython, start-up code, and switches that change how libraries compute
_IGNORED = (
    *("MATPLOTLIBRC", "PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONBREAKPOINT", "PYTHONCASEOK"),
    *("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"),
)
_IGNORED_PREFIXES = (
    *("TORCH_ALLOW_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_COMPILE_", "TORCH_LOGS", "TORCH_FORCE_"),
    *("ACCELERATE_", "FSDP_", "DEEPSPEED_", "CODECARBON_", "PYDEVD_", "TQDM_"),
)
_FIXED = {
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "LC_NUMERIC": "C",
}
DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads then leave the cores to other processes
# socket paths (sockaddr_un.sun_path) have at most 108 bytes on Linux, 104 on macOS; the socket's name takes about 40
_LONGEST = 60
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def environment(private: Path, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a kernel: the user's, without personal preferences and settings that change numbers.

    Args:
        private: An empty folder for this kernel only, which gets IPython's profile.
        own: The user's environment; by default that of this process.
    """
    kept = {
        name: value
        for name, value in (os.environ if own is None else own).items()
        if name not in _IGNORED and not name.startswith(_IGNORED_PREFIXES)
    }
    if "LC_ALL" in kept:  # it would override LC_NUMERIC
        kept["LANG"] = kept.pop("LC_ALL")
    places = {
        "IPYTHONDIR": private / "ipython",
        "JUPYTER_CONFIG_DIR": private / "jupyter",
        "MTEB_CACHE": cache.directory() / "mteb",
        "MPLCONFIGDIR": cache.directory() / "matplotlib",  # its cache of fonts takes seconds to build
    }
    return {**DEFAULTS, **kept, **_FIXED, **{name: str(path) for name, path in places.items()}}


def take_defaults() -> None:
    """Set the defaults for this process and its children, before torch reads them; the user's settings win."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def socket_folder() -> Iterator[Path]:
    """Yield a temporary folder whose path is short enough for sockets, even if TMPDIR is long.

    Raises:
        OSError: If no folder with a short path is writable.
    """
    for place in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *_PLACES):
        if place and len(os.fsencode(place)) <= _LONGEST and os.access(place, os.W_OK | os.X_OK):
            with tempfile.TemporaryDirectory(
                prefix="overparam-", dir=place, ignore_cleanup_errors=True
            ) as folder:
                yield Path(folder)
            return
    raise OSError(
        f"a kernel needs a temporary folder with a path of at most {_LONGEST} bytes for its sockets; TMPDIR is "
        f"{tempfile.gettempdir()}, and {', '.join(_PLACES)} cannot be written to: set TMPDIR to a shorter path"
    )
