"""Per-item scores of an mteb run, from the predictions that mteb saves.

`mteb.evaluate(prediction_folder=…)` is mteb's public way to get a model's prediction for each item, and works for
local and hub tasks alike. For each type of task, the predictions give an array from which a statistic computes mteb's
main score:

- STS: [pairs, 2], cosine and human score; Spearman correlation.
- Pair classification: [pairs, 2], similarity and label; average precision. mteb's `max_ap` is the best over
  five similarities, and the similarity given is that one.
- Classification: [texts, 1], share of mteb's repeated experiments that named the right class; mean.
- Retrieval and reranking: [queries, 1], nDCG (or MAP, recall) at the depth of the main score; mean, which
  mteb rounds to 5 digits.
- Bitext mining: [sentences, 1], F1 of the sentence as a class, 2 · hit / (1 + times it was chosen); mean. The
  second term makes items depend slightly on each other.
- Clustering: [experiments, 1], v-measure of each of mteb's experiments; mean. Experiments redraw the same texts and
  are not independent: an interval from them describes the draws, not other texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytrec_eval
from datasets import Dataset
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

Scores = NDArray[np.float64]
"""Scores per item, [n, k]."""

_STS = {"cosine_spearman": "cosine_scores", "spearman": "similarity_scores"}
_PAIRS = {  # similarity -> sign by which higher means more similar, in mteb's order
    "similarity_scores": 1,
    "cosine_scores": 1,
    "manhattan_distances": -1,
    "euclidean_distances": -1,
    "dot_scores": 1,
}
_PAIR_METRICS = {
    "max_ap": tuple(_PAIRS),
    "cosine_ap": ("cosine_scores",),
    "similarity_ap": ("similarity_scores",),
}
_RETRIEVAL = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall"}


def statistic_of(task: AbsTask) -> str:
    """Return the statistic that gives the task's main score from its items.

    Raises:
        ValueError: Per-item scores are not supported for the task's type or main score.
    """
    metric = task.metadata.main_score
    if isinstance(task, AbsTaskSTS) and metric in _STS:
        return "spearman"
    if isinstance(task, AbsTaskPairClassification) and metric in _PAIR_METRICS:
        return "average_precision"
    if isinstance(task, AbsTaskClassification) and metric == "accuracy" and not task.is_cross_validation:
        return "mean"
    if isinstance(task, AbsTaskRetrieval) and metric.split("_at_")[0] in _RETRIEVAL and "_at_" in metric:
        return "mean"
    if isinstance(task, AbsTaskBitextMining) and metric == "f1" and not task.parallel_subsets:
        return "mean"
    if isinstance(task, AbsTaskClustering | AbsTaskClusteringLegacy) and metric == "v_measure":
        return "v_measure_mean"
    kind = task.metadata.type
    raise ValueError(
        f"task {task.metadata.name!r} ({kind}, scored by {metric}) has no per-item scores here; STS, "
        "pair classification, classification by accuracy, retrieval, bitext mining and clustering have"
    )


def items_of(task: AbsTask, data: Any, predictions: Any, scores: dict[str, Any]) -> Scores:
    """Return the per-item scores of one split of a task.

    Args:
        task: The task, for its type and settings.
        data: The split's data, in mteb's form.
        predictions: Predictions that mteb saved for the split.
        scores: mteb's scores of the split.

    Returns:
        float64 [n, k], see the list in this module's docstring.
    """
    if isinstance(task, AbsTaskSTS):
        predicted = predictions[_STS[task.metadata.main_score]]
        return np.column_stack([predicted, data["score"]]).astype(np.float64)
    if isinstance(task, AbsTaskPairClassification):
        return _pairs(task, data, predictions)
    if isinstance(task, AbsTaskClassification):
        labels = np.asarray(data[task.label_column_name])
        hits: NDArray[np.bool_] = np.asarray(predictions) == labels  # [experiments, n]
        return np.asarray(hits.mean(axis=0)[:, None], dtype=np.float64)
    if isinstance(task, AbsTaskRetrieval):
        return _retrieval(task, data, predictions)
    if isinstance(task, AbsTaskBitextMining):
        chosen = np.asarray([neighbour["corpus_id"] for neighbour in predictions["sentence1-sentence2"]])
        times = np.bincount(chosen, minlength=len(chosen))
        return np.asarray(2.0 * (chosen == np.arange(len(chosen))) / (1 + times))[:, None]
    measures = scores["v_measures"]  # one list, or one per level of the hierarchy
    flat = [v for level in measures.values() for v in level] if isinstance(measures, dict) else measures
    return np.asarray(flat, dtype=np.float64)[:, None]


def _pairs(task: AbsTaskPairClassification, data: Dataset, predictions: dict[str, list[float]]) -> Scores:
    if len(data) == 1:  # mteb's older form keeps all pairs in one row
        data = Dataset.from_dict(data[0])
    labels = np.asarray(data[task.label_column_name], dtype=np.int64)
    candidates = [
        _PAIRS[name] * np.asarray(predictions[name]) for name in _PAIR_METRICS[task.metadata.main_score]
    ]
    best = max(candidates, key=lambda scores: average_precision_score(labels, scores))
    return np.column_stack([best, labels]).astype(np.float64)


def _retrieval(task: AbsTaskRetrieval, data: Any, results: dict[str, dict[str, float]]) -> Scores:
    name, depth = task.metadata.main_score.split("_at_")
    if task.ignore_identical_ids:
        results = {
            query: {d: s for d, s in documents.items() if d != query} for query, documents in results.items()
        }
    if task.skip_first_result:
        results = {
            query: dict(sorted(documents.items(), key=lambda item: item[1], reverse=True)[1:])
            for query, documents in results.items()
        }
    measure = f"{_RETRIEVAL[name]}.{depth}"
    per_query = pytrec_eval.RelevanceEvaluator(data["relevant_docs"], {measure}).evaluate(results)
    return np.asarray([per_query[query][measure.replace(".", "_")] for query in sorted(per_query)])[:, None]
