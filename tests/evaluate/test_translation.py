import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from overparam.data.corpora import verses
from overparam.data.parallel import VERSIONS, interface_pairs, verse_pairs
from overparam.data.splits import verses_in
from overparam.evaluate import translation
from overparam.record import stats

REFERENCE = "Au commencement, Dieu créa les cieux et la terre."


def damaged(text, rng):
    """A hypothesis as one may meet it: words lost, swapped or doubled; now and then nothing is left."""
    words = [word for word in text.split() if rng.random() > 0.2]
    if len(words) > 3 and rng.random() < 0.5:
        words[1], words[2] = words[2], words[1]
    return "" if rng.random() < 0.05 else " ".join(words)


@pytest.fixture(scope="module")
def system():
    """French hypotheses with references, 120 of each."""
    rng = random.Random(0)
    references = [pair.target for pair in verse_pairs("en", "fr", "test", n=120)]
    return [damaged(reference, rng) for reference in references], references


def test_scores_are_those_of_sacrebleu_and_of_their_items(system):
    hypotheses, references = system
    found = translation.score(hypotheses, references, ended=[True] * 120, target_language="fr")
    chrf, bleu = CHRF(word_order=2), BLEU()
    kept = ["" if reason else text for text, reason in zip(hypotheses, found.failures, strict=True)]
    for metric, mine in ((chrf, found.chrf), (bleu, found.bleu)):
        expected = metric.corpus_score(kept, [references]).score
        assert mine.score == expected
        assert mine.signature == str(metric.get_signature())
        assert stats.STATISTICS[mine.statistic](mine.items) == pytest.approx(expected, abs=1e-9)
    assert found.chrf.items.shape == (120, 24)
    assert found.bleu.items.shape == (120, 10)
    assert "nc:6|nw:2" in found.chrf.signature
    assert "tok:13a|smooth:exp" in found.bleu.signature


@pytest.mark.parametrize("size", [120, 7, 1])
def test_resampled_items_give_the_corpus_score_of_the_resample(system, size):
    hypotheses, references = system
    found = translation.score(hypotheses, references, ended=[True] * 120, target_language="fr")
    kept = ["" if reason else text for text, reason in zip(hypotheses, found.failures, strict=True)]
    draws = np.random.default_rng(0).integers(120, size=(20, size))
    for metric, mine in ((CHRF(word_order=2), found.chrf), (BLEU(), found.bleu)):
        expected = [
            metric.corpus_score([kept[i] for i in draw], [[references[i] for i in draw]]).score
            for draw in draws
        ]
        together = stats.STATISTICS[mine.statistic](mine.items[draws])  # [resamples]
        np.testing.assert_allclose(together, expected, atol=1e-9)


@pytest.mark.parametrize(
    "hypothesis", ["", "x", "Dieu", "Au commencement il y avait", "le et la terre zz yy"]
)
def test_short_and_empty_hypotheses_score_as_sacrebleu_has_it(hypothesis):
    for metric, statistic in ((CHRF(word_order=2), "chrf++"), (BLEU(), "bleu")):
        mine = translation._corpus_score(metric, statistic, [hypothesis], [REFERENCE])
        assert stats.STATISTICS[statistic](mine.items) == pytest.approx(mine.score, abs=1e-9)


def test_items_serve_the_paired_bootstrap(system):
    hypotheses, references = system
    worse = [" ".join(text.split()[::2]) for text in hypotheses]
    base = translation.score(references, references, ended=[True] * 120, target_language="fr")
    one = translation.score(hypotheses, references, ended=[True] * 120, target_language="fr")
    other = translation.score(worse, references, ended=[True] * 120, target_language="fr")
    for metric in ("chrf", "bleu"):
        first, second, whole = (getattr(each, metric) for each in (one, other, base))
        assert whole.score == pytest.approx(100)
        difference = stats.difference(first.items, second.items, statistic=first.statistic, n_resamples=200)
        assert difference.value == pytest.approx(second.score - first.score, abs=1e-9)
        assert difference.low < difference.value < difference.high < 0
        kept = stats.retention(whole.items, first.items, statistic=first.statistic, n_resamples=200)
        assert kept.value == pytest.approx(first.score / 100)


