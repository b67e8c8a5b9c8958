"""What the repository's own results/ must hold to."""

import re
from pathlib import Path

import pytest

from overparam.report import readme, record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "reference"


def test_every_file_is_named_by_a_record_and_unchanged():
    assert record.missing_or_orphaned(RESULTS) == []


def test_no_place_of_a_machine_is_in_them():
    texts = [path for path in RESULTS.rglob("*") if path.suffix in (".json", ".ipynb", ".csv")]
    found = [
        path for path in texts if re.search(r"[\s\"'](/root|/home|/tmp|/work|/Users)/", path.read_text())
    ]
    assert found == []


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README yet")
def test_readme_shows_what_they_say():
    assert not readme.stale(ROOT / "README.md", RESULTS), "run: python run_all.py report"
