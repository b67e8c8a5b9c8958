import itertools
import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import hypergeom

from overparam.compress import experts


def masses(rng, layers=5, count=7):
    mass = rng.dirichlet(np.full(count, 0.3), size=layers)
    mass[0, 0] = 0
    return mass / mass.sum(axis=1, keepdims=True)


def test_divergence_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = masses(rng), masses(rng)
        expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
        np.testing.assert_allclose(experts.divergence(p, q), expected, atol=1e-12)
        np.testing.assert_array_equal(experts.divergence(p, q), experts.divergence(q, p))


def test_divergence_runs_from_zero_to_one():
    target = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    english = [[0.0, 0.4, 0.6], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]
    values = experts.divergence(target, english)
    assert values[0] == 1
    assert 0 < values[1] < 1
    assert values[2] == 0


@pytest.mark.parametrize(
    ("target", "english", "message"),
    [
        ([[0.5, 0.5]], [[0.5, 0.5]], "routing of two languages"),
        ([[0.5, 0.5]], [[0.5, 0.5], [1, 0]], "of one shape"),
        ([0.5, 0.5], [0.1, 0.9], "of one shape"),
        ([[0.5, 0.4]], [[0.1, 0.9]], "target must be a distribution"),
        ([[0.5, 0.5]], [[-0.1, 1.1]], "english must be a distribution"),
        ([[float("nan"), 0.5]], [[0.1, 0.9]], "target must be a distribution"),
    ],
)
def test_divergence_refuses_what_is_no_pair_of_routings(target, english, message):
    with pytest.raises(ValueError, match=message):
        experts.divergence(target, english)


def test_allocation_by_hand():
    # 4 layers, top-2, 8 experts, 16 kept: 8 are spare. Shares 8 * (.5 .25 .15 .1) = 4, 2, 1.2, .8.
    assert experts.allocate([0.5, 0.25, 0.15, 0.1], 16, 2, 8) == [6, 4, 3, 3]
    # 20 kept: 12 spare, shares 6, 3, 1.8, 1.2: the first is exactly full, the rest rounds by largest remainder.
    assert experts.allocate([0.5, 0.25, 0.15, 0.1], 20, 2, 8) == [8, 5, 4, 3]
    # 24 kept: 16 spare, the first would get 8 and is capped at 6; 10 go to the others by 5 : 3 : 2.
    assert experts.allocate([0.5, 0.25, 0.15, 0.1], 24, 2, 8) == [8, 7, 5, 4]
    # Capping the first sends the second over the cap too.
    assert experts.allocate([0.6, 0.3, 0.05, 0.05], 26, 2, 8) == [8, 8, 5, 5]


def test_ties_go_to_the_earlier_layer_and_leftovers_to_layers_without_divergence():
    assert experts.allocate([0.1, 0.1, 0.1], 8, 2, 8) == [3, 3, 2]
    assert experts.allocate([0.7, 0.0, 0.0], 8 + 3 + 2, 2, 8) == [8, 3, 2]
    assert experts.allocate_uniform(10, 4, 2, 8) == [3, 3, 2, 2]


def test_allocation_properties():
    rng = np.random.default_rng(1)
    for _ in range(400):
        layers, top_k = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        n_experts = int(rng.integers(top_k, 20))
        total = int(rng.integers(layers * top_k, layers * n_experts + 1))
        values = rng.exponential(size=layers) * (rng.random(layers) < 0.8)
        if not values.any():
            continue
        kept = experts.allocate(values, total, top_k, n_experts)
        assert sum(kept) == total
        assert all(top_k <= count <= n_experts for count in kept)
        assert kept == experts.allocate(values * 4, total, top_k, n_experts)
        for a, b in itertools.permutations(range(layers), 2):
            if values[a] > values[b]:
                assert kept[a] >= kept[b]
        inverse = experts.allocate_inverse(values, total, top_k, n_experts)
        assert sum(inverse) == total
        assert all(
            inverse[a] <= inverse[b]
            for a, b in itertools.permutations(range(layers), 2)
            if values[a] > values[b]
        )
        uniform = experts.allocate_uniform(total, layers, top_k, n_experts)
        assert sum(uniform) == total
        assert max(uniform) - min(uniform) <= 1


