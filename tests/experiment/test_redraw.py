import io
import json
import shutil

import pytest
from tests.experiment.conftest import CELLS, PARAMS, PLOTS, STUDY, VERDICTS
from tests.runner.conftest import write_notebook

from overparam.cli import commands
from overparam.record import record
from overparam.runner import execute
from overparam.runner.plan import Profile, plan

PROFILE = Profile("mine", "mine.yaml", "", {"coin": [{}]})


def planned(root):
    (job,) = plan(PROFILE, notebooks_dir=root / "notebooks", studies_package="cointoss")
    return job


def run(root):
    (outcome,) = execute.run([planned(root)], out=io.StringIO())
    assert outcome.ending in ("done", "up to date"), outcome.message
    return record.load(outcome.job.directory)


@pytest.fixture
def before(coin, tmp_path_factory):
    """The record of the coin, which is measured once for all tests and then copied."""
    kept = tmp_path_factory.getbasetemp() / "measured-coin"
    if not kept.exists():
        run(coin)
        shutil.copytree(coin / "results", kept / "results")
        shutil.copy(coin / "log", kept)
    else:
        shutil.copytree(kept, coin, dirs_exist_ok=True)
    job = planned(coin)
    assert job.state == "up to date"
    return record.load(job.directory)


def times_measured(root):
    return (root / "log").read_text().count("thrown")


def change(root, name, old, new):
    path = root / "lib" / "cointoss" / "coin" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_changed_caption_and_verdict_are_made_anew_without_measuring(coin, before):
    assert planned(coin).state == "up to date"
    change(coin, "plots.py", "Heads by bias.", "How often heads came.")
    change(coin, "verdicts.py", 'published="75 %"', 'published="three of four"')
    write_notebook(coin / "notebooks" / "01_coin.ipynb", (("markdown", "# A fair coin", []), *CELLS[1:]))
    job = planned(coin)
    assert (job.state, job.reason) == (
        "to redraw",
        "notebook changed; code changed: cointoss.coin.plots, cointoss.coin.verdicts",
    )
    after = run(coin)
    assert times_measured(coin) == 1
    assert after.figures[0].caption == "How often heads came."
    assert (before.claims[0].published, after.claims[0].published) == ("75 %", "three of four")
    assert "A fair coin" in (after.path.parent / record.NOTEBOOK_NAME).read_text()
    same = ("key", "seconds", "started", "metrics", "tables", "items", "artifacts", "params")
    assert all(getattr(after, name) == getattr(before, name) for name in same)
    assert after.figures[0].files["figure_heads.csv"] == before.figures[0].files["figure_heads.csv"]
    assert record.problems(after) == []
    assert planned(coin).state == "up to date"


@pytest.mark.parametrize(
    ("name", "old", "new", "state"),
    [
        ("study.py", "0.75)", "0.8)", "due"),
        ("study.py", '"""Heads per bias, with their interval."""', '"""How often heads came."""', "up to date"),
        ("study.py", "    rows = []", "    # one row per bias\n    rows = []", "up to date"),
        ("__init__.py", "throws per bias", "how often each coin is thrown", "up to date"),
        ("__init__.py", "Field(400", "Field(401", "due"),
        ("plots.py", "heads (%)", "heads, %", "to redraw"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("before")
def test_what_a_change_makes_due(coin, name, old, new, state):
    change(coin, name, old, new)
    assert planned(coin).state == state


@pytest.mark.usefixtures("before")
def test_of_a_notebook_only_what_measures_is_in_the_measuring_key(coin):
    cells = list(CELLS)
    cells[4] = ("code", "table = steps.throw(study)\ntable.style.format(precision=3)", [])
    write_notebook(coin / "notebooks" / "01_coin.ipynb", cells)
    assert planned(coin).state == "to redraw"
    cells[4] = ("code", "import os\ntable = steps.throw(study)\ntable = steps.throw(study)", [])
    write_notebook(coin / "notebooks" / "01_coin.ipynb", cells)
    assert planned(coin).state == "due"


def test_a_step_that_the_record_does_not_hold_is_a_clear_error_and_the_old_record_stays(coin, before):
    change(coin, "verdicts.py", "    row = table.iloc[-1]", "    study.coin.weight\n    row = table.iloc[-1]")
    (outcome,) = execute.run([planned(coin)], out=io.StringIO())
    assert outcome.ending == "failed"
    assert "'weight' of a object is not available when redrawing" in outcome.message
    assert record.load(before.path.parent).sealed == before.sealed


def redraw(root, monkeypatch, *arguments):
    monkeypatch.setattr(commands, "STUDIES", "cointoss")
    return commands.main(["redraw", str(root / "results" / "mine"), *arguments], root)


def test_a_style_changes_all_figures_and_no_number(coin, before, monkeypatch, tmp_path, capsys):
    style = tmp_path / "paper.mplstyle"
    style.write_text("font.family: serif\naxes.grid: True\n")
    assert redraw(coin, monkeypatch, "--style", str(style)) == 0
    after = record.load(before.path.parent)
    assert times_measured(coin) == 1
    assert after.figures[0].files["figure_heads.png"] != before.figures[0].files["figure_heads.png"]
    assert after.figures[0].files["figure_heads.csv"] == before.figures[0].files["figure_heads.csv"]
    assert planned(coin).state == "to redraw"  # the suite's own style is another one
    monkeypatch.delenv("OVERPARAM_STYLE")
    assert redraw(coin, monkeypatch) == 0
    again = record.load(before.path.parent)
    assert again.figures[0].files["figure_heads.png"] == before.figures[0].files["figure_heads.png"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no style file"),
        ("figure.figsize: 3, 3\n", "changes sizes, which the figures' layouts rely on: remove figure.figsize"),
        ("no style at all", "is not a matplotlib style file"),
    ],
)  # fmt: skip
def test_a_style_that_cannot_be_used_is_refused(coin, monkeypatch, tmp_path, text, said):
    style = tmp_path / "bad.mplstyle"
    if text is not None:
        style.write_text(text)
    with pytest.raises(ValueError, match=said):
        redraw(coin, monkeypatch, "--style", str(style))


def test_older_records_are_left_out_and_the_rest_is_drawn(coin, before, monkeypatch, capsys):
    new = before.path.parent
    old = new.with_name("older-00000000")
    shutil.copytree(new, old)
    (old / record.STEPS_NAME).unlink()
    values = json.loads((old / "record.json").read_text())
    del values["artifacts"][record.STEPS_NAME], values["provenance"]["drawing"]
    values["sealed"], values["slug"] = None, "older"
    (old / "record.json").write_text(json.dumps(values))
    assert redraw(coin, monkeypatch) == 1
    captured = capsys.readouterr()
    assert "coin/older  left out: it was made by an older version" in captured.err
    assert "coin/penny" in captured.out


@pytest.mark.usefixtures("before")
def test_records_of_a_study_that_is_gone_are_left_out(coin, monkeypatch, capsys):
    monkeypatch.setattr(commands, "STUDIES", "nowhere")
    assert commands.main(["redraw", str(coin / "results" / "mine")], coin) == 1
    assert "coin/penny  left out: No module named 'nowhere'" in capsys.readouterr().err


def test_a_study_as_contributing_says_it_fits_in_sixty_lines():
    """Without its notebook and without what the tests alone need; blank lines do not count."""
    texts = (PARAMS, STUDY, PLOTS, VERDICTS)
    assert sum(bool(line.strip()) and "log" not in line for text in texts for line in text.splitlines()) <= 60
