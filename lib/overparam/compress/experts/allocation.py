"""How many experts each layer keeps, and which.

The layer budget follows arXiv 2605.28042: layers whose routing differs most between the target language and English
keep the most experts. `allocate_by_rise` is our own: layers whose cut costs most, measured one by one, keep the most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray


def divergence(target: ArrayLike, english: ArrayLike) -> NDArray[np.float64]:
    """Compute the Jensen–Shannon divergence of two routings per layer (arXiv 2605.28042: language specialisation).

    Args:
        target: Routing mass on the target language. [layers, experts], rows sum to 1
        english: Routing mass on English, ideally on the same content. [layers, experts]

    Returns:
        float64 [layers], in bits: 0 for equal rows, 1 for rows that share no expert.

    Raises:
        ValueError: If the shapes differ, a row is not a distribution, or the routings are equal (layers cannot then be
            ranked).
    """
    p, q = (np.asarray(mass, dtype=np.float64) for mass in (target, english))
    if p.shape != q.shape or p.ndim != 2:
        raise ValueError(
            f"both routings must be [layers, experts] of one shape, got {list(p.shape)} and {list(q.shape)}"
        )
    for name, mass in (("target", p), ("english", q)):
        if not (
            np.isfinite(mass).all() and (mass >= 0).all() and np.allclose(mass.sum(axis=1), 1, atol=1e-6)
        ):
            raise ValueError(f"each row of {name} must be a distribution over experts (it sums to 1)")
    if np.array_equal(p, q):
        raise ValueError(
            "both routings are the same; a divergence needs the routing of two languages: collect English separately"
        )
    middle = (p + q) / 2
    halves = _relative_entropy(p, middle) + _relative_entropy(q, middle)
    return np.clip(halves / 2, 0.0, 1.0)


def allocate(divergence: ArrayLike, total: int, top_k: int, n_experts: int) -> list[int]:
    """Share `total` kept experts among the layers in proportion to their divergence (arXiv 2605.28042).

    Every layer keeps at least `top_k`; the rest of the budget is shared in proportion to the divergence. A layer that
    reaches `n_experts` is full, and its excess goes to the others in the same way (equally, if their divergences are
    all zero). Fractions are rounded by largest remainder (Hamilton), ties to the earlier layer. Arithmetic is exact.

    Args:
        divergence: One non-negative number per layer. [layers]
        total: Experts kept in all layers together, from ``layers * top_k`` to ``layers * n_experts``.
        top_k: Minimum per layer.
        n_experts: Maximum per layer.

    Returns:
        Kept experts of each layer; they sum to `total`.

    Raises:
        ValueError: If the total is impossible, or the divergence is negative, not finite or zero everywhere.
    """
    return _share(_weights(divergence), total, top_k, n_experts)


def allocate_uniform(total: int, layers: int, top_k: int, n_experts: int) -> list[int]:
    """Share `total` kept experts equally among `layers`; a remainder goes to the earliest layers.

    Arguments and errors are those of `allocate`.
    """
    return allocate([1.0] * layers, total, top_k, n_experts)


def allocate_inverse(divergence: ArrayLike, total: int, top_k: int, n_experts: int) -> list[int]:
    """Allocate inversely, as a control: the most divergent layers keep the fewest experts.

    The divergence is mirrored within its range, ``max + min - divergence``, so that the control spreads the budget as
    widely as the method. Arguments and errors are those of `allocate`.
    """
    weights = _weights(divergence)
    low, high = min(weights), max(weights)
    return _share([high + low - weight for weight in weights], total, top_k, n_experts)


def allocate_by_rise(
    rises: ArrayLike, kept: Sequence[int], total: int, top_k: int, n_experts: int
) -> list[int]:
    """Share `total` kept experts so that rises of the loss, measured layer by layer, have the smallest sum.

    Between measured numbers of experts the rise is interpolated linearly; at `n_experts` it is zero. A layer that keeps
    more never counts as worse, so that noise cannot reward a cut. That rises of several layers add up is an assumption.
    Of equal sums, earlier layers keep more. Exact, by dynamic programming over layers.

    Args:
        rises: Rise of the loss when this layer alone keeps so many experts. [layers, numbers]
        kept: Those numbers, increasing, from `top_k` to below `n_experts`. [numbers]
        total: Experts kept in all layers together, from ``layers * top_k`` to ``layers * n_experts``.
        top_k: Minimum per layer.
        n_experts: Maximum per layer.

    Returns:
        Kept experts of each layer; they sum to `total`.

    Raises:
        ValueError: If the total is impossible, numbers are out of order or range, or a rise is not finite.
    """
    table = np.asarray(rises, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(kept) or not len(kept) or not np.isfinite(table).all():
        raise ValueError(
            f"rises must be finite, [layers, numbers] with the {len(kept)} numbers of kept, got {table.tolist()}"
        )
    if list(kept) != sorted(set(kept)) or kept[0] != top_k or kept[-1] >= n_experts:
        raise ValueError(
            f"kept must increase from {top_k} (top_k) to below {n_experts} (n_experts), got {list(kept)}"
        )
    layers = len(table)
    _check_total(layers, total, top_k, n_experts)
    ends = np.concatenate([table.clip(min=0), np.zeros((layers, 1))], axis=1)
    falling = np.maximum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    every = np.arange(top_k, n_experts + 1)
    costs = np.array([np.interp(every, [*kept, n_experts], row) for row in falling])  # [layers, every]
    best = np.full(total + 1, np.inf)  # least sum of the layers so far, by the experts that they keep
    best[0] = 0.0
    choices = []
    for cost in costs[::-1]:
        following, choice = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=int)
        for count, rise in zip(every, cost, strict=True):
            reached = np.full(total + 1, np.inf)
            reached[count:] = best[: total + 1 - count] + rise
            better = reached <= following
            following[better], choice[better] = reached[better], count
        best = following
        choices.append(choice)
    counts, left = [], total
    for choice in choices[::-1]:
        counts.append(int(choice[left]))
        left -= counts[-1]
    return counts


def select(scores: ArrayLike, counts: Sequence[int], *, groups: int = 1) -> list[list[int]]:
    """Keep the experts with the highest scores in each layer.

    Args:
        scores: Higher is better; minus infinity where a layer has no such expert. [layers, experts]
        counts: How many each layer keeps. [layers]
        groups: Groups of consecutive experts, each of which keeps the same number, as DeepSeek's group-limited routers
            need. Allocate in units of one expert per group: ``allocate(d, total // groups, ceil(top_k / groups),
            n_experts // groups)``, times `groups`.

    Returns:
        Ids of the kept experts of each layer, ascending; of equal scores the lower id is kept.

    Raises:
        ValueError: If a score is NaN, there is not one count per layer, or a count is out of range or not divisible by
            the number of groups.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(counts):
        raise ValueError(
            f"scores must be [layers, experts] with one count per layer, got {list(table.shape)} and {len(counts)}"
        )
    if np.isnan(table).any():
        raise ValueError(f"scores of layer {int(np.argwhere(np.isnan(table))[0][0])} are NaN")
    kept = []
    for layer, (row, count) in enumerate(zip(table, counts, strict=True)):
        available = np.flatnonzero(row > -np.inf)
        if not 1 <= count <= len(available):
            raise ValueError(f"layer {layer} can keep 1..{len(available)} experts, got {count}")
        if count % groups or len(available) % groups:
            raise ValueError(
                f"layer {layer}: {count} of {len(available)} experts do not divide into {groups} equal groups"
            )
        chosen: list[int] = []
        for group in np.split(available, groups):
            order = np.argsort(-row[group], kind="stable")[: count // groups]
            chosen += sorted(group[order].tolist())
        kept.append(chosen)
    return kept


def kept_overlap(keep_a: Sequence[Sequence[int]], keep_b: Sequence[Sequence[int]]) -> float:
    """Compute the overlap of two kept sets: intersection over union, mean over layers, in 0..1.

    Raises:
        ValueError: If the numbers of layers differ, or a layer keeps nothing in both.
    """
    if len(keep_a) != len(keep_b) or not keep_a:
        raise ValueError(
            f"both must keep experts in the same layers, got {len(keep_a)} and {len(keep_b)} layers"
        )
    pairs = [(set(a), set(b)) for a, b in zip(keep_a, keep_b, strict=True)]
    if not all(a | b for a, b in pairs):
        raise ValueError("a layer keeps no expert in either set")
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))


