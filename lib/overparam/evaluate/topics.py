"""Text classification tasks: topics of packaged texts, and GLUE from the hub. Parts of a task share no texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overparam.data import corpora
from overparam.data.corpora import known
from overparam.evaluate import GLUE_TASKS, TOPIC_TASKS, samples

if TYPE_CHECKING:
    from datasets import Dataset

_GLUE = {  # task of GLUE (Wang et al. 2018) -> columns of its texts, and the split with public labels
    "cola": (("sentence",), "validation"),
    "sst2": (("sentence",), "validation"),
    "mrpc": (("sentence1", "sentence2"), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
    "qnli": (("question", "sentence"), "validation"),
    "rte": (("sentence1", "sentence2"), "validation"),
}
FEWEST = 8  # minimum training texts per class


@dataclass(frozen=True)
class Topics:
    """One task.

    Attributes:
        name: One of `TOPIC_TASKS`.
        classes: Names of the topics, by number.
        texts: Labelled training texts.
        labels: Their topics. int64 [texts]
        unlabelled: Further texts of the training part, without labels.
        test_texts: Texts of the published test part.
        test_labels: Their topics. int64 [test texts]
    """

    name: str
    classes: tuple[str, ...]
    texts: list[str]
    labels: NDArray[np.int64]
    unlabelled: list[str]
    test_texts: list[str]
    test_labels: NDArray[np.int64]


def topics(
    name: str,
    *,
    labelled: int | None = None,
    unlabelled: int = 0,
    test_items: int | None = None,
    characters: int = 256,
    seed: int = 42,
) -> Topics:
    """Return a task whose texts are the beginnings of articles or posts; its parts share no texts.

    Classes have their frequencies of the corpus, but at least eight labelled texts each (15 of the 52 topics of
    ReutersR52 have fewer and are left out).

    Args:
        name: One of `TOPIC_TASKS` or `GLUE_TASKS`; the texts of a pair are joined by ``[SEP]``, which tokenizers of
            BERT's kind read as their separator.
        labelled: Number of labelled training texts; None for all.
        unlabelled: Maximum number of further training texts without labels.
        test_items: Number of test texts; None for all.
        characters: Maximum characters per text.
        seed: Chooses the texts; a smaller number gives the first texts of a larger one.

    Raises:
        ValueError: Unknown name, or fewer than eight labelled texts per class.
        RuntimeError: A task of the hub could not be reached and is not in the cache.
    """
    train, test = _parts(known(name, (*TOPIC_TASKS, *GLUE_TASKS), "task"), characters)
    counts = {label: train.labels.count(label) for label in set(train.labels)}
    classes = tuple(sorted(label for label, count in counts.items() if count >= FEWEST))
    order = [i for i in samples.shuffled(range(len(train.texts)), seed) if train.labels[i] in classes]
    taken = dict.fromkeys(classes, 0)
    first: list[int] = []
    rest: list[int] = []  # the first eight of each class, then all others in order
    for i in order:
        taken[train.labels[i]] += 1
        (first if taken[train.labels[i]] <= FEWEST else rest).append(i)
    size = len(order) if labelled is None else labelled
    if size < len(first):
        raise ValueError(
            f"{name} needs at least {len(first)} labelled texts, {FEWEST} for each of {len(classes)} classes, "
            f"got {size}"
        )
    chosen = [*first, *rest][:size]
    test_rows = [i for i in samples.shuffled(range(len(test.texts)), seed) if test.labels[i] in classes]
    learn, judge = train.take(chosen), test.take(test_rows[:test_items])
    return Topics(
        name,
        classes,
        learn.texts,
        _numbers(learn.labels, classes),
        train.take([*first, *rest][size : size + unlabelled]).texts,
        judge.texts,
        _numbers(judge.labels, classes),
    )


def _parts(name: str, characters: int) -> tuple[samples.Labelled, samples.Labelled]:
    """Training and test texts; a test text that is also a training text, once cut, is left out."""
    parts = [_rows(name, part) for part in ("train", "test")]
    train = samples.unseen(parts[0], characters)
    test = samples.unseen(parts[1], characters, train.texts)
    names = parts[0].features["label"].names
    return _named(train, names), _named(test, names)


def _rows(name: str, part: str) -> Dataset:
    from datasets import Dataset, Features, Value

    if name.startswith("glue/"):
        columns, labelled_split = _GLUE[name.removeprefix("glue/")]
        split = "train" if part == "train" else labelled_split
        rows = corpora.hub("nyu-mll/glue", name.removeprefix("glue/"), split=split)
        texts = [" [SEP] ".join(parts) for parts in zip(*(rows[column] for column in columns), strict=True)]
        features = Features({"text": Value("string"), "label": rows.features["label"]})
        return Dataset.from_dict({"text": texts, "label": rows["label"]}, features=features)
    if name == "Newsgroups":
        return corpora.newsgroups(part)
    return corpora.reuters(name.removeprefix("Reuters").lower(), part)


def _named(labelled: samples.Labelled, names: list[str]) -> samples.Labelled:
    return samples.Labelled(labelled.texts, [names[int(label)] for label in labelled.labels])


def _numbers(labels: list[str], classes: tuple[str, ...]) -> NDArray[np.int64]:
    number = {label: index for index, label in enumerate(classes)}
    return np.array([number[label] for label in labels], dtype=np.int64)
