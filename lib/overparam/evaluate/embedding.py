"""Scores of embeddings on local and hub tasks: every view of a model from one embedding pass.

mteb does the scoring: each task is run by `mteb.evaluate` once a view, with an encoder that looks the view's
vectors up. Nothing is read from an earlier run's results.

Scoring the nine local tasks at 100 items takes about 2 seconds a view of 640 dimensions on one core.
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
    from overparam.evaluate.items import Items
    from overparam.evaluate.view import View

Embed = Callable[[list[str], str | None], NDArray[np.float32]]
"""(texts, instruction) -> float32 [texts, views, dim]; a view is, for example, a depth."""

BAG_DIMENSIONS = 4096


@dataclass(frozen=True)
class TaskScore:
    """The score of one view on one task.

    Attributes:
        task: The task's name; of a hub task with several languages, "name (subset)", one score each.
        type: mteb's task type, such as "STS".
        metric: The name of mteb's main score.
        view: Index into the views that `embed` returns.
        score: mteb's main score, 0..1.
        items: float64 [n, k], per item; `overparam.evaluate.items` says what they are for each type.
        statistic: Name of the function of `items` that gives `score`: "mean", "spearman", "average_precision"
            or "v_measure_mean". Retrieval scores agree to 5 digits, as mteb rounds them.
    """

    task: str
    type: str
    metric: str
    view: int
    score: float
    items: Items
    statistic: str


def task_names() -> list[str]:
    """Names of the local tasks. Any MTEB task on the hub can be named as well, where there is a network."""
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

    All texts of the local tasks are embedded first, by one call of `embed` a distinct instruction (a single
    call without instructions), each text once however many tasks use it. Texts of hub tasks are embedded as
    mteb asks for them, once for all views.

    Args:
        embed: Gives the embeddings of texts, for all views at once.
        tasks: Names of local tasks (see `task_names`) or of MTEB tasks on the hub.
        max_items: How many queries, texts or verses a local task judges, at least 20; None means 1000, or as
            many as there are. Hub tasks are always whole.
        seed: Chooses the texts of local tasks, and mteb's draws.
        views: Which views to score; all by default.
        instructions: Pass each task's instruction to `embed` (to queries only, in retrieval); None otherwise.
        languages: Languages to keep of multilingual hub tasks; None keeps all.
        cache_dir: Folder to write mteb's own result files to. They are written, never read: mteb would take
            the score of a changed text or model for current.

    Returns:
        Scores by task, in the order given, then by view.

    Raises:
        ValueError: An unknown or repeated task, none at all, a size or view out of range, or embeddings of a
            wrong shape or not finite.
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
    if not wanted:  # hub tasks only: one text tells how many views there are
        shared.fill([tasks[0]], None, {tasks[0]: tasks[0]})

    found: list[TaskScore] = []
    memo, held = shared, ""
    jobs = [(name, view) for name in tasks for view in shared.views]
    for name, view in track(jobs, "scoring embeddings"):
        if name != held:  # texts of a hub task are dropped after it
            memo, held = shared if name in LOCAL_TASKS else Memo(embed, shared.views), name
        with _random_state_kept():
            found.extend(_score(make[name](), View(memo.get, view, instructions), cache_dir))
    return found


def bag_of_words(
    texts: list[str],
    instruction: str | None = None,  # noqa: ARG001
) -> NDArray[np.float32]:
    """Hashed words and word pairs, sublinear counts, unit length: the floor that a model has to beat.

    Args:
        texts: What to embed.
        instruction: Ignored, as is usual for words counted.

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
    """Embeddings of all texts met so far, by instruction; `embed` is called for new ones only."""

    def __init__(self, embed: Embed, views: Sequence[int] | None) -> None:
        self.embed = embed
        self.views = [] if views is None else list(views)
        self._rows: dict[tuple[str | None, str], NDArray[np.float32]] = {}  # [views, dim]
        self._shape: tuple[int, ...] | None = None

    def fill(self, texts: list[str], instruction: str | None, owners: dict[str, str]) -> None:
        """Embed `texts`; `owners` names the task of each, for errors."""
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
    # local tasks are so small that a second thread costs more than it does, and busy machines suffer most
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
    found = []
    for split, scores in parts:
        subset = scores["hf_subset"]
        data = task.dataset[subset][split] if subset in task.dataset else task.dataset[split]
        items = items_of(task, data, predictions[subset][split], scores)
        name = task.metadata.name if len(parts) == 1 else f"{task.metadata.name} ({subset}, {split})"
        score = float(scores["main_score"])
        found.append(
            TaskScore(name, task.metadata.type, task.metadata.main_score, view.view, score, items, statistic)
        )
    return found


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undo that every mteb task seeds the generators of the whole process: the caller may be in training."""
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
    """Keep mteb's log, progress bars and scikit-learn's warnings out of notebooks."""
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
