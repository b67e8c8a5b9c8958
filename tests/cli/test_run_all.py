import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import run_all  # noqa: E402

from overparam.runner import execute, plan  # noqa: E402

NOTEBOOK = (
    '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "keep = 3",'
    ' "outputs": [], "execution_count": null}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
)
PARAMS = """
from pydantic import BaseModel, Field

class Params(BaseModel, extra="forbid"):
    keep: int = Field(3, ge=1, le=18)
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the command line on a project with one tiny study."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_mini.ipynb").write_text(NOTEBOOK)
    (tmp_path / "ministudies").mkdir()
    (tmp_path / "ministudies" / "__init__.py").write_text("")
    (tmp_path / "ministudies" / "mini.py").write_text(PARAMS)
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    for name in ("quick", "laptop", "smoke"):
        (profiles / f"{name}.yaml").write_text(f"description: the {name} one\njobs:\n  mini: [{{}}]\n")
    monkeypatch.setattr(plan, "PROFILES", profiles)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda *arguments: run_all.main(arguments, root=tmp_path, studies_package="ministudies")
    for name in [name for name in sys.modules if name.startswith("ministudies")]:
        del sys.modules[name]


@pytest.fixture
def asked():
    """How `fake_run` was called."""
    return {}


@pytest.fixture
def fake_run(monkeypatch, asked):
    """Stand in for the kernels: note the jobs, and end them all in one way."""
    seen = []

    def end(ending):
        def run(jobs, **limits):
            seen.extend(jobs)
            asked.update(limits)
            return [execute.Outcome(job, ending, 1.0, "") for job in jobs]

        monkeypatch.setattr(execute, "run", run)
        return seen

    return end


def test_dry_run_shows_the_plan_and_runs_nothing(call, capsys, tmp_path, fake_run):
    seen = fake_run("done")
    assert call("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "quick: the quick one" in shown
    assert "mini/mini  due    missing" in shown
    assert seen == []
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("failed", 1), ("interrupted", 130)])
def test_exit_code_says_how_it_went(call, fake_run, ending, code):
    fake_run(ending)
    assert call() == code


def test_arguments_reach_the_plan(call, fake_run, tmp_path):
    seen = fake_run("done")
    assert call("--only", "mini", "--set", "mini.keep=5", "--results", str(tmp_path / "r"), "--force") == 0
    (job,) = seen
    assert (job.params, job.reason) == ({"keep": 5}, "forced")
    assert job.directory.parent == tmp_path / "r" / "mini"


def test_limits_and_workers_reach_the_run(call, fake_run, asked):
    fake_run("done")
    assert call("run", "--jobs", "3", "--timeout", "60", "--retries", "2") == 0
    assert (asked["timeout"], asked["retries"]) == (60, 2)
    assert asked["pool"].args == (3,)
    assert [job.name for job in asked["replan"]()] == ["mini/mini"]
    assert call("--cluster", "tcp://somewhere:8786") == 0
    assert asked["pool"].args == ("tcp://somewhere:8786",)


def test_a_plan_is_explained_and_given_as_json_without_a_run(call, fake_run, capsys):
    seen = fake_run("done")
    assert call("--explain", "mini") == 0
    assert capsys.readouterr().out.startswith("mini/mini\n  state      due: missing\n")
    assert call("--json") == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["name"] == "mini/mini"
    assert seen == []


def test_clean_empties_the_cache_of_steps(call, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path / "cache"))
    step = tmp_path / "cache" / "adapters" / "k"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(b"0" * 1_000_000)
    assert call("--clean") == 0
    assert "1 removed, 1.0 MB freed" in capsys.readouterr().out
    assert not step.exists()


@pytest.mark.parametrize(
    "arguments", [("--jobs", "0"), ("--retries", "-1"), ("--timeout", "x"), ("--jobs", "2.5")]
)
def test_numbers_are_checked(call, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
    assert f"{arguments[0]}: must be a whole number" in capsys.readouterr().err


def test_smoke_goes_to_a_new_temporary_folder_and_says_where(call, fake_run, capsys, tmp_path):
    seen = fake_run("done")
    call("--profile", "smoke")
    results = seen[0].directory.parents[1]
    assert f"results: {results}" in capsys.readouterr().out
    assert tmp_path not in results.parents
    results.rmdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "labtop"], "error: unknown profile 'labtop': did you mean 'laptop'?"),
        (["--only", "maxi"], "did you mean 'mini'?"),
        (["--set", "mini.keep=0.5"], "keep: Input should be a valid integer"),
        (["--set", "mini.kep=1"], "unknown parameter 'kep': did you mean 'keep'?"),
    ],
)
def test_bad_input_is_one_readable_line_and_exit_code_2(call, fake_run, capsys, arguments, message):
    seen = fake_run("done")
    assert call(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert seen == []


def test_report_fills_the_readme(call, tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- results:start -->\n<!-- results:end -->\n")
    assert call("report") == 0
    assert "No results yet" in (tmp_path / "README.md").read_text()
    assert call("report") == 0
    assert "is current" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("nothing")
    assert call("report") == 2
    assert "results:start" in capsys.readouterr().err


def test_the_real_command_line_starts(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_all.py"), "--profile", "no-such-profile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown profile 'no-such-profile'")
    assert "Traceback" not in done.stderr


def test_the_command_line_is_a_page():
    assert len((ROOT / "run_all.py").read_text().splitlines()) <= 110
