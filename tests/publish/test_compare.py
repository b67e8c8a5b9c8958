import json
import shutil

import numpy as np
import pandas as pd
import pytest

from overparam.cli import commands
from overparam.publish import compare, inventory
from overparam.record import paired_items, record
from overparam.record.stats import Estimate


@pytest.fixture
def write(tmp_path):
    """Write a results folder with one record: metrics and items as given."""

    def make(name, metrics, items=None, slug="tiny"):
        recorder = record.start(
            "layers", {"model": slug}, slug=slug, directory=tmp_path / name / "layers" / f"{slug}-1"
        )
        for key, (value, unit) in metrics.items():
            recorder.metric(key, value, unit)
        if items is not None:
            recorder.items("items", items)
        recorder.finish()
        return tmp_path / name

    return make


def scores(shift=0.0, seed=0, systems=("full", "cut")):
    rng = np.random.default_rng(1)
    noise = np.random.default_rng(seed)
    frames = [
        pd.DataFrame({"system": system, "task": task, "item": range(60), "value_0": rng.normal(0.5, 0.1, 60)})
        for system in systems
        for task in ("a", "b")
    ]
    frame = pd.concat(frames, ignore_index=True)
    moved = frame["value_0"] + noise.normal(0, 0.01, len(frame)) * (seed > 0)
    frame["value_0"] = (moved + shift * (frame["system"] == "cut")).astype(np.float32)
    return frame


def states(a, b):
    return {row.name: row.state for row in compare.compare(inventory.take(a), inventory.take(b))}


def test_two_runs_with_the_same_seed_show_no_difference(write, capsys):
    quality = {"chrf": (Estimate(50.1, 48.0, 52.0, 200), "points"), "pick_small": (7, "blocks")}
    a = write("a", quality | {"training_hours": (1.5, "h")}, scores())
    b = write("b", quality | {"training_hours": (1.9, "h")}, scores())
    assert states(a, b) == {
        "chrf": "identical",
        "pick_small": "identical",
        "training_hours": "not judged",
        "items of items": "identical",
    }
    assert commands.main(["compare", str(a), str(b)], a) == 0
    assert "no quality metric differs" in capsys.readouterr().out


def test_metrics_agree_when_the_interval_of_their_difference_holds_zero(write):
    a = write("a", {"x": (Estimate(50, 48, 52, 9), ""), "y": (Estimate(50, 49, 51, 9), ""), "z": (3.0, "")})
    b = write("b", {"x": (Estimate(52, 50, 54, 9), ""), "y": (Estimate(54, 53, 55, 9), ""), "z": (3.1, "")})
    assert states(a, b) == {"x": "agree", "y": "differ", "z": "differ"}
    assert commands.main(["compare", str(a), str(b)], a) == 1


def test_what_only_one_folder_has_is_a_difference(write):
    a = write("a", {"x": (1, ""), "only_here": (2, "")})
    b = write("b", {"x": (1, "")})
    write("b", {"x": (1, "")}, slug="other")
    assert states(a, b) == {"x": "identical", "only_here": "only in A", "record": "only in B"}


@pytest.mark.parametrize(
    ("name", "unit", "cost"),
    [
        ("training_hours", "h", True),
        ("cost_slope", "", True),
        ("speed_up_0.1", "times the teacher's speed", True),
        ("peak_bytes", "bytes", True),
        ("single_seconds", "", True),
        ("kwh_per_million_tokens", "", True),
        ("model_bytes", "bytes", False),
        ("chrf_en_fr", "points", False),
        ("retention_at_7", "", False),
        ("validation_loss", "nats per token", False),
        ("super_experts", "", False),
        ("anything_new", "", False),
    ],
)
def test_costs_are_told_from_quality_by_their_words(name, unit, cost):
    assert compare.is_cost(name, unit) is cost


def test_items_are_compared_in_pairs(write):
    near = paired_items.compare(scores(), scores(seed=2))
    assert near[0][0] == "agree"
    assert "240 items, 240 with different scores; 0 of 4 groups differ" in near[0][1]
    far = paired_items.compare(scores(), scores(shift=0.05, seed=2))
    assert [state for state, _ in far] == ["differ"] * 3
    assert far[1][1].startswith("cut a mean: B − A 0.0")
    a, b = write("a", {}, scores()), write("b", {}, scores(shift=0.05, seed=2))
    assert len(compare.differences(compare.compare(inventory.take(a), inventory.take(b)))) == 3


def test_groups_keep_items_whose_names_are_missing():
    named, unnamed = scores(), scores(shift=0.05, seed=2)
    for each in (named, unnamed):
        each["seed"] = np.nan
    assert [state for state, _ in paired_items.compare(named, unnamed)] == ["differ"] * 3


def test_items_that_do_not_match_are_said_to_be_without_partner():
    some = scores().query("item < 50")
    ((state, detail),) = paired_items.compare(scores(), some)
    assert (state, detail) == ("identical", "200 items, every score the same; 40 without a partner")
    assert paired_items.compare(scores(), scores(systems=("x",)))[0][0] == "differ"
    assert paired_items.compare(scores(), scores().assign(extra=1))[0][1] == "the columns are not the same"
    twice = pd.concat([scores(), scores()])
    assert "items cannot be identified" in paired_items.compare(twice, twice)[0][1]


def test_a_folder_without_records_is_bad_input(write, tmp_path):
    a = write("a", {"x": (1, "")})
    with pytest.raises(ValueError, match="nothing to compare"):
        commands.main(["compare", str(a), str(tmp_path / "nowhere")], tmp_path)


def test_a_broken_record_is_noted_and_the_rest_compared(write, capsys):
    a = write("a", {"x": (1, "")})
    write("a", {"x": (1, "")}, slug="broken")
    b = a.with_name("b")
    shutil.copytree(a, b)
    path = a / "layers" / "broken-1" / "record.json"
    path.write_text(json.dumps({"schema": 1}))
    assert commands.main(["compare", str(a), str(b)], a) == 1
    printed = capsys.readouterr().out
    assert "note:" in printed
    assert "only in B" in printed
