"""Local embedding tasks: real mteb tasks over packaged texts, which need no hub.

`size` is the maximum number of items per task: queries, texts to classify or cluster, verses, documents. Samples are
prefixes of one shuffled order, so a larger size contains a smaller one. The verse tasks share their verses, so that
these are embedded only once.

Verses and the Lee documents are whole. Reuters articles are cut to their first 160 characters (headline and opening
sentence) and newsgroup posts to 256, to save time on CPUs. All verses are of the test split; articles and posts that
also occur in their corpus' training part are left out.

The SHA-256 of a task's rows is its data set revision, so that a result identifies its texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from overparam.data import corpora
from overparam.evaluate import samples
from overparam.evaluate.local import Content, LocalRetrieval, LocalTask, describe, plain


class LeeSTS(LocalTask, AbsTaskSTS):  # type: ignore[misc]
    """Similarity of all pairs of up to 50 short news documents, against the mean human judgement."""

    metadata = describe(
        "LeeSTS",
        "STS",
        "cosine_spearman",
        "Similarity of the 1225 pairs of the Lee documents against human judgement.",
        "Retrieve semantically similar text.",
    )
    min_score, max_score = 0, 1

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        documents, similarities = corpora.lee()
        documents = [" ".join(document.split()) for document in documents]
        chosen = sorted(samples.shuffled(range(len(documents)), seed)[:size])
        pairs = [(i, j) for n, i in enumerate(chosen) for j in chosen[n + 1 :]]
        rows = {
            "sentence1": [documents[i] for i, _ in pairs],
            "sentence2": [documents[j] for _, j in pairs],
            "score": [float(similarities[i, j]) for i, j in pairs],
        }
        return Content({"test": rows}, plain(documents[i] for i in chosen))


class ReutersR8(LocalTask, AbsTaskClassification):  # type: ignore[misc]
    """Topic of a Reuters article, 8 classes; `size` test articles, as many of each class as there are."""

    metadata = describe(
        "ReutersR8",
        "Classification",
        "accuracy",
        "Topic of Reuters-21578 articles, 8 classes, test articles balanced over them.",
        "Classify the topic of the given news article.",
    )
    samples_per_label = samples.SAMPLES_PER_LABEL

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        return _classification("r8", size, seed)

    def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
        """Do the same as mteb, with labels in memory: otherwise each metric reads them from Arrow one by one."""
        return super()._calculate_scores(list(y_test), y_pred)


class ReutersR52(ReutersR8):
    """The same for 52 classes, without the 16 that have fewer than 8 different training articles."""

    metadata = describe(
        "ReutersR52",
        "Classification",
        "accuracy",
        "Topic of Reuters-21578 articles, the 36 of 52 classes with at least 8 training articles, balanced.",
        "Classify the topic of the given news article.",
    )

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        return _classification("r52", size, seed)


class NewsgroupsClustering(LocalTask, AbsTaskClustering):  # type: ignore[misc]
    """Clusters of `size` newsgroup posts, balanced over the 20 groups, against the groups.

    All posts are embedded, not mteb's default of 4 %; each of mteb's 10 experiments resamples them with replacement.
    """

    metadata = describe(
        "NewsgroupsClustering",
        "Clustering",
        "v_measure",
        "Clusters of 20 Newsgroups posts against the groups, balanced over them.",
        "Identify the topic of the given newsgroup post.",
    )
    max_fraction_of_documents_to_embed = None
    max_document_to_embed = None

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        posts = samples.newsgroups(size, seed)
        rows = {"sentences": posts.texts, "labels": posts.labels}
        return Content({"test": rows}, plain(posts.texts), {"max_documents_per_cluster": len(posts.texts)})


class VerseParaphrase(LocalRetrieval, AbsTaskRetrieval):  # type: ignore[misc]
    """Find each of `size` verses of the Bible in Basic English in the World English Bible.

    Three times as many verses are searched, among them the nearest neighbours of the correct ones.
    """

    metadata = describe(
        "VerseParaphrase",
        "Retrieval",
        "ndcg_at_10",
        "Retrieve the verse of the World English Bible that says what one in Basic English says.",
        {"query": "Given a Bible verse, retrieve the same verse in another translation."},
    )

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        pool = samples.verses(size, seed)
        return _retrieval(pool, pool.texts["bbe"], {verse: [verse] for verse in pool.aligned})


class VerseCrossReference(LocalRetrieval, AbsTaskRetrieval):  # type: ignore[misc]
    """Find the verses that editors linked to a verse, among those of `VerseParaphrase` except the verse itself.

    Queries are verses of the test split that are linked to another such verse: there are few, whatever the size.
    """

    metadata = describe(
        "VerseCrossReference",
        "Retrieval",
        "ndcg_at_10",
        "Retrieve the verses that human-made cross references link to a verse.",
        {"query": "Given a Bible verse, retrieve the verses that are related to it."},
    )
    ignore_identical_ids = True

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        pool = samples.verses(size, seed)
        return _retrieval(
            pool, pool.texts["web"], {v: pool.related[v] for v in pool.aligned if v in pool.related}
        )


class VerseFrench(LocalTask, AbsTaskBitextMining):  # type: ignore[misc]
    """Find the French verse (Segond 1910) for each of `size` English ones."""

    metadata = describe(
        "VerseFrench",
        "BitextMining",
        "f1",
        "Pair verses of the World English Bible with those of Louis Segond's French Bible.",
        "Retrieve parallel sentences.",
        "eng-Latn",
        "fra-Latn",
    )

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        return _bitext(size, seed, "lsg")


class VerseGerman(LocalTask, AbsTaskBitextMining):  # type: ignore[misc]
    """Find the German verse (Elberfelder 1905) for each of `size` English ones."""

    metadata = describe(
        "VerseGerman",
        "BitextMining",
        "f1",
        "Pair verses of the World English Bible with those of the German Elberfelder Bible.",
        "Retrieve parallel sentences.",
        "eng-Latn",
        "deu-Latn",
    )

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        return _bitext(size, seed, "elb")


class VersePairs(LocalTask, AbsTaskPairClassification):  # type: ignore[misc]
    """Distinguish two versions of a verse from two neighbouring verses; `size` verses are in one pair of each kind."""

    metadata = describe(
        "VersePairs",
        "PairClassification",
        "max_ap",
        "Is a verse of the World English Bible the given one in Basic English, or a neighbour of it?",
        "Retrieve parallel sentences.",
    )

    @staticmethod
    def _build(size: int, seed: int) -> Content:
        pool = samples.verses(size, seed)
        bbe, web = pool.texts["bbe"], pool.texts["web"]
        pairs = [(bbe[v], web[v], 1) for v in pool.aligned] + [
            (bbe[v], web[pool.neighbour[v]], 0) for v in pool.aligned
        ]
        first, second, labels = (list(column) for column in zip(*pairs, strict=True))
        rows = {"sentence1": first, "sentence2": second, "labels": labels}
        return Content({"test": rows}, plain([*first, *second]))


def _classification(which: str, size: int, seed: int) -> Content:
    train, test = samples.reuters(which, size, seed)
    names = sorted(set(train.labels))
    rows = {
        part: {"text": rows.texts, "label": [names.index(label) for label in rows.labels]}
        for part, rows in (("train", train), ("test", test))
    }
    # with 8 training articles per class, every draw of 8 is the same
    draws = samples.EXPERIMENTS if len(train.texts) > samples.SAMPLES_PER_LABEL * len(names) else 1
    return Content(rows, plain([*train.texts, *test.texts]), {"n_experiments": draws})


def _retrieval(pool: samples.Verses, queries: dict[str, str], relevant: dict[str, Sequence[str]]) -> Content:
    corpus = {verse: pool.texts["web"][verse] for verse in pool.searched}
    rows = {
        "corpus": {"id": list(corpus), "text": list(corpus.values())},
        "queries": {"id": list(relevant), "text": [queries[verse] for verse in relevant]},
        "relevant": {verse: list(ids) for verse, ids in relevant.items()},
    }
    sides = [(queries[verse], "query") for verse in relevant] + [
        (text, "document") for text in corpus.values()
    ]
    return Content(rows, tuple(sides))


def _bitext(size: int, seed: int, language: str) -> Content:
    pool = samples.verses(size, seed)
    english, other = ([pool.texts[version][verse] for verse in pool.aligned] for version in ("web", language))
    return Content({"test": {"sentence1": english, "sentence2": other}}, plain([*english, *other]))


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
