"""Training triplets (query, positive, hard negative) from the packaged texts."""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from overparam.data import instructions
from overparam.data.corpora import known, normalise, topic_rows, verses
from overparam.data.published import Triplet, cut, hub_triplets
from overparam.data.splits import SPLITS, split_of, verse_splits

__all__ = ["SOURCES", "Triplet", "cut", "hub_triplets", "triplets"]

SOURCES = ("paraphrase", "topic", "fr", "de")
_VERSIONS = {  # of the query, of the positive
    "paraphrase": [("web", "kjv"), ("kjv", "bbe"), ("bbe", "web")],
    "fr": [("web", "lsg")],
    "de": [("web", "elb")],
}


def triplets(
    n: int, *, sources: Sequence[str] = SOURCES, split: str = "train", seed: int = 42, max_chars: int = 256
) -> list[Triplet]:
    """Make `n` triplets, the same number from each source (one more from the first ones if `n` is not divisible).

    - paraphrase: a verse in one English version and the same verse in another; the negative is another verse of the
      same chapter in the positive's version.
    - fr, de: a verse of the World English Bible and the same verse in French or German; the negative is another verse
      of that chapter in that language.
    - topic: two posts on one topic, from 20 Newsgroups and Reuters in turns, and from their topics in turns; the
      negative is a post on another topic of the same collection.

    Within a source no normalised query occurs twice, and no positive does, so that in a single-source batch no
    in-batch negative equals the positive. Sources take turns, so the first m triplets are balanced too.

    Args:
        n: Number of triplets.
        sources: Some of `SOURCES`.
        split: "train", "validation" or "test": no text of a triplet occurs in another split, neither whole nor cut to
            `max_chars`.
        seed: Seed of the draw.
        max_chars: Texts are cut at the last word that ends within this number of characters.

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
        rng = random.Random(f"{seed} {source}")
        if source == "topic":
            candidates = _topic_posts(split, rng, max_chars)
        else:
            candidates = _verse_triplets(source, _VERSIONS[source], split, rng, max_chars)
        drawn = list(itertools.islice(_unrepeated(candidates), wanted))
        if len(drawn) < wanted:
            raise ValueError(
                f"{source!r} gives {len(drawn)} triplets in the {split} split, but n={n} over {len(sources)} "
                f"sources needs {wanted} from it; use n of at most {len(drawn) * len(sources)}"
            )
        made.append(drawn)
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


def _verse_triplets(
    source: str, pairs: list[tuple[str, str]], split: str, rng: random.Random, max_chars: int
) -> Iterator[Triplet]:
    """Go through the verses in random order, once for each pair of versions, starting with any pair."""
    splits = verse_splits()
    shown = {version: _shown(version, split, max_chars) for version in itertools.chain(*pairs)}
    chapters: dict[tuple[str, str], list[str]] = defaultdict(list)
    for version, texts in shown.items():
        for id_ in texts:
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
                yield Triplet(query, positive, negative, source, *instructions.packaged(source))


@functools.lru_cache(maxsize=16)
def _shown(version: str, split: str, max_chars: int) -> dict[str, str]:
    """The cut verses of one version and split by id, without those that normalise to a held-out one."""
    held = _held_out_verses(split, max_chars)
    splits = verse_splits()
    mine = ((verse.id, cut(verse.text, max_chars)) for verse in verses(version) if splits[verse.id] == split)
    return {id_: text for id_, text in mine if normalise(text) not in held}


@functools.lru_cache(maxsize=4)
def _held_out_verses(split: str, max_chars: int) -> set[str]:
    splits = verse_splits()
    versions = dict.fromkeys(itertools.chain(*itertools.chain(*_VERSIONS.values())))
    every = (verse for version in versions for verse in verses(version))
    return _held_out((verse.text for verse in every if splits[verse.id] != split), max_chars)


def _topic_posts(split: str, rng: random.Random, max_chars: int) -> Iterator[Triplet]:
    """Go through 20 Newsgroups and Reuters in turns, and within each through its topics in turns."""
    pools = [_posts(collection, split, max_chars) for collection in ("20newsgroups", "reuters-r52")]
    collections = [{topic: list(each) for topic, each in pool.items()} for pool in pools]
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
            # The next post of a shuffled topic is a random partner, and each post is a positive once.
            query, positive = posts[topic][place], posts[topic][(place + 1) % len(posts[topic])]
            negative = rng.choice(posts[rng.choice([other for other in topics if other != topic])])
            yield Triplet(query, positive, negative, "topic", *instructions.packaged("topic"))


@functools.cache
def _published(collection: str) -> dict[str, list[tuple[str, str]]]:
    """(topic, text) by split; the validation split is a part of the published training split."""
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for row in topic_rows(collection, "train"):
        rows[split_of(row[1], test=0.0)].append(row)
    rows["test"] = list(topic_rows(collection, "test"))
    return rows


@functools.lru_cache(maxsize=8)
def _posts(collection: str, split: str, max_chars: int) -> dict[str, list[str]]:
    """Distinct posts of a split by topic, without those that have two topics or normalise to a held-out one."""
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
    """Normalised texts of other splits in the forms that may occur: cut, and whole unless they are much longer."""
    return {normalise(shown) for text in texts for shown in {cut(text, max_chars), text[: 2 * max_chars]}}
