import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from overparam.cli import bench_gpu
from overparam.record import record

LIB = Path(__file__).parents[2] / "lib"
BARE = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Missing())
from overparam.cli import bench_gpu

bench_gpu.importlib.util.find_spec = lambda name, find=bench_gpu.importlib.util.find_spec: (
    None if name in {names!r} else find(name)
)
bench_gpu._stand_in()
from overparam.models import loading, shape_costs, shapes
from overparam.record import record
from overparam.measure import roofline, tune

print(shapes.build("tiny-Qwen3-30B-A3B").dtype)
"""
NOT_THERE = (
    "pydantic",
    "platformdirs",
    "openvino",
    "nncf",
    "torchao",
    "mteb",
    "matplotlib",
    "seaborn",
    "papermill",
    "codecarbon",
    "xllamacpp",
)


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("not run: there is no GPU")
    assert not list(tmp_path.iterdir())


def test_it_needs_no_package_that_a_server_may_lack():
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(names=NOT_THERE)],
        env={"PYTHONPATH": str(LIB), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "torch.bfloat16"


def refuse(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("seconds", "call", "status"),
    [
        (1, lambda: "12 TFLOP/s", "12 TFLOP/s"),
        (1, lambda: None, "ran"),
        (999, lambda: "never", "not run: it needs about 999 s, 60 s are left"),
        (1, refuse(ModuleNotFoundError("no", name="mteb")), "not run: the package mteb is not installed"),
        (1, refuse(MemoryError("Llama-3-8B needs 17 GiB")), "not run: Llama-3-8B needs 17 GiB"),
        (1, refuse(RuntimeError("no kernel\nmore")), "failed: RuntimeError: no kernel"),
    ],
)
def test_every_part_says_what_became_of_it(seconds, call, status, capsys):
    bench = bench_gpu.Bench("cpu", time.monotonic() + 60.4)
    bench.part("a part", seconds, call)
    assert bench.parts[0]["status"] == status
    assert f"a part: {status}" in capsys.readouterr().out


def test_a_record_has_no_notebook(monkeypatch, tmp_path):
    for name in ("OVERPARAM_PROFILE", "OVERPARAM_JOB_DIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
    bench = bench_gpu.Bench("cpu", time.monotonic() + 60, tiny=True)
    bench.part("a part", 0, lambda: None)
    bench.rows.append({"shape": "tiny", "what": "slope", "share": 1.0})
    bench_gpu._record(bench, [pd.DataFrame({"what": ["copy"]})], tmp_path)
    (found,) = record.find(tmp_path)
    assert (found.study, found.profile, found.notebook) == ("hardware", "gpu", None)
    assert set(found.tables) == {"parts", "sizes", "limits"}
    assert record.problems(found) == []


def test_odd_layers_are_compared_with_aligned_ones():
    bench = bench_gpu.Bench("cpu", time.monotonic() + 60, tiny=True)
    said = bench_gpu._alignment(bench)
    rows = {(row["shape"], row["kept"]): row["share"] for row in bench.rows}
    assert set(rows) == {
        ("width", 63),
        ("width", 64),
        ("width", 65),
        ("vocabulary", 257),
        ("vocabulary", 320),
    }
    assert rows["width", 64] == rows["vocabulary", 320] == 100
    assert "width 63" in said
