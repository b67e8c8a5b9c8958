"""The texts of the local tasks: deterministic, nested samples of the packaged corpora."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from overparam.data import corpora, published, splits

if TYPE_CHECKING:
    from datasets import Dataset

ARTICLE_CHARACTERS = 160
POST_CHARACTERS = 256
SAMPLES_PER_LABEL = 8  # mteb's own setting
EXPERIMENTS = 5  # classifiers trained on different draws of the training texts; mteb's default is 10
SHORTEST_VERSE = 20  # characters, in every version used
VERSIONS = ("web", "bbe", "lsg", "elb")
SEARCHED = 3  # verses to search, per query verse


@dataclass(frozen=True)
class Labelled:
    """Texts with the names of their classes."""

    texts: list[str]
    labels: list[str]

    def take(self, chosen: Iterable[int]) -> Labelled:
        """The texts at the positions `chosen`, in that order."""
        chosen = list(chosen)
        return Labelled([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True)
class Verses:
    """Verses of the test split for all verse tasks.

    Attributes:
        aligned: Ids of the query verses, which all versions have.
        neighbour: For each of them, another verse of its chapter (of its book, if the chapter has none).
        related: For those with cross references, ids of verses linked in either direction.
        searched: Ids of the verses to search: all of the above, and others.
        texts: Version -> id -> text.
    """

    aligned: tuple[str, ...]
    neighbour: dict[str, str]
    related: dict[str, tuple[str, ...]]
    searched: tuple[str, ...]
    texts: dict[str, dict[str, str]]


def shuffled(items: Iterable[str] | Iterable[int], seed: int) -> list:  # type: ignore[type-arg]
    """Return the items in an order that depends only on `seed`; a prefix is a sample."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def balanced(labels: Sequence[str], seed: int) -> list[int]:
    """Return positions in an order in which every prefix has the classes as evenly as their sizes allow."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for i in shuffled(range(len(labels)), seed):
        by_label[labels[i]].append(i)
    turns = [(turn, label, i) for label, indices in by_label.items() for turn, i in enumerate(indices)]
    return [i for _, _, i in sorted(turns)]


def unseen(rows: Dataset, characters: int, seen: Iterable[str] = ()) -> Labelled:
    """Return texts cut to `characters` at a word boundary, without empty ones, repeats and those in `seen`."""
    known = set(seen)
    kept = Labelled([], [])
    for text, label in zip(rows["text"], rows["label"], strict=True):
        short = cut(text, characters)
        if short and short not in known:
            known.add(short)
            kept.texts.append(short)
            kept.labels.append(str(label))
    return kept


def cut(text: str, characters: int) -> str:
    """Collapse white space and return the first whole words, at most `characters` long; one long word is cut."""
    return published.cut(" ".join(text.split()), characters)


@lru_cache(maxsize=8)
def reuters(which: str, size: int, seed: int) -> tuple[Labelled, Labelled]:
    """Return training and test articles of Reuters-R8 or -R52, balanced over their classes.

    Classes with fewer than 8 training articles are left out (15 of the 52), as are test articles that also occur in
    the training part. The training part has 8 to 40 articles per class, growing with `size`.
    """
    train, test = _articles(which)
    counts = {label: train.labels.count(label) for label in set(train.labels)}
    kept = sorted(label for label, count in counts.items() if count >= SAMPLES_PER_LABEL)
    per_label = min(max(SAMPLES_PER_LABEL, size // len(kept)), SAMPLES_PER_LABEL * EXPERIMENTS)
    train = train.take(i for i in balanced(train.labels, seed) if train.labels[i] in kept)
    taken: dict[str, int] = defaultdict(int)
    pool = []
    for i, label in enumerate(train.labels):
        taken[label] += 1
        if taken[label] <= per_label:
            pool.append(i)
    judged = [i for i in balanced(test.labels, seed) if test.labels[i] in kept]
    return train.take(pool), test.take(judged[:size])


@lru_cache(maxsize=8)
def newsgroups(size: int, seed: int) -> Labelled:
    """Return test posts of 20 Newsgroups, balanced over the groups; none of them occurs in the training part."""
    posts = _posts()
    return posts.take(balanced(posts.labels, seed)[:size])


@lru_cache(maxsize=8)
def verses(size: int, seed: int) -> Verses:
    """Return up to `size` aligned verses; those with cross references come first, because they are few."""
    texts = _test_verses()
    order = shuffled(sorted(texts["web"], key=_place), seed)
    links: dict[str, set[str]] = defaultdict(set)
    for source, target in corpora.cross_references():
        if source != target and source in texts["web"] and target in texts["web"]:
            links[source].add(target)
            links[target].add(source)
    aligned = sorted(order, key=lambda verse: verse not in links)[:size]
    neighbour = {verse: _neighbour(verse, texts["web"]) for verse in aligned}
    related = {verse: tuple(sorted(links[verse], key=_place)) for verse in aligned if verse in links}
    searched = dict.fromkeys(
        [*aligned, *neighbour.values(), *(v for linked in related.values() for v in linked)]
    )
    for verse in order:
        if len(searched) >= SEARCHED * len(aligned):
            break
        searched[verse] = None
    return Verses(tuple(aligned), neighbour, related, tuple(searched), texts)


@lru_cache(maxsize=2)
def _articles(which: str) -> tuple[Labelled, Labelled]:
    train = unseen(corpora.reuters(which, "train"), ARTICLE_CHARACTERS)
    return train, unseen(corpora.reuters(which, "test"), ARTICLE_CHARACTERS, train.texts)


@lru_cache(maxsize=1)
def _posts() -> Labelled:
    seen = {cut(text, POST_CHARACTERS) for text in corpora.newsgroups("train")["text"]}
    return unseen(corpora.newsgroups("test"), POST_CHARACTERS, seen)


@lru_cache(maxsize=1)
def _test_verses() -> dict[str, dict[str, str]]:
    """Version -> id -> text, for test verses that all versions have and whose texts are unique."""
    versions = {name: {verse.id: verse.text for verse in splits.verses_in(name, "test")} for name in VERSIONS}
    kept: list[str] = []
    seen: set[str] = set()
    for verse in sorted(set.intersection(*(set(version) for version in versions.values())), key=_place):
        wordings = {version[verse] for version in versions.values()}
        if min(map(len, wordings)) >= SHORTEST_VERSE and not wordings & seen:
            seen |= wordings
            kept.append(verse)
    return {name: {verse: version[verse] for verse in kept} for name, version in versions.items()}


def _place(verse: str) -> tuple[int, ...]:
    return tuple(int(part) for part in verse.split("."))


def _neighbour(verse: str, candidates: Iterable[str]) -> str:
    """The nearest other verse: same book and chapter first, then by distance."""
    book, chapter, number = _place(verse)

    def distance(other: str) -> tuple[int, ...]:
        b, c, n = _place(other)
        return abs(b - book), abs(c - chapter), abs(n - number)

    return min((other for other in candidates if other != verse), key=distance)
