"""Scores of embeddings on local and hub tasks: every view of a model from one embedding pass.

mteb does the scoring: `mteb.evaluate` runs each task once per view, with an encoder that looks up the view's vectors.
Results of earlier runs are never read.

Scoring the nine local tasks with 100 items each takes about 2 s per view of 640 dimensions on one core.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from overparam.evaluate import LOCAL_TASKS
from overparam.evaluate.registry import makers
from overparam.support.progress import track

if TYPE_CHECKING:
    from overparam.evaluate.items import Scores
    from overparam.evaluate.view import View

Embed = Callable[[list[str], str | None], NDArray[np.float32]]
"""(texts, instruction) -> float32 [texts, views, dim]; a view is, for example, a depth."""

BAG_DIMENSIONS = 4096


@dataclass(frozen=True)
class TaskScore:
    """The score of one view on one task.

    Attributes:
        task: The task's name; for a hub task with several languages, "name (subset)", with one score each.
        type: mteb's task type, such as "STS".
        metric: The name of mteb's main score.
        view: Index into the views that `embed` returns.
        score: mteb's main score, 0..1.
        items: Per-item scores, float64 [n, k]; `overparam.evaluate.items` describes them for each type.
        statistic: Name of the function of `items` that gives `score`: "mean", "spearman", "average_precision"
            or "v_measure_mean". Retrieval scores agree to 5 digits because mteb rounds them.
    """

    task: str
    type: str
    metric: str
    view: int
    score: float
    items: Scores
    statistic: str


def task_names() -> list[str]:
    """Names of the local tasks. With a network, any MTEB task on the hub can be used as well."""
    return list(LOCAL_TASKS)


def evaluate(
    embed: Embed,
    tasks: Sequence[str],
    *,
    max_items: int | None = None,
    seed: int = 42,
    views: Sequence[int] | None = None,
    instructions: bool = False,
    languages: Sequence[str] | None = ("eng",),
    cache_dir: Path | str | None = None,
) -> list[TaskScore]:
    """Score every view of an embedder on tasks.

    All texts of the local tasks are embedded first, with one call of `embed` per distinct instruction (a single call
    without instructions), each text once even if several tasks use it. Texts of hub tasks are embedded when mteb
    requests them, once for all views.

    Args:
        embed: Returns the embeddings of texts, for all views at once.
        tasks: Names of local tasks (see `task_names`) or of MTEB tasks on the hub.
        max_items: Items per local task (queries, texts or verses), at least 20; None for 1000, or as many as exist.
            Hub tasks always use all items.
        seed: Chooses the texts of local tasks, and seeds mteb.
        views: Which views to score; all by default.
        instructions: Whether to pass each task's instruction to `embed` (in retrieval, only for queries).
        languages: Languages to keep of multilingual hub tasks; None keeps all.
        cache_dir: Folder for mteb's own result files. They are written, never read: mteb would reuse the score of a
            changed text or model.

    Returns:
        Scores by task, in the given order, then by view.

    Raises:
        ValueError: A task is unknown or repeated, there are no tasks, a size or view is out of range, or embeddings
            have the wrong shape or are not finite.
        ConnectionError: A hub task's data could not be loaded.
    """
    from overparam.evaluate.local import LocalTask
    from overparam.evaluate.view import View, instruction_of

    with _random_state_kept():
        make = makers(tasks, max_items, seed, languages)
    shared = Memo(embed, views)
    wanted: dict[str | None, dict[str, str]] = {}  # instruction -> text -> first task that needs it
    for name in tasks:
        with _random_state_kept():
            task = make[name]()
        for text, side in task.texts() if isinstance(task, LocalTask) else ():
            instruction = instruction_of(task.metadata, side) if instructions else None
            wanted.setdefault(instruction, {}).setdefault(text, name)
    for instruction, owners in wanted.items():
        shared.fill(list(owners), instruction, owners)
    if not wanted:  # only hub tasks: embed one text to learn the number of views
        shared.fill([tasks[0]], None, {tasks[0]: tasks[0]})

    task_scores: list[TaskScore] = []
    memo, held = shared, ""
    jobs = [(name, view) for name in tasks for view in shared.views]
    for name, view in track(jobs, "scoring embeddings"):
        if name != held:  # texts of a hub task are dropped when it is done
            memo, held = shared if name in LOCAL_TASKS else Memo(embed, shared.views), name
        with _random_state_kept():
            task_scores.extend(_score(make[name](), View(memo.get, view, instructions), cache_dir))
    return task_scores


def bag_of_words(
    texts: list[str],
    instruction: str | None = None,  # noqa: ARG001
) -> NDArray[np.float32]:
    """Embed by hashed words and word pairs, with sublinear counts and unit length: the floor that a model must beat.

    Args:
        texts: Texts to embed.
        instruction: Ignored.

    Returns:
        float32 [texts, 1, 4096].
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    counts = HashingVectorizer(n_features=BAG_DIMENSIONS, ngram_range=(1, 2), norm=None, alternate_sign=True)
    matrix = counts.transform(texts)
    matrix.data = np.sign(matrix.data) * np.log1p(np.abs(matrix.data))
    return np.asarray(normalize(matrix).toarray(), dtype=np.float32)[:, None, :]


