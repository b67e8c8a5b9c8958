import time

import numpy as np
import pytest

from overparam.measure.speed import interleaved, latency


def test_latency_keeps_raw_values_and_leaves_out_the_warmup():
    calls = []

    def slow_at_first():
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    timing = latency(slow_at_first, warmup=2, repeats=5)
    assert len(calls) == 7
    assert len(timing.values) == 5
    assert timing.median == np.median(timing.values)
    assert min(timing.values) <= timing.low <= timing.median <= timing.high <= max(timing.values)
    assert 0.002 <= timing.median < 0.05


def test_interval_of_the_median_covers_it_as_often_as_it_says(monkeypatch):
    """95 % intervals of 15 exponential times hold the true median about 95 times in 100."""
    rng = np.random.default_rng(1)
    clock = [0.0]
    monkeypatch.setattr("overparam.measure.speed.time.perf_counter", lambda: clock[0])

    def step():
        clock[0] += rng.exponential()

    intervals = [latency(step, warmup=0, repeats=15) for _ in range(150)]
    covered = np.mean([timing.low <= np.log(2) <= timing.high for timing in intervals])
    assert 0.88 <= covered <= 0.99


def test_functions_take_turns():
    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, warmup=1, repeats=2)
    assert order == list("abcabcabc")
    assert list(timings) == list("abc")


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_impossible_counts_are_refused(options):
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        latency(lambda: None, **options)
    with pytest.raises(ValueError, match="at least one function"):
        interleaved({}, **options)
