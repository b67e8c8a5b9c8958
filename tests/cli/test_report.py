import re

import pytest
from tests.recording import make_record, no_runner

from overparam.cli import commands

__all__ = ["make_record", "no_runner"]


@pytest.fixture
def results(tmp_path, make_record):
    """Reference results of which one was made with uncommitted changes."""
    (tmp_path / "README.md").write_text("<!-- results:start -->\n<!-- results:end -->\n")
    folder = tmp_path / "results" / "reference"
    for slug, dirty in (("clean", "false"), ("changed", "true")):
        make_record(folder / "layers" / f"{slug}-1", slug=slug)
        path = folder / "layers" / f"{slug}-1" / "record.json"
        path.write_text(re.sub(r'"dirty": \w+', f'"dirty": {dirty}', path.read_text()))
    return folder


def test_reference_results_from_uncommitted_code_are_refused_by_name(results, tmp_path):
    with pytest.raises(ValueError, match=r"made with uncommitted changes, .*: layers/changed\. Commit"):
        commands.main(["report", str(results)], tmp_path)
    assert not (results / "REPORT.md").exists()
    assert "clean" not in (tmp_path / "README.md").read_text()


def test_verify_names_them_too(results, tmp_path, capsys):
    assert commands.main(["verify", str(results)], tmp_path) == 1
    shown = capsys.readouterr().out
    assert re.search(r"layers/changed +uncommitted", shown)
    assert "checks failed" in shown


def test_other_results_may_be_made_from_uncommitted_code(results, tmp_path):
    mine = results.rename(results.with_name("mine"))
    assert commands.main(["report", str(mine)], tmp_path) == 0
    assert "with uncommitted changes" in (mine / "REPORT.md").read_text()


def test_a_summary_of_claims_made_from_uncommitted_code_is_removed(results, tmp_path, make_record):
    make_record(results / "claims" / "reference-1", slug="reference", study="claims")
    path = results / "claims" / "reference-1" / "record.json"
    path.write_text(re.sub(r'"dirty": \w+', '"dirty": true', path.read_text()))
    with pytest.raises(ValueError, match="claims/reference"):
        commands.main(["report", str(results)], tmp_path)
    assert not path.parent.exists()
    assert (results / "layers" / "changed-1" / "record.json").exists()
