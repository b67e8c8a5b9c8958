import os
import subprocess
import sys
import time

import numpy as np
import pytest

from overparam.support import cache
from overparam.support.files import write_atomic


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path))
    monkeypatch.delenv("OVERPARAM_CACHE_LIMIT_GB", raising=False)
    return tmp_path


def keep(kind, key, size, age=0.0):
    path = cache.folder(kind) / key
    with cache.using(path), cache.making(path) as new:
        (new / "data").write_bytes(b"x" * size)
    for each in (path / "data", path):
        os.utime(each, (time.time() - age,) * 2)
    return path


def test_a_step_is_there_whole_or_not_at_all(folder):
    path = cache.folder("adapters") / "k"
    with pytest.raises(FileNotFoundError), cache.making(path) as new:
        (new / "half").write_bytes((new / "none").read_bytes())
    assert list(path.parent.iterdir()) == []
    assert keep("adapters", "k", 3).joinpath("data").read_bytes() == b"xxx"


def test_the_least_recently_used_go_first_when_the_limit_is_passed(folder, monkeypatch):
    old, used, new = (keep("adapters", name, 400, age) for name, age in (("a", 300), ("b", 200), ("c", 100)))
    with cache.using(old):  # makes it the newest
        pass
    monkeypatch.setenv("OVERPARAM_CACHE_LIMIT_GB", "1e-6")
    assert [entry.paths[0].name for entry in cache.trim()] == ["b"]
    assert (old.exists(), used.exists(), new.exists()) == (True, False, True)
    keep("students", "d", 500)  # what is made now stays, and makes room for itself
    assert sorted(entry.paths[0].name for entry in cache.entries()) == ["a", "d"]


def test_what_belongs_to_one_step_goes_together(folder):
    path = keep("training", "k", 10, 50)
    curve = cache.folder("training") / "k.curve.json"
    write_atomic(curve, b"{}")
    (entry,) = cache.entries()
    assert entry.paths == (path, curve)
    assert entry.size == 12
    assert cache.clean() == [entry]
    assert not path.exists()
    assert not curve.exists()


def test_an_array_is_made_once_for_all_that_it_depends_on(folder):
    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]

    first = cache.array("embeddings", ["weights", ["a", "b"]], make)
    again = cache.array("embeddings", ["weights", ["a", "b"]], make)
    np.testing.assert_array_equal(first, again)
    assert len(made) == 1
    cache.array("embeddings", ["other weights", ["a", "b"]], make)
    assert len(made) == 2
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".lock"}


def test_clean_says_what_it_freed_and_keeps_what_is_in_use(folder):
    keep("adapters", "a", 2_000_000)
    busy = keep("training", "b", 1_000_000)
    (folder / "packages").mkdir()
    code = "import sys,time; from pathlib import Path; from overparam.support import cache\n"
    code += "with cache.using(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(busy)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        text = cache.describe(cache.clean())
        other.kill()
    assert "adapters of trained encoders: 1 removed, 2.0 MB freed" in text
    assert "in use, and kept: 1, 1.0 MB" in text
    assert (folder / "packages").exists()
    assert len(cache.clean()) == 1  # the lock went with its process


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_named(monkeypatch, text):
    monkeypatch.setenv("OVERPARAM_CACHE_LIMIT_GB", text)
    with pytest.raises(ValueError, match=f"number of gigabytes, 0 or more, got '{text}'"):
        cache.limit()
