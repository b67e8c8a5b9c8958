import json

import pytest

from overparam.publish import citing, crate, inventory, pages, verify


@pytest.fixture
def results(tmp_path, make_record):
    make_record(tmp_path / "layers" / "tiny-1", slug="tiny", figure=True)
    found = inventory.take(tmp_path)
    for writer in (pages, citing, crate):
        writer.write(found)
    return tmp_path


def wrong(results, **arguments):
    return [(f.what, f.state, f.detail) for f in verify.check(results, **arguments) if f.failed]


def test_an_untouched_folder_is_right(results):
    assert wrong(results) == []
    states = {finding.what: finding.state for finding in verify.check(results)}
    assert states == dict.fromkeys(
        ("layers/tiny-1", "REPORT.md", "figures.json", "ro-crate-metadata.json"), "ok"
    )


def test_a_gallery_is_known_as_generated(results):
    (results / "gallery" / "files" / "layers").mkdir(parents=True)
    (results / "gallery" / "index.html").write_text("")
    (results / "gallery" / "files" / "layers" / "record.json").write_text("{}")
    assert wrong(results) == []


def test_changed_missing_and_orphaned_files_are_named(results):
    folder = results / "layers" / "tiny-1"
    (folder / "scores.parquet").write_bytes(b"other")
    (folder / "loss.pdf").unlink()
    (folder / "notes.txt").write_text("mine")
    found = wrong(results)
    assert ("layers/tiny-1", "bad", "loss.pdf: named by the record, but missing") in found
    assert any("scores.parquet: changed since" in detail for _, _, detail in found)
    assert ("layers/tiny-1/notes.txt", "orphan", "no record names this file") in found


def test_points_that_are_not_those_of_the_figure_are_found(results):
    folder = results / "layers" / "tiny-1"
    csv = folder / "loss.csv"
    csv.write_text(csv.read_text().replace("3.0", "2.5"))
    assert any(detail.startswith("loss.csv: changed since") for _, _, detail in wrong(results))
    csv.write_text("depth,loss\n")
    assert any(detail == "loss.csv: is not a table of points" for _, _, detail in wrong(results))


def test_a_figure_of_another_run_is_found_by_its_own_metadata(results):
    path = results / "layers" / "tiny-1" / "record.json"
    values = json.loads(path.read_text())
    values["key"] = "0" * 64
    path.write_text(json.dumps(values))
    details = [detail for _, _, detail in wrong(results)]
    assert "loss.png: its metadata lacks fig:layers-loss or key 00000000" in details
    assert "loss.pdf: its metadata lacks fig:layers-loss or key 00000000" in details


def test_pages_made_from_other_records_are_stale(results, make_record):
    make_record(results / "layers" / "small-1", slug="small")
    assert [(what, state) for what, state, _ in wrong(results)] == [
        ("REPORT.md", "stale"),
        ("ro-crate-metadata.json", "stale"),
    ]


def test_older_code_is_listed_and_is_no_failure(results):
    findings = verify.check(results, age=lambda record: ["overparam.models.load", "notebook"])
    (line,) = [finding for finding in findings if finding.state == "older"]
    assert "git " in line.detail
    assert line.detail.endswith("since then changed: overparam.models.load, notebook")
    assert not any(finding.failed for finding in findings)


def test_broken_records_do_not_hide_the_others(results, make_record):
    make_record(results / "layers" / "small-1", slug="small")
    (results / "layers" / "small-1" / "record.json").write_text("{")
    found = wrong(results)
    assert any("small-1/record.json is not a record" in detail for _, _, detail in found)
    assert not any(state == "orphan" for _, state, _ in found)


def test_an_empty_folder_and_a_missing_one_fail_with_a_reason(tmp_path):
    assert wrong(tmp_path)[0][1:] == ("missing", "it holds no records")
    assert wrong(tmp_path / "nowhere")[0][1:] == ("missing", "the folder does not exist")


def test_the_table_is_plain_and_aligned(results):
    lines = verify.table(verify.check(results)).splitlines()
    assert len({line.index(" ok ") for line in lines}) == 1
