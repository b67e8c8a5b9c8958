"""Which texts a model may be trained on: decided by the text itself, never by its position in a list."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from overparam.assets import packages, unpack
from overparam.data import corpora
from overparam.data.corpora import LANGUAGES, Verse, known, normalise, verses
from overparam.support import cache

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_of(text: str, *, test: float = 0.1, validation: float = 0.05) -> Split:
    """Return the split of a text, by the SHA-256 of its normalised form: the same on every machine, in any order.

    Args:
        text: Texts that differ only in case, punctuation or spacing get the same split.
        test: Share of texts held out for tests.
        validation: Share of texts held out for choices made during training.

    Raises:
        ValueError: Shares are negative or leave nothing to train on.
    """
    if test < 0 or validation < 0 or test + validation >= 1:
        raise ValueError(f"test and validation must be >= 0 with a sum < 1, got {test} and {validation}")
    digest = hashlib.sha256(normalise(text).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


@functools.cache
def verse_splits(*, test: float = 0.1, validation: float = 0.05) -> Mapping[str, Split]:
    """Return the split of every verse, by id.

    A verse has the same split in all translations, and so have verses with equal text in any of them (parallel
    passages, "And the LORD spake unto Moses, saying"). Such verses form groups; the alphabetically first normalised
    text of a group decides its split (`split_of`). The result is kept in the cache directory, under a name that
    depends on the texts and on the code that splits them.
    """
    parts = [packages.hashes("bible"), test, validation]
    code = (unpack, corpora, sys.modules[__name__])
    return MappingProxyType(cache.values("verses", parts, code, lambda: _verse_splits(test, validation)))


def _verse_splits(test: float, validation: float) -> dict[str, Split]:
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        leader.setdefault(key, key)
        while leader[key] != key:
            leader[key] = key = leader[leader[key]]
        return key

    first: dict[str, str] = {}
    for translation in LANGUAGES:
        for verse in verses(translation):
            text = normalise(verse.text)
            one, other = find(verse.id), find(f"text {text}")
            leader[other] = one
            first[one] = min(first.get(one, text), first.get(other, text), text)
    ids = [key for key in leader if not key.startswith("text ")]
    split = {
        root: split_of(first[root], test=test, validation=validation) for root in {find(key) for key in ids}
    }
    return {key: split[find(key)] for key in ids}


def verses_in(translation: str, split: str) -> list[Verse]:
    """Return the verses of one translation in one split, in the order of the book."""
    splits = verse_splits()
    known(split, SPLITS, "split")
    return [verse for verse in verses(translation) if splits[verse.id] == split]
