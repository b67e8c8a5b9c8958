"""An encoder: what it scores on embedding tasks, and how far its embeddings move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from overparam.evaluate import embedding
from overparam.experiment.costs import Call
from overparam.experiment.subjects.base import Array, Outputs, Scores, Subject, System
from overparam.support import progress


@dataclass
class Encoder(Subject):
    """An encoder, whose quality is its mean score on embedding tasks, in points.

    Attributes:
        embed: Gives the embeddings of texts by a run, float32 [texts, width].
        tasks: Of `embedding.evaluate`.
        max_items: Items per task.
        seed: Chooses the tasks' texts.
        unit_length: Whether `embed` gives vectors of unit length.
    """

    embed: Callable[[Any, list[str]], NDArray[np.float32]]
    tasks: Sequence[str]
    max_items: int
    seed: int
    unit_length: bool = False

    task: ClassVar[str] = "suite"
    scale: ClassVar[float] = 100.0
    metric: ClassVar[str] = "the mean score of the embedding suite"
    main_call: ClassVar[str] = "batch"  # of `calls`: what it is meant for
    call_names: ClassVar = {"single": "one text", "batch": "{} texts"}

    def scored(self, run: Any) -> Scores:
        """Score a run on every task."""
        return self.score([System.ready("", run)])[0]

    def score(self, systems: Sequence[System]) -> Sequence[Scores]:
        """Score each system on every task; vectors of different width are filled up with zeros."""

        def embed(texts: list[str], instruction: str | None = None) -> NDArray[np.float32]:  # noqa: ARG001
            vectors = []
            for system in progress.track(systems, "embedding the suite"):
                with system.opened() as run:
                    vectors.append(self.embed(run, texts))
            width = max(each.shape[1] for each in vectors)  # zeros change no cosine and no distance
            return np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in vectors], axis=1)

        return self._evaluated(embed, len(systems))

    def floor(self) -> Scores:
        """Score hashed bags of words, which need no model."""
        return self._evaluated(embedding.bag_of_words, 1)[0]

    def _evaluated(self, embed: embedding.Embed, views: int) -> list[dict[str, embedding.TaskScore]]:
        scores: list[dict[str, embedding.TaskScore]] = [{} for _ in range(views)]
        for each in embedding.evaluate(embed, self.tasks, max_items=self.max_items, seed=self.seed):
            scores[each.view][each.task] = each
        return scores

    def outputs(self, run: Any, texts: list[str]) -> Outputs:
        """Return the embedding of each text at unit length, [width]."""
        vectors = self.embed(run, texts)
        if self.unit_length:
            return list(vectors)
        return list(np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32))

    @staticmethod
    def divergence(base: Outputs, other: Outputs) -> Array:
        """Return 1 − cosine between `outputs`, [texts]."""
        return np.array([1 - float(a @ b) for a, b in zip(base, other, strict=True)])

    def calls(self, run: Any, texts: list[str]) -> dict[str, Call]:
        """Return what is timed: to embed one text, and all of them."""
        return {"single": lambda: self.embed(run, texts[:1]), "batch": lambda: self.embed(run, texts)}
