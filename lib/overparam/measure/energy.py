"""Energy of a step, by codecarbon's offline tracker. No network is used and nothing is written.

If the processor's energy counters can be read (RAPL), its energy is measured, for the whole machine. Otherwise (most
virtual machines, and Linux kernels that let only root read them) it is estimated: CPU time of this process and its
children × the processor's rated power (TDP), for which codecarbon guesses 4 W/thread for unknown processors.
`Energy.method` says which. Memory is always estimated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

_SHORTEST = 0.06  # seconds; codecarbon ignores blocks shorter than 0.05 s
_MODES = {
    "intel_rapl": "CPU measured with RAPL, whole machine",
    "windows_emi": "CPU measured with the Windows energy meter, whole machine",
    "intel_power_gadget": "CPU measured with Intel Power Gadget, whole machine",
    "cpu_load": "CPU estimated from CPU time of the process and TDP ({watts:.0f} W{guess})",
    "constant": "CPU estimated as a constant share of TDP ({watts:.0f} W{guess})",
}


@dataclass
class Energy:
    """Energy of a block, filled in when it ends.

    Attributes:
        kwh: Total kilowatt-hours.
        seconds: Duration of the block.
        method: What was measured, and what was estimated.
        cpu_kwh: Share of the processor.
        memory_kwh: Share of the memory.
        gpu_kwh: Share of the graphics processors.
    """

    kwh: float = float("nan")
    seconds: float = float("nan")
    method: str = "not finished"
    cpu_kwh: float = float("nan")
    memory_kwh: float = float("nan")
    gpu_kwh: float = float("nan")


@contextmanager
def energy() -> Iterator[Energy]:
    """Measure the energy of a `with` block; the object of the `as` clause holds the result afterwards.

    Blocks can be nested; the outer one includes the inner one. A block that raises is counted as well. In a block
    shorter than about 0.1 s, most of the energy is that of the measurement: repeat the step inside the block.

    Raises:
        RuntimeError: codecarbon gave no result.
    """
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    with mock.patch("codecarbon.emissions_tracker.get_hierarchical_config", dict):  # no personal settings
        tracker = OfflineEmissionsTracker(
            country_iso_code="FRA",  # only for emissions, which are not reported here
            tracking_mode="process",
            log_level="error",
            allow_multiple_runs=True,
            output_methods=[],
            emissions_endpoint=False,
            electricitymaps_api_token="",
        )
    used = Energy()
    tracker.start()
    start = time.perf_counter()
    failed = True
    try:
        yield used
        failed = False
    finally:
        used.seconds = time.perf_counter() - start
        time.sleep(max(0.0, _SHORTEST - used.seconds))
        tracker.stop()
        data = getattr(tracker, "final_emissions_data", None)  # codecarbon hides its own errors
        if data is not None:
            used.kwh, used.cpu_kwh = data.energy_consumed, data.cpu_energy
            used.memory_kwh, used.gpu_kwh = data.ram_energy, data.gpu_energy
            used.method = _method(tracker)
        elif not failed:
            raise RuntimeError("codecarbon could not count the energy of the block")


def _method(tracker: Any) -> str:
    """Describe the methods that codecarbon used, from its hardware objects."""
    parts = []
    for item in tracker._hardware:
        kind = type(item).__name__
        if kind == "CPU":
            guess = ", a generic value" if item._is_generic_tdp or not _known(item._model) else ""
            parts.append(
                _MODES.get(item._mode, f"CPU by {item._mode}").format(watts=item._tdp or 0, guess=guess)
            )
        elif kind == "GPU":
            parts.append("GPU measured with its own counters")
        elif kind == "RAM":
            parts.append("memory estimated from its size")
        else:
            parts.append(f"{item.chip_part} measured with the chip's own counters")
    return "; ".join(sorted(parts))


@cache
def _known(model: str) -> bool:
    """Whether codecarbon knows the processor's rated power."""
    from codecarbon.core import cpu
    from codecarbon.core.hardware_cache import get_cached_tdp

    return get_cached_tdp(cpu)._get_cpu_power_from_registry(model) is not None
