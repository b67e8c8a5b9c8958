import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from overparam.experiment import charts
from overparam.experiment.charts import Look
from overparam.record import record

TABLE = pd.DataFrame(
    {
        "share": [0, 50, 0, 50],
        "system": ["a", "a", "b", "b"],
        "kept": [100.0, 90.0, 100.0, 70.0],
        "low": [100.0, 88.0, np.nan, np.nan],
        "high": [100.0, 93.0, np.nan, np.nan],
    }
)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    return SimpleNamespace(recorder=record.start("toy", {}, slug="toy"))


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_figure_is_recorded_with_exactly_its_table_and_closed(study):
    with charts.figure(study, "fig:toy-curve", TABLE, caption="A curve.", legend=2) as axes:
        charts.curves(axes, TABLE, "share", "kept", by="system")
    (saved,) = study.recorder.record.figures
    assert (saved.id, saved.caption) == ("fig:toy-curve", "A curve.")
    assert pd.read_csv(study.recorder.directory / "figure_curve.csv").equals(TABLE)
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["a", "b"]
    assert not plt.get_fignums()


def test_figure_that_fails_is_closed_and_not_recorded(study):
    with pytest.raises(RuntimeError), charts.figure(study, "fig:toy-curve", TABLE, caption="A curve."):
        raise RuntimeError
    assert not plt.get_fignums()
    assert not study.recorder.record.figures


@pytest.mark.parametrize("names", [("kept_low", "kept_high"), ("low", "high")])
def test_error_bars_reach_from_the_value_to_its_ends_and_unbounded_ends_have_none(names):
    rows = pd.DataFrame({"kept": [90.0, 80.0], names[0]: [88.0, -np.inf], names[1]: [93.0, np.inf]})
    assert charts.error_bars(rows, "kept").tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_no_interval_means_no_bars():
    assert charts.error_bars(TABLE[TABLE["system"] == "b"], "kept") is None
    assert charts.error_bars(TABLE[["kept"]], "kept") is None


def test_curves_draw_the_systems_that_have_a_look_in_its_order(axes):
    look = {"b": Look("red", label="second"), "nothing": Look(), "a": Look("blue")}
    charts.curves(axes, TABLE, "share", "kept", by="system", look=look)
    assert axes.get_legend_handles_labels()[1] == ["second", "a"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert [line.get_ydata().tolist() for line in lines] == [[100, 70], [100, 90]]


def test_dots_stand_in_rows_from_the_top_down_beside_each_other(axes):
    charts.dots(
        axes, TABLE.replace({"share": {0: "none", 50: "half"}}), "share", "kept", by="system", spread=0.2
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "half"]
    assert axes.get_yticks().tolist() == [1, 0]
    first, second = (container.lines[0].get_ydata() for container in axes.containers)
    assert first.tolist() == [1.1, 0.1]
    assert second.tolist() == [0.9, -0.1]


def test_front_holds_what_no_other_beats():
    size, kept = pd.Series([10, 20, 20, 30]), pd.Series([80.0, 95.0, 90.0, 95.0])
    assert charts.on_front(size, kept) == [True, True, False, False]


def test_relative_costs_are_in_percent_of_the_full_model():
    costs = pd.DataFrame({"depth": [6, 3], "seconds": [2.0, 1.5], "bytes": [100, 60]})
    table = charts.relative(
        costs, costs.iloc[0], costs["depth"].rename("layers"), time_needed="seconds", size="bytes"
    )
    assert json.loads(table.to_json(orient="records")) == [
        {"layers": 3, "time needed": 75.0, "size": 60.0},
        {"layers": 6, "time needed": 100.0, "size": 100.0},
    ]


def test_labels_hide_neither_points_nor_each_other(axes):
    table = pd.DataFrame({"x": [1.0, 1.02, 1.04, 3.0], "y": [1.0, 1.0, 1.01, 2.0], "name": list("abcd")})
    axes.plot(table["x"], table["y"], "o")
    charts.label_points(axes, table, "x", "y", "name", ["black"] * 4)
    boxes = [charts.Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(
        box.contains(*axes.transData.transform(point)) for box in boxes for point in table[["x", "y"]].values
    )


def test_ends_of_lines_are_named_in_a_column_in_their_order(axes):
    ends = pd.DataFrame({"x": [1, 2, 3], "y": [50.0, 51.0, 10.0], "name": ["a", "b", "c"]})
    axes.set(xlim=(0, 3), ylim=(0, 100))
    charts.label_ends(axes, ends, "x", "y", "name", dict.fromkeys("abc", "black"))
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights == pytest.approx({"c": 10, "a": 50, "b": 57})
