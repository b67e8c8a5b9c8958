"""Corpus scores of texts and translations, computed from counts per sentence so that `stats` can resample them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BETA_SQUARED = 4.0  # of chrF2++: recall counts twice as much as precision


def chrf(items: Array) -> Array:
    """ChrF++ (0 to 100) as in sacrebleu, from counts ``[..., n, 3 · orders]``: hypothesis, reference, match."""
    total = items.sum(axis=-2)
    counts = total.reshape(*total.shape[:-1], -1, 3)  # [..., orders, 3]
    hypothesis, reference, match = np.moveaxis(counts, -1, 0)
    usable = (hypothesis > 0) & (reference > 0)
    orders = usable.sum(axis=-1)
    precision = _mean_where(_divide(match, hypothesis), usable, orders)
    recall = _mean_where(_divide(match, reference), usable, orders)
    return 100 * _divide((1 + _BETA_SQUARED) * precision * recall, _BETA_SQUARED * precision + recall)


def bleu(items: Array) -> Array:
    """BLEU (0 to 100) with sacrebleu's default smoothing ("exp").

    The counts are ``[..., n, 10]``: hypothesis and reference tokens, matches of order 1 to 4, n-grams of order 1
    to 4.
    """
    total = items.sum(axis=-2)
    length, reference = total[..., 0], total[..., 1]
    match, n_grams = total[..., 2:6], total[..., 6:10]  # [..., 4]
    missed = (match == 0) & (n_grams > 0)
    smoothed = np.where(missed, 0.5 ** missed.cumsum(axis=-1), match)  # 1/2, 1/4, … of a match
    precision = _divide(smoothed, n_grams)
    complete = (n_grams > 0).all(axis=-1) & (match > 0).any(axis=-1)  # else BLEU is zero
    geometric = np.exp(np.log(np.where(complete[..., None], precision, 1.0)).mean(axis=-1))
    penalty = np.exp(np.minimum(0.0, 1 - _divide(reference, length)))
    return np.where(complete, 100 * penalty * geometric, 0.0)


def nll_per_token(items: Array) -> Array:
    """Mean over all tokens of ``[..., n, 2]``: sum of negative log-likelihoods, number of tokens."""
    total = items.sum(axis=-2)
    return np.asarray(total[..., 0] / total[..., 1])


def perplexity(items: Array) -> Array:
    """Exponential of `nll_per_token`."""
    return np.exp(nll_per_token(items))


def _divide(numerator: Array, denominator: Array) -> Array:
    """Divide; the result is 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _mean_where(values: Array, usable: NDArray[np.bool_], number: NDArray[np.int64]) -> Array:
    return _divide((values * usable).sum(axis=-1), number.astype(np.float64))
