"""The floors of the house: imports run downward only, and no two files import each other."""

import ast
from pathlib import Path

LIB = Path(__file__).parents[1] / "lib"
FLOORS = (  # from the ground; the rooms of one floor do not import each other
    ("support",),
    ("assets", "measure", "record"),
    ("data", "publish", "report"),
    ("models",),
    ("train",),
    ("compress",),
    ("evaluate", "serve"),
    ("experiment",),
    ("studies", "runner"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join(path.relative_to(LIB).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (LIB / "overparam").rglob("*.py")
}


def imported(path):
    """The modules of overparam that a file imports, those inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


IMPORTS = {name: imported(path) for name, path in FILES.items()}


def test_imports_run_downward():
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if "." in name and "." in other
        if (here := name.split(".")[1]) != (there := other.split(".")[1]) and FLOOR[here] <= FLOOR[there]
    ]
    assert not upward


def test_no_two_files_import_each_other():
    mutual = [(a, b) for a, others in IMPORTS.items() for b in others if a < b and a in IMPORTS[b]]
    assert not mutual


def test_studies_do_not_import_each_other():
    def study(name):
        return name.split(".")[2] if name.startswith("overparam.studies.") else None

    crossing = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if study(name) and study(other) and (LIB / "overparam/studies" / study(other)).is_dir()
        if study(name) != study(other)
    ]
    assert not crossing
