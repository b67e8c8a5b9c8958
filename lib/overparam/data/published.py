"""Published training triplets, read from a local folder or the hub, and the type that all triplets have."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overparam.data.corpora import hub, known


@dataclass(frozen=True)
class Triplet:
    """A query, a text that belongs with it, a text that looks as if it did, and where they come from."""

    query: str
    positive: str
    negative: str
    source: str


def hub_triplets(
    path: str | Path,
    n: int | None = None,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    sources: Sequence[str] | None = None,
    seed: int = 42,
    max_chars: int | None = None,
) -> list[Triplet]:
    """Read published triplets: columns or keys `query`, `positive`, `negative` (a list gives its first text).

    Args:
        path: A folder of ``.jsonl`` files, one a source (the layout of echo-data, on which L3Prune trains),
            one such file, or a data set of the hub, whose column `source`, when it has one, is kept.
        n: Number of triplets, balanced over the sources as far as they go; all when None.
        name: Configuration on the hub.
        split: Split on the hub.
        revision: Commit on the hub.
        sources: Names of files or values of `source` to use; all when None.
        seed: Chooses which triplets are taken when `n` is given.
        max_chars: Texts are cut to it when given.

    Raises:
        ValueError: A line or row without the three texts (named), an unknown source, or `n` too large.
        RuntimeError: The data set could be neither reached nor found in the cache.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1 or None, got {n}")
    rows: Mapping[str, _File | _Rows]
    local = Path(path).exists()
    rows = _local_rows(Path(path)) if local else _hub_rows(str(path), name, split, revision)
    for source in sources or ():
        known(source, sorted(rows), "source of triplets")
    chosen = {source: rows[source] for source in (sources or sorted(rows))}
    shares = _shares({source: len(each) for source, each in chosen.items()}, n, str(path))
    made = []
    for source, each in chosen.items():
        picks = random.Random(f"{seed} {source}").sample(range(len(each)), shares[source])
        made.append([each.triplet(index, source, max_chars) for index in picks])
    return [triplet for turn in itertools.zip_longest(*made) for triplet in turn if triplet is not None]


def _shares(sizes: Mapping[str, int], n: int | None, path: str) -> dict[str, int]:
    """How many of each source make `n`: equal shares; what small sources lack is taken from larger ones."""
    total = sum(sizes.values())
    wanted = total if n is None else n
    if wanted > total or not total:
        raise ValueError(f"{path} holds {total} triplets in {len(sizes)} sources, got n={n}")
    shares: dict[str, int] = {}
    for position, source in enumerate(sorted(sizes, key=lambda source: (sizes[source], source))):
        shares[source] = min(sizes[source], wanted // (len(sizes) - position))
        wanted -= shares[source]
    return shares


def cut(text: str, max_chars: int) -> str:
    """Shorten a text to `max_chars` characters at a word boundary; only a word that is longer is broken."""
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return head.rstrip() if space and head.strip() else text[:max_chars]


@dataclass(frozen=True)
class _File:
    """A jsonl file by the places of its lines, so that millions of lines need not be held in memory."""

    path: Path
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.offsets)

    def triplet(self, index: int, source: str, max_chars: int | None) -> Triplet:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        where = f"{self.path}, byte {self.offsets[index]}"
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise ValueError(f"{where}: not a line of JSON: {problem}") from problem
        return _triplet(row, where, source, max_chars)


@dataclass(frozen=True)
class _Rows:
    """Rows of a data set."""

    table: Any
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def triplet(self, index: int, source: str, max_chars: int | None) -> Triplet:
        return _triplet(self.table[self.rows[index]], f"row {self.rows[index]}", source, max_chars)


def _triplet(row: Any, where: str, source: str, max_chars: int | None) -> Triplet:
    texts = []
    for key in ("query", "positive", "negative"):
        text = row.get(key) if isinstance(row, dict) else None
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a triplet needs a text under {key!r}, got {text!r}")
        texts.append(text.strip() if max_chars is None else cut(text.strip(), max_chars))
    query, positive, negative = texts
    return Triplet(query, positive, negative, source)


def _local_rows(path: Path) -> Mapping[str, _File]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .jsonl file; one a source is expected")
    return {file.stem: _File(file, _offsets(file)) for file in files}


def _offsets(path: Path) -> list[int]:
    offsets, place = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(place)
            place += len(line)
    return offsets


def _hub_rows(path: str, name: str | None, split: str, revision: str | None) -> Mapping[str, _Rows]:
    table = hub(path, name, split=split, revision=revision)
    if "source" not in table.column_names:
        return {name or path: _Rows(table, list(range(len(table))))}
    rows: dict[str, list[int]] = defaultdict(list)
    for index, source in enumerate(table["source"]):
        rows[str(source)].append(index)
    return {source: _Rows(table, each) for source, each in rows.items()}
