"""Costs of expert pruning on a small random Qwen3-MoE, as ratios of interleaved runs.

Needs no weights and less than a minute: 6 layers of 16 experts, top-2, hidden and expert width 256, vocabulary 8,000.

Measured on one thread of an Intel Xeon at 2.8 GHz with AVX-512 (float32), beside another job: routing statistics 0.99
of a plain forward pass, with REAP's norms 1.16; the proof of a slice, once for each model in a process, takes as long
as those of 360 tokens; pruning three quarters adds 0.83 of one layer's experts at its peak, which is the proof's;
bytes on disk, resident memory of a fresh process that loads them, and parameters fall alike (1.000 and 1.001).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from overparam import models
from overparam.compress import experts
from overparam.compress.experts import proof
from overparam.measure import disk, memory, speed

LAYERS, EXPERTS = 6, 16
BATCHES, SEQUENCES, TOKENS = 3, 16, 64
REPEATS = 7
LARGE = {"moe_intermediate_size": 2048}  # of which tensors outweigh what Python takes on the way


def main() -> int:
    """Measure, print a line a goal, and return 0 when all are met."""
    missed = 0
    for name, ratio, goal, met in chain(collecting(), proving(), peak_of_prune(), sizes()):
        print(f"{name:<66} {ratio:>7}   goal {goal:<10} {'met' if met else 'MISSED'}", flush=True)
        missed += not met
    return int(missed > 0)


def build(**overrides: int) -> PreTrainedModel:
    """The model, with random weights."""
    fields = {
        "vocab_size": 8000,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", **{**fields, **overrides})
    ).eval()


def collecting():  # type: ignore[no-untyped-def]
    """Routing statistics, and REAP's, against a plain forward pass of the decoder without its head."""
    model = build()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(8000, (SEQUENCES, TOKENS), generator=generator),
            "attention_mask": torch.ones(SEQUENCES, TOKENS, dtype=torch.long),
        }
        for _ in range(BATCHES)
    ]

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(**batch, use_cache=False)

    steps = {
        "plain": plain,
        "statistics": lambda: experts.collect(model, batches),
        "reap": lambda: experts.collect(model, batches, reap=True),
    }
    timings = speed.interleaved(steps, warmup=1, repeats=REPEATS)
    for name, goal in (("statistics", 1.1), ("reap", 1.6)):
        ratio = float(np.median(np.divide(timings[name].values, timings["plain"].values)))
        label = {"statistics": "routing statistics", "reap": "statistics with REAP's norms"}[name]
        yield f"time of {label} / plain forward", f"{ratio:.2f}", f"≤ {goal}", ratio <= goal


def proving():  # type: ignore[no-untyped-def]
    """The proof, which runs once for each model in a process, in tokens of calibration text."""
    model = build()
    batch = {
        "input_ids": torch.randint(8000, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    }

    def prove() -> None:
        proof._proven.clear()
        experts.prove(model)

    steps = {"proof": prove, "statistics": lambda: experts.collect(model, [batch])}
    timings = speed.interleaved(steps, warmup=1, repeats=REPEATS)
    ratio = float(np.median(np.divide(timings["proof"].values, timings["statistics"].values)))
    tokens = ratio * SEQUENCES * TOKENS
    yield "time of the proof, in tokens of routing statistics", f"{tokens:.0f}", "≤ 1000", tokens <= 1000


def peak_of_prune():  # type: ignore[no-untyped-def]
    """What pruning three quarters adds to the resident model at its peak, in layers."""
    peak = memory.peak_memory("tests.benchmarks.bench_experts:step_prune")
    layer = models.count_parameters(build(**LARGE)).expert * 4 / LAYERS
    ratio = peak.step_bytes / layer
    yield "peak memory that pruning adds / one layer of experts", f"{ratio:.2f}", "≤ 1", ratio <= 1


def step_prune() -> Iterator[None]:
    """Prune, in a process of its own."""
    model = build(**LARGE)
    yield
    experts.prune(model, [list(range(EXPERTS // 4))] * LAYERS)


def sizes():  # type: ignore[no-untyped-def]
    """Saved folder and resident memory against the parameter count, all as shares of the whole model's."""
    model = build()
    with tempfile.TemporaryDirectory() as temporary:
        folders, parameters = [], []
        for name in ("whole", "pruned"):
            if name == "pruned":
                counts = experts.allocate(np.arange(1, LAYERS + 1), LAYERS * EXPERTS // 4, 2, EXPERTS)
                experts.prune(model, [list(range(count)) for count in counts])
            folders.append(experts.save_pruned(model, Path(temporary) / name))
            parameters.append(models.count_parameters(model).total)
        found = {
            "bytes on disk": [disk.disk_bytes(folder) for folder in folders],
            "resident memory": list(
                memory.resident_memories(
                    "overparam.compress.experts:load_pruned", [{"path": str(folder)} for folder in folders]
                )
            ),
        }
    for name, (whole, pruned) in found.items():
        ratio = (pruned / whole) / (parameters[1] / parameters[0])
        met = abs(ratio - 1) <= 0.03
        yield f"75 % pruned: share of {name} / share of parameters", f"{ratio:.3f}", "1 ± 0.03", met


if __name__ == "__main__":
    raise SystemExit(main())
