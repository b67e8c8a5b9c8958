"""The start and the end of the quantization study, and what its steps share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import quantize
from overparam.data import corpora, parallel, splits
from overparam.evaluate import samples
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.experiment.subjects.decoder import Decoder
from overparam.experiment.subjects.encoder import Encoder
from overparam.models import proof
from overparam.models.proof import NotExactError
from overparam.studies import recipes
from overparam.studies.quantization_accuracy import Params
from overparam.support import progress
from overparam.support.allocator import keep_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overparam.compress.quantize import openvino


@dataclass
class Study(experiment.Study[Params]):
    """A started study: what every step needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embedder: models.Embedder
    subject: Encoder | Decoder
    schemes: pd.DataFrame = field(
        default_factory=pd.DataFrame
    )  # each that was asked for, and why it is not run
    not_trained: str = ""  # why the model cannot be trained with rounding; empty where it can
    systems: dict[str, quantize.Quantized] = field(default_factory=dict)
    seconds_to_quantize: dict[str, float] = field(default_factory=dict)

    @property
    def decoder(self) -> bool:
        """Whether the model gives logits, not embeddings."""
        return isinstance(self.subject, Decoder)

    def plain(self, model: PreTrainedModel) -> Any:
        """What runs a model as it is: `HiddenStates` of an encoder, a `StepwiseDecoder`."""
        return quantize.steps_of(model) if self.decoder else quantize.states_of(model)

    @property
    def running(self) -> list[str]:
        """Names of the schemes that run here, full precision first."""
        return list(self.schemes.loc[self.schemes["not_run"] == "", "scheme"])

    @cached_property
    def train_texts(self) -> list[str]:
        """Texts of the training parts, verses and articles in turns: for calibration and probing."""
        verses = samples.shuffled(
            [verse.text for verse in splits.verses_in("web", "train")], self.params.seed
        )
        news = samples.shuffled(
            [text for _, text in corpora.topic_rows("reuters-r52", "train")], self.params.seed
        )
        pairs = zip(verses, news, strict=False)
        return [samples.cut(text, self.params.characters) for pair in pairs for text in pair if text]

    @property
    def exported(self) -> tuple[Any, float]:
        """The model in OpenVINO, from which each of its schemes starts, and the seconds that its export took.

        Raises:
            NotExactError: It cannot be exported exactly.
        """
        if isinstance(self._export, NotExactError):
            raise self._export
        return self._export

    @cached_property
    def _export(self) -> tuple[Any, float] | NotExactError:
        started, proved = time.perf_counter(), proof.seconds()
        try:
            found = quantize.export(self.model, decoder=self.decoder)
        except NotExactError as error:
            return error
        return found, time.perf_counter() - started - (proof.seconds() - proved)

    def quantized(self, name: str) -> quantize.Quantized:
        """The model under a scheme, made when first asked for; calibrated on texts of the training parts.

        It computes in what gives the same numbers on every processor.
        """
        if name not in self.systems:
            scheme = quantize.SCHEMES[name]
            exported, before = self.exported if scheme.library == "openvino" else (None, 0.0)
            calibration = self._calibration if scheme.calibrated else ()
            started = time.perf_counter()
            self.systems[name] = quantize.quantize(
                self.model, name, decoder=self.decoder, calibration=calibration, exported=exported
            )
            self.seconds_to_quantize[name] = before + time.perf_counter() - started
        return self.systems[name]

    @cached_property
    def _calibration(self) -> list[openvino.Batch]:
        texts = self.embedder.prompted(self.train_texts[: self.params.calibration_texts])
        found = quantize.batches(self.tokenizer, texts, batch_size=8, max_length=self.length)
        return [batch for _, batch in found]

    @property
    def length(self) -> int:
        """Tokens of a text that is embedded."""
        return self.embedder.recipe.length(self.params.max_length)


