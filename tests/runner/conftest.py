import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

LIB = Path(__file__).parents[2] / "lib"

PARAMS = """
from typing import Literal
from pydantic import BaseModel, Field

class Params(BaseModel, extra="forbid"):
    model: str = "alpha"
    keep_layers: int = Field(3, ge=1, le=18)
    margin: float = 1.0
    depths: tuple[int, ...] = (1, 2)
    mode: Literal["ok", "fail", "silent", "die", "sleep", "flaky", "outside", "hush", "long"] = "ok"
"""
STEPS = """
from toystudies import shared

def value(keep):
    from .more import factor
    return keep * factor()
"""
PARAMETERS = 'model = "alpha"\nkeep_layers = 3  # of 18\nmargin: float = 1.0\ndepths = (1, 2)\nmode = "ok"\n'
CELLS = (
    ("markdown", "# A toy study", []),
    ("code", PARAMETERS, ["parameters"]),
    (
        "code",
        """%xmode Plain
import os, subprocess, sys, time
from overparam.support.progress import note, track
from overparam.record import record
from toystudies.toy import Params, steps
params = Params(model=model, keep_layers=keep_layers, margin=margin, depths=depths, mode=mode)
recorder = record.start("toy", params.model_dump(mode="json"), slug=params.model)
print(sys.executable, os.getcwd(), __file__ if "__file__" in globals() else recorder.directory)""",
        [],
    ),
    (
        "code",
        """note("thinking hard")
for _ in track(range(3), "counting"):
    time.sleep(0.2)
if mode == "fail":
    raise RuntimeError("no such luck\\nsecond line")
if mode == "die":
    os.kill(os.getpid(), 9)
if mode == "flaky" and not os.path.exists(os.environ["TOY_FLAG"]):
    open(os.environ["TOY_FLAG"], "w").close()
    raise RuntimeError("only once")
stray = recorder.directory.parent / "stray.txt"
if mode == "outside":
    stray.write_text("lost")
if mode == "hush":
    try:
        os.rename(recorder.directory / "x", stray)
    except OSError:
        pass
if mode == "long":
    for _ in track(range(20), "crossing"):
        time.sleep(0.2)
if mode == "sleep" and not os.path.exists(os.environ["TOY_PIDS"]):
    ours = subprocess.Popen(["sleep", "600"])
    away = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(os.environ["TOY_PIDS"] + ".tmp", "w") as pids:
        pids.write(f"{os.getpid()} {ours.pid} {away.pid}")
    os.rename(os.environ["TOY_PIDS"] + ".tmp", os.environ["TOY_PIDS"])
    time.sleep(600)""",
        [],
    ),
    (
        "code",
        'recorder.metric("value", steps.value(keep_layers))\nif mode != "silent":\n    recorder.finish()',
        [],
    ),
)


def write_notebook(path, cells=CELLS):
    content = {
        "cells": [
            {"cell_type": kind, "id": f"c{i}", "metadata": {"tags": tags}, "source": source}
            | ({"outputs": [], "execution_count": None} if kind == "code" else {})
            for i, (kind, source, tags) in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "another-env", "display_name": "x", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_project(root):
    write_notebook(root / "notebooks" / "01_toy.ipynb")
    files = {
        "__init__.py": "",
        "toy/__init__.py": PARAMS,
        "toy/steps.py": STEPS,
        "toy/more.py": "def factor():\n    return 2\n",
        "shared.py": "import json\n",
        "unrelated.py": "x = 1\n",
    }
    for name, text in files.items():
        path = root / "lib" / "toystudies" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def use(root, monkeypatch):
    """Make a toy project importable, here and in kernels."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "toystudies"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(root / "lib"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "lib"), str(LIB)]))


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = write_project(tmp_path / "project")
    use(root, monkeypatch)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "toystudies"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def toy():
    """What tests need to build variants of the toy project."""
    return SimpleNamespace(
        cells=CELLS,
        parameters=PARAMETERS,
        write_notebook=write_notebook,
        write_project=write_project,
        use=use,
    )
