"""Checks of parameter sets, and of the notebook's parameters cell, against the study's Params."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from overparam.runner import notebook as notebooks
from overparam.runner.errors import BadInput
from overparam.support.suggest import hint


def parameter_sets(
    profile: str,
    study: str,
    sets: Sequence[dict[str, Any]],
    changes: dict[str, Any],
    notebook: Path,
    module: str,
) -> list[tuple[BaseModel, dict[str, Any]]]:
    """Return each set as Params, and as plain values including defaults."""
    try:
        params_class: type[BaseModel] = importlib.import_module(module).Params
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{notebook}: {module} must export Params ({error})") from error
    problems = _disagreements(notebook, params_class)
    if not sets:
        problems.append(f"profile {profile}: {study} has no parameter sets; an empty one is written {{}}")
    valid: list[tuple[BaseModel, dict[str, Any]]] = []
    for number, values in enumerate(sets, 1):
        where = f"profile {profile}: {study}, set {number}"
        try:
            # strict JSON mode: lists become tuples, but "3" and true are not numbers
            params = params_class.model_validate_json(
                json.dumps({**values, **changes}, default=str), strict=True
            )
        except ValidationError as error:
            problems += problem_lines(where, error, params_class)
            continue
        plain = params.model_dump(mode="json")
        same = next((i for i, (_, other) in enumerate(valid, 1) if other == plain), None)
        if same:
            problems.append(f"{where} is identical to set {same}: each job may be listed once")
        valid.append((params, plain))
    if problems:
        raise BadInput(*problems)
    return valid


def _disagreements(notebook: Path, params_class: type[BaseModel]) -> list[str]:
    """Compare the notebook's parameters cell with Params: the same names, the same defaults."""
    try:
        cell = notebooks.parameters(notebook)
    except BadInput as error:
        return list(error.problems)
    fields = params_class.model_fields
    problems = [
        f"{notebook}: parameter {name!r} is not in Params: {hint(name, fields)}"
        for name in cell.keys() - fields
    ]
    problems += [
        f"{notebook}: parameter {name!r} of Params is missing in the parameters cell"
        for name in fields.keys() - cell
    ]
    if problems:
        return sorted(problems)
    required = {name: cell[name] for name, info in fields.items() if info.is_required()}
    try:
        shown = params_class.model_validate(cell).model_dump(mode="json")
        defaults = params_class.model_validate(required).model_dump(mode="json")
    except ValidationError as error:
        return problem_lines(f"{notebook}: parameters cell", error, params_class)
    return [
        f"{notebook}: parameter {name!r} is {shown[name]!r}, but Params has {defaults[name]!r}"
        for name in fields
        if shown[name] != defaults[name]
    ]


def problem_lines(where: str, error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one readable line per error of pydantic."""
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown parameter {name!r}: {hint(name, model.model_fields)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {name!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {name or 'as a whole'}: {message}, got {item['input']!r}")
    return lines
