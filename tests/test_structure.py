"""The floors of the house: imports run downward only, and no two files import each other."""

from pathlib import Path

from tests.imports import FILES, imported

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

IMPORTS = {name: imported(path) for name, path in FILES.items() if name.startswith("overparam")}


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