def best_of_all(values, total, top_k, n_experts):
    """The allocation nearest to the capped proportional shares, found by trying all of them, in exact arithmetic."""
    weights = [Fraction(float(value)) for value in values]
    spare, room = Fraction(total - len(values) * top_k), n_experts - top_k
    positive = sorted((weight for weight in weights if weight), reverse=True)
    shares = None
    for full in range(len(positive) + 1):  # the largest weights fill up, the rest is proportional
        left, rest = spare - full * room, sum(positive[full:])
        if left < 0:
            break
        if not rest:
            empty = weights.count(0)
            shares = [
                Fraction(room) if weight else (left / empty if empty else Fraction(0)) for weight in weights
            ]
        elif left / rest * positive[full] <= room:
            shares = [min(Fraction(room), left / rest * weight) for weight in weights]
        if shares is not None:
            break
    choices = itertools.product(range(room + 1), repeat=len(values))
    distances = {
        choice: sum((count - share) ** 2 for count, share in zip(choice, shares, strict=True))
        for choice in choices
        if sum(choice) == spare
    }
    nearest = min(distances.values())
    first = max(
        choice for choice, distance in distances.items() if distance == nearest
    )  # ties to earlier layers
    return [top_k + count for count in first]


def test_allocation_is_the_best_of_all_allocations():
    rng = np.random.default_rng(5)
    for _ in range(250):
        layers, top_k, room = (int(rng.integers(low, high)) for low, high in ((1, 5), (1, 3), (1, 6)))
        values = rng.choice([0.0, 0.25, 0.5, 1.0, 3.0], layers) if rng.random() < 0.5 else rng.random(layers)
        if not values.any():
            continue
        total = int(rng.integers(layers * top_k, layers * (top_k + room) + 1))
        case = (values, total, top_k, top_k + room)
        assert experts.allocate(*case) == best_of_all(*case), case
        mirrored = values.max() + values.min() - values
        if mirrored.any() and set(values) <= {0.0, 0.25, 0.5, 1.0, 3.0}:  # sums without rounding
            assert experts.allocate_inverse(*case) == best_of_all(mirrored, *case[1:]), case


def test_allocation_without_a_cap_is_the_proportional_share():
    rng = np.random.default_rng(2)
    for _ in range(50):
        values = rng.exponential(size=6)
        total = int(rng.integers(6 * 2, 200))
        kept = experts.allocate(values, total, 2, 1000)
        shares = 2 + (total - 12) * values / values.sum()
        assert all(math.floor(share - 1e-9) <= count <= math.ceil(share + 1e-9)
                   for count, share in zip(kept, shares, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], 3, 2, 8), r"total must be in 4\.\.16 .*got 3"),
        (([0.1, 0.2], 17, 2, 8), r"total must be in 4\.\.16 .*got 17"),
        (([0.0, 0.0], 8, 2, 8), "of the same language"),
        (([0.1, -0.2], 8, 2, 8), "not negative"),
        (([0.1, float("nan")], 8, 2, 8), "must be finite"),
        (([], 8, 2, 8), "one number per layer"),
        (([[0.1]], 8, 2, 8), "one number per layer"),
        (([0.1, 0.2], 8, 9, 8), r"top_k must be in 1\.\.8"),
        (([0.1, 0.2], 8, 0, 8), r"top_k must be in 1\.\.8"),
    ],
)
@pytest.mark.parametrize("allocate", [experts.allocate, experts.allocate_inverse])
def test_impossible_allocations_are_refused(allocate, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


def test_select_keeps_the_highest_with_ties_to_the_lower_id():
    scores = [[0.1, 0.5, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0]]
    assert experts.select(scores, [2, 3]) == [[1, 2], [0, 1, 2]]
    assert experts.select(scores, [1, 4]) == [[1], [0, 1, 2, 3]]
    assert experts.select([[0.9, 0.8, 0.1, 0.2]], [2], groups=2) == [[0, 3]]


def test_experts_can_be_ruled_out_or_kept_at_any_score():
    assert experts.select([[0.3, -math.inf, 0.1, 0.2], [0.3, math.inf, 0.1, 0.2]], [3, 2]) == [
        [0, 2, 3],
        [0, 1],
    ]


@pytest.mark.parametrize(
    ("scores", "counts", "groups", "message"),
    [
        ([[0.1, 0.2]], [1, 1], 1, "one count per layer"),
        ([0.1, 0.2], [1, 1], 1, "one count per layer"),
        ([[0.1, 0.2]], [3], 1, r"1\.\.2 experts, got 3"),
        ([[0.1, 0.2]], [0], 1, r"1\.\.2 experts, got 0"),
        ([[0.1, -math.inf]], [2], 1, r"1\.\.1 experts, got 2"),
        ([[0.1, math.nan]], [1], 1, "layer 0 are NaN"),
        ([[0.1, 0.2, 0.3, 0.4]], [3], 2, "do not divide into 2 equal groups"),
    ],
)
def test_impossible_selections_are_refused(scores, counts, groups, message):
    with pytest.raises(ValueError, match=message):
        experts.select(scores, counts, groups=groups)


def test_overlap():
    assert experts.kept_overlap([[0, 1], [2, 3]], [[1, 2], [2, 3]]) == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="2 and 1 layers"):
        experts.kept_overlap([[0], [1]], [[0]])
    with pytest.raises(ValueError, match="keeps no expert"):
        experts.kept_overlap([[]], [[]])


