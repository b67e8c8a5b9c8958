import math

import numpy as np
import pytest
from scipy import stats

from overparam.measure import tune


class Machine:
    """Cells that say how long they took, on a machine that drifts and makes noise; no time passes."""

    def __init__(self, seed=0, noise=0.0, drift=0.0):
        self.random, self.noise, self.drift, self.calls = np.random.default_rng(seed), noise, drift, 0

    def cell(self, seconds):
        def call():
            self.calls += 1
            slow = math.exp(
                self.drift * math.sin(self.calls / 40) + self.noise * self.random.standard_normal()
            )
            return float(seconds * slow)

        return call


def row(found, name):
    return found.table.set_index("cell").loc[name]


def test_ratios_are_times_as_fast_as_the_reference():
    m = Machine()
    found = tune.paired({"ref": m.cell(2.0), "fast": m.cell(0.5), "slow": m.cell(4.0)}, "ref", rounds=6)
    assert list(found.table["cell"]) == ["fast", "ref", "slow"]
    assert row(found, "fast")[["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx([4, 4, 4])
    assert row(found, "slow")["ratio"] == pytest.approx(0.5)
    assert row(found, "ref")["ratio"] == 1
    assert len(found.rounds) == 12


def test_a_drift_of_the_machine_meets_a_cell_and_its_neighbour_alike():
    m = Machine(drift=1.0)
    cells = {"ref": m.cell(1.0)} | {f"c{i}": m.cell(1.25) for i in range(9)}
    found = tune.paired(cells, "ref", rounds=21)
    raw = found.rounds.groupby("cell")["seconds"].median()
    ratios = found.table[found.table["cell"] != "ref"]["ratio"]
    assert np.abs(ratios - 0.8).max() < 0.03
    assert raw.max() / raw.min() > 1.05  # what unpaired medians would have said


def test_a_thing_compared_with_itself_gives_one():
    holds = 0
    for seed in range(20):
        m = Machine(seed, noise=0.2, drift=0.3)
        found = row(tune.paired({"a": m.cell(1.0), "b": m.cell(1.0)}, "a", rounds=15, seed=seed), "b")
        holds += found["ratio_low"] <= 1 <= found["ratio_high"]
    assert holds >= 17


def test_the_interval_is_the_percentile_bootstrap_of_the_median():
    logs = np.random.default_rng(1).normal(0.3, 0.2, 25)
    value, low, high = tune.interval(list(logs))
    expected = stats.bootstrap(
        (logs,), np.median, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert value == pytest.approx(math.exp(np.median(logs)))
    assert (low, high) == pytest.approx(tuple(np.exp(expected)), rel=0.03)


def test_few_rounds_have_no_interval():
    assert np.isnan(tune.interval([0.1, 0.2])[1])
    assert np.isnan(tune.interval([])[0])


def test_a_cell_is_timed_if_it_says_nothing():
    found = tune.paired({"a": lambda: None, "b": lambda: "text"}, "a", rounds=5)
    assert (found.rounds["seconds"] > 0).all()


def test_much_slower_cells_are_given_up_after_one_round():
    m = Machine()
    found = tune.paired(
        {"ref": m.cell(1.0), "slow": m.cell(9.0), "near": m.cell(2.0)}, "ref", rounds=6, give_up=4
    )
    assert row(found, "slow")["rounds"] == 1
    assert "more than 4 times as slow" in row(found, "slow")["status"]
    assert np.isnan(row(found, "slow")["ratio_low"])
    assert row(found, "near")["rounds"] == 6


def test_a_cell_that_fails_is_listed_and_the_others_go_on():
    m = Machine()

    def broken():
        raise RuntimeError("no kernel for this shape\nat line 3")

    cells = {"ref": m.cell(1.0), "broken": broken, "fast": m.cell(0.5)}
    for found in (tune.paired(cells, "ref", rounds=5), tune.halving(cells, "ref", budget_s=60)):
        assert row(found, "broken")["status"] == "failed: no kernel for this shape"
        assert row(found, "fast")["ratio"] == pytest.approx(2)
    with pytest.raises(RuntimeError, match="no kernel"):
        tune.paired({"ref": broken, "fast": m.cell(0.5)}, "ref")


@pytest.mark.parametrize("seed", range(3))
def test_halving_finds_the_fastest_of_many_with_a_fraction_of_the_calls(seed):
    m = Machine(seed, noise=0.1, drift=0.3)
    cells = {f"c{i}": m.cell(1.0 + 0.1 * i) for i in range(30)} | {"ref": m.cell(1.5)}
    found = tune.halving(cells, "ref", budget_s=60, seed=seed, prepared=True)
    assert found.best in {"c0", "c1"}
    assert row(found, found.best)["ratio_low"] > 1
    many = m.calls
    tune.paired(cells, "ref", rounds=15)
    assert many < 0.5 * (m.calls - many)


def test_the_default_stays_where_nothing_is_faster():
    m = Machine(noise=0.1)
    found = tune.halving({"ref": m.cell(1.0), "a": m.cell(1.3), "b": m.cell(2.0)}, "ref", budget_s=60)
    assert found.best == "ref"


def test_a_budget_that_is_too_small_is_refused(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(ValueError, match="budget_s = 2 ended before any of 1 cells was compared"):
        tune.halving({"ref": lambda: None, "a": lambda: None}, "ref", budget_s=2)


def test_cells_that_the_budget_does_not_reach_are_listed(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: float(next(clock)))
    cells = {"ref": lambda: None} | {f"c{i}": lambda: None for i in range(100)}
    found = tune.halving(cells, "ref", budget_s=200)
    assert (found.table["status"] == "not reached within the budget").sum() > 10
    assert found.table["ratio"].notna().sum() > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: tune.paired(c, "none"), "reference must be one of the cells"),
        (lambda c: tune.paired({"ref": c["ref"]}, "ref"), "besides the reference"),
        (lambda c: tune.paired(c, "ref", rounds=0), "rounds must be at least 1"),
        (lambda c: tune.halving(c, "ref", budget_s=0), "budget_s must be above 0"),
        (lambda c: tune.halving(c, "ref", budget_s=1, keep=1.0), "keep must be above 0 and below 1"),
    ],
)
def test_bad_calls_are_refused(call, message):
    m = Machine()
    with pytest.raises(ValueError, match=message):
        call({"ref": m.cell(1.0), "a": m.cell(1.0)})
