"""``python -m overparam.cli.bench_gpu``: what published sizes cost on a GPU, and the paper profile's code on twins.

It runs from a checkout without installing anything and without a network: torch, transformers, numpy, pandas and psutil
are enough. A path of the code that needs another package is listed as not run. Every part says what it needs, and is
left out, with the reason, when less time is left. Without a GPU it says so and exits 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_TEXTS = 8
_TOKENS = 512
_SHARES = (0.25, 0.5, 0.75)
_EXPERTS = (0.25, 0.5)
_WIDTHS = (4095, 4096, 4097)
_VOCABULARIES = (50257, 50304)
_ROUNDS = 9
# shapes, and the seconds that are kept free for each
_BY_LAYERS = {
    "Qwen3-0.6B": 15, "Llama-3.2-1B": 15, "Llama-3.2-3B": 20, "Phi-3-mini": 20, "Mistral-7B": 25, "Qwen2-7B": 25,
    "Llama-3-8B": 30, "Llama-3-70B, 16 layers": 45,
}  # fmt: skip
_BY_EXPERTS = {"OLMoE-1B-7B": 25, "GPT-OSS-20B": 40, "Qwen3-30B-A3B": 45}
_BY_BITS = {"Qwen3-0.6B": 30, "Llama-3-8B": 60}
_PATHS_SECONDS = 90


@dataclass
class Bench:
    """A running benchmark.

    Attributes:
        device: Where models are built.
        deadline: Of `time.monotonic`.
        tiny: Use tiny twins of the shapes: a trial.
        rows: Of the table of sizes.
        parts: What ran, and what did not, with the reason.
    """

    device: str
    deadline: float
    tiny: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def part(self, name: str, seconds: float, run: Callable[[], str | None]) -> None:
        """Run a part if time is left for it; what it returns is said."""
        if self.left < seconds:
            self._done(
                name, f"not run: it needs about {seconds:.0f} s, {max(self.left, 0):.0f} s are left", 0.0
            )
            return
        started = time.monotonic()
        try:
            said = run() or "ran"
        except ModuleNotFoundError as error:
            said = f"not run: the package {error.name} is not installed"
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            missing = isinstance(error, MemoryError)
            said = f"not run: {first}" if missing else f"failed: {type(error).__name__}: {first}"
            if not missing:
                traceback.print_exc()
        self._done(name, said, time.monotonic() - started)

    def _done(self, name: str, said: str, seconds: float) -> None:
        self.parts.append({"part": name, "seconds": seconds, "status": said})
        print(f"{seconds:6.1f} s  {name}: {said}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m overparam.cli.bench_gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=460.0, help="time after which no part begins")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the record")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny twins, on the CPU if there is no GPU: a trial"
    )
    chosen = parser.parse_args(arguments)
    try:
        import torch
    except ModuleNotFoundError:
        print(f"not run: torch is not installed in {sys.executable}; nothing is measured")
        return 0
    if not torch.cuda.is_available() and not chosen.tiny:
        print("not run: there is no GPU that torch can use; rows of a GPU stay 'not measured'")
        return 0
    _stand_in()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(device, time.monotonic() + chosen.seconds, chosen.tiny)
    limits = _run(bench)
    where = _record(bench, limits, chosen.out)
    print(f"record: {where}")
    return int(any(part["status"].startswith("failed") for part in bench.parts))


def _stand_in() -> None:
    """Modules of this project ask platformdirs for the cache's folder; servers may not have it."""
    if importlib.util.find_spec("platformdirs") is None:
        module: Any = ModuleType("platformdirs")
        module.user_cache_dir = lambda name: str(Path(tempfile.gettempdir()) / name)
        sys.modules["platformdirs"] = module


