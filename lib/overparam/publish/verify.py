"""Check that a results folder matches its records: every hash, every file, every generated page."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overparam.publish import citing, crate, pages
from overparam.publish.inventory import SUMMARY, Inventory, folder, take
from overparam.record import record
from overparam.record.record import Record

Age = Callable[[Record], list[str]]


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was checked, its state, and what is wrong."""

    what: str
    state: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether the check failed; a record made by older code is not a failure."""
        return self.state not in ("ok", "older", "not made")


def check(
    results_dir: str | Path, *, age: Age | None = None, summary_inputs: dict[str, str] | None = None
) -> list[Finding]:
    """Check a results folder.

    Args:
        results_dir: The folder.
        age: Lists the code, notebook and inputs that changed since a record was made.
        summary_inputs: Hashes of the records that the summary of claims should be made from.
    """
    root = Path(results_dir)
    if not root.is_dir():
        return [Finding(str(root), "missing", "the folder does not exist")]
    inventory = take(root)
    findings = [Finding("record", "bad", problem) for problem in inventory.problems]
    findings += [Finding(name, "failed", "the job failed; see error.txt in it") for name in inventory.failed]
    if not inventory.records:
        findings.append(Finding(str(root), "missing", "it holds no records"))
    for each in [*inventory.records, *inventory.superseded]:
        findings += _record(each, inventory, age)
    if summary_inputs is not None:
        findings += _summary(inventory, summary_inputs)
    orphans = record.orphans(root, [*inventory.records, *inventory.superseded])
    unread = {path.parent for path in record.record_files(root)} - {
        folder(each) for each in [*inventory.records, *inventory.superseded]
    }
    findings += [
        Finding(path.relative_to(root).as_posix(), "orphan", "no record names this file")
        for path in orphans
        if path.parent not in unread  # the files of an unreadable record are unknown
    ]
    return findings + _generated(inventory)


def table(findings: list[Finding]) -> str:
    """The findings as aligned text."""
    what = max(len(finding.what) for finding in findings)
    state = max(len(finding.state) for finding in findings)
    return "\n".join(f"{f.what:<{what}}  {f.state:<{state}}  {f.detail}".rstrip() for f in findings)


def _record(each: Record, inventory: Inventory, age: Age | None) -> list[Finding]:
    place = folder(each)
    name = place.relative_to(inventory.root).as_posix()
    wrong = [problem.replace(f"{place}/", "") for problem in record.problems(each)]
    wrong += [problem for figure in each.figures for problem in _figure(figure, each)]
    findings = [Finding(name, "bad", problem) for problem in wrong]
    git = each.provenance["git"]
    made = f"git {(git['sha'] or 'unknown')[:10]}{' with uncommitted changes' if git['dirty'] else ''}"
    files = f"{len(each.files()) + 1} files, {made}"
    changed = age(each) if age else []
    if each in inventory.superseded:
        findings.append(Finding(name, "older", f"{files}; a newer record of {each.slug} is there"))
    elif changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        findings.append(Finding(name, "older", f"{files}; since then changed: {shown}"))
    elif not wrong:
        findings.append(Finding(name, "ok", files))
    return findings


def _figure(figure: record.Figure, each: Record) -> list[str]:
    """Problems of a figure, except hashes of its files."""
    stems = {Path(name).stem for name in figure.files}
    if len(stems) != 1 or {Path(name).suffix for name in figure.files} != {".pdf", ".png", ".csv"}:
        return [f"{figure.id}: needs one PDF, PNG and CSV with the same stem, has {', '.join(figure.files)}"]
    (stem,) = stems
    place = folder(each)
    problems = []
    for ending in (".pdf", ".png"):
        path = place / f"{stem}{ending}"
        content = path.read_bytes() if path.is_file() else None
        if content is not None and not (figure.id.encode() in content and each.key.encode() in content):
            problems.append(f"{path.name}: its metadata lacks {figure.id} or key {each.key[:8]}")
    points = place / f"{stem}.csv"
    if points.is_file():
        with points.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
        if len(rows) < 2 or len({len(row) for row in rows}) != 1:
            problems.append(f"{points.name}: is not a table of points")
    return problems


def _summary(inventory: Inventory, inputs: dict[str, str]) -> list[Finding]:
    made = [each for each in inventory.records if each.study == SUMMARY]
    if not made:
        return (
            [Finding(SUMMARY, "not made", "`run_all.py report` makes the figures of all claims")]
            if inventory.records
            else []
        )
    before = {
        name: value
        for name, value in made[0].provenance.get("key", {}).get("inputs", {}).items()
        if name in inputs or name.endswith("record.json")
    }
    return (
        []
        if before == inputs
        else [Finding(SUMMARY, "stale", "made from other records: run `run_all.py report`")]
    )


def _generated(inventory: Inventory) -> list[Finding]:
    findings = []
    for name, wanted in ((pages.FILE, pages.text), (citing.FILE, citing.text), (crate.FILE, crate.text)):
        path = inventory.root / name
        if not path.is_file():
            findings.append(Finding(name, "not made", "`run_all.py report` makes it"))
        elif path.read_text(encoding="utf-8") != wanted(inventory):
            findings.append(Finding(name, "stale", "records have changed since: run `run_all.py report`"))
        else:
            findings.append(Finding(name, "ok", "current"))
    return findings
