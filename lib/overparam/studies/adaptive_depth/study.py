"""The first steps: encoders, and exits at every depth of each for every task."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.record import stats
from overparam.studies.adaptive_depth import FULL, LABELS, TRAINED, Params
from overparam.support import cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overparam.compress.exits import Exits
    from overparam.evaluate.topics import Topics

MAX_LENGTH = 64  # tokens of a text
TRAINED_CHARACTERS = 128  # of a text that trains the second encoder
BATCH_TOKENS = 2048
RESAMPLES = 1000


@dataclass(frozen=True)
class Case:
    """Exits of one encoder on one task, and what they say.

    Attributes:
        exits: Taught by labels, with the rule of maximum probability.
        logits: Of the pool's texts, by what taught the exits, [texts, exits, classes].
        learned: Predictors of the learned rule, by what taught the exits.
        texts: Of the pool.
        labels: Numbers of the classes. [texts]
    """

    exits: Exits
    logits: dict[str, NDArray[np.float32]]
    learned: dict[str, NDArray[np.float64]]
    texts: list[str]
    labels: NDArray[np.int64]


@dataclass
class Study(experiment.Study[Params]):
    """A started study.

    Attributes:
        encoders: Models and tokenizers by name; the second encoder trained for all depths joins them when needed.
        cases: By encoder and task, from the step `depths`.
    """

    encoders: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    cases: dict[tuple[str, str], Case] = field(default_factory=dict)

    @cached_property
    def trained(self) -> str:
        """Name of the second encoder after its training."""
        return f"{self.params.small}, {TRAINED}"


@begins
def start(params: Params) -> Study:
    """Check memory, load the encoders, and open the record.

    Raises:
        ValueError: An encoder has no stack of blocks that can be stopped, or a task has too few texts.
        MemoryError: A model does not fit.
    """
    import torch

    from overparam.compress.depth.proof import reading
    from overparam.data import corpora

    for task in params.tasks:
        texts_of(params, task)
    names = [name for name in (params.model, params.small) if name]
    decoders = [name for name in (params.decoder, params.translator) if name]
    for name in [*names, *decoders]:
        models.check_memory(name, torch.float32, times_weights=2.5, purpose="with its activations")
    encoders: dict[str, Any] = {}
    for name in names:
        model, tokenizer = models.load(name, dtype=torch.float32)
        reading(model.eval())  # refuses a model without such a stack
        encoders[name] = (model, tokenizer)
    inputs = corpora.provenance(
        "verses", *({"newsgroups"} if "Newsgroups" in params.tasks else ()), "reuters"
    )
    for name in [*names, *decoders]:
        inputs |= models.provenance(name)
    recorder = experiment.open_record(params, inputs=inputs | params.key_inputs())
    return Study(params, recorder, encoders)


@step
def train(study: Study) -> pd.DataFrame:
    """Train the second encoder for all depths with adapters; they are kept with the record.

    Returns:
        A row a step: its loss.
    """
    from overparam.data import pairs
    from overparam.train import contrastive

    params = study.params
    if params.small is None:
        return pd.DataFrame(columns=["step", "loss"])
    model, tokenizer = study.encoders[params.small]
    sources, batch = ("paraphrase", "topic"), params.train_batch_size
    wanted = max(params.train_steps, len(sources)) * batch
    triplets = pairs.triplets(
        wanted + -wanted % (len(sources) * batch),
        sources=sources,
        seed=params.seed,
        max_chars=TRAINED_CHARACTERS,
    )
    recipe = contrastive.Recipe(
        steps=params.train_steps,
        batch_size=batch,
        learning_rate=params.learning_rate,
        warmup=params.train_steps // 10,
        lora_rank=params.lora_rank,
        lora_alpha=2 * params.lora_rank,
        scale=20.0,
        max_length=MAX_LENGTH,
        seed=params.seed,
        all_depths=True,
    )
    found = contrastive.train(
        model,
        tokenizer,
        triplets,
        recipe,
        pooling="mean",
        cache=cache.folder("adapters"),
        identity=str(models.provenance(params.small)),
        label="training for all depths",
    )
    study.encoders[study.trained] = (found.encoder[0].model.eval(), tokenizer)
    table = pd.DataFrame({"step": range(1, len(found.losses) + 1), "loss": found.losses})
    study.recorder.table("training_loss", table)
    study.recorder.metric("training_seconds", found.seconds, "s")
    assert found.adapters is not None
    weights = found.adapters / "adapter_model.safetensors"
    study.recorder.artifact("all-depths-adapter.safetensors", weights.read_bytes())
    return table


def texts_of(params: Params, task: str) -> Topics:
    """Return a task's texts.

    Raises:
        ValueError: It has fewer than are asked for, or its classes need more.
    """
    from overparam.evaluate import topics

    found = topics.topics(
        task,
        labelled=params.labelled,
        unlabelled=params.unlabelled,
        test_items=params.pool,
        characters=params.characters,
        seed=params.seed,
    )
    if len(found.test_texts) < params.pool or len(found.unlabelled) < 2:
        raise ValueError(
            f"{task} has {len(found.test_texts)} test texts and {len(found.unlabelled)} further ones, pool is "
            f"{params.pool} and unlabelled {params.unlabelled}: lower them"
        )
    return found


def states(study: Study, encoder: str, texts: list[str]) -> NDArray[np.float32]:
    """Pooled states of every depth, [texts, layers + 1, hidden]."""
    from overparam.compress import depth

    model, tokenizer = study.encoders[encoder]
    return depth.layer_embeddings(
        model, tokenizer, texts, pooling="mean", max_length=MAX_LENGTH, batch_tokens=BATCH_TOKENS
    )


@step
def depths(study: Study, training: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Fit exits at every depth of every encoder, on labels and on the full model's own probabilities.

    Returns:
        A row an encoder, task, teaching and depth: `accuracy`, and `disagrees`, the share of texts with another class
        than the full model's, both in percent with bootstrap intervals over the pool's texts.
    """
    from overparam.compress import exits

    params, rows = study.params, []
    for task in params.tasks:
        found = texts_of(params, task)
        sizes = [len(found.texts), len(found.unlabelled)]
        for encoder, (model, _) in study.encoders.items():
            every = states(study, encoder, [*found.texts, *found.unlabelled, *found.test_texts])
            own, free, pool = np.split(every, np.cumsum(sizes))
            by_labels = exits.fit(own, found.labels, of=model, seed=params.seed)
            taught = {
                LABELS: by_labels,
                FULL: exits.distilled(by_labels, every[: sum(sizes)], seed=params.seed),
            }
            logits = {name: each.logits(pool) for name, each in taught.items()}
            learned = {name: exits.predictor(each.logits(free)) for name, each in taught.items()}
            labels = by_labels.numbers(found.test_labels)
            study.cases[encoder, task] = Case(by_labels, logits, learned, found.test_texts, labels)
            for name, each in logits.items():
                rows += _by_depth(study, encoder, task, name, each.argmax(-1), labels)
    table = pd.DataFrame(rows)
    study.recorder.table("depths", table)
    return table


def _by_depth(
    study: Study, encoder: str, task: str, teaching: str, predicted: NDArray[Any], labels: NDArray[np.int64]
) -> list[dict[str, Any]]:
    rows = []
    for exit in range(predicted.shape[1]):
        hits = (predicted[:, exit] == labels).astype(float)[:, None]
        moved = (predicted[:, exit] != predicted[:, -1]).astype(float)[:, None]
        if teaching == LABELS:
            study.recorder.keep(hits, encoder=encoder, task=task, depth=exit + 1)
        accuracy, disagrees = (
            stats.bootstrap(items, n_resamples=RESAMPLES).scaled(100) for items in (hits, moved)
        )
        named = {"encoder": encoder, "task": task, "teaching": teaching, "depth": exit + 1}
        shape = {"layers": predicted.shape[1], "texts": len(labels)}
        rows.append(named | shape | accuracy.columns("accuracy") | disagrees.columns("disagrees"))
    return rows
