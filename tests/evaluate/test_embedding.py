"""Scores and per-item scores against independent references, and the passes over texts."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from overparam.data import corpora
from overparam.evaluate import LOCAL_TASKS, embedding
from overparam.evaluate.embedding import bag_of_words, evaluate, task_names
from overparam.evaluate.tasks import TASKS

STATISTICS = {
    "mean": lambda items: items[:, 0].mean(),
    "v_measure_mean": lambda items: items[:, 0].mean(),
    "spearman": lambda items: spearmanr(items[:, 0], items[:, 1])[0],
    "average_precision": lambda items: average_precision_score(items[:, 1], items[:, 0]),
}


def of(run, task):
    embedder, scores, _ = run
    return embedder, [score for score in scores if score.task == task], TASKS[task](24).content.rows


def cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (a, b))
    return a @ b.T


def test_names_are_the_same_with_and_without_mteb():
    assert task_names() == list(LOCAL_TASKS) == list(TASKS)


def test_every_task_is_scored_at_every_view(run):
    _, scores, _ = run
    assert [(s.task, s.view) for s in scores] == [(task, view) for task in LOCAL_TASKS for view in range(3)]
    assert all(0 <= s.score <= 1 or s.type == "STS" for s in scores)


def test_local_texts_are_embedded_once_in_a_single_call(run):
    embedder, _, _ = run
    (texts, instruction), *more = embedder.calls
    assert not more
    assert instruction is None
    assert len(texts) == len(set(texts))


def test_statistic_of_items_is_mtebs_main_score(run):
    _, scores, _ = run
    for score in scores:
        digits = 5e-6 if score.type == "Retrieval" else 1e-12  # mteb rounds retrieval to 5 digits
        assert STATISTICS[score.statistic](score.items) == pytest.approx(score.score, abs=digits + 1e-9), (
            score.task
        )
        assert score.items.dtype == np.float64
        assert score.items.ndim == 2


def test_equal_views_have_equal_scores(run):
    """Also in clustering, whose task object keeps the state of its generator."""
    _, scores, _ = run
    for task in LOCAL_TASKS:
        first, poor, again = (score for score in scores if score.task == task)
        assert first.score == again.score
        assert np.array_equal(first.items, again.items)
        assert not np.array_equal(first.items, poor.items)


def test_sts_is_the_rank_correlation_of_cosines(run):
    embedder, scores, rows = of(run, "LeeSTS")
    gold = np.asarray(rows["test"]["score"])
    for score in scores:
        left, right = (embedder.vectors(rows["test"][f"sentence{i}"], score.view) for i in (1, 2))
        expected = cosines(left, right).diagonal()
        assert len(gold) == 24 * 23 / 2
        assert score.score == pytest.approx(spearmanr(expected, gold)[0], abs=1e-4)
        assert score.items == pytest.approx(np.column_stack([expected, gold]), abs=1e-5)


def test_pair_classification_takes_the_best_similarity(run):
    embedder, scores, rows = of(run, "VersePairs")
    labels = np.asarray(rows["test"]["labels"])
    assert labels.sum() == len(labels) / 2 == 24
    for score in scores:
        a, b = (embedder.vectors(rows["test"][f"sentence{i}"], score.view) for i in (1, 2))
        similarities = (
            cosines(a, b).diagonal(),
            (a * b).sum(axis=1),
            -np.linalg.norm(a - b, axis=1),
            -np.abs(a - b).sum(axis=1),
        )
        expected = max(average_precision_score(labels, similarity) for similarity in similarities)
        assert score.score == pytest.approx(expected, abs=1e-4)
        assert np.array_equal(score.items[:, 1], labels)


@pytest.mark.parametrize("task", ["VerseFrench", "VerseGerman"])
def test_bitext_mining_is_the_nearest_neighbour(run, task):
    embedder, scores, rows = of(run, task)
    for score in scores:
        english, other = (embedder.vectors(rows["test"][f"sentence{i}"], score.view) for i in (1, 2))
        chosen = cosines(english, other).argmax(axis=1)
        gold = np.arange(len(chosen))
        assert score.score == pytest.approx(f1_score(gold, chosen, average="weighted", zero_division=0))
        assert np.array_equal(score.items[:, 0] > 0, chosen == gold)


@pytest.mark.parametrize("task", ["VerseParaphrase", "VerseCrossReference"])
def test_retrieval_is_ndcg_at_10_without_the_query_itself(run, task):
    embedder, scores, rows = of(run, task)
    ids, queries, relevant = rows["corpus"]["id"], rows["queries"], rows["relevant"]
    for score in scores:
        found = cosines(
            embedder.vectors(queries["text"], score.view),
            embedder.vectors(rows["corpus"]["text"], score.view),
        )
        expected = []
        for query, row in sorted(zip(queries["id"], found, strict=True)):
            ranked = [ids[i] for i in np.argsort(-row)]
            if task == "VerseCrossReference":
                ranked.remove(query)
            gain = sum(1 / np.log2(rank + 2) for rank, i in enumerate(ranked[:10]) if i in relevant[query])
            ideal = sum(1 / np.log2(rank + 2) for rank in range(min(10, len(relevant[query]))))
            expected.append(gain / ideal)
        assert score.items[:, 0] == pytest.approx(expected, abs=1e-6)


def test_classification_is_logistic_regression_on_eight_a_class(run):
    embedder, scores, rows = of(run, "ReutersR52")
    train, test = rows["train"], rows["test"]
    assert set(np.bincount(train["label"])) == {8}
    for score in scores[1:]:
        order = np.random.RandomState(42).permutation(len(train["label"]))  # what mteb's shuffle amounts to
        vectors = embedder.vectors(train["text"], score.view).astype(np.float32)[order]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(max_iter=100, random_state=42).fit(
                vectors, np.asarray(train["label"])[order]
            )
        hits = model.predict(embedder.vectors(test["text"], score.view).astype(np.float32)) == test["label"]
        assert np.abs(score.items[:, 0] - hits).mean() <= 1 / 24


def test_clustering_embeds_all_posts(run):
    _, scores, rows = of(run, "NewsgroupsClustering")
    assert len(rows["test"]["sentences"]) == 24
    assert all(score.items.shape == (10, 1) for score in scores)


def test_no_network_is_tried(run):
    *_, attempts = run
    assert not attempts


def test_nothing_is_printed_and_random_state_is_kept(capfd, monkeypatch, tmp_path, embedder):
    monkeypatch.setenv("OVERPARAM_PROGRESS", str(tmp_path / "progress"))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluate(embedder, ["VerseFrench", "NewsgroupsClustering", "VerseParaphrase"], max_items=24, views=[1])
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "progress").read_text())["done"] == 3
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_views_are_chosen_by_their_index(run, embedder):
    _, scores, _ = of(run, "VersePairs")
    found = evaluate(embedder, ["VersePairs"], max_items=24, views=[2, 1])
    assert [(s.view, s.score) for s in found] == [(2, scores[2].score), (1, scores[1].score)]


def test_instructions_go_to_queries_not_to_documents(embedder):
    evaluate(embedder, ["VerseParaphrase", "VerseFrench", "VerseGerman"], max_items=24, instructions=True)
    calls = {instruction: texts for texts, instruction in embedder.calls}
    assert len(calls) == len(embedder.calls) == 3
    rows = TASKS["VerseParaphrase"](24).content.rows
    assert (
        calls["Given a Bible verse, retrieve the same verse in another translation."]
        == rows["queries"]["text"]
    )
    assert calls[None] == rows["corpus"]["text"]
    assert len(calls["Retrieve parallel sentences."]) == 3 * 24


def test_result_files_are_written_but_never_read(tmp_path, embedder):
    first = evaluate(embedder, ["VersePairs"], max_items=24, views=[0], cache_dir=tmp_path)
    other = evaluate(
        lambda t, i: -1 / (1 + embedder(t, i) ** 2), ["VersePairs"], max_items=24, cache_dir=tmp_path
    )
    assert other[0].score != first[0].score
    result = json.loads(next(tmp_path.rglob("*view_0*/VersePairs.json")).read_text())
    assert result["scores"]["test"][0]["main_score"] == pytest.approx(other[0].score, abs=1e-5)
    assert result["dataset_revision"] == TASKS["VersePairs"](24).content.revision


def test_bag_of_words_is_unit_length_and_finds_paraphrases(run):
    vectors = bag_of_words(["the cat sat on the mat", "the cat sat", ""])
    assert vectors.shape == (3, 1, 4096)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors[:, 0], axis=1) == pytest.approx([1, 1, 0])
    assert evaluate(bag_of_words, ["VerseParaphrase"], max_items=24)[0].score > 0.6


class HubSTS(AbsTaskSTS):
    """Stands for a hub task: two languages, loaded by a method of its own."""

    metadata = TaskMetadata(
        name="HubSTS",
        description="",
        type="STS",
        eval_splits=["validation", "test"],
        eval_langs={"en": ["eng-Latn"], "fr": ["fra-Latn"]},
        main_score="cosine_spearman",
        dataset={"path": "somewhere", "revision": "1"},
    )
    loads = 0

    def load_data(self, **_):
        type(self).loads += 1
        docs = corpora.lee()[0]
        rows = {"sentence1": docs[:9], "sentence2": docs[9:18], "score": [i / 2 for i in range(9)]}
        part = DatasetDict({"test": Dataset.from_dict(rows), "validation": Dataset.from_dict(rows)})
        self.dataset = dict.fromkeys(self.hf_subsets, part)
        self.data_loaded = True


@pytest.fixture
def hub(monkeypatch):
    HubSTS.loads = 0

    def get_task(name, **filters):
        exclusive = filters.pop("exclusive_language_filter", False)
        return HubSTS().filter_languages(filters.get("languages"), exclusive_language_filter=exclusive)

    monkeypatch.setattr("mteb.get_task", get_task)


def test_hub_task_loads_once_and_embeds_each_text_once_for_all_views(hub, embedder):
    (*scores,) = evaluate(embedder, ["HubSTS"])
    assert HubSTS.loads == 1
    assert [(s.task, s.view, s.items.shape) for s in scores] == [
        ("HubSTS", view, (9, 2)) for view in range(3)
    ]
    texts = [text for texts, _ in embedder.calls for text in texts if text != "HubSTS"]
    assert sorted(texts) == sorted(corpora.lee()[0][:18])


def test_languages_of_a_hub_task_are_scored_apart(hub, embedder):
    scores = evaluate(embedder, ["HubSTS", "VersePairs"], max_items=24, languages=None, views=[0])
    assert [s.task for s in scores] == ["HubSTS (en, test)", "HubSTS (fr, test)", "VersePairs"]


def test_hub_task_without_network_says_so(no_network, embedder, monkeypatch):
    def load(self, **_):
        raise OSError("no route")

    monkeypatch.setattr("mteb.abstasks.AbsTask.load_data", load)
    with pytest.raises(ConnectionError, match=r"'STS12' is on the model hub.*no route.*LeeSTS"):
        evaluate(embedder, ["VersePairs", "STS12"], max_items=24)
    assert not embedder.calls


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "tasks must be a list of names"),
        ("LeeSTS", {}, "tasks must be a list of names"),
        (["LeeSTS", "LeeSTS"], {}, "differ from each other"),
        (["leests"], {}, r"unknown task 'leests': did you mean 'LeeSTS'\? Local tasks: LeeSTS, ReutersR8"),
        (["Banking77Clasification"], {}, "did you mean 'Banking77Classification'"),
        (["SummEval"], {}, r"'SummEval' \(Summarization, scored by .*\) has no per-item scores"),
        (["LeeSTS"], {"max_items": 19}, "max_items must be a whole number from 20 on, or None, got 19"),
        (["LeeSTS"], {"max_items": 24, "views": [3]}, r"views must be in 0\.\.2, got 3"),
    ],
)
def test_wrong_requests_are_refused(embedder, tasks, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(embedder, tasks, **options)


def test_embeddings_that_are_not_finite_name_task_and_view(embedder):
    rows = TASKS["VersePairs"](24).content.rows["test"]

    def broken(texts, instruction):
        values = embedder(texts, instruction)
        values[texts.index(rows["sentence2"][3]), 1, 5] = np.nan
        return values

    with pytest.raises(
        ValueError, match=r"task 'VersePairs' at view 1 hold NaN or infinity \(1 of \d+ texts"
    ):
        evaluate(broken, ["LeeSTS", "VersePairs"], max_items=24)
    evaluate(broken, ["VersePairs"], max_items=24, views=[0])


def test_embeddings_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"embed must return \[24 texts, views, dim\], got shape \[24, 5\]"):
        evaluate(lambda texts, _: np.zeros((len(texts), 5)), ["LeeSTS"], max_items=24)
    with pytest.raises(ValueError, match=r"got shape \[23, 1, 5\]"):
        evaluate(lambda texts, _: np.zeros((len(texts) - 1, 1, 5)), ["LeeSTS"], max_items=24)
    memo = embedding.Memo(lambda texts, _: np.zeros((len(texts), len(texts), 5)), None)
    memo.fill(["a"], None, {"a": "A"})
    with pytest.raises(ValueError, match=r"returned \[views, dim\] = \[2, 5\], earlier \[1, 5\]"):
        memo.fill(["b", "c"], None, {"b": "A", "c": "A"})
