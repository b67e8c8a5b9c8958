"""When a text leaves: confidences of exits, and controls. Exits are numbered from 0; the last is the full model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RULES = ("probability", "margin", "entropy", "patience", "learned")
"""Maximum probability; its distance from the second; entropy (DeeBERT, arXiv 2004.12993); the number of exits in a row
that agree (PABEE, arXiv 2006.04152); the probability, learned from the four others, of agreeing with the full model
(as in BERxiT)."""


def confidences(logits: ArrayLike, rule: str, learned: Floats | None = None) -> Floats:
    """Return how sure each exit is of its class, from 0 to 1.

    Args:
        logits: [texts, exits, classes].
        rule: One of `RULES`.
        learned: From `predictor`; needed by the rule "learned".

    Returns:
        float64 [texts, exits].

    Raises:
        ValueError: The rule is unknown, or `learned` is missing.
    """
    values = np.asarray(logits, dtype=np.float64)
    runs, exits = streaks(values.argmax(-1)), values.shape[1]
    each = [confidence(values[:, k], runs[:, k], k, exits, rule, learned) for k in range(exits)]
    return np.stack(each, axis=1)


def confidence(
    logits: Floats, streak: Ints, exit: int, exits: int, rule: str, learned: Floats | None = None
) -> Floats:
    """Return the same of one exit, of `exits`: its logits [texts, classes] and the streaks there [texts]."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "patience":
        return streak / exits
    if rule == "learned":
        if learned is None:
            raise ValueError("the rule 'learned' needs a predictor: use Exits.with_rule('learned', states)")
        score = _features(logits, streak, exits) @ learned[exit, 1:] + learned[exit, 0]
        return np.asarray(1 / (1 + np.exp(-score)))
    return _features(logits, streak, exits)[:, RULES.index(rule)]


def _features(logits: Floats, streak: Ints, exits: int) -> Floats:
    """The first four rules' confidences, [texts, 4]."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    p = shifted / shifted.sum(-1, keepdims=True)
    top = np.partition(p, -2, axis=-1)[:, -2:]
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1) / np.log(p.shape[-1])
    return np.stack([top[:, 1], top[:, 1] - top[:, 0], 1 - entropy, streak / exits], axis=-1)


def streaks(predicted: ArrayLike) -> Ints:
    """Count how many exits in a row predict the same class, up to and with each: [texts, exits] of classes."""
    classes = np.asarray(predicted)
    found = np.ones(classes.shape, dtype=np.int64)
    for k in range(1, classes.shape[1]):
        found[:, k] += np.where(classes[:, k] == classes[:, k - 1], found[:, k - 1], 0)
    return found


def predictor(logits: ArrayLike) -> Floats:
    """Learn when an exit agrees with the last one, by logistic regression on the four other confidences.

    Args:
        logits: Of texts that the exits were not trained on, [texts, exits, classes]; labels are not needed.

    Returns:
        Bias and four weights of each exit, float64 [exits, 5].
    """
    from sklearn.linear_model import LogisticRegression

    values = np.asarray(logits, dtype=np.float64)
    predicted, exits = values.argmax(-1), values.shape[1]
    runs, table = streaks(predicted), np.zeros((exits, 1 + len(RULES[:-1])))
    for k in range(exits):
        agrees = predicted[:, k] == predicted[:, -1]
        if agrees.all() or not agrees.any():
            odds = (agrees.sum() + 0.5) / (len(agrees) - agrees.sum() + 0.5)
            table[k, 0] = np.log(odds)
            continue
        features = _features(values[:, k], runs[:, k], exits)
        found = LogisticRegression(C=100.0, max_iter=1000).fit(features, agrees)
        table[k] = [found.intercept_[0], *found.coef_[0]]
    return table


def leave(confidence: ArrayLike, threshold: float | ArrayLike) -> Ints:
    """Return the first exit that is at least as sure as the threshold, else the last.

    Args:
        confidence: [texts, exits].
        threshold: A number; or several, [thresholds].

    Returns:
        int64 [texts], or [thresholds, texts].
    """
    values, several = np.asarray(confidence), np.atleast_1d(np.asarray(threshold, dtype=np.float64))
    found = np.empty((len(several), len(values)), dtype=np.int64)
    for row, one in zip(found, several, strict=True):
        sure = values >= one
        sure[:, -1] = True
        row[:] = sure.argmax(axis=1)
    return found if np.ndim(threshold) else found[0]


def oracle(losses: ArrayLike) -> Ints:
    """Return the first exit of each text whose loss [texts, exits] is no larger than the last one's: the best rule."""
    values = np.asarray(losses, dtype=np.float64)
    return np.asarray((values <= values[:, -1:]).argmax(axis=1), dtype=np.int64)


def fixed(losses: ArrayLike, exit: float) -> Floats:
    """Return what each text loses where all leave at one exit: [texts], of the losses of each exit [texts, exits].

    Between two exits, the loss that is expected when texts are dealt out to both at random, so that the mean depth is
    any number.
    """
    values = np.asarray(losses, dtype=np.float64)
    low = int(exit)
    high = min(low + 1, values.shape[1] - 1)
    return np.asarray(values[:, low] + (exit - low) * (values[:, high] - values[:, low]))


def shuffled(confidence: ArrayLike, seed: int) -> Floats:
    """Return confidences dealt out anew among the texts, exit by exit: a control that knows no text."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(column) for column in np.asarray(confidence).T], axis=1)
