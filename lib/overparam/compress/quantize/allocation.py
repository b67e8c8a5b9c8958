"""Mixed precision: which parts of a model get more bits than others, at a size that is given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def allocate_bits(
    harm: Mapping[str, Mapping[int, float]], size: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Choose bits for every part so that the harm is small and the size within the budget.

    Harm of parts is taken to add up, so that the choice is an integer programme, as in HAWQ-V3 (arXiv 2011.10680), and
    is solved exactly. Going up greedily is not enough: small parts would use up the room that a large one needs.

    Args:
        harm: {part: {bits: harm of rounding that part alone}}, such as a mean divergence from the model as it is.
        size: {part: {bits: bits that it takes}}; the same parts and numbers of bits.
        budget: The most that all parts may take together.

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
    found = milp(
        [harm[part][bits] for part, bits in options],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[room, one_each],
    )
    return {part: bits for (part, bits), chosen in zip(options, found.x, strict=True) if chosen > 0.5}
