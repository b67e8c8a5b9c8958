"""``python -m overparam.cli.parameters``: write the parameters cell of every notebook from its study's Params."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from overparam.runner.plan import NOTEBOOKS, STUDIES
from overparam.support.files import write_changed

_LINE = 110  # line length of the formatter


def commented(notebook: Path) -> str:
    """Return the text of a notebook whose parameters cell holds its study's parameters as they are today."""
    params = importlib.import_module(f"{STUDIES}.{notebook.stem.partition('_')[2]}").Params
    content = json.loads(notebook.read_text(encoding="utf-8"))
    (cell,) = (each for each in content["cells"] if "parameters" in each["metadata"].get("tags", []))
    cell["source"] = cell_source(params).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def cell_source(params: type[BaseModel]) -> str:
    """Return the source of a parameters cell: for each field, its description as a comment, and its default."""
    lines = []
    for name, field in params.model_fields.items():
        lines += [f"# {field.description}", _assignment(name, field.get_default())]
    return "\n".join(lines)


def _assignment(name: str, value: Any) -> str:
    line = f"{name} = {_literal(value)}"
    if len(line) <= _LINE or not isinstance(value, list | tuple):
        return line
    return "\n".join([f"{name} = [", *(f"    {_literal(each)}," for each in value), "]"])


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def main() -> None:
    """Rewrite every notebook whose cell differs."""
    for path in sorted(NOTEBOOKS.glob("[0-9]*_*.ipynb")):
        if write_changed(path, commented(path).encode()):
            print(f"{path.name}: parameters cell written")


if __name__ == "__main__":
    main()
