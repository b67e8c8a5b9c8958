import json

import pytest

from overparam.publish import inventory, readme, tables
from overparam.record import ledger

TEXT = f"# Title\n\n{readme.START}\nold\n{readme.END}\n\nmore\n"


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


@pytest.fixture
def results(tmp_path, make_record):
    """Two models with a verdict on one claim of the front page."""
    folder = tmp_path / "results" / "reference"
    for slug in ("tiny", "small"):
        place = folder / "trailing_layer_pruning" / f"{slug}-1"
        make_record(place, slug=slug, study="trailing_layer_pruning", figure=True)
        path = place / "record.json"
        values = json.loads(path.read_text())
        values["claims"][0]["id"] = "l3prune-negligible-30"
        if slug == "tiny":
            values["claims"][0]["verdict"] = "inconclusive"
        path.write_text(json.dumps(values))
    return folder


def rows(text):
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    return [line.strip("| ").split(" | ") for line in plain.splitlines() if line.startswith("| ")]


def test_a_row_has_the_models_side_by_side(page, results):
    assert readme.stale(page, results)
    assert readme.fill(page, results)
    text = page.read_text()
    assert rows(text)[1] == [
        "A text encoder loses up to 30 % of its layers at negligible loss",
        "negligible",
        "small −0.42 [−0.90, 0.00] · tiny −0.42 [−0.90, 0.00] points",
        "small reproduced · tiny inconclusive",
    ]
    assert rows(text)[2][-1] == "no record (trailing layer pruning)"
    assert "[REPORT.md](results/reference/REPORT.md)" in text
    assert "from 2 records" in text
    assert text.startswith("# Title")
    assert text.endswith("more\n")
    assert not readme.stale(page, results)
    assert not readme.fill(page, results)


def test_the_table_is_short_and_in_the_order_of_the_studies(results):
    found = rows(readme.table(inventory.take(results)))[1:]
    studies = {one.study for one in inventory.take(results).studies}
    chosen = [entry for entry in ledger.entries() if entry.front and entry.study in studies]
    assert [row[0] for row in found] == [entry.front.claim for entry in chosen]
    assert len(found) <= ledger.FRONT_ROWS
    assert max(len(cell) for row in found for cell in row) <= ledger.CELL


def test_models_that_do_not_fit_into_a_cell_are_counted(results, make_record):
    for number in range(4):
        place = results / "trailing_layer_pruning" / f"more-{number}"
        make_record(place, slug=f"model-{number}", study="trailing_layer_pruning")
        path = place / "record.json"
        path.write_text(path.read_text().replace('"id": "large"', '"id": "l3prune-negligible-30"'))
    row = rows(readme.table(inventory.take(results)))[1]
    assert row[2].endswith(" points · 4 more")
    assert max(map(len, row)) <= ledger.CELL


def test_the_picture_is_that_of_all_studies(results, page, make_record):
    place = results / "claims" / "reference-1"
    make_record(place, slug="reference", study="claims", figure=True)
    path = place / "record.json"
    path.write_text(path.read_text().replace("fig:layers-loss", readme.PICTURE))
    readme.fill(page, results)
    picture = page.read_text().split(readme.START)[1].split("\n\n")[0].strip()
    assert picture == "![Loss.](results/reference/claims/reference-1/loss.png)"


def test_without_results_it_says_so(tmp_path, page):
    readme.fill(page, tmp_path / "results" / "reference")
    assert "No results yet: `python run_all.py --profile reference` makes them." in page.read_text()


def test_a_readme_without_marks_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="results:start"):
        readme.fill(path, tmp_path)
    assert path.read_text() == "nothing"


def test_other_intervals_of_a_note_are_shown():
    note = "Half pruned, none idle. With one kept: -21.2 [-24.0, -18.4] %. Trained on verses. 3 seeds."
    assert tables.shown_of(note) == "Half pruned, none idle. With one kept: -21.2 [-24.0, -18.4] %"
    assert tables.shown_of("One sentence.") == "One sentence"
    assert tables.shown_of("") == ""
