"""Scores that rank the experts of a layer: the method, alternatives, and controls."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from overparam.compress.experts.routing import RoutingStatistics

METHODS = (
    *("routing_mass", "routing_mass_super", "frequency", "koishekenov", "reap", "reap_renormalised"),
    *("random", "inverted"),
)
SUPER_FACTOR = 5.0


def scores(statistics: RoutingStatistics, method: str, *, seed: int = 0) -> NDArray[np.float64]:
    """Score every expert from the statistics of a text; `select` keeps the highest scores of each layer.

    - ``routing_mass``: mean normalised top-k weight (arXiv 2605.28042).
    - ``routing_mass_super``: the same, but the `super_experts` of each layer rank before all others.
    - ``frequency``: share of tokens routed to the expert.
    - ``koishekenov``: share of tokens with the expert as first choice × exp(mean gate on those tokens), where the gate
      is the softmax of the router's logits (arXiv 2212.09811).
    - ``reap``: mean over routed tokens of gate × norm of the expert's output (arXiv 2510.13999), where the gate is the
      factor that the model applies to that output; 0 for an expert without tokens.
    - ``reap_renormalised``: the same with gates that sum to one over the experts of a token. For models that normalise
      their gates (``norm_topk_prob``) both scores are equal; OLMoE, Qwen2-MoE and DeepSeek-V2 do not.
    - ``random``: uniform random numbers, a control.
    - ``inverted``: minus the routing mass, a control that keeps the least used experts.

    Args:
        statistics: From `collect`; with ``reap=True`` for both REAP scores and ``routing_mass_super``.
        method: One of `METHODS`.
        seed: Seed of ``random``.

    Returns:
        float64 [layers, experts]; minus infinity for experts that a layer of a pruned model does not have.

    Raises:
        ValueError: If the method is unknown, or the statistics lack what it needs.
    """
    if method == "routing_mass":
        values = statistics.routing_mass
    elif method == "routing_mass_super":
        values = statistics.routing_mass.copy()
        for layer, ids in zip(values, super_experts(statistics), strict=True):
            layer[ids] += 1.0  # above any share
    elif method == "inverted":
        values = -statistics.routing_mass
    elif method == "frequency":
        values = statistics.frequency
    elif method == "koishekenov":
        gate = _mean(statistics.top1_gate_sum, statistics.top1)
        values = statistics.top1 / statistics.tokens * np.exp(gate)
    elif method == "reap":
        values = _output_norms(statistics)
    elif method == "reap_renormalised":
        values = _per_token(statistics, statistics.renormalised_norm_sum)
    elif method == "random":
        values = np.random.default_rng(seed).random(statistics.mass_sum.shape)
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    exists = np.arange(values.shape[1]) < statistics.n_experts[:, None]
    return np.where(exists, values, -np.inf)


def super_experts(statistics: RoutingStatistics) -> list[list[int]]:
    """Find the experts of each layer whose outputs are far larger than those of the others.

    Super experts (arXiv 2507.23279) produce the massive activations that attention sinks depend on. They may be used
    for a single token of a text, such as the first, so that measures of use rank them low; without them a model breaks
    down. Here an expert is a super expert if its REAP score is more than `SUPER_FACTOR` times the median of its
    layer's experts that were used at all.

    Raises:
        ValueError: If the statistics lack the norms.
    """
    norms = _output_norms(statistics)
    return [
        np.flatnonzero(row > SUPER_FACTOR * np.median(row[used > 0])).tolist()
        for row, used in zip(norms, statistics.routed, strict=True)
    ]


def _output_norms(statistics: RoutingStatistics) -> NDArray[np.float64]:
    """Mean over routed tokens of gate × output norm. float64 [layers, experts]."""
    return _per_token(statistics, statistics.gated_norm_sum)


def _per_token(statistics: RoutingStatistics, norms: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Mean over routed tokens. float64 [layers, experts]."""
    if norms is None:
        raise ValueError("the norms of the experts' outputs need statistics collected with reap=True")
    return _mean(norms, statistics.routed)


def _mean(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean, 0 where nothing was counted."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