def test_expected_overlap_is_the_hypergeometric_expectation():
    for a, b, n in [(2, 2, 5), (8, 8, 32), (1, 4, 6), (5, 5, 5), (3, 6, 7)]:
        expected = sum(hypergeom(n, a, b).pmf(i) * i / (a + b - i) for i in range(min(a, b) + 1))
        assert experts.expected_overlap([a], n, other_counts=[b]) == pytest.approx(expected, abs=1e-12)
    assert experts.expected_overlap([2, 5], 5) == pytest.approx((experts.expected_overlap([2], 5) + 1) / 2)
    every = list(itertools.combinations(range(5), 2))
    mean = np.mean([experts.kept_overlap([a], [b]) for a in every for b in every])
    assert experts.expected_overlap([2], 5) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("counts", "message"), [([0], r"1\.\.4, got 0"), ([5], "got 5"), ([], "a count for each")]
)
def test_impossible_overlaps_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        experts.expected_overlap(counts, 4)


def test_budgets_by_measured_rises_have_the_smallest_sum_of_all():
    rng = np.random.default_rng(0)
    kept, top_k, n_experts, layers = [2, 3, 5], 2, 7, 3
    for _ in range(20):
        rises = np.sort(rng.random((layers, len(kept))), axis=1)[:, ::-1]
        cost = [np.interp(range(n_experts + 1), [*kept, n_experts], [*row, 0.0]) for row in rises]
        for total in range(layers * top_k, layers * n_experts + 1):
            found = experts.allocate_by_rise(rises, kept, total, top_k, n_experts)
            every = product(range(top_k, n_experts + 1), repeat=layers)
            best = min(
                sum(row[count] for row, count in zip(cost, counts, strict=True))
                for counts in every
                if sum(counts) == total
            )
            assert sum(found) == total
            assert sum(row[count] for row, count in zip(cost, found, strict=True)) == pytest.approx(best)


def test_a_layer_that_costs_most_keeps_most_and_noise_rewards_no_cut():
    assert experts.allocate_by_rise([[2.0, 1.0], [0.2, 0.1]], [1, 2], 5, 1, 4) == [4, 1]
    noisy = [[-0.3, 0.1], [0.1, -0.2]]  # a layer that keeps more is not worse
    assert experts.allocate_by_rise(noisy, [1, 2], 6, 1, 4) == [4, 2]


@pytest.mark.parametrize(
    ("rises", "kept", "total", "message"),
    [
        ([[1.0]], [1, 2], 3, "2 numbers of kept"),
        ([[math.nan, 0.0]], [1, 2], 3, "finite"),
        ([[1.0, 0.0]], [2, 1], 3, "must increase from 1"),
        ([[1.0, 0.0]], [1, 4], 3, "to below 4"),
        ([[1.0, 0.0]], [1, 2], 5, "total must be in 1..4"),
    ],
)
def test_measured_rises_that_cannot_be_used_are_refused(rises, kept, total, message):
    with pytest.raises(ValueError, match=message):
        experts.allocate_by_rise(rises, kept, total, 1, 4)