def _run(bench: Bench) -> list[Any]:
    import torch

    from overparam.models import published_shapes, shape_costs, shapes

    limits: list[Any] = []

    def name_of(shape: str) -> str:
        return f"tiny-{shape}" if bench.tiny else shape

    def measure_limits() -> str:
        from overparam.measure import roofline

        sizes, copied = ((64,), 2**20) if bench.tiny else ((4096, 8192), 2**31)
        table = roofline.measured(
            ("float32", "bfloat16", "int8"),
            (1,),
            sizes=sizes,
            copied_bytes=copied,
            repeats=20,
            device=bench.device,
        )
        limits.append(table)
        here = roofline.limits(table, 1)
        return f"{here.peaks['bfloat16'] / 1e12:.1f} TFLOP/s in bfloat16, {here.bandwidth / 1e9:.0f} GB/s"

    def by_layers(shape: str) -> Callable[[], str]:
        def run() -> str:
            name = name_of(shape)
            kept = shape_costs.kept_layers(name, _SHARES)
            published = published_shapes.shape(name).published_layers
            found = shape_costs.time_by_layers(
                name, kept, dtype=torch.bfloat16, device=bench.device, texts=_TEXTS, tokens=_tokens(bench),
                repeats=_ROUNDS,
            )  # fmt: skip
            own = list(shape_costs.time_rows(found, published, "bfloat16"))
            own += _peaks(found)
            own += _memory(name, kept, "layers")
            bench.rows += [{"shape": name, **row} for row in own]
            slope = next(row["share"] for row in own if row["what"] == "slope")
            whole = next(row for row in own if row["what"] == "time by layers" and row["kept"] == kept[-1])
            return (
                f"{1e3 * whole['seconds']:.1f} ms for {_TEXTS} × {_tokens(bench)} tokens, slope {slope:.2f}"
            )

        return run

    def by_experts(shape: str) -> Callable[[], str]:
        def run() -> str:
            name = name_of(shape)
            whole = shapes.experts_of(name)
            least = shapes.config(name).num_experts_per_tok
            kept = sorted({*(max(least, round(share * whole)) for share in _EXPERTS), whole})
            own = list(_memory(name, kept, "experts"))
            bench.rows += [{"shape": name, **row} for row in own]
            first = own[0]
            return (
                f"{first['kept']} of {whole} experts: {first['share']:.1f} % of {own[-1]['megabytes']:.0f} MB"
            )

        return run

    def _memory(name: str, kept: list[int], by: str) -> Iterator[dict[str, Any]]:
        found = shape_costs.resident(
            name, kept, by=by, dtype=torch.bfloat16, device=bench.device, causal=by == "experts"
        )
        return shape_costs.memory_rows(found, by, "bfloat16")

    def by_bits(shape: str) -> Callable[[], str]:
        def run() -> str:
            name = name_of(shape)
            found = shape_costs.speed_by_bits(
                name, (8, 4), device=bench.device, prompt=_tokens(bench), repeats=2 * _ROUNDS
            )
            own = list(shape_costs.bits_rows(found))
            bench.rows += [{"shape": name, **row} for row in own]
            tokens = [row for row in own if row["what"] == "token"]
            return "a token in " + ", ".join(
                f"{row['kept']} bits: {row.get('status') or format(row['share'], '.2f') + ' times as fast'}"
                for row in tokens
            )

        return run

    bench.part("limits of the machine", 20, measure_limits)
    bench.part("alignment", 15, lambda: _alignment(bench))
    for shape, seconds in _BY_LAYERS.items():
        bench.part(f"time and memory by layers: {shape}", seconds, by_layers(shape))
    for shape, seconds in _BY_EXPERTS.items():
        bench.part(f"memory by experts: {shape}", seconds, by_experts(shape))
    for shape, seconds in _BY_BITS.items():
        bench.part(f"speed by bits: {shape}", seconds, by_bits(shape))
    for path, call in _paths(bench.device):
        bench.part(f"code of the paper profile: {path}", _PATHS_SECONDS / 6, call)
    for package in ("openvino", "torchao", "mteb"):
        if importlib.util.find_spec(package) is None:
            bench.part(f"code that needs {package}", 0, _needs(package))
    return limits


def _needs(package: str) -> Callable[[], str]:
    return lambda: f"not run: the package {package} is not installed"


def _tokens(bench: Bench) -> int:
    return 16 if bench.tiny else _TOKENS


