"""The order of jobs: a study runs after the studies that it needs."""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from overparam.runner.errors import BadInput
from overparam.support.suggest import hint

if TYPE_CHECKING:
    from overparam.runner.job import Job


def sort(jobs: Sequence[Job], studies: Collection[str]) -> list[Job]:
    """Return jobs in the order of the profile, with each study after those that it needs.

    Args:
        jobs: Jobs of a plan.
        studies: Names of all studies.

    Raises:
        BadInput: if studies need each other, or a needed study is neither planned nor done.
    """
    planned = list(dict.fromkeys(job.study for job in jobs))
    problems = []
    graph: dict[str, set[str]] = {study: set() for study in planned}
    for job in jobs:
        for need, missing in job.needs.items():
            if need not in studies:
                problems.append(f"{job.name} needs {need!r}: no such study: {hint(need, studies)}")
            elif need in graph:
                graph[job.study].add(need)
            elif missing:
                problems.append(f"{job.name} needs {need}, which is not in this plan: {missing}")
    if problems:
        raise BadInput(*problems)
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise BadInput(
            f"studies need each other in a circle: {' needs '.join(error.args[1][::-1])}"
        ) from None
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=planned.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return sorted(jobs, key=lambda job: order.index(job.study))
