import pytest
from datasets import ClassLabel, Dataset, Features, Value

from overparam.data import corpora
from overparam.data.corpora import normalise
from overparam.evaluate import TOPIC_TASKS
from overparam.evaluate.topics import FEWEST, topics


@pytest.mark.parametrize(("name", "classes"), zip(TOPIC_TASKS, (8, 37, 20), strict=True))
def test_parts_share_no_text_and_every_class_has_enough(name, classes):
    task = topics(name, labelled=600, unlabelled=300, test_items=200, characters=200)
    assert (len(task.texts), len(task.unlabelled), len(task.test_texts)) == (600, 300, 200)
    parts = [set(map(normalise, part)) for part in (task.texts, task.unlabelled, task.test_texts)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(task.classes) == classes
    counts = [(task.labels == number).sum() for number in range(classes)]
    assert min(counts) >= FEWEST
    assert max(map(len, task.texts)) <= 200


def test_a_smaller_number_takes_the_first_texts_of_a_larger():
    small = topics("ReutersR8", labelled=100, test_items=50)
    large = topics("ReutersR8", labelled=400, test_items=100)
    assert large.texts[:100] == small.texts
    assert large.labels[:100].tolist() == small.labels.tolist()
    assert large.test_texts[:50] == small.test_texts
    other = topics("ReutersR8", labelled=100, test_items=50, seed=1)
    assert other.texts != small.texts


def test_labels_are_those_of_the_corpus():
    task = topics("Newsgroups", labelled=400, test_items=50)
    hockey = task.classes.index("rec.sport.hockey")
    words = " ".join(text for text, label in zip(task.texts, task.labels, strict=True) if label == hockey)
    assert "hockey" in words or "nhl" in words


def test_pairs_of_the_hub_are_joined_and_judged_on_the_split_with_labels(monkeypatch):
    asked = []

    def hub(path, name, *, split):
        asked.append((path, name, split))
        rows = range(40) if split == "train" else range(100, 110)
        return Dataset.from_dict(
            {
                "sentence1": [f"one {i}" for i in rows],
                "sentence2": [f"two {i}" for i in rows],
                "label": [i % 2 for i in rows],
            },
            features=Features(
                {
                    "sentence1": Value("string"),
                    "sentence2": Value("string"),
                    "label": ClassLabel(names=["no", "yes"]),
                }
            ),
        )

    monkeypatch.setattr(corpora, "hub", hub)
    task = topics("glue/mrpc", labelled=20, unlabelled=10, test_items=5)
    assert asked == [("nyu-mll/glue", "mrpc", "train"), ("nyu-mll/glue", "mrpc", "validation")]
    assert task.classes == ("no", "yes")
    number = int(task.test_texts[0].split()[1])
    assert task.test_texts[0] == f"one {number} [SEP] two {number}"
    assert task.test_labels[0] == number % 2


def test_too_few_labels_and_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="at least 160 labelled texts, 8 for each of 20 classes, got 100"):
        topics("Newsgroups", labelled=100)
    with pytest.raises(ValueError, match="unknown task 'R8'"):
        topics("R8")
