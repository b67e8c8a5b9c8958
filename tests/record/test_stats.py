import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score

from overparam.record import stats
from overparam.record.stats import Estimate


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def close(estimate, reference, tolerance):
    assert estimate.low == pytest.approx(reference.low, abs=tolerance)
    assert estimate.high == pytest.approx(reference.high, abs=tolerance)


def scipy_interval(data, statistic, n_resamples=9_999):
    return scipy_stats.bootstrap(
        data,
        statistic,
        paired=len(data) > 1,
        vectorized=False,
        method="percentile",
        n_resamples=n_resamples,
        random_state=1,
    ).confidence_interval


def test_mean_agrees_with_scipy(rng):
    items = rng.random(80)
    estimate = stats.bootstrap(items)
    assert estimate.value == pytest.approx(items.mean())
    assert estimate.n == 80
    close(estimate, scipy_interval((items,), np.mean), 0.004)


def test_mean_agrees_with_the_normal_closed_form(rng):
    items = rng.normal(2.0, 1.0, size=2_000)
    estimate = stats.bootstrap(items)
    half = 1.96 * items.std() / math.sqrt(len(items))
    close(estimate, Estimate(0, items.mean() - half, items.mean() + half, 0), 0.004)


def test_retention_and_difference_agree_with_scipy_paired(rng):
    baseline = rng.random(60)
    compressed = np.clip(baseline - 0.1 + rng.normal(0, 0.05, 60), 0, 1)
    kept = stats.retention(baseline, compressed)
    assert kept.value == pytest.approx(compressed.mean() / baseline.mean())
    close(kept, scipy_interval((baseline, compressed), lambda b, c: c.mean() / b.mean()), 0.005)
    change = stats.difference(baseline, compressed)
    assert change.value == pytest.approx(compressed.mean() - baseline.mean())
    close(change, scipy_interval((baseline, compressed), lambda b, c: c.mean() - b.mean()), 0.002)


def test_pairing_narrows_the_interval(rng):
    baseline = rng.random(200)
    compressed = baseline - 0.1
    change = stats.difference(baseline, compressed)
    assert change.high - change.low < 1e-12
    shuffled = stats.difference(baseline, rng.permutation(compressed))
    assert shuffled.high - shuffled.low > 0.05


def test_spearman_agrees_with_scipy_also_with_ties(rng):
    items = np.round(rng.normal(size=(50, 2)) @ [[1, 0.6], [0, 0.8]], 1)
    estimate = stats.bootstrap(items, statistic="spearman", n_resamples=4_000)
    assert estimate.value == pytest.approx(scipy_stats.spearmanr(items[:, 0], items[:, 1]).statistic)
    reference = scipy_interval(
        (items[:, 0], items[:, 1]), lambda x, y: scipy_stats.spearmanr(x, y).statistic, n_resamples=1_500
    )
    close(estimate, reference, 0.03)


def test_spearman_of_a_constant_is_zero():
    assert stats.bootstrap(np.array([[1.0, 1.0], [1.0, 2.0]]), statistic="spearman").value == 0


@pytest.mark.parametrize("decimals", [1, 6])
def test_average_precision_agrees_with_sklearn_also_with_ties(rng, decimals):
    labels = rng.integers(2, size=(20, 40)).astype(float)
    scores = np.round(labels * 0.3 + rng.random((20, 40)), decimals)
    batch = stats.STATISTICS["average_precision"](np.stack([scores, labels], axis=-1))
    expected = [average_precision_score(y, s) for y, s in zip(labels, scores, strict=True)]
    np.testing.assert_allclose(batch, expected)


def test_seed_decides_the_draws(rng):
    items = rng.random(30)
    assert stats.bootstrap(items) == stats.bootstrap(items)
    assert stats.bootstrap(items, seed=1) != stats.bootstrap(items)


def test_means_are_drawn_in_chunks_without_changing_the_result(rng, monkeypatch):
    items = rng.random(50)
    whole = stats.bootstrap(items)
    monkeypatch.setattr(stats, "_CHUNK", 1_000)
    assert stats.bootstrap(items).low == pytest.approx(whole.low, abs=1e-3)


def test_coverage_of_the_interval_is_near_its_confidence(rng):
    hits = 0
    for trial in range(300):
        baseline = rng.normal(0.7, 0.2, 100)
        compressed = baseline * 0.8 + rng.normal(0, 0.1, 100)
        kept = stats.retention(baseline, compressed, n_resamples=600, seed=trial)
        hits += kept.low <= 0.8 <= kept.high
    assert 0.90 <= hits / 300 <= 0.985


