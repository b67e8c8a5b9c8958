import pytest

from overparam.publish import readme

TEXT = f"# Title\n\n{readme.START}\nold\n{readme.END}\n\nmore\n"


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


def test_table_comes_from_records_with_relative_links(tmp_path, page, make_record):
    results = tmp_path / "results" / "reference"
    make_record(results / "layers" / "tiny-1", slug="tiny", figure=True)
    make_record(results / "layers" / "small-1", slug="small")
    assert readme.stale(page, results)
    assert readme.fill(page, results)
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| claim | published | model | measured [95 % CI] | verdict |"
    assert [row.split(" | ")[0].lstrip("| ") + ":" + row.split(" | ")[-3] for row in rows[2:]][1].endswith(
        "tiny"
    )
    assert (
        "| A light cut \\| costs next to nothing | −0.3 points at −21 % | tiny | −0.42 [−0.90, 0.00] points "
        "([figure](results/reference/layers/tiny-1/loss.png), "
        "[record](results/reference/layers/tiny-1/record.json)) | reproduced |"
    ) in rows
    assert sum("not testable at this scale" in row for row in rows) == 2
    assert "from 2 records" in text
    assert text.startswith("# Title")
    assert text.endswith("more\n")
    assert not readme.stale(page, results)
    assert not readme.fill(page, results)


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
    assert readme.shown_of(note) == "Half pruned, none idle. With one kept: -21.2 [-24.0, -18.4] %"
    assert readme.shown_of("One sentence.") == "One sentence"
    assert readme.shown_of("") == ""
