"""What a scheme costs to run: bytes, resident memory, time of one text and of a batch, of a prompt and of a token."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from overparam.compress import quantize
from overparam.experiment.study import step
from overparam.measure import disk, energy, memory, speed
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import Study
from overparam.support import progress

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
    single, batch = _calls(study, systems)
    one, many = (speed.interleaved(calls, repeats=params.cost_repeats) for calls in (single, batch))
    used = {}
    for name in progress.track(names, "measuring energy"):
        with energy.energy() as used[name]:
            for _ in range(_ENERGY_CALLS):
                batch[name]()
    sizes: dict[str, int] = {}
    starts: dict[str, float] = {}
    jobs = _saved(study, systems, sizes, starts)
    resident = dict(zip(names, memory.resident_memories(_HELD, jobs), strict=True))
    rows = [
        {
            "scheme": name,
            "computes_in": systems[name].precision.computes_in,
            "cache_in": systems[name].precision.cache_in,
            "disk_bytes": sizes[name],
            "resident_bytes": resident[name],
            "single_seconds": one[name].median,
            "single_seconds_low": one[name].low,
            "single_seconds_high": one[name].high,
            "batch_seconds": many[name].median,
            "batch_seconds_low": many[name].low,
            "batch_seconds_high": many[name].high,
            **_speed_up(one, name).columns("single_speed_up"),
            **_speed_up(many, name).columns("batch_speed_up"),
            "seconds_to_quantize": study.seconds_to_quantize[name],
            "seconds_to_start": starts[name],
            "kwh_per_million_batches": used[name].kwh / _ENERGY_CALLS * 1e6,
            "energy_method": used[name].method,
        }
        for name in names
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("costs", table)
    raw = [
        {"scheme": name, "what": what, "seconds": seconds}
        for what, timings in (("single", one), ("batch", many))
        for name, timing in timings.items()
        for seconds in timing.values
    ]
    study.recorder.table("latencies", pd.DataFrame(raw))
    judged = one if study.decoder else many
    faster = {name: _speed_up(judged, name) for name in names if name != quantize.BASELINE}
    for name, found in faster.items():
        study.recorder.metric(f"speed_up_{name}", found, "times the speed of fp32 eager")
        study.recorder.metric(f"disk_share_{name}", 100 * sizes[name] / sizes[quantize.BASELINE], "% of fp32")
    return table, faster


def readable(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The costs in the units that people read, a row a scheme."""
    small, large = names_of_calls(study)
    return pd.DataFrame(
        {
            "computes in": table["computes_in"],
            **({"keys and values in": table["cache_in"]} if study.decoder else {}),
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


def names_of_calls(study: Study) -> tuple[str, str]:
    """What the small and the large call that are timed are."""
    return ("one more token", "prompt") if study.decoder else ("one text", f"{study.params.cost_texts} texts")


def _speed_up(timings: Mapping[str, speed.Timing], name: str) -> stats.Estimate:
    """How many times as fast as full precision a scheme is, paired by round."""
    return stats.retention(np.array(timings[name].values), np.array(timings[quantize.BASELINE].values))


def _saved(
    study: Study, systems: dict[str, quantize.Quantized], sizes: dict[str, int], starts: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Save one model after the other and ask for the memory that it takes.

    Its bytes go to `sizes`, the seconds until it is loaded and has read its first text to `starts`.
    """
    import torch

    kind = type(study.model)
    ids = study.tokenizer(study.train_texts[0])["input_ids"][: study.params.max_length]
    for name, system in progress.track(systems.items(), "measuring memory"):
        with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
            system.save(folder)
            sizes[name] = disk.disk_bytes(Path(folder))
            torch.compiler.reset()
            started = time.perf_counter()
            cold = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
            with warnings.catch_warnings(action="ignore"), cold:  # it warns that one of its caches is off
                loaded = quantize.load(folder, kind, decoder=study.decoder, fastest=True)
                _calls(study, {name: loaded})[0][name]()
            starts[name] = time.perf_counter() - started
            del loaded
            yield {
                "folder": folder,
                "module": kind.__module__,
                "kind": kind.__name__,
                "ids": ids,
                "decoder": study.decoder,
            }


Calls = dict[str, Callable[[], object]]


def _calls(study: Study, systems: dict[str, quantize.Quantized]) -> tuple[Calls, Calls]:
    """What is timed: the small and the large call of every system."""
    import torch

    texts = study.train_texts[: study.params.cost_texts]
    if not study.decoder:

        def encoding(system: quantize.Quantized, some: list[str]) -> Callable[[], object]:
            return lambda: study.embed(system.run, some)

        return (
            {name: encoding(system, texts[:1]) for name, system in systems.items()},
            {name: encoding(system, texts) for name, system in systems.items()},
        )
    ids = study.tokenizer(" ".join(texts), return_tensors="pt")["input_ids"][
        :, : 4 * study.params.cost_tokens
    ]

    def prompt(system: quantize.Quantized) -> Callable[[], object]:
        def call() -> None:
            system.run.reset()
            system.run(ids)

        return call

    def token(system: quantize.Quantized) -> Callable[[], object]:
        system.run.reset()
        system.run(ids)
        following = torch.tensor([[int(ids[0, -1])]])
        return lambda: system.run(following)

    # tokens first: a prompt forgets what was read
    return {n: token(s) for n, s in systems.items()}, {n: prompt(s) for n, s in systems.items()}
