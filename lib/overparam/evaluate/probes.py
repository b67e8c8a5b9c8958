"""Classification by embeddings of an encoder that was not trained for it, and simple baselines as floors.

Classes are ids 0, 1, …; predictions are int64 [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

Classes = NDArray[np.int64]
Embeddings = NDArray[np.float32]

FEWEST_TO_CHOOSE = 8  # examples per class below which folds are too small to choose a regularisation
_STRENGTHS = np.logspace(-4, 2, 7)  # scikit-learn's C
_WORD_STRENGTHS = np.logspace(1, 3, 3)
_FOLDS = 4


def linear_probe(train: Embeddings, train_labels: ArrayLike, test: Embeddings, *, seed: int) -> Classes:
    """Predict by logistic regression on standardised embeddings.

    Its regularisation C is chosen from 1e-4 … 100 by stratified 4-fold cross-validation (accuracy) if every class has
    at least 8 examples, and is scikit-learn's default of 1 otherwise.

    Args:
        train: float32 [n, dim].
        train_labels: [n] ids; classes without an example cannot be predicted.
        test: float32 [m, dim].
        seed: Seed of the folds.

    Raises:
        ValueError: Fewer than two classes, or embeddings of different dimensions.
    """
    from sklearn.preprocessing import StandardScaler

    labels = _check_embeddings(train, train_labels, test)
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs examples of at least 2 classes, got {len(classes)}")
    probe = _fitted(StandardScaler(), _STRENGTHS, train, labels, int(counts.min()), seed)
    return np.asarray(probe.predict(test), dtype=np.int64)


def nearest_neighbours(train: Embeddings, train_labels: ArrayLike, test: Embeddings, *, k: int) -> Classes:
    """Predict the most frequent class among the `k` training texts with the highest cosine.

    Of equally frequent classes, the one with the larger sum of cosines wins, then the lower id.

    Args:
        train: float32 [n, dim].
        train_labels: [n] ids.
        test: float32 [m, dim].
        k: Number of neighbours, 1..n.

    Raises:
        ValueError: `k` is out of range, or embeddings have different dimensions.
    """
    from sklearn.preprocessing import normalize

    labels = _check_embeddings(train, train_labels, test)
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be in 1..{len(labels)}, the number of training texts, got {k}")
    cosines = normalize(test) @ normalize(train).T  # [m, n]
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(test), labels.max() + 1))
    # sums of cosines are within ±k, so they never outweigh a neighbour
    weights = 2 * k + 1 + np.take_along_axis(cosines, nearest, axis=1).astype(np.float64)
    np.add.at(votes, (np.arange(len(test))[:, None], labels[nearest]), weights)
    return np.asarray(votes.argmax(axis=1), dtype=np.int64)


def zero_shot(descriptions: Embeddings, test: Embeddings) -> Classes:
    """Predict the class whose description has the highest cosine, without examples.

    Args:
        descriptions: Embeddings of a description of each class, float32 [classes, dim].
        test: float32 [m, dim].

    Raises:
        ValueError: Embeddings have different dimensions.
    """
    from sklearn.preprocessing import normalize

    _check_embeddings(descriptions, np.arange(len(descriptions)), test)
    return np.asarray((normalize(test) @ normalize(descriptions).T).argmax(axis=1), dtype=np.int64)


def bag_of_words(
    train_texts: Sequence[str], train_labels: ArrayLike, test_texts: Sequence[str], *, seed: int
) -> NDArray[np.float64]:
    """Compute class probabilities by logistic regression on TF-IDF of words and word pairs: the floor to beat.

    Its regularisation C is chosen as in `linear_probe`, but from 10 … 1000, because features are small.

    Returns:
        float64 [n, classes] for the ids 0..max(train_labels); an id without an example has 0.

    Raises:
        ValueError: Fewer than two classes, unequal numbers of texts and labels, or no texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    labels = class_ids(train_labels)
    if len(train_texts) != len(labels) or not len(test_texts):
        raise ValueError(
            f"there must be a label for each training text, and test texts: got {len(labels)} labels for "
            f"{len(train_texts)} training texts, and {len(test_texts)} test texts"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a bag of words needs examples of at least 2 classes, got {len(classes)}")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    regression = _fitted(words, _WORD_STRENGTHS, list(train_texts), labels, int(counts.min()), seed)
    probabilities = np.zeros((len(test_texts), labels.max() + 1))
    probabilities[:, classes] = regression.predict_proba(list(test_texts))
    return probabilities


def majority(train_labels: ArrayLike, n: int) -> Classes:
    """Predict the most frequent class (of several, the lowest id) for all `n` texts."""
    return np.full(n, np.bincount(class_ids(train_labels)).argmax(), dtype=np.int64)


def class_ids(labels: ArrayLike) -> Classes:
    """Return `labels` as int64 [n].

    Raises:
        ValueError: They are not class ids, or there are none.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        raise ValueError("labels must be a list of class ids 0, 1, …, at least one of them")
    return values.astype(np.int64)


def _fitted(
    features: Any, strengths: NDArray[np.float64], train: Any, labels: Classes, fewest: int, seed: int
) -> Any:
    """Logistic regression on features; C is chosen by cross-validation if classes have enough examples."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    probe = make_pipeline(features, LogisticRegression(max_iter=2000, random_state=seed))
    if fewest >= FEWEST_TO_CHOOSE:
        folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
        probe = GridSearchCV(probe, {"logisticregression__C": strengths}, cv=folds)
    with threadpool_limits(
        1
    ):  # for small matrices, two threads wait for each other and take six times as long
        return probe.fit(train, labels)


def _check_embeddings(train: Embeddings, labels: ArrayLike, test: Embeddings) -> Classes:
    ids = class_ids(labels)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or len(train) != len(ids):
        raise ValueError(
            f"embeddings must be [{len(ids)} labels, dim] and [n, dim], got shapes {list(train.shape)} and "
            f"{list(test.shape)}"
        )
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise ValueError("embeddings hold NaN or infinity; a model in float16 overflows easily: try bfloat16")
    return ids
