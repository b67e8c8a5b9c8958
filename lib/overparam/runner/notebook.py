"""Reading notebooks without running them: their source, their parameters cell, and what code they reach."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from overparam.runner.errors import BadInput


def sources(notebook: Path) -> list[tuple[str, str, list[str]]]:
    """Return (type, source, tags) of each cell.

    Raises:
        BadInput: when the file is no notebook of format 4.
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
        BadInput: when there is not exactly one such cell, or it holds more than assignments of literals.
    """
    cells = [source for kind, source, tags in sources(notebook) if kind == "code" and "parameters" in tags]
    if len(cells) != 1:
        raise BadInput(f"{notebook}: needs exactly one code cell tagged 'parameters', found {len(cells)}")
    found: dict[str, Any] = {}
    for statement in _parse(cells[0], notebook).body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        value = getattr(statement, "value", None)
        target = targets[0] if len(targets) == 1 else None
        try:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
                raise ValueError
            if target.id in found:
                raise BadInput(f"{notebook}: parameter {target.id!r} is assigned twice")
            found[target.id] = ast.literal_eval(value or "")
        except BadInput:
            raise
        except (ValueError, SyntaxError) as error:
            text = ast.unparse(statement)
            raise BadInput(
                f"{notebook}: the parameters cell may only assign literals, found {text!r}"
            ) from error
    return found


def source_hash(notebook: Path) -> str:
    """Return the SHA-256 of all cells' types and sources; outputs and metadata do not count."""
    cells = [(kind, source) for kind, source, _ in sources(notebook)]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def reachable_modules(notebook: Path, study: str) -> dict[str, str]:
    """Return {module: SHA-256 of its source} for all of our code that a study can reach by import.

    Followed are import statements, also those inside functions, from the notebook's cells and from every
    module of the study's own package, into the packages that `study` and this module belong to.

    Args:
        notebook: The study's notebook.
        study: Full name of the study's module or package, such as ``overparam.studies.x``.
    """
    roots = {study.partition(".")[0], __name__.partition(".")[0]}
    waiting: set[str] = {study}
    if (package := _locate(study)) and package.name == "__init__.py":
        for path in package.parent.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            waiting.add(".".join((study, *parts)).removesuffix(".__init__"))
    for kind, source, _ in sources(notebook):
        if kind == "code":
            waiting |= _imported(_parse(source, notebook), "", roots)
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = _locate(name)
        if file is None or name in found:
            continue
        text = file.read_text(encoding="utf-8")
        found[name] = hashlib.sha256(text.encode()).hexdigest()
        parents = name.split(".")
        waiting |= {".".join(parents[:i]) for i in range(1, len(parents))}
        package_name = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting |= _imported_by(text, str(file), package_name, frozenset(roots))
        waiting -= found.keys()
    return dict(sorted(found.items()))


@cache
def _imported_by(text: str, file: str, package: str, roots: frozenset[str]) -> set[str]:
    """`_imported` of a module's source; every study of a plan reaches much the same modules."""
    return _imported(ast.parse(text, file), package, roots)


def _imported(tree: ast.AST, package: str, roots: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b` reaches a and, where b is a module, a.b
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.partition(".")[0] in roots}


def _locate(module: str) -> Path | None:
    """Find a module's source file without importing it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return Path(spec.origin) if spec and spec.origin and not rest else None
    for folder in spec.submodule_search_locations:
        base = Path(folder).joinpath(*rest)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
    return None


def _parse(source: str, notebook: Path) -> ast.Module:
    lines = ["" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise BadInput(f"{notebook}: a code cell is not valid Python: {error}") from error
