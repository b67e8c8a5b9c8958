"""The code that a notebook reaches by import: what can change a measured number, and what only draws and judges.

Modules are hashed without comments, docstrings and descriptions of parameters. An import from an ``__init__.py`` that
only re-exports names reaches the modules that define these names, not the others.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from overparam.runner import notebook as notebooks

# modules that only record, draw or judge: no measured number depends on them
DRAWING = frozenset(
    f"overparam.{name}"
    for name in (
        "experiment.charts",
        "experiment.params",
        "experiment.study",
        "record.claims",
        "record.figures",
        "record.ledger",
        "record.provenance",
        "record.record",
        "record.steps",
        "support.files",
        "support.lazy",
        "support.progress",
        "support.suggest",
    )
)
Span = tuple[tuple[int, int], tuple[int, int]]  # start and end, each (line from 1, byte from 0)
_DRAWING_NAMES = ("plots", "verdicts", "card")  # names of such modules in a study's package


@dataclass(frozen=True)
class Reached:
    """{module: hash of its code} of modules that measure, and that only draw; and both hashes of the notebook."""

    measuring: dict[str, str]
    drawing: dict[str, str]
    notebook_measuring: str
    notebook_drawing: str


@dataclass(frozen=True)
class _Module:
    """A source file: text, syntax tree, and the package that its relative imports start from.

    `reexports` is {name: module} for an ``__init__.py`` with nothing but imports, otherwise None.
    """

    text: str
    tree: ast.Module
    package: str
    reexports: dict[str, str] | None


def reached(notebook: Path, study: str) -> Reached:
    """Return the modules that a study's notebook reaches by import, including imports inside functions.

    Args:
        notebook: The study's notebook.
        study: Full name of the study's module or package, such as ``overparam.studies.x``. All modules of the package
            count as reached. Imports are followed within its top-level package and this one.
    """
    roots = frozenset({study.partition(".")[0], __name__.partition(".")[0]})
    trees = [
        notebooks.parse(source, notebook)
        for kind, source, tags in notebooks.sources(notebook)
        if kind == "code" and "parameters" not in tags
    ]
    start = {study, *_own_modules(study)}
    for tree in trees:
        start |= _imports(tree, "", roots)
    every = _closure(start, roots, follow_drawing=True)
    measuring = _closure({name for name in start if not draws(name, study)}, roots, study=study)
    return Reached(
        measuring=measuring,
        drawing={name: sha256 for name, sha256 in every.items() if name not in measuring},
        notebook_measuring=_hash(_measuring_part(trees, study, roots)),
        notebook_drawing=notebooks.source_hash(notebook),
    )


def forget() -> None:
    """Clear the caches: files may have been edited since they were read."""
    for cached in (_code, _module, _locate):
        cached.cache_clear()


def draws(module: str, study: str) -> bool:
    """Return whether a module only records, draws or judges: one of `DRAWING`, or a study's plots, verdicts or card."""
    own = module.removeprefix(f"{study}.") if module.startswith(f"{study}.") else ""
    return module in DRAWING or own in _DRAWING_NAMES


def _own_modules(study: str) -> Iterator[str]:
    package = _locate(study)
    if package and package.name == "__init__.py":
        for path in package.parent.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            yield ".".join((study, *parts)).removesuffix(".__init__")


def _closure(
    start: Iterable[str], roots: frozenset[str], *, study: str = "", follow_drawing: bool = False
) -> dict[str, str]:
    hashes: dict[str, str] = {}
    waiting = deque(start)
    while waiting:
        name = waiting.popleft()
        if (
            name in hashes
            or name.partition(".")[0] not in roots
            or (not follow_drawing and draws(name, study))
        ):
            continue
        module = _module(name)
        if module is not None and module.reexports is None:
            hashes[name], imports = _code(name, roots)
            parents = name.split(".")
            waiting += [".".join(parents[:i]) for i in range(1, len(parents))]
            waiting += imports
    return dict(sorted(hashes.items()))


@cache
def _module(name: str) -> _Module | None:
    file = _locate(name)
    if file is None:
        return None
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text, str(file))
    if file.name != "__init__.py":
        return _Module(text, tree, name.rpartition(".")[0], None)
    return _Module(text, tree, name, _reexports(tree, name))


@cache
def _code(name: str, roots: frozenset[str]) -> tuple[str, frozenset[str]]:
    """Hash of a module's code, and the modules that it imports."""
    module = _module(name)
    assert module is not None
    imports = frozenset(_imports(module.tree, module.package, roots))
    return _hash(_bare(module)), imports