def test_failed_generations_score_as_empty_ones_and_are_counted():
    pairs = verse_pairs("en", "fr", "test", n=5)
    references = [pair.target for pair in pairs]
    hypotheses = ["  ", "et il dit, " * 8, references[2], pairs[3].source, references[4]]
    ended = [True, True, False, True, True]
    found = translation.score(hypotheses, references, ended=ended, target_language="fr")
    assert found.failures == ["empty", "loop", "no_end", "wrong_language", None]
    assert found.failure_shares == pytest.approx(
        {"any": 0.8, "empty": 0.2, "loop": 0.2, "no_end": 0.2, "wrong_language": 0.2}
    )
    assert found.language_checked
    orders = found.chrf.items.reshape(5, 8, 3)
    assert (orders[:4, :, [0, 2]] == 0).all()
    assert (orders[:, :, 1] > 0).all()
    alone = CHRF(word_order=2).corpus_score(["", "", "", "", references[4]], [references]).score
    assert found.chrf.score == alone


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("und der Sohn " * 4, True),
        ("Er sprach: ja ja ja ja ja ja ja ja ja ja", True),
        ("a" * 24, True),
        ("これは" * 8, True),
        ("Anfang und dann " + "der HERR, der Gott Israels; " * 5 + "Ende", True),
        ("Heilig, heilig, heilig ist der HERR der Heerscharen", False),
        ("und der Sohn und der Sohn und der Sohn", False),
        ("ha ha ha ha", False),
        ("", False),
        ("x", False),
    ],
)
def test_loops_are_parts_repeated_in_a_row(text, loop):
    assert translation.is_loop(text) is loop


def test_no_human_translation_is_a_loop():
    for version in VERSIONS.values():
        assert not [verse.text for verse in verses(version)[::10] if translation.is_loop(verse.text)]


def test_what_holds_for_the_reference_is_no_failure():
    refrain = "Hallelujah! " * 6
    english = "Weblate is a server for the translation of software"
    assert translation.failures(
        [refrain, english], [refrain, english], ended=[True, True], target_language="de"
    ) == [None, None]
    assert translation.failures(
        [refrain, english],
        ["Lobet den Herrn!", "Verwaltung des Servers"],
        ended=[True, True],
        target_language="de",
    ) == ["loop", "wrong_language"]


def test_languages_of_held_out_verses_are_told_apart():
    rng = random.Random(1)
    right = wrong = 0
    for language, version in VERSIONS.items():
        texts = [verse.text.split() for verse in verses_in(version, "test")]
        texts = [" ".join(words[: rng.randint(10, 20)]) for words in texts if len(words) >= 10]
        for text in rng.sample(texts, 150):
            right += not translation.is_wrong_language(text, language)
            wrong += all(translation.is_wrong_language(text, other) for other in set(VERSIONS) - {language})
    assert right / 750 >= 0.99
    assert wrong / 750 >= 0.97


def test_interface_strings_are_told_from_english():
    pairs = [pair for pair in interface_pairs("fr", n=300) if sum(map(str.isalpha, pair.source)) >= 20]
    targets = [translation.is_wrong_language(pair.target, "fr") for pair in pairs]
    sources = [translation.is_wrong_language(pair.source, "fr") for pair in pairs]
    assert np.mean(targets) <= 0.01
    assert np.mean(sources) >= 0.9


def test_short_texts_are_never_in_a_wrong_language():
    assert not translation.is_wrong_language("Jesus wept.", "fr")
    assert translation.is_wrong_language("Jesus wept, and they all saw it.", "fr")


def test_standard_arabic_is_no_failure_where_egyptian_is_asked_for():
    arabic = "في البدء خلق الله السماوات والأرض، وكانت الأرض خربة وخالية"
    assert not translation.is_wrong_language(arabic, "arz")
    assert translation.is_wrong_language(arabic, "bn")


def test_a_language_that_is_not_known_is_not_checked_and_said(capsys):
    english = "In the beginning, God created the heavens and the earth."
    found = translation.score([english], [REFERENCE], ended=[True], target_language="tlh")
    assert found.failures == [None]
    assert not found.language_checked
    assert "languages are not checked" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("hypotheses", "references", "ended", "message"),
    [
        ([], [], [], "at least 1, got 0, 0 and 0"),
        (["a"], ["a", "b"], [True], "equal in number, at least 1, got 1, 2 and 1"),
        (["a"], ["a"], [], "got 1, 1 and 0"),
        (["a", "b"], ["a", " "], [True, True], "1 of 2 references are empty, the first at index 1"),
    ],
)
def test_bad_input_is_named(hypotheses, references, ended, message):
    with pytest.raises(ValueError, match=message):
        translation.score(hypotheses, references, ended=ended, target_language="fr")
