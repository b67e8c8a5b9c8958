"""The results table of the README, made from records and never by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from urllib.parse import quote

from overparam.publish.inventory import Inventory, folder, take
from overparam.record.claims import Claim
from overparam.record.record import FILE_NAME, Record
from overparam.support.files import write_atomic

START, END = "<!-- results:start -->", "<!-- results:end -->"
_HEAD = "| claim | published | model | measured [95 % CI] | verdict |\n|---|---|---|---|---|"


def fill(readme_path: str | Path, results_dir: str | Path) -> bool:
    """Replace the README's results table by the one made from the records; return whether anything changed.

    Raises:
        ValueError: when the README lacks the two marks around the table.
    """
    path = Path(readme_path)
    before = path.read_text()
    after = _filled(path, before, Path(results_dir))
    if after == before:
        return False
    write_atomic(path, after.encode())
    return True


def stale(readme_path: str | Path, results_dir: str | Path) -> bool:
    """Tell whether the README's table differs from the one that the records give now."""
    path = Path(readme_path)
    text = path.read_text()
    return _filled(path, text, Path(results_dir)) != text


def table(found: Inventory, relative_to: str | Path) -> str:
    """Return the table of all claims in a results folder, with links relative to a folder."""
    rows = [_row(claim, record, Path(relative_to)) for claim, record in found.claims()]
    if not rows:
        return f"No results yet: `python run_all.py --profile {found.root.name}` makes them."
    remarks = [f"\n{remark[0].upper()}{remark[1:]}." for remark in found.remarks()]
    return "\n".join([_HEAD, *rows, "", origin(found.studies), *remarks])


def _filled(path: Path, text: str, results_dir: Path) -> str:
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{path} needs one line {START} and, below it, one line {END}")
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(take(results_dir), path.parent)}\n{END}{after}"


def _row(claim: Claim, record: Record, base: Path) -> str:
    links = [("figure", folder(record) / name) for name in [png_of(claim, record)] if name]
    links.append(("record", folder(record) / FILE_NAME))
    linked = ", ".join(f"[{label}]({relative(path, base)})" for label, path in links)
    measured = "; ".join(part for part in (measured_text(claim), shown_of(claim.note)) if part)
    cells = [claim.statement, claim.published, record.slug, f"{measured} ({linked})", claim.verdict]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def png_of(claim: Claim, record: Record) -> str | None:
    """Name of the picture that shows a claim, or None where its record has none."""
    files = [name for figure in record.figures if figure.id == claim.figure for name in figure.files]
    return next((name for name in files if name.endswith(".png")), None)


def shown_of(note: str) -> str:
    """Return what the table shows of a note: its first sentence, and others with a measured interval."""
    first, *others = note.split(". ")
    return ". ".join([first, *(sentence for sentence in others if "[" in sentence)]).rstrip(". ")


def measured_text(claim: Claim) -> str:
    """The measured number with its interval and unit, or a dash."""
    if claim.measured is None:
        return "—"
    m = claim.measured
    digits = 2 if max(abs(end) for end in (m.value, m.low, m.high) if math.isfinite(end)) < 10 else 1
    value, low, high = (_number(number, digits) for number in (m.value, m.low, m.high))
    return f"{value} [{low}, {high}] {claim.unit}".strip()


def _number(value: float, digits: int) -> str:
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def origin(records: list[Record]) -> str:
    """Say by which code and on which machines records were made."""
    machines = {
        f"{hw['cpu']} ({hw['logical_cores']} logical cores, {hw['ram_gib']:g} GiB)"
        for hw in (record.provenance["hardware"] for record in records)
    }
    states = {
        (git["sha"] or "unknown")[:10] + (" with uncommitted changes" if git["dirty"] else "")
        for git in (record.provenance["git"] for record in records)
    }
    return (
        f"Made by `python run_all.py report` from {len(records)} record{'s' if len(records) > 1 else ''}; "
        f"measured on {' and '.join(sorted(machines))} by commit {', '.join(sorted(states))}."
    )


def relative(path: Path, base: Path) -> str:
    """A link from a folder to a file."""
    return quote(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix())