@step
def as_quantized(study: Study) -> pd.DataFrame:
    """What each scheme made of the weights, and in what it computes while quality is measured."""
    rows = []
    for name in progress.track(study.running, "quantizing"):
        found = study.quantized(name)
        covered = found.coverage
        assert covered is not None
        rows.append(
            {
                "scheme": name,
                "computes_in": found.precision.computes_in,
                "cache_in": found.precision.cache_in,
                "quantized_share": 100 * covered.quantized if name != quantize.BASELINE else 0.0,
                "weights": covered.described(),
                "left": ", ".join(f"{role}: {100 * share:.3g} %" for role, share in covered.left.items()),
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("systems", table)
    return table


@begins
def start(params: Params) -> Study:
    """Load the model, find out which schemes run with it, and open the record.

    Raises:
        ValueError: The model is quantized already, its blocks are not known, or its recipe has parts that are not.
        MemoryError: It does not fit beside its quantized copies.
    """
    import torch

    copies = sum(max(16, quantize.SCHEMES[name].weights) / 32 for name in params.schemes)
    models.check_memory(
        params.model, torch.float32, times_weights=2 + copies, purpose="with its quantized copies"
    )
    decoder = models.is_decoder(params.model, kind=params.kind)
    model, tokenizer = models.load(params.model, device=models.working_device(), causal=decoder)
    quantize.refuse_quantized(model)
    models.blocks(model.base_model)  # whose parts are rounded one by one
    recipe = None if decoder else models.recipe(model)
    embedder = models.Embedder(recipe)
    keep_freed_memory()
    recorder = experiment.open_record(
        params,
        inputs=models.provenance(params.model) | corpora.provenance(),
    )
    subject = _decoder(params, tokenizer) if decoder else _encoder(params, model, tokenizer, embedder)
    study = Study(params, recorder, model, tokenizer, embedder, subject)
    if not decoder:
        here = embedder.recipe.describe() | {"tokens at most": str(study.length)}
        recipes.keep(recorder, params.model, recipe, here)
    study.schemes = _schemes(study)
    study.not_trained = _not_trained(study)
    if study.not_trained:
        print(f"not trained with rounding: {study.not_trained}", flush=True)
    recorder.metric("schemes_that_run", len(study.running))
    recorder.metric("parameters", models.count_parameters(model).total)
    return study


def _encoder(
    params: Params, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embedder: models.Embedder
) -> Encoder:
    """The model as what embeds texts as its recipe says."""

    def embed(run: Any, texts: list[str]) -> NDArray[np.float32]:
        length = embedder.recipe.length(params.max_length)
        return quantize.embed(
            run, tokenizer, texts, max_length=length, device=model.device, embedder=embedder
        )

    return Encoder(embed, params.suite, params.suite_items, params.seed, embedder.recipe.unit_length)


def _decoder(params: Params, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    """The model as what reads held-out texts: the same verses in every language, and news."""

    def texts() -> dict[str, list[str]]:
        n, found = params.likelihood_texts, {}
        for language in params.languages:
            other = "fr" if language == "en" else "en"
            pairs = parallel.verse_pairs(language, other, "test", n=n, seed=params.seed)
            found[f"verses, {language}"] = [pair.source for pair in pairs]
        rows = corpora.topic_rows("reuters-r52", "test")
        news = [samples.cut(text, 2 * params.characters) for _, text in rows]
        found["news, en"] = samples.shuffled([text for text in news if text], params.seed)[:n]
        return found

    return Decoder(tokenizer, texts, 4 * params.cost_tokens)


def _schemes(study: Study) -> pd.DataFrame:
    rows = [
        {
            "scheme": name,
            "about": quantize.SCHEMES[name].about,
            "weight_bits": quantize.SCHEMES[name].weights,
            "activation_bits": quantize.SCHEMES[name].activations,
            "not_run": quantize.reason_against(
                name, study.model, decoder=study.decoder, exported=lambda: study.exported
            )
            or "",
        }
        for name in (quantize.BASELINE, *study.params.schemes)
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("schemes", table)
    return table


def _not_trained(study: Study) -> str:
    from overparam.compress.quantize import qat  # loads torchao

    body = models.blocks(study.model.base_model).layers if study.decoder else study.model
    reason = qat.reason_against(body, group_size=study.params.group_size)
    return f"{type(study.model).__name__}: {reason}" if reason else ""
