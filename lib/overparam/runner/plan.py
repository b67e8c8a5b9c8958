"""The plan: which notebook runs are due, complete and validated before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from overparam.runner import code, order, state
from overparam.runner.errors import BadInput
from overparam.runner.job import Job
from overparam.runner.state import Keys
from overparam.runner.validate import parameter_sets, problem_lines
from overparam.support.suggest import hint

PROFILES = Path(__file__).parents[1] / "profiles"
NOTEBOOKS = Path(__file__).resolve().parents[3] / "notebooks"
STUDIES = "overparam.studies"


@dataclass(frozen=True)
class Profile:
    """What to run.

    Attributes:
        name: Name of its file, without ending.
        source: The name or path that the user typed.
        description: For whom it is, how long it takes, and what it leaves out.
        jobs: {study: its parameter sets}.
        minutes: {study: minutes per job on two cores}, an estimate until the job has run here once.
    """

    name: str
    source: str
    description: str
    jobs: dict[str, list[dict[str, Any]]]
    minutes: dict[str, float] = field(default_factory=dict)


class _ProfileFile(BaseModel, extra="forbid"):
    description: str = ""
    jobs: dict[str, list[dict[str, Any]]]
    minutes: dict[str, float] = {}


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a profile that comes with the package, by name, or a YAML file, by path.

    Raises:
        BadInput: for an unknown name, a missing file, or a file that is not a profile.
    """
    given = str(name_or_path)
    path = Path(given)
    if path.suffix not in (".yaml", ".yml") and path.name == given:
        path = PROFILES / f"{given}.yaml"
        if not path.is_file():
            names = [file.stem for file in PROFILES.glob("*.yaml")]
            raise BadInput(
                f"unknown profile {given!r}: {hint(given, names)} (or give a path to a .yaml file)"
            )
    try:
        content = _ProfileFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInput(f"profile {given}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"profile {given}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BadInput(*problem_lines(f"profile {given}", error, _ProfileFile)) from error
    return Profile(path.stem, given, content.description.strip(), content.jobs, content.minutes)


def plan(
    profile: Profile,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
    *,
    force: bool = False,
    inputs: Mapping[str, str] | None = None,
    notebooks_dir: Path = NOTEBOOKS,
    studies_package: str = STUDIES,
) -> list[Job]:
    """List the jobs of a profile with their states, each validated by its study's Params.

    Params may define methods: ``slug()``; ``key_inputs()`` and ``drawing_inputs()`` (name → hash of inputs that are
    measured, or that judge); ``resources()`` (such as {"GPU": 1}); ``needs()`` (study → what of its results is missing,
    or ""). With a class variable ``code_in_key = False``, code and notebook are not part of the measuring key: such a
    study, which runs for hours, is due only if a parameter changes, and one parameter is the version of its recipe.

    Args:
        profile: From `load_profile`.
        only: Studies, or ``study/slug``, to keep; all by default.
        overrides: ``study.param=value`` with a YAML value, applied to every set of that study.
        results: Results folder; by default ``results/<profile>`` beside the notebooks.
        force: Make every job due.
        inputs: Name → SHA-256 of weights and data, part of every key.
        notebooks_dir: Folder with ``NN_<study>.ipynb``.
        studies_package: Package with a module or package per study that has Params and does not import torch.

    Raises:
        BadInput: with one line per problem.
    """
    code.forget()
    root = Path(results) if results is not None else notebooks_dir.parent / "results" / profile.name
    notebooks = {
        m[1]: path
        for path in sorted(notebooks_dir.glob("*.ipynb"))
        if (m := re.match(r"\d+_(\w+)$", path.stem))
    }
    changes, problems = _overrides(overrides, profile, notebooks)
    wanted_studies = [name.partition("/")[0] for name in only]
    problems += [
        f"--only {name}: the profile {profile.name!r} has no such study: {hint(study, profile.jobs)}"
        for name, study in zip(only, wanted_studies, strict=True)
        if study not in profile.jobs
    ]
    jobs: list[Job] = []
    for study, sets in profile.jobs.items():
        if study not in notebooks:
            problems.append(f"profile {profile.name}: unknown study {study!r}: {hint(study, notebooks)}")
        elif not only or study in wanted_studies:
            try:
                module = f"{studies_package}.{study}"
                valid = parameter_sets(
                    profile.name, study, sets, changes.get(study, {}), notebooks[study], module
                )
                jobs += _jobs(
                    profile, study, valid, notebooks[study], module, root, dict(inputs or {}), overrides
                )
            except BadInput as error:
                problems += error.problems
    names = [job.name for job in jobs]
    problems += [
        f"--only {name}: no such job: {hint(name, names)}"
        for name, study in zip(only, wanted_studies, strict=True)
        if "/" in name and study in profile.jobs and name not in names and not problems
    ]
    if problems:
        raise BadInput(*problems)
    jobs = order.sort([job for job in jobs if not only or job.study in only or job.name in only], notebooks)
    return [
        replace(job, state="due", reason="forced") if force and job.state != "running elsewhere" else job
        for job in jobs
    ]


def drawing_parts(reached: code.Reached, params: BaseModel) -> dict[str, Any]:
    """Return what a drawing key is made from: notebook, code that draws and judges, and claims."""
    judged: dict[str, str] = getattr(params, "drawing_inputs", dict)()
    return {"notebook": reached.notebook_drawing, "modules": reached.drawing, "inputs": judged}


def describe(jobs: Sequence[Job]) -> str:
    """Return the plan as a table."""
    return columns(
        ("job", "state", "reason", "record"), [(j.name, j.state, j.reason, j.directory) for j in jobs]
    )


def columns(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return text in aligned columns."""
    table = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _overrides(
    overrides: Sequence[str], profile: Profile, studies: Mapping[str, Path]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    changes: dict[str, dict[str, Any]] = {}
    problems = []
    for text in overrides:
        target, equals, value = text.partition("=")
        study, dot, param = target.strip().partition(".")
        if not (equals and dot and study and param):
            problems.append(f"--set {text}: must look like STUDY.PARAM=VALUE")
        elif study not in profile.jobs:
            what = f"profile {profile.name!r} has no jobs of" if study in studies else "unknown study"
            problems.append(f"--set {text}: {what} {study!r}: {hint(study, profile.jobs)}")
        else:
            try:
                changes.setdefault(study, {})[param] = yaml.safe_load(value)
            except yaml.YAMLError:
                problems.append(f"--set {text}: the value is not valid YAML")
    return changes, problems


def _jobs(
    profile: Profile,
    study: str,
    valid: Sequence[tuple[BaseModel, dict[str, Any]]],
    notebook: Path,
    module: str,
    root: Path,
    inputs: dict[str, str],
    overrides: Sequence[str],
) -> list[Job]:
    reached = code.reached(notebook, module)
    measuring: dict[str, Any] = {}
    if all(getattr(params, "code_in_key", True) for params, _ in valid):
        measuring = {"notebook": reached.notebook_measuring, "modules": reached.measuring}
    sets = [shlex.quote(text) for text in overrides if text.partition(".")[0].strip() == study]
    existing = state.find(root / study)
    planned = 60 * profile.minutes[study] if study in profile.minutes else None
    jobs = []
    for slug, (validated, params) in zip(_slugs(study, valid), valid, strict=True):
        own: dict[str, str] = getattr(validated, "key_inputs", dict)()
        keys = Keys(
            {**measuring, "params": params, "inputs": {**inputs, **own}}, drawing_parts(reached, validated)
        )
        directory = root / study / f"{slug}-{keys.key[:8]}"
        target = f"{study}/{slug}" if len(valid) > 1 else study
        words = ["python run_all.py --profile", shlex.quote(_shown(profile)), "--only", target]
        command = " ".join([*words, *(f"--set {text}" for text in sets)])
        now = state.of(keys, slug, directory, state.lock_of(directory), existing)
        job = Job(
            study, slug, notebook, params, profile.name, keys.key, keys.parts, directory, command, *now[:2]
        )
        took = [(one.started, one.seconds) for one in existing.records if one.slug == slug]
        jobs.append(
            replace(
                job,
                module=module,
                drawing={"key": keys.drawing, **keys.drawing_parts},
                changes=now[2],
                resources=dict(getattr(validated, "resources", dict)()),
                needs=dict(getattr(validated, "needs", dict)()),
                expected=max(took)[1] if took else planned,
            )
        )
    return jobs


def _shown(profile: Profile) -> str:
    """Return the profile as typed, or only its file name if it is an absolute path."""
    path = Path(profile.source)
    return path.name if path.is_absolute() else profile.source


def _slugs(study: str, valid: Sequence[tuple[BaseModel, dict[str, Any]]]) -> list[str]:
    """Name each set by ``Params.slug()``, its model, or the study; add the differing parameters to equal names."""
    slugs = []
    for params, plain in valid:
        own = getattr(params, "slug", None)
        name = own() if callable(own) else plain.get("model") or study
        slugs.append(_clean(Path(str(name)).name if Path(str(name)).is_absolute() else str(name)) or study)
    result = []
    for slug, (_, plain) in zip(slugs, valid, strict=True):
        alike = [other for name, (_, other) in zip(slugs, valid, strict=True) if name == slug]
        differing = [name for name in plain if any(other[name] != plain[name] for other in alike)]
        result.append(_clean("-".join([slug, *(f"{name}-{plain[name]}" for name in differing)])))
    return [s if result.count(s) == 1 else f"{s}-{result[:i].count(s) + 1}" for i, s in enumerate(result)]


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80].strip("-.")