def test_seeds_widen_the_interval_and_average_the_value(rng):
    items = rng.random(400)
    seeds = [items + shift for shift in (-0.2, 0.0, 0.2)]
    estimate = stats.bootstrap(seeds)
    single = stats.bootstrap(items)
    assert estimate.value == pytest.approx(items.mean())
    assert estimate.high - estimate.low > 3 * (single.high - single.low)
    # the variance of crossed draws is the sum of both parts: seeds (n = 3) and items (n = 400)
    change = stats.difference(seeds, [one - 0.1 for one in seeds])
    assert (change.low, change.high) == pytest.approx((-0.1, -0.1))


def test_one_baseline_run_serves_several_compressed_seeds(rng):
    items = rng.random(50)
    change = stats.difference(items, [items + 0.1, items + 0.3])
    assert change.value == pytest.approx(0.2)
    assert change.low == pytest.approx(0.1)
    assert change.high == pytest.approx(0.3)


def test_suite_is_the_mean_over_tasks(rng):
    one, two = rng.random(40) + 0.5, rng.normal(size=(30, 2))
    worse = np.column_stack([two[:, 0] + rng.normal(size=30), two[:, 1]])
    pairs = {"a": (one, one * 0.9, "mean"), "b": (two, worse, "spearman")}
    base = (one.mean() + scipy_stats.spearmanr(*two.T).statistic) / 2
    small = (0.9 * one.mean() + scipy_stats.spearmanr(*worse.T).statistic) / 2
    change = stats.suite_difference(pairs)
    assert change.value == pytest.approx(small - base)
    assert change.low < change.value < change.high
    assert change.n == 70
    assert stats.suite_retention({"a": pairs["a"]}).value == pytest.approx(0.9)


def test_suite_interval_agrees_with_independent_tasks(rng):
    one, two = rng.random(100), rng.random(150)
    change = stats.suite_difference({"a": (one * 0, one, "mean"), "b": (two * 0, two, "mean")})
    half = 1.96 * math.sqrt(one.var() / 100 + two.var() / 150) / 2
    assert (change.high - change.low) / 2 == pytest.approx(half, rel=0.04)


def test_a_model_against_itself_keeps_all(rng):
    items = rng.random(20)
    assert stats.retention(items, items) == Estimate(1.0, 1.0, 1.0, 20)
    assert stats.difference(items, items) == Estimate(0.0, 0.0, 0.0, 20)


def test_retention_of_a_baseline_that_may_be_zero_is_unbounded(rng):
    baseline = rng.normal(0.0, 1.0, 50)
    baseline += 0.01 - baseline.mean()
    estimate = stats.retention(baseline, baseline + 1)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    assert Estimate.from_dict(estimate.to_dict()) == estimate
    assert estimate.to_dict()["low"] is None


def test_retention_of_a_zero_baseline_is_an_error():
    with pytest.raises(ValueError, match=r"other than 0.*use difference"):
        stats.retention(np.zeros(5), np.ones(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.retention(np.ones(4), np.ones(5)), "baseline has 4, compressed has 5"),
        (lambda: stats.bootstrap(np.array([1.0, np.nan])), "NaN"),
        (lambda: stats.retention(np.array([np.nan]), np.ones(1)), "NaN"),
        (lambda: stats.bootstrap(np.array([])), "n ≥ 1"),
        (lambda: stats.bootstrap(np.ones(3), statistic="median"), "unknown statistic 'median'.*spearman"),
        (lambda: stats.bootstrap([np.ones(3), np.ones(4)]), "every seed needs the same items"),
        (lambda: stats.difference([np.ones(3)] * 2, [np.ones(3)] * 3), r"got \[2, 3\]"),
        (lambda: stats.bootstrap(np.ones(3), confidence=95), "between 0 and 1"),
        (lambda: stats.bootstrap(np.ones(3), n_resamples=0), "at least 1"),
        (lambda: stats.suite_difference({}), "no task"),
        (lambda: stats.suite_difference({"lee": (np.ones(2), np.ones(3), "mean")}), "task lee"),
        (lambda: stats.holm([0.1, 1.2]), r"0\.\.1"),
        (lambda: stats.holm([0.1, math.nan]), r"0\.\.1"),
        (lambda: stats.equivalent(Estimate(0, 0, 0, 1), -1), "at least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holm_by_hand():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.9, 0.8]), [1.0, 1.0])
    assert stats.holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-1.0, 1.0, "equivalent"),
        (-1.01, 0.5, "inconclusive"),
        (-3.0, -1.0, "inconclusive"),
        (-3.0, -1.01, "worse"),
        (1.01, 2.0, "better"),
        (0.2, 1.01, "inconclusive"),
    ],
)
def test_equivalence_at_the_edges(low, high, verdict):
    assert stats.equivalent(Estimate((low + high) / 2, low, high, 9), 1.0) == verdict


def test_the_lower_end_stays_below_whatever_the_factor():
    found = stats.Estimate(2.0, 1.0, 4.0, 9)
    assert found.scaled(-1) == stats.Estimate(-2.0, -4.0, -1.0, 9)
    assert found.scaled(100) == stats.Estimate(200.0, 100.0, 400.0, 9)
