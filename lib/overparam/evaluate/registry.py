"""Tasks by name: local tasks, and MTEB tasks on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from overparam.evaluate import LOCAL_TASKS
from overparam.support.suggest import hint

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

FULL_SIZE = 1000
SMALLEST_SIZE = 20
_LOCAL = ", ".join(LOCAL_TASKS)


def makers(
    tasks: Sequence[str], max_items: int | None, seed: int, languages: Sequence[str] | None
) -> dict[str, Callable[[], AbsTask]]:
    """Return for each name a function that makes a new task: mteb's clustering tasks keep a generator's state."""
    from overparam.evaluate.tasks import TASKS

    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of names, got {tasks!r}; local tasks: {_LOCAL}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must differ from each other, got {list(tasks)}")
    if max_items is not None and (not isinstance(max_items, int) or max_items < SMALLEST_SIZE):
        raise ValueError(
            f"max_items must be a whole number from {SMALLEST_SIZE} on, or None, got {max_items!r}"
        )
    for name in tasks:
        check_task(name)
    size = FULL_SIZE if max_items is None else max_items
    return {
        name: partial(TASKS[name], size, seed) if name in LOCAL_TASKS else _hub_maker(name, seed, languages)
        for name in tasks
    }


def check_task(name: str) -> None:
    """Raise ValueError for a name that is neither a local task nor an MTEB task."""
    import mteb

    try:
        if name not in LOCAL_TASKS:
            mteb.get_task(name)
    except KeyError as error:
        names = [
            *LOCAL_TASKS,
            *re.findall(r"Did you mean: '([^']+)'", str(error)),
        ]  # and mteb's own suggestion
        raise ValueError(
            f"unknown task {name!r}: {hint(name, names)} Local tasks: {_LOCAL}. "
            "Others are MTEB tasks on the model hub."
        ) from None


def _hub_maker(name: str, seed: int, languages: Sequence[str] | None) -> Callable[[], AbsTask]:
    """Load a hub task's data once, for all new tasks."""
    import mteb

    from overparam.evaluate.items import statistic_of

    def make() -> Any:
        try:
            task = mteb.get_task(name, languages=languages, exclusive_language_filter=languages is not None)
        except ValueError as error:
            raise ValueError(f"task {name!r} has no part in languages {languages}: {error}") from error
        task = type(task)(seed=seed).filter_languages(None, hf_subsets=task.hf_subsets)
        return task.filter_eval_splits(["test"]) if "test" in task.eval_splits else task

    first = make()
    statistic_of(first)
    try:
        first.load_data()
    except Exception as error:
        raise ConnectionError(
            f"the data of MTEB task {name!r} is on the model hub and could not be loaded "
            f"({type(error).__name__}: {str(error).strip()[:200]}). Connect to the network once, or use "
            f"local tasks: {_LOCAL}"
        ) from error

    def fresh() -> AbsTask:
        task: AbsTask = make()
        task.dataset, task.data_loaded = first.dataset, True
        return task

    return fresh
