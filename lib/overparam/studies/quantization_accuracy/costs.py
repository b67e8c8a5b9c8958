"""What a scheme costs to run: bytes, resident memory, time of one text and of a batch, of a prompt and of a token."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from overparam.compress import quantize
from overparam.experiment import costs as measuring
from overparam.experiment.study import step
from overparam.measure import disk, memory
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import Study

_ENERGY_CALLS = 3
_HELD = "overparam.compress.quantize.systems:held"


@step
def costs(study: Study) -> tuple[pd.DataFrame, dict[str, stats.Estimate]]:
    """Measure every scheme that runs here, in what is the fastest on this processor; they take turns while timed.

    `computes_in` and `cache_in` say what that is: OpenVINO chooses it by processor, so that it can differ from what the
    quality was measured in.

    `seconds_to_start` is the time until the saved model is loaded, compiled without what was compiled before, and has
    read its first text. `single_seconds` and `batch_seconds` are, of an encoder, the time of one text and of a batch;
    of a decoder, that of one more token and of a prompt. `resident_bytes` is what a fresh process holds more when it
    has loaded the saved weights and read a text; of files that are mapped, what was read of them.

    Returns:
        A row a scheme, and how many times as fast as fp32 eager it is where it is meant to be used: a batch of an
        encoder, one token after the other of a decoder, with a bootstrap interval over rounds.
    """
    params, names = study.params, study.running
    systems = {name: study.quantized(name).fastest() for name in names}
    calls = {name: _calls(study, system) for name, system in systems.items()}
    starts: list[float] = []

    def save(system: quantize.Quantized, folder: Path) -> tuple[int, dict[str, Any]]:
        system.save(folder)
        starts.append(_seconds_to_start(study, folder))
        return disk.disk_bytes(folder), {"folder": str(folder), **_held_arguments(study)}

    steps = {
        step: measuring.Step({name: each[step] for name, each in calls.items()}, texts)
        for step, texts in (("single", 1), ("batch", params.cost_texts))
    }
    found = measuring.measure(
        "scheme",
        {
            name: {"computes_in": each.precision.computes_in, "cache_in": each.precision.cache_in}
            for name, each in systems.items()
        },
        steps,
        repeats=params.cost_repeats,
        energy_step="batch",
        energy_repeats=_ENERGY_CALLS,
        unit="batches",
        units=1,
    )
    sizes = measuring.sizes(systems, save, _HELD, memory.resident_memories)
    speed_ups = {step: found.faster(step, quantize.BASELINE) for step in steps}
    more = [
        {
            "scheme": name,
            "disk_bytes": sizes[name][0],
            "resident_bytes": sizes[name][1],
            **speed_ups["single"][name].columns("single_speed_up"),
            **speed_ups["batch"][name].columns("batch_speed_up"),
            "seconds_to_quantize": study.seconds_to_quantize[name],
            "seconds_to_start": start,
        }
        for name, start in zip(systems, starts, strict=True)
    ]
    table = found.table.merge(pd.DataFrame(more), on="scheme")
    study.recorder.table("costs", table)
    study.recorder.table("latencies", found.latencies)
    faster = speed_ups[study.subject.main_call]
    faster = {name: each for name, each in faster.items() if name != quantize.BASELINE}
    for name, each in faster.items():
        study.recorder.metric(f"speed_up_{name}", each, "times the speed of fp32 eager")
        share = 100 * sizes[name][0] / sizes[quantize.BASELINE][0]
        study.recorder.metric(f"disk_share_{name}", share, "% of fp32")
    return table, faster


def readable(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The costs in the units that people read, a row a scheme."""
    small, large = names_of_calls(study).values()
    return pd.DataFrame(
        {
            "computes in": table["computes_in"],
            **({"keys and values in": table["cache_in"]} if any(table["cache_in"]) else {}),
            "saved (MB)": table["disk_bytes"] / 1e6,
            "in memory (MB)": table["resident_bytes"] / 1e6,
            f"{small} (ms)": table["single_seconds"] * 1e3,
            f"{large} (ms)": table["batch_seconds"] * 1e3,
            f"{small}, times fp32": table["single_speed_up"],
            f"{large}, times fp32": table["batch_speed_up"],
            "to quantize (s)": table["seconds_to_quantize"],
            "to start (s)": table["seconds_to_start"],
            f"{large} (kWh a million)": table["kwh_per_million_batches"],
        }
    ).set_axis(table["scheme"])


def names_of_calls(study: Study) -> dict[str, str]:
    """What is timed, by step."""
    names = study.subject.call_names.items()
    return {step: name.format(study.params.cost_texts) for step, name in names}


def _seconds_to_start(study: Study, folder: Path) -> float:
    """Seconds until a saved system is loaded and has read its first text."""
    import torch

    torch.compiler.reset()
    started = time.perf_counter()
    cold = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with warnings.catch_warnings(action="ignore"), cold:  # it warns that one of its caches is off
        loaded = quantize.load(folder, type(study.model), decoder=study.decoder, fastest=True)
        _calls(study, loaded)["single"]()
    return time.perf_counter() - started


def _held_arguments(study: Study) -> dict[str, Any]:
    kind = type(study.model)
    ids = study.tokenizer(study.train_texts[0])["input_ids"][: study.params.max_length]
    return {"module": kind.__module__, "kind": kind.__name__, "ids": ids, "decoder": study.decoder}


def _calls(study: Study, system: quantize.Quantized) -> dict[str, measuring.Call]:
    return study.subject.calls(system.run, study.train_texts[: study.params.cost_texts])
