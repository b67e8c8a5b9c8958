"""`make check`: the tests of what has changed: those nearest to it, as far as the time goes.

Changed is what is not committed yet, or what the last commit changed where all is; `python -m tests.changed main` takes
all that differs from a commit or branch. A test file is run when its imports lead to a changed file, one whose imports
lead there at once before one that comes there over others. What no Python file imports (a profile, a notebook, a
template) belongs to the files that name it. Tests for which no time is left are skipped, and said to be; `make test`
runs them all.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from tests.imports import FILES, ROOT, distances, imported, mentioning

SECONDS = 60  # for tests; lint and types need the rest of a minute and a half
AT_MOST = 12  # files: reading all of them takes a minute
END = "OVERPARAM_TESTS_END"  # when no further test is begun, in seconds since 1970: see conftest.py


def main(arguments: list[str]) -> int:
    """Run the tests and return pytest's exit code; no tests at all are no error."""
    files = changed(*arguments)
    chosen = tests_of(files)
    print(f"{len(files)} files changed, {len(chosen)} test files lead to them: ", end="")
    print(f"these are run, the nearest {AT_MOST} of them at most", flush=True)
    if not chosen:
        return 0
    environment = os.environ | {END: str(time.time() + SECONDS)}
    command = [sys.executable, "-m", "pytest", "-q", *map(str, chosen[:AT_MOST])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def changed(since: str = "") -> list[Path]:
    """Files that differ from a commit, by default from the last one, or from the one before where nothing differs."""
    new = _git("ls-files", "--others", "--exclude-standard")
    differing = _git("diff", "--name-only", since or "HEAD")
    if not (since or new or differing):
        differing = _git("diff", "--name-only", "HEAD~1")
    return [ROOT / name for name in dict.fromkeys((*differing, *new))]


def _git(*arguments: str) -> list[str]:
    said = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said.split("\n")[:-1]


def tests_of(files: Collection[Path]) -> list[Path]:
    """The test files whose imports lead to some files, the nearest first."""
    names = {path: module for module, path in FILES.items()}
    targets = {names[path] for path in files if path in names}
    others = [path for path in files if path not in names]
    targets |= mentioning([text for path in others for text in (path.name, f'"{_study(path)}"')])
    imports = {module: imported(path) for module, path in FILES.items()}
    found = {}
    for module, path in FILES.items():
        if path.name.startswith("test_"):
            reached = distances(module, imports | {module: imports[module] | _fixtures(path)})
            if near := [reached[target] for target in targets & reached.keys()]:
                found[path] = (min(near), len(reached))
    return sorted(found, key=lambda path: (found[path], str(path)))


def _fixtures(path: Path) -> set[str]:
    """The conftest modules that pytest loads for a test file."""
    places = [folder / "conftest.py" for folder in path.parents if folder.is_relative_to(ROOT / "tests")]
    return {module for module, file in FILES.items() if file in places}


def _study(path: Path) -> str:
    """The name under which code knows a file: a profile's, or that of a notebook's study."""
    return path.stem.lstrip("0123456789_")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
