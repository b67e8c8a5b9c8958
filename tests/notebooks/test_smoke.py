import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overparam.cli import commands
from overparam.record import record
from overparam.runner.plan import load_profile, plan

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(2400)  # every study of the suite, one after the other


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    ran = subprocess.run(
        [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke", "--results", str(results)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("OVERPARAM_JOB")},
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return results, ran.stdout


def test_every_study_of_the_smoke_profile_leaves_a_complete_record(smoke):
    results, _ = smoke
    records = record.find(results)
    assert {one.study for one in records} == set(load_profile("smoke").jobs)
    assert record.missing_or_orphaned(results) == []
    for one in records:
        assert one.claims
        assert one.figures
        assert one.notebook


def test_progress_names_the_steps(smoke):
    _, printed = smoke
    for step in ("embedding every depth", "scoring embeddings"):
        assert step in printed
    assert re.search(r"done +\d+:\d\d", printed)


def test_nothing_is_due_after_a_run(smoke):
    results, _ = smoke
    assert {job.state for job in plan(load_profile("smoke"), results=results)} == {"up to date"}


def test_every_study_is_drawn_anew_from_its_recorded_steps_to_the_same_bytes(smoke, tmp_path):
    results, _ = smoke
    again = tmp_path / "again"
    shutil.copytree(results, again)
    assert commands.main(["redraw", str(again)], ROOT) == 0
    before, after = record.find(results), record.find(again)
    assert [(one.slug, one.figures, one.claims) for one in after] == [
        (one.slug, one.figures, one.claims) for one in before
    ]
    assert record.missing_or_orphaned(again) == []


@pytest.mark.parametrize("profile", ["smoke", "quick", "laptop", "reference", "paper"])
def test_every_profile_is_valid(profile, tmp_path):
    assert plan(load_profile(profile), results=tmp_path)
