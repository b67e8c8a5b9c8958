"""What models of a published size cost to run: time and memory by layers and by experts kept, speed by bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from overparam.measure import memory, speed, tune
from overparam.models import packed, shapes
from overparam.models.published_shapes import shape
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD = "overparam.models.shape_costs:held"


def kept_layers(name: str, shares: Sequence[float]) -> list[int]:
    """Return the numbers of layers for shares of those of a shape, all of them last."""
    whole = shape(name).layers
    return sorted({*(max(1, round(share * whole)) for share in shares), whole})


def time_by_layers(
    name: str,
    kept: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    texts: int = 1,
    tokens: int = 64,
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the encoding of texts with the first layers of a shape, in turns.

    Returns:
        A row a number of layers and round: `layers`, `round`, `seconds`. On a GPU also `peak_bytes` of a pass,
        and `weight_bytes`, what its layers and embeddings take.

    Raises:
        MemoryError: As `shapes.build`.
    """
    model = shapes.build(name, dtype=dtype, device=device, causal=False)
    ids = torch.arange(texts * tokens, device=device).view(texts, tokens) % 250 + 3
    layers = model.layers
    calls = {str(count): _encoding(model, layers, count, ids) for count in kept}
    with torch.inference_mode():
        timings = speed.interleaved(calls, warmup=1, repeats=repeats)
        peaks = {count: _peak(calls[count], device) for count in calls}
    table_bytes = sum(p.nbytes for key, p in model.named_parameters() if ".layers." not in f".{key}")
    layer_bytes = sum(p.nbytes for p in layers[0].parameters())
    return pd.DataFrame(
        [
            {"layers": int(count), "round": number, "seconds": seconds, "peak_bytes": peaks[count],
             "weight_bytes": table_bytes + int(count) * layer_bytes}
            for count, timing in timings.items()
            for number, seconds in enumerate(timing.values)
        ]
    )  # fmt: skip


def _encoding(
    model: PreTrainedModel, layers: nn.ModuleList, count: int, ids: torch.Tensor
) -> Callable[[], None]:
    def call() -> None:
        model.layers = layers[:count]
        model.config.num_hidden_layers = count
        model(input_ids=ids, use_cache=False)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return call


def _peak(call: Callable[[], None], device: str) -> float:
    """Bytes that a call takes at most on a GPU, the weights included."""
    if device == "cpu":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    call()
    return float(torch.cuda.max_memory_allocated())


def slope(table: pd.DataFrame) -> list[float]:
    """Return, round by round, the slope of relative time over relative depth; 1 is proportional.

    Args:
        table: From `time_by_layers`.
    """
    grid = table.pivot(index="round", columns="layers", values="seconds")
    counts = [int(count) for count in grid.columns]
    whole = max(counts)
    depth = np.array(counts) / whole
    relative = grid.div(grid[whole], axis=0).to_numpy()
    return [float(np.polyfit(depth, row, 1)[0]) for row in relative]


def extrapolated(table: pd.DataFrame, layers: int) -> float:
    """Return the seconds that more layers would take than were built: each layer costs the same."""
    middle = table.groupby("layers")["seconds"].median()
    a_layer, rest = np.polyfit(middle.index.to_numpy(float), middle.to_numpy(), 1)
    return float(rest + a_layer * layers)


def held(name: str, dtype: str, causal: bool, layers: int | None, experts: int | None) -> Any:
    """Build a shape in a process of its own, for `measure.memory.resident_memories`."""
    return shapes.build(name, dtype=getattr(torch, dtype), causal=causal, layers=layers, experts=experts)


