"""Training triplets (query, positive, hard negative) made of the packaged texts, or read from published ones."""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from overparam.data.corpora import known, newsgroups, normalise, reuters, verses
from overparam.data.published import Triplet, cut, hub_triplets
from overparam.data.splits import SPLITS, split_of, verse_splits

__all__ = ["ENGLISH", "SOURCES", "Triplet", "cut", "hub_triplets", "triplets"]

SOURCES = ("paraphrase", "topic", "fr", "de")
ENGLISH = ("web", "kjv", "bbe")
_TARGET = {"fr": "lsg", "de": "elb"}


def triplets(
    n: int, *, sources: Sequence[str] = SOURCES, split: str = "train", seed: int = 42, max_chars: int = 256
) -> list[Triplet]:
    """Make `n` triplets, as many from each source (one more from the first ones when `n` does not divide).

    paraphrase: a verse in one English version, the same verse in another; negative: another verse of the same
    chapter in the positive's version. fr, de: a verse of the World English Bible, the same in French or German;
    negative: another verse of that chapter in that language. topic: two posts of one topic, 20 Newsgroups and
    Reuters by turns, topics by turns; negative: a post on another topic of the same collection.

    No normalised query occurs twice within a source, and no positive does, so that in-batch negatives of a
    single-source batch are not equal to a positive. The triplets are in random order except that the sources
    take turns: the first m are balanced too.

    Args:
        n: Number of triplets.
        sources: Some of `SOURCES`.
        split: "train", "validation" or "test"; no text of a triplet is, whole or cut to `max_chars`, in a test
            split unless `split` is "test", and likewise for the others.
        seed: Another seed gives other triplets; the same seed, the same ones.
        max_chars: Texts are cut at the last word that ends within so many characters.

    Raises:
        ValueError: Unknown source or split, or more triplets than the texts give.
    """
    known(split, SPLITS, "split")
    if n < 1 or not sources or max_chars < 1 or len(set(sources)) != len(sources):
        raise ValueError(
            "triplets needs n >= 1, max_chars >= 1 and at least one source, each named once, "
            f"got n={n}, max_chars={max_chars}, sources={tuple(sources)}"
        )
    made = []
    for position, source in enumerate(sources):
        known(source, SOURCES, "source of triplets")
        wanted = n // len(sources) + (position < n % len(sources))
        makers: dict[str, Callable[..., Iterator[Triplet]]] = {
            "paraphrase": _paraphrases,
            "topic": _topic_posts,
        }
        maker = makers.get(source, functools.partial(_translations, source=source))
        candidates = _unrepeated(maker(split, random.Random(f"{seed} {source}"), max_chars))
        found = list(itertools.islice(candidates, wanted))
        if len(found) < wanted:
            raise ValueError(
                f"{source!r} gives {len(found)} triplets in the {split} split, got n={n} over {len(sources)} "
                f"sources, which is {wanted} of it; ask for at most {len(found) * len(sources)}"
            )
        made.append(found)
    turns = itertools.zip_longest(*made)
    return [triplet for turn in turns for triplet in turn if triplet is not None]


def _unrepeated(candidates: Iterable[Triplet]) -> Iterator[Triplet]:
    queries: set[str] = set()
    positives: set[str] = set()
    for triplet in candidates:
        query, positive, negative = map(normalise, (triplet.query, triplet.positive, triplet.negative))
        if negative in (query, positive) or query in queries or positive in positives:
            continue
        queries.add(query)
        positives.add(positive)
        yield triplet


def _paraphrases(split: str, rng: random.Random, max_chars: int) -> Iterator[Triplet]:
    return _verse_triplets(
        "paraphrase", list(itertools.pairwise([*ENGLISH, ENGLISH[0]])), split, rng, max_chars
    )


def _translations(split: str, rng: random.Random, max_chars: int, *, source: str) -> Iterator[Triplet]:
    return _verse_triplets(source, [(ENGLISH[0], _TARGET[source])], split, rng, max_chars)


