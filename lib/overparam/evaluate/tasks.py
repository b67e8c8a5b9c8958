"""Local embedding tasks: real mteb tasks over packaged texts, so that no hub is needed.

Sizes. `size` bounds what a task judges: queries, texts to classify or cluster, aligned verses, documents. Samples
are prefixes of one shuffled order, so that a larger size contains the smaller one. The verse tasks use the same
verses, so that an embedding pass which embeds each text once pays for them once.

Texts. Verses and the Lee documents are whole; Reuters articles are cut to their first 256 characters (headline and
opening sentence) and newsgroup posts to 384, at a word boundary, because time on a CPU is counted in tokens. All
verses are of the test split, and no article or post that also occurs in its corpus' training part is judged.

The SHA-256 of a task's rows is its data set revision, so that a result says which texts it is about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from overparam.data import corpora
from overparam.evaluate import samples

Side = str | None  # "query" or "document" in retrieval, None elsewhere


@dataclass(frozen=True)
class Content:
    """What a task holds: `rows` in plain Python by part, every text it encodes, and settings of the task class."""

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
        self.content = self.build(size, seed)
        dataset = {"path": "local", "revision": self.content.revision}
        self.metadata = type(self).metadata.model_copy(update={"dataset": dataset})  # type: ignore[misc]
        super().__init__(seed=seed)  # type: ignore[call-arg]
        for name, value in self.content.settings.items():
            setattr(self, name, value)

    @staticmethod
    def build(size: int, seed: int) -> Content:
        """Choose the task's texts."""
        raise NotImplementedError

    def texts(self) -> tuple[tuple[str, Side], ...]:
        """Every text that the task encodes, with its side."""
        return self.content.texts

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Build the data sets in the shape that mteb expects."""
        self.dataset: Any = DatasetDict({part: Dataset.from_dict(v) for part, v in self.content.rows.items()})
        self.data_loaded = True


class LocalRetrieval(LocalTask):
    """Retrieval whose rows are ids and texts of queries and corpus, and the relevant ids of each query."""

    k_values: ClassVar[Sequence[int]] = (1, 10, 20)

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
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


def _metadata(
    name: str, kind: str, metric: str, description: str, prompt: str | dict[str, str], *languages: str
) -> TaskMetadata:
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


class LeeSTS(LocalTask, AbsTaskSTS):
    """Similarity of every pair of 50 short news documents, against the mean human judgement."""

    metadata = _metadata(
        "LeeSTS",
        "STS",
        "cosine_spearman",
        "Similarity of the 1225 pairs of the Lee documents against human judgement.",
        "Retrieve semantically similar text.",
    )
    min_score, max_score = 0, 1

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` documents (there are 50) and all pairs of them."""
        documents, similarities = corpora.lee()
        documents = [" ".join(document.split()) for document in documents]
        chosen = sorted(samples.shuffled(range(len(documents)), seed)[:size])
        pairs = [(i, j) for n, i in enumerate(chosen) for j in chosen[n + 1 :]]
        rows = {
            "sentence1": [documents[i] for i, _ in pairs],
            "sentence2": [documents[j] for _, j in pairs],
            "score": [float(similarities[i, j]) for i, j in pairs],
        }
        return Content({"test": rows}, _plain(documents[i] for i in chosen))


class ReutersR8(LocalTask, AbsTaskClassification):
    """Topic of a Reuters article, 8 classes, judged on equally many articles of each class."""

    metadata = _metadata(
        "ReutersR8",
        "Classification",
        "accuracy",
        "Topic of Reuters-21578 articles, 8 classes, test articles balanced over them.",
        "Classify the topic of the given news article.",
    )
    samples_per_label = samples.SAMPLES_PER_LABEL

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` test articles, balanced over classes."""
        return _classification("r8", size, seed)

    def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
        """As mteb does, but with the labels in memory: each metric would read them from Arrow one by one."""
        return super()._calculate_scores(list(y_test), y_pred)


class ReutersR52(ReutersR8):
    """The same with 52 classes, without those that have fewer than 8 training articles (37 remain)."""

    metadata = _metadata(
        "ReutersR52",
        "Classification",
        "accuracy",
        "Topic of Reuters-21578 articles, the 37 of 52 classes with at least 8 training articles, balanced.",
        "Classify the topic of the given news article.",
    )

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` test articles, balanced over classes."""
        return _classification("r52", size, seed)


class NewsgroupsClustering(LocalTask, AbsTaskClustering):
    """Clusters of newsgroup posts against their 20 groups; all posts are embedded, not mteb's default of 4 %."""

    metadata = _metadata(
        "NewsgroupsClustering",
        "Clustering",
        "v_measure",
        "Clusters of 20 Newsgroups posts against the groups, balanced over them.",
        "Identify the topic of the given newsgroup post.",
    )
    max_fraction_of_documents_to_embed = None
    max_document_to_embed = None

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` posts, balanced over groups; each of mteb's 10 experiments redraws as many with replacement."""
        posts = samples.newsgroups(size, seed)
        rows = {"sentences": posts.texts, "labels": posts.labels}
        return Content({"test": rows}, _plain(posts.texts), {"max_documents_per_cluster": len(posts.texts)})


class VerseParaphrase(LocalRetrieval, AbsTaskRetrieval):
    """Find a verse of the Bible in Basic English in the World English Bible."""

    metadata = _metadata(
        "VerseParaphrase",
        "Retrieval",
        "ndcg_at_10",
        "Retrieve the verse of the World English Bible that says what one of the Bible in Basic English says.",
        {"query": "Given a Bible verse, retrieve the same verse in another translation."},
    )

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` queries and three times as many verses to search, same-chapter neighbours among them."""
        pool = samples.verses(size, seed)
        return _retrieval(pool, pool.texts["bbe"], {verse: [verse] for verse in pool.aligned})


class VerseCrossReference(LocalRetrieval, AbsTaskRetrieval):
    """Find the verses that people linked to a verse (one English version; the verse itself is left out)."""

    metadata = _metadata(
        "VerseCrossReference",
        "Retrieval",
        "ndcg_at_10",
        "Retrieve the verses that human-made cross references link to a verse.",
        {"query": "Given a Bible verse, retrieve the verses that are related to it."},
    )
    ignore_identical_ids = True

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take up to `size` queries: as many test verses as have a cross reference to another test verse."""
        pool = samples.verses(size, seed)
        return _retrieval(pool, pool.texts["web"], {v: pool.related[v] for v in pool.aligned if v in pool.related})