def expected_overlap(
    counts: Sequence[int], n_experts: int, *, other_counts: Sequence[int] | None = None
) -> float:
    """Compute the expected `kept_overlap` of independent random sets of these sizes in each layer.

    Exact: the size of the intersection is hypergeometric.

    Args:
        counts: Kept experts of each layer. [layers]
        n_experts: Experts of each layer before pruning.
        other_counts: Sizes of the second set, if they differ from `counts`. [layers]

    Raises:
        ValueError: If a count is not in 1..n_experts, or the lengths differ.
    """
    others = counts if other_counts is None else other_counts
    if len(counts) != len(others) or not counts:
        raise ValueError(f"both need a count for each layer, got {len(counts)} and {len(others)}")
    wrong = [count for count in (*counts, *others) if not 1 <= count <= n_experts]
    if wrong:
        raise ValueError(f"counts must be in 1..{n_experts}, got {wrong[0]}")
    return float(np.mean([_chance(a, b, n_experts) for a, b in zip(counts, others, strict=True)]))


def _share(weights: list[Fraction], total: int, top_k: int, n_experts: int) -> list[int]:
    """Do the same as `allocate`, with exact weights."""
    count = len(weights)
    _check_total(count, total, top_k, n_experts)
    shares = _fill(weights, total - count * top_k, n_experts - top_k)
    kept = [top_k + math.floor(share) for share in shares]
    order = sorted(range(count), key=lambda layer: (math.floor(shares[layer]) - shares[layer], layer))
    for layer in order[: total - sum(kept)]:
        kept[layer] += 1
    return kept


