"""The steps of the weight-pruning study, in the order of the notebook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import depth, quantize, weights
from overparam.data import corpora, kinds
from overparam.evaluate import samples
from overparam.experiment import costs, sweep
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.experiment.subjects.base import Scores
from overparam.experiment.subjects.decoder import Decoder
from overparam.experiment.subjects.encoder import Encoder
from overparam.measure import speed
from overparam.record import stats
from overparam.studies.weight_pruning import Params
from overparam.support import progress
from overparam.support.allocator import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overparam.compress.weights import Matrix

UNPRUNED, RANDOM, INVERTED, FLOOR = "unpruned", "random", "inverted", "bag of words"
PATTERN = (2, 4)
HALF = 0.5  # the sparsity at which everything but methods is compared
STORED = 2  # bytes of a weight, as models are stored
_SIDES = 8  # texts of a calibration batch


@dataclass(frozen=True)
class System:
    """One way to choose zeros.

    Attributes:
        method: One of `weights.METHODS`.
        sparsity: Share of the layers' weights.
        pattern: "" or "2:4".
        seed: Of random choices.
    """

    method: str
    sparsity: float
    pattern: str = ""
    seed: int = 0

    @property
    def key(self) -> tuple[str, float, str]:
        """What repeats of it have in common."""
        return self.method, self.sparsity, self.pattern


@dataclass
class Study(experiment.Study[Params]):
    """A started study: what every step needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embedder: models.Embedder
    subject: Encoder | Decoder
    matrices: list[Matrix] = field(default_factory=list)

    @property
    def decoder(self) -> bool:
        """Whether the model gives logits, not embeddings."""
        return isinstance(self.subject, Decoder)

    def plain(self, model: PreTrainedModel) -> Any:
        """What runs a model as it is."""
        return quantize.steps_of(model) if self.decoder else quantize.states_of(model)

    def texts(self, kind: str, split: str, n: int) -> list[str]:
        """Return texts of a kind of at least eight words, in an order of their own.

        Raises:
            ValueError: If there are fewer.
        """
        found = [text for text in kinds.texts(kind, split) if len(text.split()) >= 8]
        if len(found) < n:
            raise ValueError(f"{kind} ({split}) has {len(found)} texts, {n} are asked for")
        return samples.shuffled(found, self.params.seed)[:n]

    def calibration(self, kind: str, n: int) -> list[dict[str, torch.Tensor]]:
        """Return texts of the training part as batches, each text as the model expects it."""
        texts = self.embedder.prompted(self.texts(kind, "train", n))
        return [
            dict(
                self.tokenizer(
                    texts[at : at + _SIDES],
                    padding=True,
                    truncation=True,
                    max_length=self.params.text_length,
                    return_tensors="pt",
                )
            )
            for at in range(0, n, _SIDES)
        ]

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The calibration text."""
        return self.calibration(self.params.calibration_kind, self.params.calibration_texts)

    @cached_property
    def probe(self) -> list[str]:
        """Texts on which outputs are compared."""
        kind = self.params.test_kinds[0] if self.decoder else "news"
        return [samples.cut(text, 400) for text in self.texts(kind, "validation", self.params.probe_texts)]

    @contextmanager
    def pruned(
        self,
        system: System,
        *,
        batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
        one_pass: bool = False,
    ) -> Iterator[PreTrainedModel]:
        """Prune the model inside of the block; its weights are put back afterwards."""
        before = [matrix.weight.clone() for matrix in self.matrices]
        try:
            yield weights.prune(
                self.model,
                system.method,
                system.sparsity,
                batches=self.batches if batches is None else batches,
                pattern=PATTERN if system.pattern else None,
                one_pass=one_pass,
                seed=system.seed,
            )
        finally:
            for matrix, weight in zip(self.matrices, before, strict=True):
                matrix.weight.copy_(weight)


@begins
def start(params: Params) -> Study:
    """Load the model, find its matrices, and open the record.

    Raises:
        ValueError: If the model has no single stack of layers, is quantized, or rows that 2:4 does not divide.
        MemoryError: If it does not fit beside a copy of its weights.
    """
    import torch

    models.check_memory(params.model, torch.float32, times_weights=3, purpose="with a copy of its weights")
    decoder = models.is_decoder(params.model)
    model, tokenizer = models.load(
        params.model, dtype=torch.float32, device=models.working_device(), causal=decoder
    )
    found = weights.matrices(model)
    if params.two_of_four:
        weights.check_pattern({each.name: each.weight.shape[1] for each in found}, PATTERN)
    embedder = models.Embedder(None if decoder else models.recipe(model))
    keep_freed_memory()
    used = {params.calibration_kind, params.other_kind, "news", *(params.test_kinds if decoder else ())}
    inputs = models.provenance(params.model) | kinds.provenance(*sorted(used))
    recorder = experiment.open_record(
        params,
        inputs=inputs | ({} if decoder else corpora.provenance()),
        seeds=[params.seed, *params.control_seeds],
    )
    study = Study(
        params, recorder, model, tokenizer, embedder, _subject(params, model, tokenizer, embedder, decoder)
    )
    study.matrices = found
    if isinstance(study.subject, Decoder):
        study.subject.texts = partial(_read, study)
    counts = weights.count_zeros(model, found)
    recorder.metric("parameters", counts.total)
    recorder.metric(
        "parameters_of_layers", counts.layers, "can be pruned; embeddings, head, routers and norms stay"
    )
    recorder.metric("zeros_before", 100 * counts.of_layers, "% of the layers' weights")
    return study


def _subject(
    params: Params,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    embedder: models.Embedder,
    decoder: bool,
) -> Encoder | Decoder:
    if decoder:
        return Decoder(tokenizer, dict, 4 * params.text_length)
    length = embedder.recipe.length(params.text_length)

    def embed(run: Any, texts: list[str]) -> NDArray[np.float32]:
        return quantize.embed(
            run, tokenizer, texts, max_length=length, device=model.device, embedder=embedder
        )

    return Encoder(embed, params.tasks, params.max_items, params.seed, embedder.recipe.unit_length)


def _read(study: Study) -> dict[str, list[str]]:
    """Texts that a decoder reads, by kind, each of at most `text_length` tokens."""
    found = {}
    for kind in study.params.test_kinds:
        texts = study.texts(kind, "test", study.params.test_texts)
        ids = study.tokenizer(texts, add_special_tokens=False)["input_ids"]
        found[kind] = [study.tokenizer.decode(each[: study.params.text_length]) for each in ids]
    return found


def systems(params: Params) -> list[System]:
    """Return what is compared: every method and control at every sparsity, and the pattern 2:4."""
    every = []
    for sparsity in params.sparsities:
        every += [System(method, sparsity) for method in params.methods]
        every += [System(RANDOM, sparsity, seed=seed) for seed in params.control_seeds]
        every += [System(INVERTED, sparsity)]
    if params.two_of_four:
        every += [System(method, HALF, "2:4") for method in params.methods]
        every += [System(RANDOM, HALF, "2:4", seed) for seed in params.control_seeds]
    return every


@dataclass(frozen=True)
class Quality:
    """Quality by system.

    Attributes:
        table: A row a system, see `quality`.
        kept: Percent of the unpruned model's quality, by method, sparsity and pattern.
        against: Percent of its quality that one system keeps more than another, by the names of `PAIRS`.
    """

    table: pd.DataFrame
    kept: dict[tuple[str, float, str], stats.Estimate]
    against: dict[str, stats.Estimate]


@step
def quality(study: Study) -> Quality:
    """Prune in every way, and score what is left, paired by item with the unpruned model.

    Returns:
        A row a system: ``score`` (points of the suite, or perplexity), ``kept`` in percent with its interval,
        ``gap_kept`` (of an encoder: the share that is left of the distance to a bag of words, in percent), ``moved``
        (1 − cosine to the unpruned embeddings, or divergence of the next token in nats), ``zeros`` of all parameters
        in percent, and the score of each task or kind of text.
    """
    subject = study.subject
    scores: dict[Any, list[Scores]] = {}
    moved: dict[Any, list[float]] = {}
    zeros: dict[Any, float] = {}

    def measure(key: tuple[str, float, str], run: Any, seed: int = 0) -> None:
        found = subject.scored(run)
        for task, each in found.items():
            named = {"system": key[0], "sparsity": key[1], "pattern": key[2], "seed": seed}
            study.recorder.keep(each.items, **named, task=f"{subject.task}: {task}")
        scores.setdefault(key, []).append(found)
        apart = subject.divergence(base, subject.outputs(run, study.probe))
        moved.setdefault(key, []).append(float(np.mean(apart)))
        zeros[key] = 100 * weights.count_zeros(study.model, study.matrices).of_model

    run = study.plain(study.model)
    base = subject.outputs(run, study.probe)
    unpruned = (UNPRUNED, 0.0, "")
    measure(unpruned, run)
    for system in progress.track(systems(study.params), "pruning and scoring"):
        with study.pruned(system) as model:
            measure(system.key, study.plain(model), system.seed)
    if isinstance(subject, Encoder):
        scores[FLOOR, 1.0, ""] = [subject.floor()]
    found = sweep.compare(subject, scores, ["sparsity", "pattern"], margin=study.params.margin)
    table = found.table
    keys = list(scores)
    table.insert(3, "moved", [float(np.mean(moved.get(key, [np.nan]))) for key in keys])
    table.insert(3, "zeros", [zeros.get(key, np.nan) for key in keys])
    if isinstance(subject, Encoder):
        by_key = dict(zip(keys, table["score"], strict=True))
        floor, full = by_key[FLOOR, 1.0, ""], by_key[unpruned]
        table.insert(3, "gap_kept", 100 * (table["score"] - floor) / (full - floor))
    study.recorder.table("quality", table)
    against = {
        name: subject.gained(scores[unpruned], scores[one], scores[other])
        for name, (one, other) in PAIRS.items()
        if one in scores and other in scores
    }
    return Quality(table, found.kept, against)


PAIRS = {  # one system, and the one that should keep more
    "wanda over magnitude": (("magnitude", HALF, ""), ("wanda", HALF, "")),
    "sparsegpt over wanda": (("wanda", HALF, ""), ("sparsegpt", HALF, "")),
    "refit over wanda": (("wanda", HALF, ""), ("wanda_refit", HALF, "")),
    "free over 2:4": (("wanda", HALF, "2:4"), ("wanda", HALF, "")),
}


@step
def calibration(study: Study) -> pd.DataFrame:
    """Change one thing at a time about the text that Wanda chooses by, at half of the weights.

    Returns:
        A row a change: ``kept`` in percent with its interval.
    """
    params, subject = study.params, study.subject
    if "wanda" not in params.methods:
        return pd.DataFrame(columns=["change", "texts", "kept", "kept_low", "kept_high"])
    system = System("wanda", HALF)
    n, kind, other = params.calibration_texts, params.calibration_kind, params.other_kind
    changes: dict[str, tuple[str, int, bool]] = {f"{n} texts, {kind}": (kind, n, False)}
    changes |= {f"{few} texts": (kind, few, False) for few in params.fewer_texts}
    changes[f"{other} instead of {kind}"] = (other, n, False)
    changes["all layers in one pass"] = (kind, n, True)
    scores = {(UNPRUNED,): [subject.scored(study.plain(study.model))]}
    for name, (of, texts, one_pass) in progress.track(changes.items(), "changing the calibration"):
        with study.pruned(system, batches=study.calibration(of, texts), one_pass=one_pass) as model:
            scores[(name,)] = [subject.scored(study.plain(model))]
    found = sweep.compare(subject, scores)
    table = pd.DataFrame(
        {"change": name, "texts": texts, **found.kept[(name,)].columns("kept")}
        for name, (_, texts, _) in changes.items()
    )
    study.recorder.table("calibration", table)
    return table


@step
def equal_bytes(study: Study, pruned: Quality) -> pd.DataFrame:
    """Compare zeros with rounding and with fewer layers, by the bytes that the layers' weights take when stored.

    A matrix with zeros is stored as the weights that stay, 16 bits each, and one bit for every place; rounded ones with
    the least value and step of each group.

    Returns:
        A row a system: its ``kind``, ``bytes_percent`` of the unpruned layers in 16 bits, and ``kept`` with interval.
    """
    params, subject, model = study.params, study.subject, study.model
    full = sum(matrix.weight.numel() for matrix in study.matrices)
    rows = []
    for (method, sparsity, pattern), kept in pruned.kept.items():
        if method in params.methods:
            bits = (1 - sparsity) * 8 * STORED + 1
            name = f"{method}, 2:4" if pattern else method
            rows.append({"kind": name, "system": f"{sparsity:.0%} zeros", "bytes_percent": 100 * bits / (8 * STORED)}
                        | kept.columns("kept"))  # fmt: skip
    scores: dict[Any, list[Scores]] = {("", ""): [subject.scored(study.plain(model))]}
    size = {}
    names = {matrix.name.partition("[")[0] for matrix in study.matrices}
    for bits in progress.track(params.bits, "rounding"):
        key = ("rounded", f"{bits} bits")
        with quantize.rounded(model, dict.fromkeys(names, bits)):
            scores[key] = [subject.scored(study.plain(model))]
        each = quantize.rounding.sizes(model, bits)
        size[key] = sum(each[name] for name in names) / 8
    layers = len(models.blocks(model.base_model).layers)
    for share in progress.track(params.layer_shares, "leaving out layers"):
        keep = max(1, round(layers * (1 - share)))
        key = ("fewer layers", f"{keep} of {layers} layers")
        shorter = models.sharing_copy(model)
        depth.truncate(shorter.base_model, keep)
        scores[key] = [subject.scored(study.plain(shorter))]
        left = [matrix for matrix in study.matrices if matrix.layer < keep]
        size[key] = STORED * sum(matrix.weight.numel() for matrix in left)
    found = sweep.compare(subject, scores, ["label"])
    for key, kept in found.kept.items():
        percent = 100 * size[key] / (STORED * full)
        rows.append({"kind": key[0], "system": key[1], "bytes_percent": percent, **kept.columns("kept")})
    table = pd.DataFrame(rows)
    study.recorder.table("equal_bytes", table)
    return table


@dataclass(frozen=True)
class Times:
    """What zeros buy in time.

    Attributes:
        products: A row a number of tokens and sparsity: how many times as fast as dense a sparse product is.
        dense: Change of the time of the whole model at half zeros, in percent.
    """

    products: pd.DataFrame
    dense: stats.Estimate


@step
def times(study: Study) -> Times:
    """Time the model with half of its weights zero beside the unpruned one, and sparse products beside dense ones.

    Dense kernels multiply with zeros as with any number. Sparse ones (compressed rows, `torch.sparse_csr`) skip them,
    on the largest matrix of the model.
    """
    import torch

    params = study.params
    texts = study.texts("news", "test", params.cost_texts)
    half = copy.deepcopy(study.model)
    weights.prune(half, "magnitude", HALF)
    what = study.subject.main_call
    calls: dict[str, Callable[[], object]] = {
        name: study.subject.calls(study.plain(model), texts)[what]
        for name, model in {UNPRUNED: study.model, "half": half}.items()
    }
    timed = speed.interleaved(calls, repeats=params.cost_repeats)
    change = stats.retention(*(np.asarray(timed[name].values) for name in (UNPRUNED, "half")))
    largest = max(study.matrices, key=lambda each: each.weight.numel()).weight.detach().contiguous()
    random = torch.Generator().manual_seed(params.seed)
    rows = []
    for tokens in params.product_tokens:
        x = torch.randn(largest.shape[1], tokens, generator=random)
        products: dict[str, Callable[[], object]] = {"dense": partial(torch.mm, largest, x)}
        for sparsity in params.product_sparsities:
            rated = {"largest": weights.scores(largest, "magnitude")}
            keep = weights.masks(rated, sparsity)["largest"]
            products[f"{sparsity}"] = partial(torch.mm, (largest * keep).to_sparse_csr(), x)
        with torch.inference_mode():
            found = speed.interleaved(products, repeats=params.cost_repeats)
        for sparsity in params.product_sparsities:
            faster = costs.speed_up(found["dense"].values, found[f"{sparsity}"].values)
            shape = "x".join(map(str, largest.shape))
            rows.append(
                {"tokens": tokens, "sparsity": sparsity, "matrix": shape, **faster.columns("times_as_fast")}
            )
    table = pd.DataFrame(rows)
    study.recorder.table("products", table)
    dense = change.shifted(-1).scaled(100)
    study.recorder.metric("time_change_at_half", dense, f"% of the time of {study.subject.call_names[what]}")
    return Times(table, dense)
