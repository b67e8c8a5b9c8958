"""What a kernel starts with: known settings, whatever the user's own are, so that a run is the same for everybody.

Kept are settings that say where things are and what may be used: paths, caches, proxies, threads, devices.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from overparam.support import cache

# Matplotlib's and IPython's personal files, start-up code, and switches that make libraries compute in another way.
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
DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait do not take the cores from other processes
# the length of sockaddr_un.sun_path is 108 on Linux and 104 on macOS; names of a kernel's sockets take about 40
_LONGEST = 60
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def environment(private: Path, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a kernel: the user's, without what is personal taste or changes numbers.

    Args:
        private: An empty folder of the kernel alone; IPython's profile goes there.
        own: The user's environment; that of this process by default.
    """
    kept = {
        name: value
        for name, value in (os.environ if own is None else own).items()
        if name not in _IGNORED and not name.startswith(_IGNORED_PREFIXES)
    }
    if "LC_ALL" in kept:  # it would win over LC_NUMERIC
        kept["LANG"] = kept.pop("LC_ALL")
    places = {
        "IPYTHONDIR": private / "ipython",
        "JUPYTER_CONFIG_DIR": private / "jupyter",
        "MTEB_CACHE": cache.directory() / "mteb",
        "MPLCONFIGDIR": cache.directory() / "matplotlib",  # its cache of fonts takes seconds to build
    }
    return {**DEFAULTS, **kept, **_FIXED, **{name: str(path) for name, path in places.items()}}


def take_defaults() -> None:
    """Set the defaults for this process and all that it starts, before torch reads them; the user's own win."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def socket_folder() -> Iterator[Path]:
    """Give a temporary folder whose path is short enough for sockets, also where TMPDIR is long.

    Raises:
        OSError: If no short path can be written to.
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
