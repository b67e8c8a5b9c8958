import re
import unicodedata
from collections import Counter

import pytest

from overparam.data import corpora, splits


def plain(text):
    """An independent reading of 'the same text': letters and digits alone."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def test_no_verse_and_no_text_of_any_translation_is_in_two_splits():
    of = splits.verse_splits()
    seen: dict[str, str] = {}
    for translation in corpora.LANGUAGES:
        for verse in corpora.verses(translation):
            assert seen.setdefault(plain(verse.text), of[verse.id]) == of[verse.id], verse
    assert set(of) == {verse.id for verse in corpora.verses("web")}


def test_shares_of_the_verse_splits_are_about_those_asked_for():
    counts = Counter(splits.verse_splits().values())
    assert counts["test"] / 31102 == pytest.approx(0.1, abs=0.01)
    assert counts["validation"] / 31102 == pytest.approx(0.05, abs=0.01)


def test_splits_are_the_same_on_every_machine():
    # The first 64 bits of SHA-256("a") are 0.7914 of their range, of SHA-256("b") 0.2427.
    assert [splits.split_of("a", test=test, validation=0.1) for test in (0.69, 0.7, 0.79, 0.8)] == [
        "train",
        "validation",
        "validation",
        "test",
    ]
    assert splits.split_of("b", test=0.25) == "test"
    counts = Counter(splits.verse_splits().values())
    assert counts == {"train": 26465, "test": 3060, "validation": 1577}


def test_equal_texts_fall_together_and_shares_are_kept():
    words = [f"word {number}" for number in range(20_000)]
    counts = Counter(splits.split_of(word, test=0.2, validation=0.1) for word in words)
    assert counts["test"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert all(splits.split_of(word) == splits.split_of(f" {word.upper()}!") for word in words[:500])
    assert {splits.split_of(word, test=0, validation=0) for word in words} == {"train"}


@pytest.mark.parametrize(("test", "validation"), [(-0.1, 0.1), (0.5, 0.5), (0.1, -1)])
def test_impossible_shares_are_refused(test, validation):
    with pytest.raises(ValueError, match=re.escape(f"got {test} and {validation}")):
        splits.split_of("text", test=test, validation=validation)


def test_verses_in_a_split_keep_their_order():
    parts = [splits.verses_in("elb", split) for split in splits.SPLITS]
    place = {verse.id: index for index, verse in enumerate(corpora.verses("elb"))}
    assert sum(map(len, parts)) == len(place)
    for part in parts:
        order = [place[verse.id] for verse in part]
        assert order == sorted(order)
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        splits.verses_in("elb", "valid")


def test_kept_splits_equal_computed_ones_and_a_broken_file_is_made_again(monkeypatch, tmp_path):
    expected = splits.verse_splits()
    monkeypatch.setattr("overparam.support.cache.directory", lambda: tmp_path)
    fresh = splits.verse_splits.__wrapped__
    assert fresh() == expected
    (file,) = (tmp_path / "splits").iterdir()
    assert fresh() == expected
    file.write_text("{")
    assert fresh() == expected
    assert fresh(test=0.2) != expected
    assert len(list((tmp_path / "splits").iterdir())) == 2
