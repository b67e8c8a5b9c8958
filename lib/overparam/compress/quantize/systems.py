"""One interface to quantized models of all libraries: encoders give embeddings, decoders logits token by token."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from overparam.compress.quantize import backends, coverage, openvino
from overparam.compress.quantize.coverage import Coverage
from overparam.compress.quantize.exporting import export
from overparam.compress.quantize.schemes import SCHEMES, refuse_quantized
from overparam.models import Embedder, proof
from overparam.models.proof import NotExactError
from overparam.support.files import new_folder

_NOTE = "quantization.json"
HiddenStates = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(token ids, attention mask), both [texts, tokens] -> hidden states [texts, tokens, hidden]."""


class StepwiseDecoder(Protocol):
    """A decoder that reads a text in steps and keeps the keys and values of what it has read."""

    def reset(self) -> None:
        """Forget all tokens."""

    def __call__(self, input_ids: torch.Tensor, *, last: int = 0) -> torch.Tensor:
        """Read further tokens, [1, tokens], and return their logits, [1, tokens, vocabulary].

        With `last`, only the logits of the last tokens are needed, which saves time with a large vocabulary.
        """


@dataclass(frozen=True)
class Quantized:
    """A model under one scheme.

    Attributes:
        scheme: Name of the scheme.
        run: `HiddenStates` of an encoder, or a `StepwiseDecoder`.
        model: The quantized module or `openvino.Model`.
        precision: Precision of activations, and of keys and values.
        coverage: Shares of weights by bits; None if loaded from a folder that does not state them.
    """

    scheme: str
    run: Any
    model: Any
    precision: openvino.Precision
    coverage: Coverage | None = None

    def fastest(self) -> Quantized:
        """The same weights, computing in the fastest precision on this processor: for measuring speed.

        OpenVINO chooses the precision of activations, keys and values by processor; in PyTorch the scheme fixes it.
        """
        if SCHEMES[self.scheme].library != "openvino":
            return self
        return _in_openvino(
            self.scheme, self.model, isinstance(self.run, openvino.Decoder), self.coverage, exact=False
        )

    def save(self, path: Path | str) -> None:
        """Save the weights in the format of the scheme's library; the folder appears complete or not at all.

        `quantization.json` in the folder states the scheme and the version of the library that wrote it.

        Raises:
            FileExistsError: If the path exists.
        """
        library = SCHEMES[self.scheme].library
        with new_folder(path) as folder:
            if library == "openvino":
                openvino.save(self.model, folder)
            else:
                self.model.save_pretrained(folder)
            written: dict[str, Any] = {"scheme": self.scheme, "library": library, "version": version(library)}
            if self.coverage is not None:
                written["coverage"] = asdict(self.coverage)
            (folder / _NOTE).write_text(json.dumps(written) + "\n", encoding="utf-8")


def quantize(
    model: PreTrainedModel,
    name: str,
    *,
    decoder: bool = False,
    calibration: Sequence[openvino.Batch] = (),
    exported: Any = None,
) -> Quantized:
    """Quantize a copy of a model.

    The result computes the same numbers on every processor; use `Quantized.fastest` to measure speed.

    Args:
        model: The model; it is not changed.
        name: A scheme for which `reasons.reason_against` returns None.
        decoder: Whether the model has a language-modelling head and is to give logits.
        calibration: Batches of real text, for schemes that need calibration.
        exported: The result of `export`; None to export the model here.

    Raises:
        NotExactError: The scheme leaves weights unquantized that it should quantize, or the export is not exact.
        ValueError: The model is already quantized, or calibration is missing.
    """
    refuse_quantized(model)
    scheme = SCHEMES[name]
    if scheme.library == "openvino":
        exported = exported or export(model, decoder=decoder)
        changed = openvino.compressed(exported, name, calibration)
        covered = coverage.checked(coverage.of_openvino(changed, model), scheme, model)
        return _in_openvino(name, changed, decoder, covered)
    if scheme.library in ("torchao", "bitsandbytes") and (
        reason := coverage.unreached(model, scheme.library)
    ):
        raise NotExactError(f"{name}: {reason}")
    changed = backends.in_torch(model, name)
    covered = coverage.checked(coverage.of_module(changed, model), scheme, model)
    system = _in_torch(name, changed, decoder, covered)
    if scheme.library == "torchao":
        _check_runs(system, model, decoder)
    return system


def _check_runs(system: Quantized, model: PreTrainedModel, decoder: bool) -> None:
    """Run a quantized model on a few tokens: some architectures change their weights while they run."""
    batch = proof.probe(model, (4, 3))
    try:
        with torch.inference_mode():
            if decoder:
                system.run.reset()
                system.run(batch.input_ids[:1])
                system.run.reset()
            else:
                system.run(batch.input_ids, batch.attention_mask)
    except NotImplementedError as error:
        raise NotExactError(
            f"{type(model).__name__} does not run in {system.scheme}: {str(error).splitlines()[0][:160]}"
        ) from error