def _verse_triplets(
    source: str, pairs: list[tuple[str, str]], split: str, rng: random.Random, max_chars: int
) -> Iterator[Triplet]:
    """Go through all verses in random order, once for each pair of versions, each verse starting with another."""
    splits = verse_splits()
    versions = dict.fromkeys(version for pair in pairs for version in pair)
    texts = {version: {verse.id: verse.text for verse in verses(version)} for version in versions}
    held = _held_out(
        (text for each in texts.values() for id_, text in each.items() if splits[id_] != split), max_chars
    )
    shown = {
        version: {
            id_: short
            for id_, text in each.items()
            if splits[id_] == split and normalise(short := cut(text, max_chars)) not in held
        }
        for version, each in texts.items()
    }
    chapters: dict[tuple[str, str], list[str]] = defaultdict(list)
    for version, each in shown.items():
        for id_ in each:
            chapters[version, id_.rpartition(".")[0]].append(id_)
    ids = [id_ for id_ in splits if splits[id_] == split]
    start = {id_: rng.randrange(len(pairs)) for id_ in ids}
    for turn in range(len(pairs)):
        rng.shuffle(ids)
        for id_ in ids:
            asked, answered = pairs[(start[id_] + turn) % len(pairs)]
            if id_ not in shown[asked] or id_ not in shown[answered]:
                continue
            query, positive = shown[asked][id_], shown[answered][id_]
            same = {normalise(query), normalise(positive)}
            others = chapters[answered, id_.rpartition(".")[0]]
            negatives = (shown[answered][other] for other in rng.sample(others, len(others)) if other != id_)
            negative = next((text for text in negatives if normalise(text) not in same), None)
            if negative is not None:
                yield Triplet(query, positive, negative, source)


def _topic_posts(split: str, rng: random.Random, max_chars: int) -> Iterator[Triplet]:
    """Take 20 Newsgroups and Reuters by turns, and within each its topics by turns."""
    collections = [_posts("20newsgroups", split, max_chars), _posts("reuters-r52", split, max_chars)]
    orders = []
    for posts in collections:
        topics = sorted(topic for topic, each in posts.items() if len(each) > 1)
        rng.shuffle(topics)
        for topic in topics:
            rng.shuffle(posts[topic])
        turns = itertools.zip_longest(
            *([(topic, place) for place in range(len(posts[topic]))] for topic in topics)
        )
        orders.append([(posts, topics, *each) for turn in turns for each in turn if each is not None])
    for pair in itertools.zip_longest(*orders):
        for posts, topics, topic, place in (each for each in pair if each is not None):
            # The next post of a shuffled topic: a random partner, and each post is a positive once.
            query, positive = posts[topic][place], posts[topic][(place + 1) % len(posts[topic])]
            negative = rng.choice(posts[rng.choice([other for other in topics if other != topic])])
            yield Triplet(query, positive, negative, "topic")


@functools.cache
def _published(collection: str) -> dict[str, list[tuple[str, str]]]:
    """(topic, text) by split; validation is taken out of the published training split."""
    loaded = {
        part: newsgroups(part) if collection == "20newsgroups" else reuters("r52", part)
        for part in ("train", "test")
    }
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for part, table in loaded.items():
        names = table.features["label"].names
        for text, label in zip(table["text"], table["label"], strict=True):
            rows["test" if part == "test" else split_of(text, test=0.0)].append((names[label], text))
    return rows


def _posts(collection: str, split: str, max_chars: int) -> dict[str, list[str]]:
    """Distinct posts of one split by topic, without those that have two topics or read like a held-out one."""
    published = _published(collection)
    held = _held_out((text for part in SPLITS if part != split for _, text in published[part]), max_chars)
    topics: dict[str, set[str]] = defaultdict(set)
    for topic, text in published[split]:
        topics[normalise(cut(text, max_chars))].add(topic)
    posts: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for topic, text in published[split]:
        short = cut(text, max_chars)
        key = normalise(short)
        if key not in held and key not in seen and len(topics[key]) == 1:
            seen.add(key)
            posts[topic].append(short)
    return posts


def _held_out(texts: Iterable[str], max_chars: int) -> set[str]:
    """Texts of other splits as a reader of them would see them: whole (when they are not much longer), and cut."""
    return {normalise(shown) for text in texts for shown in (cut(text, max_chars), text[: 2 * max_chars])}
