"""Texts about claims, checks and records, and the tables of REPORT.md, all made from records."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from overparam.publish.inventory import Inventory, folder
from overparam.record.claims import Claim, Verdict
from overparam.record.record import FILE_NAME, Record

VERDICTS: tuple[str, ...] = get_args(Verdict)
OUTCOMES = {  # verdict -> outcome of a check
    "reproduced": "met",
    "reproduced in direction": "met in direction",
    "not reproduced": "not met",
}


def outcome(claim: Claim) -> str:
    """The verdict on a check: whether the condition is met."""
    return OUTCOMES.get(claim.verdict, claim.verdict)


def title(study: str) -> str:
    """A study's name for readers."""
    return study.replace("_", " ").capitalize().replace("Moe", "MoE")


def counts(inventory: Inventory) -> list[tuple[str, list[int]]]:
    """Number of verdicts of each kind on the claims of each study, in the order of `VERDICTS`."""
    numbers: dict[str, Counter[str]] = {}
    for claim, record in inventory.verdicts("claim"):
        numbers.setdefault(record.study, Counter())[claim.verdict] += 1
    return [(study, [number[verdict] for verdict in VERDICTS]) for study, number in numbers.items()]


def counts_table(inventory: Inventory) -> str:
    """The counts as a Markdown table, with sums."""
    rows = counts(inventory)
    sums = [sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True)]
    cells = [[title(study), *(str(number or "") for number in numbers)] for study, numbers in rows]
    return markdown(["study", *VERDICTS], [*cells, ["all", *map(str, sums)]])


def questions_table(inventory: Inventory, study: str, relative_to: Path) -> str:
    """The claims of a study with every verdict, its conditions, and links to figure and record."""
    rows = []
    for question in inventory.questions("claim"):
        if question.study == study:
            rows += [_row(claim, record, relative_to) for claim, record in question.answers]
    return markdown(["claim", "published", "model", "measured [95 % CI]", "verdict"], rows)


def checks_table(inventory: Inventory, relative_to: Path) -> str:
    """The checks of all studies, with outcomes."""
    rows = []
    for claim, record in inventory.verdicts("check"):
        statement, goal, model, measured, _ = _row(claim, record, relative_to)
        rows.append([statement, title(record.study), goal, model, measured, outcome(claim)])
    return markdown(["check", "study", "condition", "model", "measured [95 % CI]", "outcome"], rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _row(claim: Claim, record: Record, base: Path) -> list[str]:
    links = [("figure", folder(record) / name) for name in [png_of(claim, record)] if name]
    links.append(("record", folder(record) / FILE_NAME))
    linked = ", ".join(f"[{label}]({relative(path, base)})" for label, path in links)
    measured = "; ".join(part for part in (measured_text(claim), shown_of(claim.note)) if part)
    return [claim.statement, claim.published, record.slug, f"{measured} ({linked})", claim.verdict]


def png_of(claim: Claim, record: Record) -> str | None:
    """File name of the figure that shows a claim, or None if its record has none."""
    files = [name for figure in record.figures if figure.id == claim.figure for name in figure.files]
    return next((name for name in files if name.endswith(".png")), None)


def shown_of(note: str) -> str:
    """Shorten a note for tables: its first sentence, and sentences with a measured interval."""
    first, *others = note.split(". ")
    return ". ".join([first, *(sentence for sentence in others if "[" in sentence)]).rstrip(". ")


def measured_text(claim: Claim) -> str:
    """The measured number with its interval and unit, or a dash."""
    return "—" if claim.measured is None else f"{interval(claim)} {claim.unit}".strip()


def interval(claim: Claim, plus: float = 0.0) -> str:
    """The measured number with its interval, `plus` added to all; a dash if nothing was measured."""
    if claim.measured is None:
        return "—"
    numbers = [number + plus for number in (claim.measured.value, claim.measured.low, claim.measured.high)]
    digits = 2 if max(abs(end) for end in numbers if math.isfinite(end)) < 10 else 1
    value, low, high = (_number(number, digits) for number in numbers)
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def origin(records: list[Record]) -> str:
    """A sentence about the code and the machines that made the records."""
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


def nothing(inventory: Inventory) -> str:
    """The text of pages for a folder without results."""
    return f"No results yet: `python run_all.py --profile {inventory.root.name}` makes them."


def relative(path: Path, base: Path) -> str:
    """A link from a folder to a file."""
    return quote(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix())
