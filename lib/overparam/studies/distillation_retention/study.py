"""The start and the end of the distillation study, and what its steps share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from overparam import models
from overparam.compress import depth, distill
from overparam.compress.distill import encoders
from overparam.data import corpora, splits
from overparam.evaluate import samples
from overparam.experiment import study as experiment
from overparam.experiment.study import begins
from overparam.measure import energy
from overparam.studies import recipes
from overparam.studies.distillation_retention import Params
from overparam.support import cache
from overparam.support.allocator import keep_freed_memory
from overparam.train.distillation import Recipe
from overparam.train.loop import Log

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Study(experiment.Study[Params]):
    """A started study: what every step needs."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def encoder(self) -> SentenceTransformer:
        """The teacher as its recipe says; without one, with mean pooling and unit length."""
        return encoders.as_encoder(self.teacher, self.tokenizer, max_length=self.params.max_length)

    @cached_property
    def width(self) -> int:
        """Dimensions of the teacher's embeddings."""
        hidden = int(self.teacher.config.get_text_config().hidden_size)
        recipe = models.recipe(self.teacher)
        return recipe.outputs(hidden) if recipe else hidden

    @property
    def pooling(self) -> str:
        """The teacher's pooling, where single tokens can be pooled so; else the mean."""
        recipe = models.recipe(self.teacher)
        own = recipe.pooling if recipe else ("mean",)
        return own[0] if len(own) == 1 and own[0] in depth.POOLINGS else "mean"

    def record_recipes(self) -> None:
        """Record how the teacher, ready-made students and general models make embeddings."""
        table = None
        for name in dict.fromkeys(
            (self.params.teacher, *self.params.ready_made, *self.params.general_models)
        ):
            recipe = models.recipe(self.teacher) if name == self.params.teacher else models.recipe(name)
            here = (recipe or models.Recipe()).describe()
            length = recipe.length(self.params.max_length) if recipe else self.params.max_length
            table = recipes.keep(self.recorder, name, recipe, here | {"tokens at most": str(length)}, table)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the teacher, embedding tables included."""
        return models.count_parameters(self.teacher).total

    @cached_property
    def texts(self) -> list[str]:
        """Unlabelled texts of the training parts: verses, articles and posts, as many of each."""
        found = self.vocabulary_texts
        if len(found) < self.params.texts:
            raise ValueError(
                f"there are {len(found)} unlabelled texts, texts = {self.params.texts} asks for more"
            )
        return found[: self.params.texts]

    @cached_property
    def vocabulary_texts(self) -> list[str]:
        """All unlabelled texts, the sources in turns."""
        sources = [
            [verse.text for verse in splits.verses_in("web", "train")],
            [verse.text for verse in splits.verses_in("bbe", "train")],
            [text for _, text in corpora.topic_rows("reuters-r52", "train")],
            [text for _, text in corpora.topic_rows("20newsgroups", "train")],
        ]
        drawn = [samples.shuffled(source, self.params.seed) for source in sources]
        turns = (text for row in itertools.zip_longest(*drawn) for text in row if text)
        return list(dict.fromkeys(samples.cut(text, self.params.characters) for text in turns))

    def verses(self, count: int) -> list[str]:
        """Verses of the training part: unlabelled text that is of another kind than the topics' articles and posts."""
        texts = [verse.text for verse in splits.verses_in("web", "train")]
        return list(map(str, samples.shuffled(texts, self.params.seed)[:count]))

    def checkpoint(
        self, model: SentenceTransformer, recipe: Recipe, texts: Sequence[str], *data: object
    ) -> Path:
        """Folder of a training in the user's cache, by all that its outcome depends on.

        Args:
            model: As it is before the training.
            recipe: Of the training.
            texts: Which it reads as token ids.
            data: Arrays and settings that it reads.
        """
        import torch

        tensors = (
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            for tensor in model.state_dict().values()
        )
        return cached(asdict(recipe), *tensors, encoders.token_ids(model, texts), *data)


def cached(*parts: object) -> Path:
    """Folder of a training in the user's cache, by all that its outcome depends on: arrays, and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"\x1e")
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return cache.folder("students") / digest.hexdigest()[:24]


def measured(training: Callable[[], Log]) -> tuple[Log, float]:
    """Run a training; return its log and the kWh that it took, NaN where it went on from an earlier run's state."""
    with energy.energy() as used:
        log = training()
    return log, float("nan") if log.resumed else used.kwh


@begins
def start(params: Params) -> Study:
    """Check what can be checked at once, load the teacher, and open the record.

    Raises:
        ValueError: If no student has one of the shares, texts are longer than a student reads, or the recipe of a
            model has parts that are not known here.
    """
    from overparam.models.folder_recipe import check

    teacher, tokenizer = models.load(params.teacher, device=models.working_device())
    for name in (params.teacher, *params.ready_made, *params.general_models):
        if recipe := models.recipe(name):
            check(recipe)
    for share in params.shares:
        positions = distill.student_config(teacher, share).max_position_embeddings
        if params.max_length > positions:
            raise ValueError(
                f"max_length must be at most {positions}, the positions of a student of {share:g}, "
                f"got {params.max_length}"
            )
    keep_freed_memory()
    inputs = models.provenance(params.teacher) | corpora.provenance()
    others = (*params.general_models, *params.ready_made, params.decoder_teacher, params.decoder_student)
    for name in filter(None, others):
        inputs |= models.provenance(name)
    recorder = experiment.open_record(
        params,
        inputs=inputs,
    )
    study = Study(params, recorder, teacher, tokenizer)
    recorder.metric("teacher_parameters", study.parameters)
    assert study.width > 0  # known from here on without the teacher
    study.record_recipes()
    return study