def resident(
    name: str,
    kept: Sequence[int],
    *,
    by: str,
    dtype: torch.dtype,
    device: str = "cpu",
    causal: bool = True,
    timeout: float | None = None,
) -> pd.DataFrame:
    """Measure the memory that a shape takes with fewer layers or experts.

    On the CPU: resident bytes of a fresh process, less those of the same process without the model. On a GPU: bytes
    that are allocated there.

    Args:
        name: A shape.
        kept: Numbers of layers, or of experts.
        by: "layers" or "experts".
        dtype: Of the weights.
        device: "cpu" or "cuda".
        causal: With the language-modelling head.
        timeout: Seconds for one of them.

    Returns:
        A row a number: `parameters`, `weight_bytes`, `resident_bytes`.

    Raises:
        MemoryError: The largest does not fit.
    """
    if reason := shapes.reason_against(name, dtype, device, causal=causal, **{by: max(kept)}):
        raise MemoryError(f"{name} {reason}")
    counts = {each: shapes.parameters(name, causal=causal, **{by: each}) for each in kept}
    if device == "cpu":
        kind = str(dtype).removeprefix("torch.")
        jobs = [
            {"name": name, "dtype": kind, "causal": causal, "layers": None, "experts": None, by: each}
            for each in kept
        ]
        sizes = list(memory.resident_memories(_HELD, jobs, timeout=timeout))
    else:
        sizes = []
        for each in progress.track(kept, "measuring memory"):
            before = torch.cuda.memory_allocated()
            model = shapes.build(name, dtype=dtype, device=device, causal=causal, **{by: each})
            sizes.append(torch.cuda.memory_allocated() - before)
            del model
            torch.cuda.empty_cache()
    return pd.DataFrame(
        {
            by: list(kept),
            "parameters": [counts[each] for each in kept],
            "weight_bytes": [dtype.itemsize * counts[each] for each in kept],
            "resident_bytes": sizes,
        }
    )


