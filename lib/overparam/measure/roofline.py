"""Limits of a machine, measured, and the least time that a model's work takes within them.

The roofline model (Williams, Waterman & Patterson 2009, doi 10.1145/1498765.1498785): work of F operations on B bytes
takes at least max(F ÷ operations a second, B ÷ bytes a second). Both limits are the best of many tries of the simplest
program that comes near them: a product of square matrices, and passes over arrays that no cache holds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil

from overparam.support import progress

if TYPE_CHECKING:
    import torch

COPY, READ = "copy", "read"
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_LONGEST = 0.5  # seconds of one product; where larger matrices would take longer, smaller ones are the best that count


@dataclass(frozen=True)
class Machine:
    """What a machine does at most with some number of threads.

    Attributes:
        peaks: Operations a second by dtype; a multiply and an add are two.
        bandwidth: Bytes a second between processor and memory.
        threads: How many were used.
    """

    peaks: Mapping[str, float]
    bandwidth: float
    threads: int

    def balance(self, dtype: str) -> float:
        """Return the balance point, in operations a byte: work with fewer waits for memory."""
        return self.peaks[dtype] / self.bandwidth


@dataclass(frozen=True)
class Work:
    """What a call of a model does at least.

    Attributes:
        flops: Operations of all products of matrices.
        weight_bytes: Bytes of the weights that are read, each once.
        other_bytes: Bytes of keys and values read and written, rows of embedding tables, and outputs. Hidden states
            are left out: they can stay in caches.
    """

    flops: float
    weight_bytes: float
    other_bytes: float

    @property
    def bytes(self) -> float:
        """All of them."""
        return self.weight_bytes + self.other_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


def bound(work: Work, machine: Machine, dtype: str) -> float:
    """Return the seconds that work takes at least.

    Args:
        work: From `work`.
        machine: From `limits`.
        dtype: As for `peak`.
    """
    return max(work.flops / peak(machine, dtype), work.bytes / machine.bandwidth)


def peak(machine: Machine, dtype: str) -> float:
    """Return the operations a second that count for a dtype.

    Where a narrow dtype is emulated, float32's count: numbers can be widened before they are multiplied.

    Args:
        machine: From `limits`.
        dtype: One whose peak was measured; any other, such as "best", stands for the highest of all.
    """
    if dtype not in machine.peaks:
        return max(machine.peaks.values())
    return max(machine.peaks[dtype], machine.peaks.get("float32", 0.0))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(
    dtypes: Sequence[str],
    thread_counts: Sequence[int],
    *,
    sizes: Sequence[int] = (512, 1024, 2048),
    copied_bytes: int = 2**29,
    repeats: int = 20,
    device: str = "cpu",
) -> pd.DataFrame:
    """Measure peaks and bandwidth.

    Args:
        dtypes: Such as "float32", "bfloat16"; "int8" gives 32-bit sums.
        thread_counts: Numbers of threads.
        sizes: Sides of the matrices, increasing.
        copied_bytes: Bytes of an array that is passed over; it should be several times as large as any cache.
        repeats: Tries, of which the best counts.
        device: Where; threads make no difference on "cuda".

    Returns:
        A row a limit and number of threads: `what` (a dtype, "copy" or "read"), `size`, `best` and `median` in
        operations or bytes a second, `unit`, `tries`. A dtype that cannot be multiplied here has no best, and a
        `reason`.

    Raises:
        MemoryError: Two arrays of `copied_bytes` do not fit into the free memory.
    """
    rows = []
    for number in thread_counts:
        with threads(number):
            for dtype in progress.track(dtypes, "measuring peaks"):
                rows += [
                    {"threads": number, "what": dtype, **each}
                    for each in _peaks(dtype, sizes, repeats, device)
                ]
            rows += [
                {"threads": number, **each} for each in _bandwidths(copied_bytes, min(repeats, 20), device)
            ]
    columns = ["threads", "what", "size", "best", "median", "unit", "tries", "reason"]
    return pd.DataFrame(rows).reindex(columns=columns).fillna({"reason": ""})


def limits(table: pd.DataFrame, number: int) -> Machine:
    """Return the limits with a number of threads from the table of `measured`: the best of all sizes."""
    own = table[table["threads"] == number].dropna(subset="best")
    best = own.groupby("what", sort=False)["best"].max().to_dict()
    bandwidth = max(best.pop(COPY), best.pop(READ))
    return Machine({str(dtype): float(peak) for dtype, peak in best.items()}, float(bandwidth), number)


def largest_cache() -> int:
    """Return the bytes of the largest cache that the system reports, 0 if it reports none.

    A virtual machine may report its host's, of which it has a share.
    """
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")] if _CACHES.is_dir() else []
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)


def best_of(call: Callable[[], object], repeats: int, device: str = "cpu") -> list[float]:
    """Return the seconds of repeated calls, after one that is not counted; a device is waited for."""
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    call()
    found = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - started)
    return found


def _peaks(dtype: str, sizes: Sequence[int], repeats: int, device: str) -> list[dict[str, Any]]:
    import torch

    rows: list[dict[str, Any]] = []
    for size in sizes:
        if dtype == "int8":
            a = torch.ones(size, size, dtype=torch.int8, device=device)
            product = torch._int_mm
        else:
            a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            product = torch.mm
        operations = 2 * size**3
        if rows and operations / rows[-1]["best"] > _LONGEST:
            break
        try:
            found = best_of(lambda product=product, a=a: product(a, a), repeats, device)  # type: ignore[misc]
        except (RuntimeError, NotImplementedError) as error:
            return [{"size": size, "unit": "FLOP/s", "reason": str(error).splitlines()[0][:120]}]
        rows.append(
            {
                "size": size, "best": operations / min(found), "median": operations / float(np.median(found)),
                "unit": "FLOP/s", "tries": repeats,
            }
        )  # fmt: skip
    return rows


def _bandwidths(size: int, repeats: int, device: str) -> list[dict[str, Any]]:
    import torch

    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    if 2 * size > 0.8 * free:
        raise MemoryError(
            f"measuring bandwidth needs two arrays of {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: "
            "copy a smaller one"
        )
    width = 4096
    source = torch.ones(size // 4 // width, width, device=device)
    target, vector = torch.empty_like(source), torch.ones(width, device=device)
    calls = {COPY: (lambda: target.copy_(source), 2), READ: (lambda: source @ vector, 1)}
    rows = []
    for name, (call, passes) in calls.items():
        found = best_of(call, repeats, device)
        amount = passes * source.numel() * 4
        rows.append(
            {
                "what": name, "size": amount, "best": amount / min(found), "median": amount / float(np.median(found)),
                "unit": "byte/s", "tries": repeats,
            }
        )  # fmt: skip
    return rows


def work(
    model: Any,
    batch: int,
    length: int,
    *,
    context: int = 0,
    bits: float | None = None,
) -> Work:
    """Count what a forward pass does, on a copy without weights.

    Operations are those of PyTorch's `FlopCounterMode` with eager attention, which computes the scores of the whole
    square of tokens; a kernel that skips what the mask hides does a little less.

    Args:
        model: A text encoder, or a decoder; only its class, configuration and dtype are used.
        batch: Texts.
        length: Tokens of each text that are read now. A decoder with a head gives the logits of the last one only.
        context: Tokens that a decoder has read before, whose keys and values are kept.
        bits: Mean bits of a weight as it is stored; by default, those of the model's dtype.

    Raises:
        ValueError: Its work depends on what it reads, as that of a mixture of experts; or a number is below 1.
    """
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    if batch < 1 or length < 1 or context < 0:
        raise ValueError(
            f"batch and length must be at least 1 and context at least 0, got {batch}, {length} and {context}"
        )
    config = copy.deepcopy(model.config)
    mixture = [
        name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in vars(config)
    ]
    if mixture:
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts ({mixture[0]}): its work depends on what it reads; "
            "flops.per_token counts it"
        )
    with torch.device("meta"):
        bare = type(model)._from_config(config, attn_implementation="eager").eval().to(model.dtype)
        past = torch.zeros(batch, context, dtype=torch.long)
        ids = torch.zeros(batch, length, dtype=torch.long)
    more = {"logits_to_keep": 1} if bare.get_output_embeddings() is not None else {}
    with torch.no_grad():
        kept = bare(input_ids=past, use_cache=True, **more).past_key_values if context else None
        with FlopCounterMode(display=False) as counter:
            out = bare(
                input_ids=ids, **({"past_key_values": kept, "use_cache": True} if context else {}), **more
            )
    itemsize = model.dtype.itemsize
    multiplied = {id(m.weight) for m in bare.modules() if isinstance(m, nn.Linear)}
    looked_up = [
        m.weight for m in bare.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in multiplied
    ]
    tables = {id(weight) for weight in looked_up}
    weights = sum(p.numel() for p in bare.parameters() if id(p) not in tables)
    rows = sum(batch * length * weight.shape[1] for weight in looked_up)
    cache = getattr(out, "past_key_values", None)
    cached = sum(each.numel() for each in _tensors(cache)) if cache is not None else 0
    return Work(
        float(counter.get_total_flops()),
        weights * (8 * itemsize if bits is None else bits) / 8,
        itemsize * (rows + cached + out[0].numel()),
    )


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    """Keys and values of all layers."""
    for layer in cache.layers:
        if layer.keys is not None:
            yield from (layer.keys, layer.values)
