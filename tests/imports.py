"""What imports what, in `lib` and in `tests`, read from the sources."""

import ast
from collections.abc import Collection
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _named(folder: Path, package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (folder / package).rglob("*.py")
    }


FILES = {**_named(ROOT / "lib", "overparam"), **_named(ROOT, "tests"), "run_all": ROOT / "run_all.py"}


@cache
def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, those inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


def distances(start: str, imports: dict[str, set[str]]) -> dict[str, int]:
    """How many imports lead from one module to each that it reaches; 0 to itself."""
    found, edge, steps = {start: 0}, {start}, 0
    while edge:
        steps += 1
        edge = {other for name in edge for other in imports[name]} - found.keys()
        found |= dict.fromkeys(edge, steps)
    return found


def mentioning(texts: Collection[str]) -> set[str]:
    """The modules whose source holds one of some texts."""
    sources = {module: path.read_text(encoding="utf-8") for module, path in FILES.items()}
    return {module for module, source in sources.items() for text in texts if text in source}
