"""What the repository's own results/ must hold to."""

import re
from pathlib import Path

import pytest

from overparam.publish import inventory, readme, verify
from overparam.record import ledger, record
from overparam.studies.claims import record_hashes

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


def test_the_front_page_is_one_picture_and_a_short_table():
    front = readme.front(inventory.take(RESULTS), ROOT)
    rows = [line.strip("| ").split(" | ") for line in front.splitlines() if line.startswith("| ")]
    assert front.count("![") == 1
    assert 1 < len(rows) <= ledger.FRONT_ROWS + 1
    assert max(len(cell) for row in rows for cell in row) <= ledger.CELL
    assert not any("no record" in row[-1] for row in rows)


def test_every_generated_page_is_current():
    findings = verify.check(RESULTS, summary_inputs=record_hashes(RESULTS))
    assert [finding for finding in findings if finding.failed] == [], "run: python run_all.py report"


def test_the_ledger_says_what_the_records_say():
    found = inventory.take(RESULTS)
    assert found.unknown == []
    for claim, _ in found.verdicts():
        entry = ledger.find(claim.id)
        assert re.fullmatch(ledger.pattern(entry.statement), claim.statement), claim.id
        assert re.fullmatch(ledger.pattern(entry.published), claim.published), claim.id
        assert (entry.cited(), entry.figure) == (claim.source, claim.figure), claim.id


def test_no_figure_or_page_is_larger_than_a_megabyte():
    models = {".safetensors"}
    large = [path for path in RESULTS.rglob("*") if path.is_file() and path.stat().st_size > 1e6]
    assert [path for path in large if path.suffix not in models and "gallery" not in path.parts] == []
