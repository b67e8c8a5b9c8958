import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from overparam.publish import inventory
from overparam.record import record
from overparam.studies.claims import Params, pareto, plots
from overparam.studies.claims import study as steps

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "reference"
STUDIES = ("trailing_layer_pruning", "moe_expert_pruning", "distillation_retention", "quantization_accuracy")


@pytest.fixture(autouse=True)
def _no_runner(monkeypatch):
    for name in ("JOB_DIR", "JOB_KEY", "COMMAND", "PROGRESS", "PROFILE"):
        monkeypatch.delenv(f"OVERPARAM_{name}", raising=False)


def summarise(folder, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(folder))
    study = steps.start(Params())
    table = steps.claim_table(study)
    steps.check_table(study)
    list(plots.plot_forests(study, steps.forest(study)))
    plots.plot_pareto(study, pareto.points(study.found))
    steps.conditions(study)
    return table, study.finish()


def test_the_same_records_give_the_same_bytes(tmp_path, monkeypatch):
    _, first = summarise(tmp_path / "a", monkeypatch)
    _, second = summarise(tmp_path / "b", monkeypatch)
    studies = {source.study for _, source in inventory.take(RESULTS).verdicts("claim")}
    forests = {f"fig:claims-forest-{study.replace('_', '-')}" for study in studies}
    assert {figure.id for figure in first.figures} == {*forests, "fig:claims-pareto"}
    files = [name for figure in first.figures for name in figure.files]
    assert {Path(name).suffix for name in files} == {".pdf", ".png", ".csv"}
    assert [figure.files for figure in first.figures] == [figure.files for figure in second.figures]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_claim_is_in_the_table_with_its_verdict(tmp_path, monkeypatch):
    table, _ = summarise(tmp_path / "a", monkeypatch)
    found = inventory.take(RESULTS)
    claims = list(found.verdicts("claim"))
    assert len(table) == len(claims) + sum(entry.type == "claim" for entry in found.missing)
    assert set(table["verdict"]) <= {claim.verdict for claim, _ in claims} | {"no record"}
    assert not table["claim"].str.contains("chrF++ 42", regex=False).any()


def test_checks_say_whether_they_are_met(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    study = steps.start(Params())
    table = steps.check_table(study).set_index("check")
    assert table.loc["The small translator reaches chrF++ 42 from English into French", "outcome"] == "met"
    assert (table["outcome"] != "no record").sum() == len(list(study.found.verdicts("check")))
    counts = steps.counts(study)
    assert counts.to_numpy().sum() == len(list(study.found.verdicts("claim")))
    assert counts.index.tolist()[0] == "Trailing layer pruning"


def test_numbers_of_the_forest_are_in_points_or_percent(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    rows = steps.forest(steps.start(Params())).set_index(["claim", "model"])
    slope = rows.loc[("l3prune-cost", "Gemma")]
    assert slope["value"] == pytest.approx(0.87, abs=0.01)
    assert slope["published"] == 0
    assert rows.loc[("experts-shared", "translator"), "published"] == pytest.approx(46)
    assert (rows["low"] <= rows["value"]).all()


def test_the_pareto_figure_starts_at_the_full_model():
    points = pareto.points(inventory.take(RESULTS))
    full = points[points["size_percent"] == 100]
    np.testing.assert_allclose(full["kept_percent"], 100)
    np.testing.assert_allclose(full["speed"], 1)
    # another library's file of the same weights may be larger
    assert points["size_percent"].between(0, 101).all()
    assert set(points["study"]) == set(STUDIES)
    best = plots._unbeaten(points[(points["model"] == "Gemma") & (points["curve"] == "fewer bits")], "speed")
    assert best["speed"].is_monotonic_increasing
    assert best["kept_percent"].is_monotonic_decreasing
    assert len(best) > 1


def test_students_are_read_as_their_study_writes_them(tmp_path):
    recorder = record.start(
        "distillation_retention", {}, slug="mini", directory=tmp_path / "distillation_retention" / "m"
    )
    costs = pd.DataFrame({"share": [1.0, 0.1], "parameters": [1000, 100], "batch_seconds": [1.0, 0.2]})
    kept = {"kept": [100.0, 90.0, 50.0], "kept_low": [100.0, 88.0, 40.0], "kept_high": [100.0, 92.0, 60.0]}
    suite = pd.DataFrame(
        {"system": ["teacher", "distilled", "random weights"], "share": [1.0, 0.1, 0.1], **kept}
    )
    recorder.table("costs", costs)
    recorder.table("suite", suite)
    recorder.finish()
    points = pareto.points(inventory.take(tmp_path))
    assert points[["size_percent", "speed", "kept_percent"]].to_numpy().tolist() == [
        [100, 1, 100],
        [10, 5, 90],
    ]


def test_nothing_to_draw_is_said(tmp_path):
    assert pareto.points(inventory.take(tmp_path)).empty
    assert "no record" in plots.plot_pareto(None, pd.DataFrame())
    assert ["no record" in text for text in plots.plot_forests(None, pd.DataFrame())] == [True]


def test_an_unknown_folder_is_refused():
    with pytest.raises(ValueError, match="run a profile first"):
        Params(results="nowhere")


def test_report_and_verify_on_one_study_as_a_user_runs_them(tmp_path):
    results = tmp_path / "größe" / "mine"
    study = next((RESULTS / "trailing_layer_pruning").glob("all-mpnet-base-v2-*"))
    shutil.copytree(study, results / study.parent.name / study.name)

    def run(*arguments):
        command = [sys.executable, str(ROOT / "run_all.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    readme = (ROOT / "README.md").read_bytes()
    made = run("report", results)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "missing: moe_expert_pruning" in made.stdout
    assert (ROOT / "README.md").read_bytes() == readme
    assert "All claims" in (results / "REPORT.md").read_text()
    index = (results / "gallery" / "index.html").read_text()
    assert "fig:claims-forest-trailing-layer-pruning@" in index
    assert 'href="moe_expert' not in index
    checked = run("verify", results)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "all checks passed" in checked.stdout
    (results / study.parent.name / study.name / "figure_cost.csv").write_text("x\n1\n")
    checked = run("verify", results)
    assert checked.returncode == 1
    assert "figure_cost.csv: changed since" in checked.stdout
    assert "checks failed" in checked.stdout


def test_of_many_claims_of_one_kind_the_figure_shows_the_furthest():
    table = pd.DataFrame(
        {
            "study": ["a"] * 10,
            "entry": ["size-{model}"] * 9 + ["loss"],
            "claim": [f"size-{number}" for number in range(9)] + ["loss"],
            "statement": ["has its size"] * 9 + ["loses"],
            "value": [0.0, 0.1, -3.0, 0.2, 0.0, 0.0, 2.0, 0.0, 0.0, 5.0],
            "published": [0.0] * 9 + [None],
        }
    )
    found = steps._furthest(table)
    assert found["claim"].tolist() == ["size-2", "loss"]
    assert found["statement"].tolist() == ["has its size (the furthest of 9)", "loses"]
    few = table.iloc[5:]
    assert len(steps._furthest(few)) == len(few)
