"""Output of a plan as JSON, and of one job in full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overparam.runner.errors import BadInput
from overparam.runner.job import Job
from overparam.runner.plan import Profile
from overparam.support.suggest import hint


def as_json(profile: Profile, results: Path, jobs: Sequence[Job]) -> str:
    """Return a plan as JSON."""
    listed = []
    for job in jobs:
        values = job.to_dict()
        del values["parts"]
        listed.append({"name": job.name, **values})
    content = {"profile": profile.name, "results": str(results), "jobs": listed}
    return json.dumps(content, indent=1, ensure_ascii=False)


def explain(jobs: Sequence[Job], name: str) -> str:
    """Return everything about a job: what it is, its state, and why.

    Args:
        jobs: The plan.
        name: ``study/slug``, or only the study if it has one job.

    Raises:
        BadInput: if no job, or more than one, has that name.
    """
    matches = [job for job in jobs if name in (job.name, job.study)]
    if len(matches) != 1:
        names = [job.name for job in matches or jobs]
        advice = hint(name, names) if not matches else f"there are {', '.join(names)}"
        raise BadInput(f"--explain {name}: {'no such job' if not matches else 'which one'}? {advice}")
    (job,) = matches
    failed = job.directory.with_name(f"{job.directory.name}.failed")
    log = job.beside("log")
    rows: list[tuple[str, Any]] = [
        ("state", f"{job.state}{job.reason and ': '}{job.reason}"),
        ("key", job.key),
        ("record", job.directory),
        ("notebook", job.notebook),
        ("command", job.command),
        ("needs", ", ".join(job.needs) or "no other study"),
        ("resources", _pairs(job.resources) or "nothing special"),
        ("takes", f"about {job.expected:.0f} s" if job.expected is not None else "unknown"),
        ("log", log if log.exists() else "none yet"),
        *([("failure", failed)] if failed.exists() else []),
    ]
    lines = [job.name, *(f"  {label:<10} {value}" for label, value in rows)]
    for what, names in job.changes.items():
        lines += [f"  {what} changed since the last record", *(f"    {text}" for text in names)]
    lines += ["  the key covers", f"    parameters {_pairs(job.params)}"]
    if "notebook" in job.parts:
        lines.append(f"    notebook   {job.parts['notebook'][:16]}")
        lines += [f"    code       {module} {sha[:16]}" for module, sha in job.parts["modules"].items()]
    else:
        lines.append("    no code: a parameter with the recipe's version stands for it")
    lines += [f"    data       {each} {str(sha)[:16]}" for each, sha in job.parts["inputs"].items()]
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
