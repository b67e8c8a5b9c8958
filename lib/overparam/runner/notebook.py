"""Reading notebooks without running them: their source and their parameters cell."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from overparam.runner.errors import BadInput


def sources(notebook: Path) -> list[tuple[str, str, list[str]]]:
    """Return (type, source, tags) of each cell.

    Raises:
        BadInput: if the file is not a notebook of format 4.
    """
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        if content["nbformat"] != 4:
            raise ValueError(f"format {content['nbformat']}, expected 4")
        return [
            (cell["cell_type"], "".join(cell["source"]), list(cell.get("metadata", {}).get("tags", [])))
            for cell in content["cells"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{notebook}: not a readable notebook ({error})") from error


def parameters(notebook: Path) -> dict[str, Any]:
    """Return the names and literal values that the cell tagged "parameters" assigns.

    Raises:
        BadInput: if there is not exactly one such cell, or it has anything but assignments of literals.
    """
    cells = [source for kind, source, tags in sources(notebook) if kind == "code" and "parameters" in tags]
    if len(cells) != 1:
        raise BadInput(f"{notebook}: needs exactly one code cell tagged 'parameters', found {len(cells)}")
    values: dict[str, Any] = {}
    for statement in parse(cells[0], notebook).body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        value = getattr(statement, "value", None)
        target = targets[0] if len(targets) == 1 else None
        try:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
                raise ValueError
            if target.id in values:
                raise BadInput(f"{notebook}: parameter {target.id!r} is assigned twice")
            values[target.id] = ast.literal_eval(value or "")
        except BadInput:
            raise
        except (ValueError, SyntaxError) as error:
            text = ast.unparse(statement)
            raise BadInput(
                f"{notebook}: the parameters cell may only assign literals, found {text!r}"
            ) from error
    return values


def source_hash(notebook: Path) -> str:
    """Return the SHA-256 of all cells' types and sources, without outputs and metadata."""
    cells = [(kind, source) for kind, source, _ in sources(notebook)]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def parse(source: str, notebook: Path) -> ast.Module:
    """Return the syntax of a code cell, without its magics and shell lines.

    Raises:
        BadInput: if it is not valid Python.
    """
    lines = ["" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise BadInput(f"{notebook}: a code cell is not valid Python: {error}") from error
