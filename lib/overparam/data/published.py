"""Published training triplets, read from a local folder or the hub, and the type of all triplets."""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from overparam.data import instructions
from overparam.data.corpora import hub, known


@dataclass(frozen=True)
class Triplet:
    """A query, a text that matches it, a text that only seems to match, and their source.

    The instructions are put before the query, and before both documents, by recipes that use instructions.
    """

    query: str
    positive: str
    negative: str
    source: str
    query_instruction: str | None = None
    document_instruction: str | None = None


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
    draw: Literal["balanced", "proportional"] = "balanced",
    group: int = 1,
) -> list[Triplet]:
    """Read published triplets: columns or keys `query`, `positive`, `negative` (of a list, the first text is used).

    Each data set is used once: if it exists both whole and in parts (``allnli`` next to ``allnli_split1`` and
    ``allnli_split2``), the parts are left out; otherwise the parts together are one source.

    Args:
        path: A folder of ``.jsonl`` files, one per source (the layout of echo-data, on which L3Prune trains), one such
            file, or a data set of the hub; its column `source`, if there is one, is kept.
        n: Number of triplets; None for all.
        name: Configuration on the hub.
        split: Split on the hub.
        revision: Commit on the hub.
        sources: File names or values of `source` to use; None for all.
        seed: Seed of the draw of `n` triplets.
        max_chars: Maximum characters per text; longer texts are cut.
        draw: ``balanced`` draws equally from each source as far as possible; ``proportional`` draws at random from all
            triplets together, as the published code does, so that large sources give more.
        group: For a proportional draw: triplets are drawn in groups of this size from one source, such as the batches
            of a training; the incomplete last group of a source is never drawn.

    Raises:
        ValueError: A line or row lacks one of the three texts (the message names it), a source is unknown, a data set
            is requested twice, or `n` is too large or not a multiple of `group`.
        RuntimeError: The data set could not be reached and is not in the cache.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1 or None, got {n}")
    local = Path(path).exists()
    rows = _local_rows(Path(path)) if local else _hub_rows(str(path), name, split, revision)
    for source in sources or ():
        known(source, sorted(rows), "source of triplets")
    chosen = _each_once(rows, sources)
    sizes = {source: sum(len(part) for part in parts.values()) for source, parts in chosen.items()}
    turns = (
        _balanced(sizes, n, str(path))
        if draw == "balanced"
        else _proportional(sizes, n, group, seed, str(path))
    )
    left = {
        source: iter(random.Random(f"{seed} {source}").sample(range(sizes[source]), turns.count(source)))
        for source in chosen
    }
    return [_take(chosen[source], next(left[source]), source, max_chars) for source in turns]


def _each_once(rows: Mapping[str, _Part], sources: Sequence[str] | None) -> dict[str, dict[str, _Part]]:
    """The parts of each data set by its name, without parts if the whole is there."""
    chosen: dict[str, dict[str, _Part]] = defaultdict(dict)
    names = sources or sorted(rows)
    for source in names:
        whole, number = instructions.part_of(source)
        if number is not None and whole in names:
            if sources:
                raise ValueError(
                    f"sources names {whole!r} and its part {source!r}, whose triplets would count twice"
                )
            continue
        chosen[whole][source] = rows[source]
    return dict(sorted(chosen.items())) if sources is None else dict(chosen)


def _balanced(sizes: Mapping[str, int], n: int | None, path: str) -> list[str]:
    """Sources in turns, in equal shares; larger sources make up for small ones."""
    wanted = _wanted(sizes, n, path)
    shares: dict[str, int] = {}
    for position, source in enumerate(sorted(sizes, key=lambda source: (sizes[source], source))):
        shares[source] = min(sizes[source], wanted // (len(sizes) - position))
        wanted -= shares[source]
    turns = itertools.zip_longest(*([source] * shares[source] for source in sizes))
    return [source for turn in turns for source in turn if source is not None]


def _proportional(sizes: Mapping[str, int], n: int | None, group: int, seed: int, path: str) -> list[str]:
    """Sources of whole groups that are drawn at random from all sources together, group after group."""
    whole = {source: size // group for source, size in sizes.items()}
    wanted = _wanted({source: group * count for source, count in whole.items()}, n, path)
    if wanted % group:
        raise ValueError(f"n must be a multiple of the group of {group} triplets, got {n}")
    ends = list(itertools.accumulate(whole.values()))
    picks = random.Random(f"{seed} draw").sample(range(ends[-1]), wanted // group)
    names = list(whole)
    return [names[bisect.bisect_right(ends, pick)] for pick in picks for _ in range(group)]


def _wanted(sizes: Mapping[str, int], n: int | None, path: str) -> int:
    total = sum(sizes.values())
    wanted = total if n is None else n
    if wanted > total or not total:
        raise ValueError(f"{path} holds {total} triplets in {len(sizes)} sources, got n={n}")
    return wanted


def _take(parts: Mapping[str, _Part], index: int, source: str, max_chars: int | None) -> Triplet:
    """One triplet of a data set, by an index over all its parts."""
    for part, rows in parts.items():
        if index < len(rows):
            query, positive, negative = rows.texts(index, max_chars)
            return Triplet(query, positive, negative, source, *instructions.published(part, index))
        index -= len(rows)
    raise IndexError(index)


def cut(text: str, max_chars: int) -> str:
    """Shorten a text to `max_chars` characters at a word boundary; a single longer word is cut."""
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return head.rstrip() if space and head.strip() else text[:max_chars]


class _Part(Protocol):
    """Triplets of one file, or of one value of the column `source`."""

    def __len__(self) -> int: ...

    def texts(self, index: int, max_chars: int | None) -> tuple[str, str, str]:
        """Query, positive and negative of a line or row."""


@dataclass(frozen=True)
class _File:
    """A jsonl file by the offsets of its lines, so that millions of lines need not be in memory."""

    path: Path
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.offsets)

    def texts(self, index: int, max_chars: int | None) -> tuple[str, str, str]:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        where = f"{self.path}, byte {self.offsets[index]}"
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise ValueError(f"{where}: not a line of JSON: {problem}") from problem
        return _texts(row, where, max_chars)


@dataclass(frozen=True)
class _Rows:
    """Rows of a data set."""

    table: Any
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, index: int, max_chars: int | None) -> tuple[str, str, str]:
        return _texts(self.table[self.rows[index]], f"row {self.rows[index]}", max_chars)


def _texts(row: Any, where: str, max_chars: int | None) -> tuple[str, str, str]:
    texts = []
    for key in ("query", "positive", "negative"):
        text = row.get(key) if isinstance(row, dict) else None
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a triplet needs a text under {key!r}, got {text!r}")
        texts.append(text.strip() if max_chars is None else cut(text.strip(), max_chars))
    query, positive, negative = texts
    return query, positive, negative


def _local_rows(path: Path) -> Mapping[str, _Part]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .jsonl file; expected one per source")
    return {file.stem: _File(file, _offsets(file)) for file in files}


def _offsets(path: Path) -> list[int]:
    offsets, place = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(place)
            place += len(line)
    return offsets


def _hub_rows(path: str, name: str | None, split: str, revision: str | None) -> Mapping[str, _Part]:
    table = hub(path, name, split=split, revision=revision)
    if "source" not in table.column_names:
        return {name or path: _Rows(table, list(range(len(table))))}
    rows: dict[str, list[int]] = defaultdict(list)
    for index, source in enumerate(table["source"]):
        rows[str(source)].append(index)
    return {source: _Rows(table, each) for source, each in rows.items()}
