"""Mixed precision: how many bits each part of a model gets, for a given total size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def allocate_bits(
    harm: Mapping[str, Mapping[int, float]], size: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Choose bits for every part so that the total harm is minimal and the total size within the budget.

    The harm of parts is assumed to be additive. The choice is then an integer programme, as in HAWQ-V3 (arXiv
    2011.10680), which is solved exactly. A greedy choice is worse: small parts use up the room that a large one needs.

    Args:
        harm: {part: {bits: harm of rounding that part alone}}, such as the mean divergence from the unrounded model.
        size: {part: {bits: size in bits}}; the same parts and numbers of bits.
        budget: Maximum total size in bits.

    Returns:
        {part: bits}.

    Raises:
        ValueError: Parts or bits differ, there are none, or even the fewest bits exceed the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if (
        not harm
        or harm.keys() != size.keys()
        or any(harm[p].keys() != size[p].keys() or not harm[p] for p in harm)
    ):
        raise ValueError(
            "harm and size must have the same parts, at least 1, and the same bits for each of them"
        )
    least = sum(min(of.values()) for of in size.values())
    if least > budget:
        raise ValueError(f"the fewest bits take {least}, more than the budget of {budget}")
    options = [(part, bits) for part in harm for bits in sorted(harm[part])]
    sizes = [size[part][bits] for part, bits in options]
    unit = math.gcd(*sizes)  # small whole numbers, which the solver compares without error
    room = LinearConstraint(np.array([sizes]) // unit, ub=budget // unit)
    one_each = LinearConstraint(np.array([[part == own for part, _ in options] for own in harm]), 1, 1)
    solution = milp(
        [harm[part][bits] for part, bits in options],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[room, one_each],
    )
    return {part: bits for (part, bits), chosen in zip(options, solution.x, strict=True) if chosen > 0.5}
