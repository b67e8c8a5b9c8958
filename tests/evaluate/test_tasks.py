"""What the local tasks are made of."""

import pytest

from overparam.data import corpora, splits
from overparam.evaluate import LOCAL_TASKS
from overparam.evaluate.samples import balanced, cut, newsgroups, reuters, verses
from overparam.evaluate.tasks import TASKS


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_texts_are_all_that_a_task_holds_and_fit_mteb(name):
    task = TASKS[name](24)
    texts = {text for text, _ in task.texts()}
    rows = task.content.rows
    columns = [column for part in rows.values() for key, column in part.items() if key in TEXT_COLUMNS]
    assert texts == {text for column in columns for text in column}
    assert all(text == " ".join(text.split()) and text for text in texts)  # mteb strips what it reads


TEXT_COLUMNS = ("text", "sentences", "sentence1", "sentence2")


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_data_depends_on_size_and_seed_alone(name):
    revision = TASKS[name](24).content.revision
    assert TASKS[name](24).metadata.dataset == {"path": "local", "revision": revision}
    assert TASKS[name](25).content.revision != revision
    assert TASKS[name](24, seed=1).content.revision != revision


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_a_larger_size_contains_a_smaller_one(name):
    small, large = ({text for text, _ in TASKS[name](size).texts()} for size in (24, 40))
    assert len(small - large) <= len(small) / 4  # what is searched beside the right verses may change


def test_verses_are_of_the_test_split_and_all_different():
    pool = verses(100, 42)
    split = splits.verse_splits()
    used = {*pool.aligned, *pool.searched, *pool.neighbour.values()}
    assert {split[verse] for verse in used} == {"test"}
    assert all(len(texts) == len(set(texts.values())) for texts in pool.texts.values())
    assert len(pool.aligned) == 100
    assert len(pool.searched) == 300
    assert all(verse != other for verse, other in pool.neighbour.items())
    assert sum(verse.split(".")[:2] == other.split(".")[:2] for verse, other in pool.neighbour.items()) > 80


def test_related_verses_are_linked_by_cross_references():
    pool = verses(100, 42)
    links = set(corpora.cross_references())
    assert len(pool.related) > 90
    assert all((a, b) in links or (b, a) in links for a, others in pool.related.items() for b in others)


@pytest.mark.parametrize(("which", "classes"), [("r8", 8), ("r52", 36)])
def test_reuters_is_balanced_and_keeps_classes_with_eight_training_articles(which, classes):
    train, test = reuters(which, 100, 42)
    counts = {label: train.labels.count(label) for label in set(train.labels)}
    assert len(counts) == classes
    assert min(counts.values()) >= 8
    assert max(counts.values()) - min(counts.values()) <= 4
    assert set(test.labels) <= set(counts)
    assert len(test.texts) == 100
    assert not set(train.texts) & set(test.texts)
    assert max(map(len, train.texts + test.texts)) <= 160


def test_newsgroups_are_balanced():
    posts = newsgroups(100, 42)
    assert {posts.labels.count(label) for label in posts.labels} == {5}
    assert max(map(len, posts.texts)) <= 256


def test_balanced_order_uses_up_small_classes_last():
    labels = ["a"] * 5 + ["b"] * 2 + ["c"]
    order = balanced(labels, 0)
    assert sorted(order) == list(range(8))
    assert sorted(labels[i] for i in order[:3]) == ["a", "b", "c"]
    assert [labels[i] for i in order[5:]] == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two  three", "one two"),
        ("one", "one"),
        ("one two", "one two"),
        ("unbreakable", "unbreak"),
        (" ", ""),
    ],
)
def test_cut_keeps_whole_words(text, expected):
    assert cut(text, 7) == expected