def _bare(module: _Module) -> str:
    """A module's source without comments, docstrings, blank lines and descriptions of parameters.

    Text rather than a dump of the syntax tree, so that it is the same in every version of Python.
    """
    lines = [line.encode() for line in module.text.splitlines()]
    strings: dict[int, list[Span]] = {}
    cuts: list[Span] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        ):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                strings.setdefault(row, []).append(_span(node))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                cuts.append(_span(node.value))
        elif isinstance(node, ast.keyword) and node.arg == "description":
            cuts.append(_span(node.value))
    for row, line in enumerate(lines, 1):
        for column in (at for at, byte in enumerate(line) if byte == ord("#")):
            if not any(start <= (row, column) < end for start, end in strings.get(row, ())):
                cuts.append(((row, column), (row, len(line))))
                break
    for (first, start), (last, end) in sorted(cuts, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:], *[b""] * (last - first)]
    return "\n".join(line.decode().rstrip() for line in lines if line.strip())


def _span(node: ast.expr) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or 0)


def _imports(tree: ast.AST, package: str, roots: frozenset[str]) -> set[str]:
    """The modules that a tree imports; re-exported names are followed to the modules that define them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            for alias in node.names:
                # `from a import b` reaches a and, where b is a module, a.b
                whole = f"{base}.{alias.name}"
                if _locate(whole) and whole.partition(".")[0] in roots:
                    names |= _used(tree, whole, alias.asname or alias.name, roots)
                else:
                    names |= _origin(base, alias.name, roots)
    return {name for name in names if name.partition(".")[0] in roots}


def _used(tree: ast.AST, module: str, alias: str, roots: frozenset[str]) -> set[str]:
    """The modules behind an import named `alias`: the module itself, or those that define the names used from it."""
    here = _module(module)
    if here is None or here.reexports is None:
        return {module}
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == alias
    }
    return set().union(*(_origin(module, name, roots) for name in attributes))


def _origin(package: str, name: str, roots: frozenset[str]) -> set[str]:
    """The module that defines a name re-exported by a package, or the package itself."""
    here = _module(package) if package.partition(".")[0] in roots else None
    if here is None or here.reexports is None:
        return {package}
    if name == "*" or name not in here.reexports:
        inside = f"{package}.{name}"
        return {inside} if _locate(inside) else set(here.reexports.values())
    return _origin(here.reexports[name], name, roots)


def _reexports(tree: ast.Module, package: str) -> dict[str, str] | None:
    """{name: module} for an ``__init__.py`` with nothing but imports and ``__all__``, otherwise None."""
    origins: dict[str, str] = {}
    body = list(tree.body)
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":  # see `support.lazy`
            body += node.body
        elif isinstance(node, ast.ImportFrom):
            if node.module == "__future__":
                continue
            base = _base(node, package)
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                origins[alias.asname or alias.name] = inside if _locate(inside) else base
        elif isinstance(node, ast.Assign):
            if [ast.unparse(target) for target in node.targets] != ["__all__"]:
                return None
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return None
    return origins


def _base(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _measuring_part(trees: Iterable[ast.Module], study: str, roots: frozenset[str]) -> str:
    """The calls of a notebook that measure or record, in order, and the statements that define their arguments.

    Calls that only show tables, figures and verdicts are left out.
    """
    statements = [statement for tree in trees for statement in tree.body]
    drawing: set[str] = set()
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            drawing |= {
                alias.asname or alias.name
                for alias in node.names
                if draws(f"{node.module}.{alias.name}", study) or draws(node.module or "", study)
            }
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in statements
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").partition(".")[0] in roots
    } - drawing
    kept: list[str] = []
    needed: set[str] = set()
    for statement in reversed(statements):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        stored = {
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        calls = [
            node
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and _root(node.func) in imported | {"recorder"}
        ]
        if calls and isinstance(statement, ast.Expr):
            kept += [ast.unparse(call) for call in reversed(calls)]
            needed |= set().union(*({n.id for n in ast.walk(c) if isinstance(n, ast.Name)} for c in calls))
        elif calls or stored & needed:
            kept.append(ast.unparse(statement))
            needed |= names
    return "\n".join(reversed(kept))


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _locate(module: str) -> Path | None:
    """Find a module's source file without importing it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or not spec.submodule_search_locations:
        return Path(spec.origin) if spec and spec.origin and not rest else None
    for folder in spec.submodule_search_locations:
        base = Path(folder).joinpath(*rest)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
    return None