def speed_by_bits(
    name: str,
    bits: Sequence[int],
    *,
    device: str = "cpu",
    prompt: int = 128,
    repeats: int = 10,
    layers: int | None = None,
) -> pd.DataFrame:
    """Time a prompt and one more token of a shape in bfloat16, and with its linear layers in fewer bits, in turns.

    Args:
        name: A shape.
        bits: Of `packed.BITS`; 16 bits come first in any case.
        device: "cpu" or "cuda".
        prompt: Tokens of the prompt.
        repeats: Rounds.
        layers: Keep only so many.

    Returns:
        A row a number of bits, phase ("prompt", "token") and round: `seconds`; `bytes_a_token`, of the weights that a
        token reads. A number of bits without a kernel here has one row, with its `reason`.

    Raises:
        MemoryError: As `shapes.build`.
    """
    models = {16: shapes.build(name, dtype=torch.bfloat16, device=device, layers=layers)}
    table = sum(p.nbytes for key, p in models[16].named_parameters() if "embed" in key)
    size = {16: sum(p.nbytes for p in models[16].parameters())}
    if models[16].get_output_embeddings().weight is not models[16].get_input_embeddings().weight:
        size[16] -= table  # a table that is only looked up is not read
    ids = torch.arange(prompt, device=device)[None] % 250 + 3
    calls: dict[str, Callable[[], None]] = dict(_decoding(models[16], ids, 16))
    rows: list[dict[str, Any]] = []
    for each in bits:
        try:
            models[each] = shapes.build(name, dtype=torch.bfloat16, device=device, layers=layers)
            size[each] = packed.pack(models[each], each)
            own = _decoding(models[each], ids, each)
            for call in own.values():
                call()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            models.pop(each, None)
            rows.append({"bits": each, "reason": str(error).splitlines()[0][:160]})
            continue
        calls |= own
    timings = speed.interleaved(calls, warmup=1, repeats=repeats)
    for key, timing in timings.items():
        count, _, phase = key.partition(" ")
        rows += [
            {"bits": int(count), "phase": phase, "round": number, "seconds": seconds,
             "bytes_a_token": size[int(count)], "reason": ""}
            for number, seconds in enumerate(timing.values)
        ]  # fmt: skip
    columns = ["bits", "phase", "round", "seconds", "bytes_a_token", "reason"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _decoding(model: PreTrainedModel, ids: torch.Tensor, bits: int) -> dict[str, Callable[[], None]]:
    with torch.inference_mode():
        kept = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def prompt() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            if ids.is_cuda:
                torch.cuda.synchronize()

    def token() -> None:
        with torch.inference_mode():
            model(input_ids=ids[:, :1], past_key_values=kept, use_cache=True)
            kept.crop(-1)
            if ids.is_cuda:
                torch.cuda.synchronize()

    return {f"{bits} prompt": prompt, f"{bits} token": token}


def time_rows(
    found: pd.DataFrame, published: int | None, dtype: str, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Summarise `time_by_layers`: shares of the full time, the slope, and an extrapolation."""
    whole = int(found["layers"].max())
    grid: Any = found.pivot(index="round", columns="layers", values="seconds")
    kind = dtype.removeprefix("torch.")
    common = {"dtype": kind, "whole": whole, "rounds": len(grid)}
    for kept in sorted(grid):
        value, low, high = tune.interval(list(np.log(grid[kept] / grid[whole])), seed=seed)
        yield {"what": "time by layers", "kept": int(kept), **common, "seconds": float(grid[kept].median()),
               "share": 100 * value, "share_low": 100 * low, "share_high": 100 * high,
               "expected": 100 * kept / whole}  # fmt: skip
    slopes = np.array(slope(found))
    draws = np.random.default_rng(seed).integers(len(slopes), size=(tune.RESAMPLES, len(slopes)))
    low, high = np.percentile(np.median(slopes[draws], axis=1), [2.5, 97.5])
    yield {"what": "slope", "kept": whole, **common, "share": float(np.median(slopes)), "share_low": float(low),
           "share_high": float(high), "expected": 1.0}  # fmt: skip
    if published:
        seconds = extrapolated(found, published)
        yield {"what": "time by layers", "kept": published, **common, "seconds": seconds,
               "status": f"extrapolated by layer from {whole} of {published} layers"}  # fmt: skip


def memory_rows(found: pd.DataFrame, by: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Summarise `resident`: shares of the whole model's bytes, and what its parameters let expect."""
    full = found.sort_values(by).iloc[-1]
    for row in found.to_dict("records"):
        yield {
            "what": f"memory by {by}", "dtype": dtype.removeprefix("torch."), "kept": int(row[by]),
            "whole": int(full[by]), "parameters": int(row["parameters"]), "megabytes": row["resident_bytes"] / 1e6,
            "share": 100 * row["resident_bytes"] / full["resident_bytes"],
            "expected": 100 * row["parameters"] / full["parameters"],
        }  # fmt: skip


def bits_rows(found: pd.DataFrame, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Summarise `speed_by_bits`: times as fast as 16 bits, and how many times fewer bytes a token reads."""
    for row in found[found["reason"] != ""].to_dict("records"):
        yield {"what": "token", "kept": int(row["bits"]), "whole": 16, "status": row["reason"]}
    ran = found[found["reason"] == ""]
    groups: Any = ran.groupby(["bits", "phase"], sort=False)
    for (bits, phase), own in groups:
        base = ran[(ran["bits"] == 16) & (ran["phase"] == phase)]
        logs = np.log(base["seconds"].to_numpy() / own["seconds"].to_numpy())
        value, low, high = tune.interval(list(logs), seed=seed)
        yield {
            "what": phase, "dtype": "bfloat16", "kept": int(bits), "whole": 16,
            "megabytes": own["bytes_a_token"].iloc[0] / 1e6, "seconds": float(own["seconds"].median()),
            "share": value, "share_low": low, "share_high": high,
            "expected": float(base["bytes_a_token"].iloc[0] / own["bytes_a_token"].iloc[0]), "rounds": len(own),
        }  # fmt: skip