def _peaks(found: Any) -> list[dict[str, Any]]:
    """Rows of the memory that a pass takes at most, the weights included."""
    whole = int(found["layers"].max())
    first = found.groupby("layers")["peak_bytes"].first()
    return [
        {"what": "peak memory by layers", "kept": int(layers), "whole": whole, "megabytes": peak / 1e6,
         "share": 100 * peak / first[whole]}
        for layers, peak in first.items()
    ]  # fmt: skip


def _alignment(bench: Bench) -> str:
    """Odd and aligned layers in turns."""
    import torch

    from overparam.measure import tune

    rows, width = 8 if bench.tiny else 4096, 64 if bench.tiny else _WIDTHS[1]
    sizes = tuple(size - _WIDTHS[1] + width for size in _WIDTHS)
    vocabularies = (257, 320) if bench.tiny else _VOCABULARIES

    def product(inner: int, outer: int) -> Callable[[], None]:
        x = torch.randn(rows, inner, device=bench.device).to(torch.bfloat16)
        weight = torch.randn(outer, inner, device=bench.device).to(torch.bfloat16)

        def call() -> None:
            for _ in range(10):
                torch.nn.functional.linear(x, weight)
            if x.is_cuda:
                torch.cuda.synchronize()

        return call

    said = []
    for what, cells, base in (
        ("width", {size: product(size, size) for size in sizes}, sizes[1]),
        ("vocabulary", {size: product(width, size) for size in vocabularies}, vocabularies[1]),
    ):
        named = {str(size): call for size, call in cells.items()}
        found = tune.paired(named, str(base), rounds=31).table.set_index("cell")
        for size in cells:
            work = (size / base) ** (2 if what == "width" else 1)
            row: Any = found.loc[str(size)]
            low, value, high = (100 * work * row[name] for name in ("ratio_low", "ratio", "ratio_high"))
            bench.rows.append(
                {"shape": what, "what": "alignment", "dtype": "bfloat16", "kept": size, "whole": base,
                 "share": value, "share_low": low, "share_high": high, "rounds": 31}
            )  # fmt: skip
            if size != base:
                said.append(f"{what} {size}: {value:.0f} % of {base}'s speed")
    return "; ".join(said)