class VerseFrench(LocalTask, AbsTaskBitextMining):
    """Find the French verse (Segond 1910) for each English one."""

    metadata = _metadata(
        "VerseFrench",
        "BitextMining",
        "f1",
        "Pair verses of the World English Bible with those of Louis Segond's French Bible.",
        "Retrieve parallel sentences.",
        "eng-Latn",
        "fra-Latn",
    )

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` aligned verses."""
        return _bitext(size, seed, "lsg")


class VerseGerman(LocalTask, AbsTaskBitextMining):
    """Find the German verse (Elberfelder 1905) for each English one."""

    metadata = _metadata(
        "VerseGerman",
        "BitextMining",
        "f1",
        "Pair verses of the World English Bible with those of the German Elberfelder Bible.",
        "Retrieve parallel sentences.",
        "eng-Latn",
        "deu-Latn",
    )

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` aligned verses."""
        return _bitext(size, seed, "elb")


class VersePairs(LocalTask, AbsTaskPairClassification):
    """Tell two versions of a verse from two neighbouring verses of a chapter."""

    metadata = _metadata(
        "VersePairs",
        "PairClassification",
        "max_ap",
        "Is a verse of the World English Bible the given one of the Bible in Basic English, or a neighbour of it?",
        "Retrieve parallel sentences.",
    )

    @staticmethod
    @lru_cache(maxsize=4)
    def build(size: int, seed: int) -> Content:
        """Take `size` verses, each once with its paraphrase and once with a neighbour."""
        pool = samples.verses(size, seed)
        bbe, web = pool.texts["bbe"], pool.texts["web"]
        pairs = [(bbe[v], web[v], 1) for v in pool.aligned] + [
            (bbe[v], web[pool.neighbour[v]], 0) for v in pool.aligned
        ]
        first, second, labels = (list(column) for column in zip(*pairs, strict=True))
        rows = {"sentence1": first, "sentence2": second, "labels": labels}
        return Content({"test": rows}, _plain([*first, *second]))


def _plain(texts: Iterable[str]) -> tuple[tuple[str, Side], ...]:
    return tuple((text, None) for text in dict.fromkeys(texts))


def _classification(which: str, size: int, seed: int) -> Content:
    train, test = samples.reuters(which, size, seed)
    names = sorted(set(train.labels))
    rows = {
        part: {"text": rows.texts, "label": [names.index(label) for label in rows.labels]}
        for part, rows in (("train", train), ("test", test))
    }
    # with 8 training articles a class, every draw of 8 is the same
    draws = samples.EXPERIMENTS if len(train.texts) > samples.SAMPLES_PER_LABEL * len(names) else 1
    return Content(rows, _plain([*train.texts, *test.texts]), {"n_experiments": draws})


def _retrieval(pool: samples.Verses, queries: dict[str, str], relevant: dict[str, Sequence[str]]) -> Content:
    corpus = {verse: pool.texts["web"][verse] for verse in pool.searched}
    rows = {
        "corpus": {"id": list(corpus), "text": list(corpus.values())},
        "queries": {"id": list(relevant), "text": [queries[verse] for verse in relevant]},
        "relevant": {verse: list(ids) for verse, ids in relevant.items()},
    }
    sides = [(queries[verse], "query") for verse in relevant] + [(text, "document") for text in corpus.values()]
    return Content(rows, tuple(sides))


def _bitext(size: int, seed: int, language: str) -> Content:
    pool = samples.verses(size, seed)
    english, other = ([pool.texts[version][verse] for verse in pool.aligned] for version in ("web", language))
    return Content({"test": {"sentence1": english, "sentence2": other}}, _plain([*english, *other]))


TASKS: dict[str, type[LocalTask]] = {
    task.metadata.name: task
    for task in (
        LeeSTS,
        ReutersR8,
        ReutersR52,
        NewsgroupsClustering,
        VerseParaphrase,
        VerseCrossReference,
        VerseFrench,
        VerseGerman,
        VersePairs,
    )
}
