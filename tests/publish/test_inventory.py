import json

import pytest

from overparam.publish import inventory, pages, readme, tables
from overparam.record import ledger


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def results(tmp_path, make_record):
    folder = tmp_path / "größe" / "reference"  # non-ASCII on purpose
    make_record(folder / "layers" / "tiny-1", slug="tiny", figure=True)
    make_record(folder / "layers" / "small-1", slug="small")
    return folder


def test_an_empty_or_absent_folder_holds_nothing_and_says_what_is_missing(tmp_path):
    for found in (inventory.take(tmp_path / "reference"), inventory.take(tmp_path)):
        assert found.records == []
        assert found.problems == []
    assert {entry.id for entry in found.missing} == {entry.id for entry in ledger.entries()}
    assert "No results yet" in readme.front(found, tmp_path)
    assert "No results yet" in pages.text(found)


def test_unknown_claim_fields_leave_out_that_record_and_no_other(results):
    edit(results / "layers" / "small-1" / "record.json", lambda r: r["claims"][0].update(colour="red"))
    found = inventory.take(results)
    assert [record.slug for record in found.records] == ["tiny"]
    (problem,) = found.problems
    assert problem.startswith("layers/small-1/record.json is not a valid record: claim 'large'")
    assert "colour" in problem
    assert "left out of the report" in problem
    assert "A light cut" in tables.questions_table(found, "layers", results)


def test_two_verdicts_on_one_claim_are_named_and_the_first_is_shown(results):
    edit(results / "layers" / "tiny-1" / "record.json", lambda r: r["claims"].append(r["claims"][0]))
    found = inventory.take(results)
    assert [claim.id for claim in found.records[1].claims] == ["large", "speed"]
    assert found.problems == ["layers/tiny: two verdicts on one claim, large; the first is shown"]


def test_of_two_records_of_one_job_the_newer_is_shown(results, make_record):
    make_record(results / "layers" / "tiny-2", slug="tiny")
    edit(
        results / "layers" / "tiny-2" / "record.json", lambda r: r.update(started="2099-01-01T00:00:00+00:00")
    )
    found = inventory.take(results)
    assert [inventory.folder(record).name for record in found.records] == ["small-1", "tiny-2"]
    assert [inventory.folder(record).name for record in found.superseded] == ["tiny-1"]
    assert "layers/tiny-1 is superseded by a newer record of tiny" in found.remarks()


def test_claims_and_checks_are_kept_apart_and_stand_in_the_order_of_the_ledger(tmp_path, make_record):
    for study, ids in (
        ("distillation_retention", ("distillation-speed", "distillation-soft-targets")),
        ("trailing_layer_pruning", ("l3prune-cost", "l3prune-large")),
    ):
        make_record(tmp_path / study / "tiny-1", study=study)
        edit(
            tmp_path / study / "tiny-1" / "record.json",
            lambda r, ids=ids: [claim.update(id=name) for claim, name in zip(r["claims"], ids, strict=True)],
        )
    found = inventory.take(tmp_path)
    claims = [question.claim.id for question in found.questions("claim")]
    assert claims == ["l3prune-large", "l3prune-cost", "distillation-soft-targets"]
    assert [question.claim.id for question in found.questions("check")] == ["distillation-speed"]
    assert [study for study, _ in tables.counts(found)] == [
        "trailing_layer_pruning",
        "distillation_retention",
    ]
    page = pages.text(found)
    assert "A light cut" not in page[page.index("### Distillation retention") : page.index("## Checks")]
    assert (
        "| A light cut \\| costs next to nothing | Distillation retention |"
        in page[page.index("## Checks") :]
    )


def test_failed_and_unfinished_jobs_are_no_results(results, make_record):
    make_record(results / "layers" / "big-1.failed", slug="big")
    edit(results / "layers" / "small-1" / "record.json", lambda r: r.update(status="running"))
    found = inventory.take(results)
    assert [record.slug for record in found.records] == ["tiny"]
    assert found.failed == ["layers/big-1.failed"]
    assert found.problems == ["layers/small-1: its record says 'running', not 'complete' (left out)"]


def test_missing_and_unknown_claims_are_marked(results):
    found = inventory.take(results)
    assert "layers/tiny: large" in found.unknown
    assert {entry.study for entry in found.missing} == {entry.study for entry in ledger.entries("reference")}
    page = pages.text(found)
    assert "## Missing" in page
    assert (
        "| Up to 30 % of the layers go with negligible loss | negligible | trailing_layer_pruning |" in page
    )


def test_a_figure_deleted_by_hand_is_marked_in_the_report(results):
    (results / "layers" / "tiny-1" / "loss.png").unlink()
    page = pages.text(inventory.take(results))
    assert "Missing: loss.png." in page
    assert "![" not in page.split("## Layers: tiny")[1]


def test_report_is_the_same_twice_and_links_to_files_that_are_there(results):
    found = inventory.take(results)
    assert pages.write(found)
    assert not pages.write(inventory.take(results))
    links = [part.split(")")[0] for part in (results / "REPORT.md").read_text().split("](")[1:]]
    files = [link for link in links if "://" not in link and "record" in link and "ro-crate" not in link]
    assert files
    assert all((results / link).is_file() for link in files)
