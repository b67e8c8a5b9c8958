import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overparam.record import record
from overparam.runner import execute, settings
from overparam.runner.plan import Profile, plan
from overparam.runner.pool import Local

ROOT = Path(__file__).parents[2]
DRAWS = """
import matplotlib.pyplot as plt
import pandas as pd
from overparam.record import figures
with figures.style():
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], [0.5, 0.25, 1.0], label="a")
    axes.set_xlabel("depth")
    axes.legend()
    data = pd.DataFrame({"x": [1, 2, 3], "y": [0.5, 0.25, 1.0]})
    shown = figures.publish(figure, "fig:toy-curve", data=data, caption="A curve.", recorder=recorder)
print("order", list({"a", "b", "c", "d"}), "startup" in globals(), __debug__, os.environ.get("TORCHDYNAMO_DISABLE"))
shown"""


def run(root, monkeypatch, results):
    profile = Profile("mine", "mine.yaml", "", {"toy": [{"model": "alpha"}]})
    jobs = plan(profile, results=results, notebooks_dir=root / "notebooks", studies_package="toystudies")
    (outcome,) = execute.run(jobs, pool=lambda: Local(1))
    assert outcome.ending == "done", outcome.message
    left = record.load(outcome.message)
    notebook = (Path(outcome.message).parent / "executed.ipynb").read_text()
    return {figure.id: figure.files for figure in left.figures}, notebook


@pytest.fixture
def drawing(tmp_path, monkeypatch, toy):
    root = toy.write_project(tmp_path / "project")
    toy.write_notebook(
        root / "notebooks" / "01_toy.ipynb", [*toy.cells[:3], ("code", DRAWS, []), toy.cells[-1]]
    )
    toy.use(root, monkeypatch)
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(root)
    return root


def personal(home):
    """A home with settings that would break a run or change its figures, and what lies in it."""
    files = {
        ".config/matplotlib/matplotlibrc": "text.usetex: True\naxes.grid: True\n",
        ".ipython/profile_default/startup/00-mine.py": "startup = True\n1 / 0\n",
        ".ipython/profile_default/ipython_kernel_config.py": "c.IPKernelApp.exec_lines = ['startup = 1']\n",
        ".pythonrc.py": "startup = True\n",
    }
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sorted(path for path in home.rglob("*"))


def test_personal_settings_change_nothing_and_the_home_stays_as_it_was(drawing, tmp_path, monkeypatch):
    expected, plain = run(drawing, monkeypatch, tmp_path / "plain")
    home = tmp_path / "home"
    before = personal(home)
    (drawing / "matplotlibrc").write_text("axes.grid: True\nsavefig.facecolor: red\n")
    long = tmp_path / "t" / ("x" * 117)
    long.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "PYTHONSTARTUP": str(home / ".pythonrc.py"),
        "MATPLOTLIBRC": str(home / ".config" / "matplotlib"),
        "MPLBACKEND": "TkAgg",
        "PYTHONHASHSEED": "7",
        "TORCHDYNAMO_DISABLE": "1",
        "TMPDIR": str(long),
    }.items():
        monkeypatch.setenv(name, value)
    found, personally = run(drawing, monkeypatch, tmp_path / "personal")
    assert found == expected
    assert sorted(path for path in home.rglob("*")) == before
    for notebook in (plain, personally):
        assert "False True None" in notebook
        assert '"image/png"' in notebook
    order = [line for line in plain.splitlines() if '"order' in line]
    assert order == [line for line in personally.splitlines() if '"order' in line]


def test_settings_that_say_where_things_are_and_what_may_be_used_are_kept(tmp_path):
    mine = {
        "HF_HOME": "/data/hf",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "ACTIVE",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    found = settings.environment(
        tmp_path, mine | {"ACCELERATE_MIXED_PRECISION": "bf16", "LC_ALL": "de_DE.UTF-8"}
    )
    assert {name: found[name] for name in mine} == mine
    assert "ACCELERATE_MIXED_PRECISION" not in found
    assert (found.get("LC_ALL"), found["LANG"], found["LC_NUMERIC"]) == (None, "de_DE.UTF-8", "C")
    assert settings.environment(tmp_path, {})["OMP_WAIT_POLICY"] == "PASSIVE"


MAKE = "show: ; @echo $$OMP_WAIT_POLICY"
RUN = """
import os, sys
import run_all
assert "torch" not in sys.modules
run_all.main(["--profile", "none-such"])
print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(
    "command", [["make", "--no-print-directory", "--eval", MAKE, "show"], [sys.executable, "-c", RUN]]
)
@pytest.mark.parametrize(("own", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_leave_the_cores_to_others_unless_the_user_says_otherwise(command, own, used):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(command, cwd=ROOT, env=others | own, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == used


def test_the_tests_themselves_wait_so():
    assert os.environ["OMP_WAIT_POLICY"]


def test_sockets_get_a_short_path_or_an_error_that_names_the_limit(tmp_path, monkeypatch):
    with settings.socket_folder() as folder:
        assert len(os.fsencode(folder)) < 80
        assert folder.is_dir()
    assert not folder.exists()
    monkeypatch.setattr(settings, "_PLACES", ())
    monkeypatch.setattr(settings.tempfile, "gettempdir", lambda: "/x" * 60)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(OSError, match="at most 60 bytes"), settings.socket_folder():
        pass
