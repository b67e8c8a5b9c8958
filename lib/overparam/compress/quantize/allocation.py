"""Mixed precision: which parts of a model get more bits than others, at a size that is given."""

from __future__ import annotations

from collections.abc import Mapping


def allocate_bits(
    harm: Mapping[str, Mapping[int, float]], size: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Choose bits for every part so that the harm is small and the size within the budget.

    Greedy from the fewest bits up: the step that takes the most harm away for each bit of size comes next (the marginal
    analysis of Fox 1966, optimal for convex curves at the sizes that it passes). Harm of parts is taken to add up.

    Args:
        harm: {part: {bits: harm of rounding that part alone}}, such as a mean divergence from the model as it is.
        size: {part: {bits: bits that it takes}}; the same parts and numbers of bits.
        budget: The most that all parts may take together.

    Returns:
        {part: bits}.

    Raises:
        ValueError: Parts or bits differ, there are none, or even the fewest bits exceed the budget.
    """
    if (
        not harm
        or harm.keys() != size.keys()
        or any(harm[p].keys() != size[p].keys() or not harm[p] for p in harm)
    ):
        raise ValueError(
            "harm and size must have the same parts, at least 1, and the same bits for each of them"
        )
    chosen = {part: min(harm[part]) for part in harm}
    spent = sum(size[part][bits] for part, bits in chosen.items())
    if spent > budget:
        raise ValueError(f"the fewest bits take {spent}, more than the budget of {budget}")
    while True:
        steps = [
            ((harm[part][now] - harm[part][more]) / (size[part][more] - size[part][now]), part, more)
            for part, now in chosen.items()
            for more in harm[part]
            if more > now
            and harm[part][more] < harm[part][now]
            and spent + size[part][more] - size[part][now] <= budget
        ]
        if not steps:
            return chosen
        _, part, more = max(steps)
        spent += size[part][more] - size[part][chosen[part]]
        chosen[part] = more
