"""A text encoder with any setting: precision and backend, batch, threads, texts sorted by length or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam import models
from overparam.compress import quantize
from overparam.compress.quantize import openvino
from overparam.measure import roofline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMES = ("fp32", "bf16", "fp32-compiled", "openvino-fp32", "openvino-int8")
EMULATED = "bfloat16 is emulated on this processor: tried with the default batch and threads only"


@dataclass(frozen=True, order=True)
class Setting:
    """How texts are embedded.

    Attributes:
        scheme: One of `quantize.SCHEMES`: backend and precision.
        batch: Texts at once.
        threads: Of the processor.
        by_length: Whether texts of similar length share a batch, so that less padding is computed.
    """

    scheme: str = "fp32"
    batch: int = 32
    threads: int = 1
    by_length: bool = True

    def __str__(self) -> str:
        texts, threads = ("" if number == 1 else "s" for number in (self.batch, self.threads))
        order = "sorted" if self.by_length else "as they come"
        return f"{self.scheme}, {self.batch} text{texts}, {self.threads} thread{threads}, {order}"


def cores() -> int:
    """Return how many logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings(
    schemes: Iterable[str], batches: Iterable[int], threads: Iterable[int], *, default: Setting
) -> list[Setting]:
    """Return the default, and the joint grid of all choices.

    Of bfloat16, only the default's other choices where the processor has no instructions for it: it takes many times
    as long there.
    """
    found = [
        Setting(scheme, batch, number, by_length)
        for scheme in schemes
        for batch in batches
        for number in threads
        for by_length in ((True, False) if batch > 1 else (True,))
    ]
    kept = [
        each
        for each in found
        if each.scheme != "bf16" or models.bf16_is_fast() or each == _with(default, "bf16")
    ]
    return list(dict.fromkeys([default, *kept]))


def one_knob(grid: Iterable[Setting], default: Setting) -> list[Setting]:
    """Return those that differ from the default in one choice, and the default first."""
    names = ("scheme", "batch", "threads", "by_length")
    near = [each for each in grid if sum(getattr(each, n) != getattr(default, n) for n in names) == 1]
    return [default, *near]


def _with(setting: Setting, scheme: str) -> Setting:
    return Setting(scheme, setting.batch, setting.threads, setting.by_length)


class Encoders:
    """A text encoder under several schemes, each made when first used."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        calibration: Sequence[str] = (),
        max_length: int = 256,
    ) -> None:
        """Take a model.

        Args:
            model: From `models.load`, on the CPU.
            tokenizer: Its tokenizer.
            calibration: Texts, for schemes that measure activations on some.
            max_length: Tokens of a text at most; a shorter limit of the model's recipe goes before it.
        """
        self.model, self.tokenizer = model, tokenizer
        self.embedder = models.Embedder(models.recipe(model))
        self.max_length = self.embedder.recipe.length(max_length)
        self._calibration = list(calibration)
        self._systems: dict[str, quantize.Quantized] = {}
        self._runs: dict[tuple[str, int], Any] = {}
        self._exported: Any = None

    def reason_against(self, scheme: str) -> str | None:
        """Return why a scheme does not run here, or None; a model is exported for it once."""
        if quantize.SCHEMES[scheme].calibrated and not self._calibration:
            return "there are no texts to calibrate it with"
        return quantize.reason_against(scheme, self.model, decoder=False, exported=self._export)

    def quantized(self, scheme: str) -> quantize.Quantized:
        """Return the model under a scheme."""
        if scheme not in self._systems:
            exported = self._export() if quantize.SCHEMES[scheme].library == "openvino" else None
            measured = self._measured() if quantize.SCHEMES[scheme].calibrated else []
            self._systems[scheme] = quantize.quantize(
                self.model, scheme, calibration=measured, exported=exported
            )
        return self._systems[scheme]

    def embed(
        self, texts: Sequence[str], setting: Setting, *, length: int | None = None
    ) -> NDArray[np.float32]:
        """Return the embeddings of texts, float32 [texts, width], from tokenizing to pooling.

        Args:
            texts: Texts.
            setting: How.
            length: Tokens of a text at most, instead of `max_length`.
        """
        limit = min(length or self.max_length, self.max_length)
        parts = (
            [list(texts)] if setting.by_length
            else [list(texts[at : at + setting.batch]) for at in range(0, len(texts), setting.batch)]
        )  # fmt: skip
        with roofline.threads(setting.threads):
            run = self.run(setting.scheme, setting.threads)
            return np.concatenate(
                [
                    quantize.embed(
                        run, self.tokenizer, part, batch_size=setting.batch, max_length=limit, embedder=self.embedder
                    )
                    for part in parts
                ]
            )  # fmt: skip

    def call(
        self, texts: Sequence[str], setting: Setting, *, length: int | None = None
    ) -> Callable[[], object]:
        """Return what is timed."""
        return lambda: self.embed(texts, setting, length=length)

    def padding(self, texts: Sequence[str], setting: Setting, *, length: int | None = None) -> float:
        """Return the share of tokens that are padding, among all that are computed."""
        limit = min(length or self.max_length, self.max_length)
        ids = self.tokenizer(self.embedder.prompted(texts), truncation=True, max_length=limit)["input_ids"]
        lengths = [len(each) for each in ids]
        ordered = sorted(lengths) if setting.by_length else lengths
        chunks = [ordered[at : at + setting.batch] for at in range(0, len(ordered), setting.batch)]
        return 1 - sum(lengths) / sum(len(chunk) * max(chunk) for chunk in chunks)

    def run(self, scheme: str, threads: int) -> quantize.HiddenStates:
        """Return what gives the hidden states under a scheme; OpenVINO compiles a model for a number of threads."""
        import torch

        system = self.quantized(scheme)
        if quantize.SCHEMES[scheme].library != "openvino":
            run: quantize.HiddenStates = system.run
            return run
        if (scheme, threads) not in self._runs:
            self._runs[scheme, threads] = compiled(system.model, threads)
        graph = self._runs[scheme, threads]

        def states(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(graph([input_ids.numpy(), attention_mask.numpy()])[0])

        return states

    def _measured(self) -> list[openvino.Batch]:
        texts = self.embedder.prompted(self._calibration)
        found = quantize.batches(self.tokenizer, texts, batch_size=8, max_length=self.max_length)
        return [batch for _, batch in found]

    def _export(self) -> Any:
        if self._exported is None:
            self._exported = quantize.export(self.model, decoder=False)
        return self._exported


def compiled(model: Any, threads: int) -> Any:
    """Compile an `openvino.Model` for a number of threads, in the precision that is fastest on this processor."""
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino.library().Core().compile_model(model, "CPU", hints)


def read_once(**job: Any) -> None:
    """Load what `Quantized.save` wrote and read a text, in a process of its own whose memory is measured."""
    from overparam.compress.quantize import systems

    systems.held(**job)
