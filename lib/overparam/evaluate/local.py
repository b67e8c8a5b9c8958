"""The base of local mteb tasks: their data sets are built here, from the packaged texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from mteb.abstasks.task_metadata import TaskMetadata

Side = str | None  # "query" or "document" in retrieval, None elsewhere


@dataclass(frozen=True)
class Content:
    """The content of a task: plain rows by part, all texts that it encodes, and settings of the task's class."""

    rows: dict[str, Any]
    texts: tuple[tuple[str, Side], ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> str:
        """SHA-256 of the rows and settings: the identity of the data."""
        return hashlib.sha256(json.dumps([self.rows, self.settings]).encode()).hexdigest()


class LocalTask:
    """Mixin that gives an mteb task its content instead of a hub data set."""

    metadata: ClassVar[TaskMetadata]

    def __init__(self, size: int, seed: int = 42) -> None:
        self.content = _content(type(self)._build, size, seed)
        dataset = {"path": "local", "revision": self.content.revision}
        self.metadata = type(self).metadata.model_copy(update={"dataset": dataset})  # type: ignore[misc]
        super().__init__(seed=seed)  # type: ignore[call-arg]
        for name, value in self.content.settings.items():
            setattr(self, name, value)

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        raise NotImplementedError

    def texts(self) -> tuple[tuple[str, Side], ...]:
        """All texts that the task encodes, with their sides."""
        return self.content.texts

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002
        """Build the data sets in the shape that mteb expects."""
        self.dataset: Any = DatasetDict({part: Dataset.from_dict(v) for part, v in self.content.rows.items()})
        self.data_loaded = True


class LocalRetrieval(LocalTask):
    """Retrieval tasks; rows are ids and texts of queries and corpus, and the relevant ids of each query."""

    k_values: ClassVar[Sequence[int]] = (1, 10, 20)

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002
        """Build the nested shape of mteb's retrieval tasks."""
        rows = self.content.rows
        part = {
            "corpus": Dataset.from_dict(rows["corpus"]),
            "queries": Dataset.from_dict(rows["queries"]),
            "relevant_docs": {query: dict.fromkeys(ids, 1) for query, ids in rows["relevant"].items()},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": part}}
        self.data_loaded = True


def describe(
    name: str, kind: str, metric: str, description: str, prompt: str | dict[str, str], *languages: str
) -> TaskMetadata:
    """Return mteb's metadata of a local task."""
    return TaskMetadata(
        name=name,
        description=description,
        type=kind,
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        eval_splits=["test"],
        eval_langs=list(languages) or ["eng-Latn"],
        main_score=metric,
        prompt=prompt,
        dataset={"path": "local", "revision": "unset"},
    )


def plain(texts: Iterable[str]) -> tuple[tuple[str, Side], ...]:
    """Return the texts of a task without sides, each once."""
    return tuple((text, None) for text in dict.fromkeys(texts))


@lru_cache(maxsize=64)
def _content(build: Callable[[int, int], Content], size: int, seed: int) -> Content:
    return build(size, seed)