def _check_total(layers: int, total: int, top_k: int, n_experts: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be in 1..{n_experts} (n_experts), got {top_k}")
    if not layers * top_k <= total <= layers * n_experts:
        raise ValueError(
            f"total must be in {layers * top_k}..{layers * n_experts} ({layers} layers of {top_k} (top-k) to "
            f"{n_experts} experts), got {total}"
        )


def _fill(weights: list[Fraction], spare: int, room: int) -> list[Fraction]:
    """Share `spare` in proportion to `weights`, at most `room` each; any excess goes to layers with room left."""
    shares = [Fraction(0)] * len(weights)
    open_layers = list(range(len(weights)))
    left = Fraction(spare)
    while left:
        scale = sum(weights[layer] for layer in open_layers)
        parts = {
            layer: left * (weights[layer] / scale if scale else Fraction(1, len(open_layers)))
            for layer in open_layers
        }
        full = [layer for layer in open_layers if parts[layer] >= room]
        if not full:
            for layer, part in parts.items():
                shares[layer] = part
            break
        for layer in full:
            shares[layer] = Fraction(room)
            left -= room
        open_layers = [layer for layer in open_layers if layer not in full]
    return shares


def _weights(divergence: ArrayLike) -> list[Fraction]:
    values = np.asarray(divergence, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"divergence must be one number per layer, got shape {list(values.shape)}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"divergence must be finite and not negative, got {values.tolist()}")
    if not values.any():
        raise ValueError(
            "the divergence is zero in every layer: both routings are of the same language, so layers cannot be "
            "ranked. Collect English separately, or use allocate_uniform"
        )
    return [Fraction(float(value)) for value in values]


def _chance(a: int, b: int, n_experts: int) -> float:
    ways = Fraction(0)
    for common in range(max(0, a + b - n_experts), min(a, b) + 1):
        probability = Fraction(
            math.comb(a, common) * math.comb(n_experts - a, b - common), math.comb(n_experts, b)
        )
        ways += probability * Fraction(common, a + b - common)
    return float(ways)


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback–Leibler divergence of each row, in bits; 0 log 0 is 0."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(axis=1))
