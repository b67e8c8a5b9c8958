import math

import pytest

from overparam.record import claims
from overparam.record.stats import Estimate


def ci(low, high):
    return Estimate((low + high) / 2, low, high, 10)


def verdict(kind, low, high, **arguments):
    return claims.judge(kind, ci(low, high), **arguments)[0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-1.0, 0.2, "reproduced"),
        (-1.01, 0.2, "inconclusive"),
        (0.5, 3.0, "reproduced"),
        (-3.0, -1.0, "inconclusive"),
        (-3.0, -1.01, "not reproduced"),
    ],
)
def test_no_worse_than_a_margin(low, high, expected):
    assert verdict("no_worse", low, high, margin=1.0) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-5.5, -4.0, "reproduced"),
        (-7.0, -6.1, "reproduced"),  # meets the lower end of −5.1 ± 1
        (-7.0, -6.11, "reproduced in direction"),
        (-3.0, -1.0, "reproduced"),  # loses less than published
        (0.5, 2.0, "reproduced"),
        (-12.0, -8.0, "reproduced in direction"),
        (-14.0, -8.0, "not reproduced"),  # further from zero than direction_within
        (-11.0, 1.0, "inconclusive"),  # wider than ± 5.1
        (-10.0, 0.0, "reproduced"),
    ],
)
def test_difference_from_a_published_number(low, high, expected):
    assert verdict("difference", low, high, margin=1.0, published=-5.1, direction_within=10.5) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 2, "reproduced"), (0, 2, "inconclusive"), (-1, 2, "inconclusive"), (-1, 0, "not reproduced")],
)
def test_better_than_nothing(low, high, expected):
    assert verdict("better", low, high, margin=0) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-10, 10, "reproduced"),
        (-11, 2, "inconclusive"),
        (3, 12, "inconclusive"),
        (11, 12, "not reproduced"),
        (-30, -11, "not reproduced"),
    ],
)
def test_unchanged_in_either_direction(low, high, expected):
    assert verdict("unchanged", low, high, margin=10) == expected


def test_direction_alone_needs_the_same_side_of_zero():
    assert verdict("difference", 0.1, 0.5, margin=0.2, published=2.0) == "reproduced in direction"
    assert verdict("difference", 0.0, 0.5, margin=0.2, published=2.0) == "not reproduced"
    assert verdict("difference", -0.5, -0.1, margin=0.2, published=2.0) == "not reproduced"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.8, 0.9, "reproduced"),
        (1.1, 1.3, "reproduced"),
        (1.11, 1.3, "reproduced in direction"),
        (0.2, 0.89, "reproduced in direction"),
        (0.0, 0.89, "not reproduced"),
        (-0.1, 1.0, "inconclusive"),
    ],
)
def test_cost_in_proportion(low, high, expected):
    assert verdict("proportional", low, high, margin=0.1) == expected


def test_the_rule_says_its_numbers():
    _, rule = claims.judge(
        "difference", ci(-1, 0), margin=1.0, published=-0.3, direction_within=3, unit="points"
    )
    assert "−0.3 points ± 1" in rule
    assert "within 3 points" in rule
    assert "−0.5 points" in claims.judge("no_worse", ci(-1, 0), margin=0.5, unit="points")[1]


def test_what_cannot_be_measured_says_why():
    arguments = {"source": "s", "published": "p", "kind": "no_worse", "measured": None, "margin": 1}
    with pytest.raises(ValueError, match="say why"):
        claims.judged("a", "b", **arguments)
    claim = claims.judged("a", "b", **arguments, note="needs 8 B parameters")
    assert claim.verdict == "not testable at this scale"
    assert claims.Claim.from_dict(claim.to_dict()) == claim


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "equal", "margin": 1}, "unknown kind.*proportional"),
        ({"kind": "no_worse", "margin": -1}, "at least 0"),
        ({"kind": "no_worse", "margin": math.nan}, "at least 0"),
        ({"kind": "difference", "margin": 1}, "published="),
        ({"kind": "no_worse", "margin": 1, "measured": ci(math.nan, 0)}, "NaN"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        claims.judge(measured=arguments.pop("measured", ci(0, 1)), **arguments)


def test_a_verdict_that_was_typed_is_refused():
    good = claims.judged(
        "a", "b", source="s", published="p", kind="no_worse", measured=ci(0, 1), margin=1
    ).to_dict()
    with pytest.raises(ValueError, match="great"):
        claims.Claim.from_dict(good | {"verdict": "great"})
    with pytest.raises(ValueError, match="colour"):
        claims.Claim.from_dict(good | {"colour": 1})