def load(
    folder: Path | str, kind: type[PreTrainedModel], *, decoder: bool = False, fastest: bool = False
) -> Quantized:
    """Load what `Quantized.save` wrote.

    Args:
        folder: Folder of the saved model.
        kind: Class of the model in transformers.
        decoder: Whether the model is to give logits.
        fastest: See `Quantized.fastest`.

    Raises:
        FileNotFoundError: There is no saved model.
        ValueError: The library cannot read it; the message names the versions that wrote it and that is installed.
    """
    note = Path(folder) / _NOTE
    if not note.exists():
        raise FileNotFoundError(f"{folder} has no {_NOTE}: it was not saved by overparam")
    written = json.loads(note.read_text(encoding="utf-8"))
    name, library = written["scheme"], written["library"]
    covered = _coverage(written.get("coverage"))
    try:
        if library == "openvino":
            return _in_openvino(name, openvino.load(folder), decoder, covered, exact=not fastest)
        model = backends.load(folder, kind)
    except Exception as error:
        raise ValueError(
            f"{library} {version(library)} cannot read {folder}, which {library} {written['version']} wrote: {error}"
        ) from error
    return _in_torch(name, backends.compiled(model) if name == "fp32-compiled" else model, decoder, covered)


def held(folder: str, module: str, kind: str, ids: list[int], decoder: bool) -> Any:
    """Load a saved model, run it on a text, and return it: what stays in memory of a process that serves the model.

    Args:
        folder: Written by `Quantized.save`.
        module: Module of the model's class in transformers.
        kind: Name of that class.
        ids: Token ids of the text.
        decoder: Whether the model gives logits.
    """
    run = load(folder, getattr(importlib.import_module(module), kind), decoder=decoder, fastest=True).run
    text = torch.tensor([ids])
    with torch.inference_mode():
        run(text) if decoder else run(text, torch.ones_like(text))
    return run


def embed(
    run: HiddenStates,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 64,
    device: torch.device | str = "cpu",
    embedder: Embedder | None = None,
) -> NDArray[np.float32]:
    """Return the embeddings of texts, float32 [texts, width].

    Texts of similar length share a batch; results are in the order of `texts`.

    Args:
        run: Gives hidden states.
        tokenizer: The model's tokenizer.
        texts: Texts to embed.
        batch_size: Texts per batch.
        max_length: Maximum tokens per text.
        device: Device of the model.
        embedder: Turns hidden states into embeddings by the model's recipe; by default, their mean at unit length.
    """
    embedder = (embedder or Embedder()).to(device)
    skipped = embedder.skipped(tokenizer)
    vectors: dict[int, NDArray[np.float32]] = {}
    for rows, (input_ids, attention_mask) in batches(
        tokenizer, embedder.prompted(texts), batch_size=batch_size, max_length=max_length
    ):
        ids, mask = (torch.from_numpy(each).to(device) for each in (input_ids, attention_mask))
        pooled = mask.clone()
        pooled[:, :skipped] = 0
        with torch.inference_mode():
            values = embedder(run(ids, mask), mask, pooled).cpu().numpy()
        vectors |= dict(zip(rows, values, strict=True))
    return np.stack([vectors[row] for row in range(len(texts))])


def batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int, max_length: int
) -> list[tuple[list[int], openvino.Batch]]:
    """Return (indices of texts, (token ids, mask)) for each batch, shortest texts first."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda row: len(ids[row]))
    made = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="np"
        )
        made.append((rows, (padded["input_ids"].astype(np.int64), padded["attention_mask"].astype(np.int64))))
    return made


def states_of(model: PreTrainedModel) -> HiddenStates:
    """Return the function that gives the hidden states of a transformers model."""

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    return run


def steps_of(model: PreTrainedModel) -> StepwiseDecoder:
    """Return a transformers decoder that reads in steps and keeps its keys and values."""
    return _StepwiseModel(model)


class _StepwiseModel:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self._cache = DynamicCache(config=self.model.config.get_text_config())

    def __call__(self, input_ids: torch.Tensor, *, last: int = 0) -> torch.Tensor:
        with torch.inference_mode():
            ids = input_ids.to(self.model.device)
            output = self.model(
                input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=last
            )
        return cast(torch.Tensor, output.logits)


def _in_torch(name: str, model: PreTrainedModel, decoder: bool, covered: Coverage | None) -> Quantized:
    kind = str(model.dtype).removeprefix("torch.")
    rounds = SCHEMES[name].activations
    precision = openvino.Precision(
        kind if rounds > 8 else f"{kind}, activations in {rounds} bits", kind if decoder else ""
    )
    return Quantized(name, steps_of(model) if decoder else states_of(model), model, precision, covered)


def _in_openvino(
    name: str, model: Any, decoder: bool, covered: Coverage | None, *, exact: bool = True
) -> Quantized:
    run = openvino.Decoder(model, exact=exact) if decoder else openvino.Encoder(model, exact=exact)
    return Quantized(name, run, model, run.precision, covered)


def _coverage(written: dict[str, Any] | None) -> Coverage | None:
    """Read the coverage that `save` wrote; JSON has turned the bits into text."""
    if written is None:
        return None
    shares = {int(bits): share for bits, share in written["shares"].items()}
    return Coverage(shares, written["quantized"], written["left"])