class Memo:
    """Embeddings of all texts so far, by instruction; `embed` is called only for new texts."""

    def __init__(self, embed: Embed, views: Sequence[int] | None) -> None:
        self.embed = embed
        self.views = [] if views is None else list(views)
        self._rows: dict[tuple[str | None, str], NDArray[np.float32]] = {}  # [views, dim]
        self._shape: tuple[int, ...] | None = None

    def fill(self, texts: list[str], instruction: str | None, owners: dict[str, str]) -> None:
        """Embed `texts`; `owners` maps each text to its task, for error messages."""
        texts = [text for text in dict.fromkeys(texts) if (instruction, text) not in self._rows]
        if not texts:
            return
        values = np.asarray(self.embed(texts, instruction))  # [texts, views, dim]
        if values.ndim != 3 or len(values) != len(texts) or 0 in values.shape:
            raise ValueError(
                f"embed must return [{len(texts)} texts, views, dim], got shape {list(values.shape)}"
            )
        if self._shape not in (None, values.shape[1:]):
            raise ValueError(
                f"embed returned [views, dim] = {list(values.shape[1:])}, earlier {list(self._shape or ())}"
            )
        self._shape = values.shape[1:]
        self.views = self.views or list(range(values.shape[1]))
        if wrong := [view for view in self.views if not 0 <= view < values.shape[1]]:
            raise ValueError(f"views must be in 0..{values.shape[1] - 1}, got {wrong[0]}")
        values = values[:, self.views].astype(np.float32, copy=False)
        bad = np.argwhere(~np.isfinite(values).all(axis=-1))  # [bad, (text, view)]
        if len(bad):
            text, view = texts[bad[0][0]], self.views[bad[0][1]]
            raise ValueError(
                f"the embeddings of task {owners[text]!r} at view {view} hold NaN or infinity "
                f"({len(set(bad[:, 0]))} of {len(texts)} texts, such as {text[:60]!r}); a model in float16 "
                "overflows easily: try bfloat16 or float32"
            )
        self._rows.update(((instruction, text), row) for text, row in zip(texts, values, strict=True))

    def get(self, texts: list[str], instruction: str | None, view: int, task: str) -> NDArray[np.float32]:
        """Vectors of one view, float32 [texts, dim]."""
        self.fill(texts, instruction, dict.fromkeys(texts, task))
        position = self.views.index(view)
        return np.stack([self._rows[instruction, text][position] for text in texts])


def _score(task: Any, view: View, cache_dir: Path | str | None) -> list[TaskScore]:
    """Run mteb on one view; one score, or one a subset and split where a hub task has several."""
    import mteb

    from overparam.evaluate.items import items_of, statistic_of
    from overparam.evaluate.local import LocalTask

    statistic = statistic_of(task)
    if not task.data_loaded:
        task.load_data()
    # local tasks are so small that a second thread makes them slower, most of all on busy machines
    threads = threadpool_limits(1 if isinstance(task, LocalTask) else None)
    with tempfile.TemporaryDirectory() as folder, _quiet(), threads:
        result = mteb.evaluate(
            view,
            task,
            co2_tracker=False,  # mteb's default would start codecarbon's online tracker
            cache=None if cache_dir is None else mteb.ResultCache(Path(cache_dir)),
            overwrite_strategy="always",
            prediction_folder=folder,
            encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            show_progress_bar=False,
        ).task_results[0]
        predictions = json.loads((Path(folder) / task.prediction_file_name).read_text())
    parts = [(split, scores) for split, by_subset in result.scores.items() for scores in by_subset]
    task_scores = []
    for split, scores in parts:
        subset = scores["hf_subset"]
        data = task.dataset[subset][split] if subset in task.dataset else task.dataset[split]
        items = items_of(task, data, predictions[subset][split], scores)
        name = task.metadata.name if len(parts) == 1 else f"{task.metadata.name} ({subset}, {split})"
        score = float(scores["main_score"])
        task_scores.append(
            TaskScore(name, task.metadata.type, task.metadata.main_score, view.view, score, items, statistic)
        )
    return task_scores


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random generators, which every mteb task seeds for the whole process: the caller may be training."""
    import torch

    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide mteb's log and progress bars, and scikit-learn's warnings."""
    import datasets

    logger = logging.getLogger("mteb")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    bitext = "mteb._evaluators.text.bitext_mining_evaluator.tqdm"  # the one bar that no argument turns off
    try:
        with warnings.catch_warnings(), mock.patch(bitext, partial(tqdm, disable=True)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
