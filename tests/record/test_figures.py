import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from overparam.record import figures, record

DATA = pd.DataFrame({"x": [0, 1], "y": [1.0, 2.0]})


@pytest.fixture
def recorder(tmp_path):
    return record.start("layers", {}, slug="tiny", directory=tmp_path / "tiny")


def draw(title="", axes=1):
    with figures.style():
        fig, _ = plt.subplots(1, axes, squeeze=False)
        fig.axes[0].plot(DATA["x"], DATA["y"])
        fig.axes[0].set(xlabel="depth (layers)", ylabel="perte — Größe", title=title)
    plt.close(fig)
    return fig


def save(recorder, fig=None, **changed):
    arguments = {"stem": "loss", "data": DATA, "caption": "Loss.", "id": "fig:a-loss"} | changed
    return figures.save(fig or draw(), arguments.pop("stem"), recorder=recorder, **arguments)


def test_three_files_under_one_stem_in_print_quality(recorder):
    files = save(recorder)
    assert sorted(files) == ["loss.csv", "loss.pdf", "loss.png"]
    assert recorder.record.figures == [record.Figure("fig:a-loss", "Loss.", files)]
    with Image.open(recorder.directory / "loss.png") as image:
        assert round(image.size[0] / 300 * 25.4) == 85
        assert round(image.info["dpi"][0]) == 300
    pdf = (recorder.directory / "loss.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf
    pd.testing.assert_frame_equal(pd.read_csv(recorder.directory / "loss.csv"), DATA)


def test_id_commit_and_key_travel_in_the_files(recorder):
    save(recorder)
    described = f"git {recorder.record.provenance['git']['sha']}, key {recorder.record.key}"
    with Image.open(recorder.directory / "loss.png") as image:
        assert image.info["Title"] == "fig:a-loss"
        assert image.info["Description"].startswith(described)
    pdf = (recorder.directory / "loss.pdf").read_bytes()
    assert b"fig:a-loss" in pdf
    assert described.encode() in pdf
    assert b"CreationDate" not in pdf


def test_same_input_gives_the_same_bytes_in_another_process(tmp_path):
    tests = Path(__file__).parent
    code = f"""
import sys; sys.path.insert(0, {str(tests)!r})
import test_figures as t
from overparam.record import record
r = record.start("layers", {{}}, slug="tiny", directory=sys.argv[1])
print(t.save(r))
"""
    here = save(record.start("layers", {}, slug="tiny", directory=tmp_path / "here"))
    there = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == str(here)


def test_saving_again_replaces_the_figure(recorder):
    save(recorder)
    save(recorder, caption="Better.")
    assert [figure.caption for figure in recorder.record.figures] == ["Better."]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id": "loss"}, "must look like"),
        ({"stem": "../loss"}, "stem must be"),
        ({"caption": " "}, "needs a caption"),
        ({"data": DATA.iloc[:0]}, "needs a caption and the data"),
        ({"fig": draw(title="Loss")}, "has a title"),
    ],
)
def test_bad_figures_are_refused_before_anything_is_written(recorder, changed, message):
    with pytest.raises(ValueError, match=message):
        save(recorder, **changed)
    assert list(recorder.directory.iterdir()) == []


def test_a_stem_belongs_to_one_figure(recorder):
    save(recorder)
    with pytest.raises(ValueError, match="taken by fig:a-loss"):
        save(recorder, id="fig:b-loss")
    recorder.table("depths", DATA)
    with pytest.raises(ValueError, match="taken by a table"):
        save(recorder, id="fig:c", stem="depths")


def test_panels_may_have_names(recorder):
    assert save(recorder, fig=draw(title="Lee STS", axes=2))


def test_style_is_left_behind_outside():
    before = mpl.rcParams["font.size"]
    with figures.style():
        assert mpl.rcParams["font.size"] == 8
        cycle = list(mpl.rcParams["axes.prop_cycle"])
        assert len({c["color"] for c in cycle}) == len({c["marker"] for c in cycle}) == 8
    assert mpl.rcParams["font.size"] == before