def _paths(device: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """What the notebooks do with published models, on tiny twins: (name, call)."""
    texts = [
        f"{a} of the {b}"
        for a in ("king", "river", "house", "light")
        for b in ("city", "sea", "field", "sky")
    ]

    def loaded(name: str, **options: Any) -> tuple[Any, Any]:
        import torch

        from overparam import models

        return models.load(name, device=device, dtype=torch.bfloat16, **options)

    def layers() -> None:
        from overparam.compress import depth

        model, tokenizer = loaded("tiny-phi3")
        depth.layer_embeddings(model, tokenizer, texts)
        cuts = depth.l3prune(depth.initial_loss(model, tokenizer, _triplets(texts), batch_size=4))
        with tempfile.TemporaryDirectory() as folder:
            depth.save(depth.truncate(model, cuts.large), tokenizer, Path(folder) / "cut")

    def contrastive() -> None:
        from overparam.train import contrastive as training

        model, tokenizer = loaded("tiny-llama")
        recipe = training.Recipe(steps=2, warmup=1, batch_size=4, bf16=True)
        training.train(model, tokenizer, _triplets(texts), recipe)

    def experts(name: str) -> Callable[[], None]:
        def run() -> None:
            from overparam.compress import experts as pruning
            from overparam.data.packing import Tree, pack
            from overparam.train import causal

            model, tokenizer = loaded(name, causal=True)
            batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
            half = [layer.n_experts // 2 for layer in pruning.layers(model)]
            pruning.prune(model, pruning.select(pruning.routing_mass(model, [batch]), half))
            ids = [tokenizer(text)["input_ids"] for text in texts]
            packed = list(pack([Tree(each[:4], [each[4:]]) for each in ids * 8], rows=4, length=128))
            pruning.recover(model, packed * 2, causal.Recipe(steps=2), lora=pruning.Lora(rank=2))
            with tempfile.TemporaryDirectory() as folder:
                pruning.save_pruned(model, str(Path(folder) / "pruned"))

        return run

    def generating() -> None:
        from overparam.evaluate import generation, likelihood

        model, tokenizer = loaded("tiny-llama", causal=True)
        generation.generate(model, tokenizer, texts, max_new_tokens=4)
        likelihood.perplexity(model, tokenizer, texts, max_length=32, label="")

    def distilling() -> None:
        from overparam.compress import distill
        from overparam.train import causal

        teacher, tokenizer = loaded("tiny-llama", causal=True)
        student, _ = loaded("tiny-llama", causal=True)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        distill.distill_decoder(
            student.float(),
            teacher,
            [each[:4] for each in ids],
            [each[4:] for each in ids],
            causal.Recipe(steps=2),
        )

    def students() -> None:
        from overparam import models
        from overparam.compress import distill

        teacher, tokenizer = models.load("tiny-bert", device=device)
        full = distill.as_encoder(teacher, tokenizer, max_length=32)
        student = distill.new_student(distill.student_config(teacher, 0.5), seed=0)
        encoder = distill.as_encoder(
            student.to(device), tokenizer, width=full.get_embedding_dimension(), max_length=32
        )
        distill.distill_embeddings(
            encoder, texts, distill.outputs(full, texts), distill.Recipe(steps=2, batch_size=4)
        )

    def bits(scheme: str) -> Callable[[], str | None]:
        def run() -> str | None:
            from overparam import models
            from overparam.compress import quantize

            # wide enough for groups of 32 weights
            model = models.tiny_twin("llama", causal=True, intermediate_size=64).to(device)
            tokenizer = models.tiny_tokenizer()
            if reason := quantize.reason_against(scheme, model, decoder=True):
                return f"not run: {reason}"
            system = quantize.quantize(model, scheme, decoder=True)
            system.run(tokenizer(texts[:1], return_tensors="pt")["input_ids"].to(device))
            return None

        return run

    yield "layers: embeddings, initial loss, cuts, save", layers
    yield "layers: contrastive training with LoRA", contrastive
    for twin in ("tiny-gpt_oss", "tiny-qwen3_moe", "tiny-olmoe"):
        yield f"experts: routing, pruning, recovery, save ({twin})", experts(twin)
    yield "generation and likelihood", generating
    yield "distillation of a decoder", distilling
    yield "distillation of an encoder", students
    for scheme in (
        "bf16",
        "torchao-int8",
        "torchao-int4-g32",
        "torchao-fp8",
        "bitsandbytes-int8",
        "bitsandbytes-nf4",
    ):
        yield f"bits: {scheme}", bits(scheme)


def _triplets(texts: list[str]) -> list[Any]:
    return [
        SimpleNamespace(
            query=text, positive=f"{text} again", negative=texts[number - 1], source="made up",
            query_instruction="", document_instruction="",
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip


def _record(bench: Bench, limits: list[Any], out: Path) -> Path:
    """Write a record without a notebook: tables of sizes, limits and parts."""
    import pandas as pd
    import torch

    from overparam.record import record

    device = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    slug = "tiny" if bench.tiny else device.lower().replace(" ", "-")
    os.environ["OVERPARAM_PROFILE"] = "gpu"
    params = {
        "shapes": [*_BY_LAYERS, *_BY_EXPERTS, *_BY_BITS],
        "texts": _TEXTS,
        "tokens": _tokens(bench),
        "tiny": bench.tiny,
    }
    os.environ["OVERPARAM_JOB_DIR"] = str(out / "hardware" / slug)
    recorder = record.start("hardware", params, slug=slug, seeds=[0])
    recorder.table("parts", pd.DataFrame(bench.parts))
    if bench.rows:
        recorder.table("sizes", pd.DataFrame(bench.rows))
    for table in limits:
        recorder.table("limits", table)
    return recorder.finish()


if __name__ == "__main__":
    sys.exit(main())
