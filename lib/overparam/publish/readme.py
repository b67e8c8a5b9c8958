"""The generated part of the README: one picture, and a short table of selected claims."""

from __future__ import annotations

from pathlib import Path

from overparam.publish import pages, tables
from overparam.publish.inventory import SUMMARY, Inventory, Question, folder, take
from overparam.record import ledger
from overparam.record.ledger import CELL, Entry, Front
from overparam.support.files import write_atomic

START, END = "<!-- results:start -->", "<!-- results:end -->"
PICTURE = "fig:claims-pareto"
_BETWEEN = " · "


def fill(readme_path: str | Path, results_dir: str | Path) -> bool:
    """Write the generated part of the README between its two marks; return whether anything changed.

    Raises:
        ValueError: if the README lacks the two marks.
    """
    path = Path(readme_path)
    before = path.read_text()
    after = _filled(path, before, Path(results_dir))
    if after == before:
        return False
    write_atomic(path, after.encode())
    return True


def stale(readme_path: str | Path, results_dir: str | Path) -> bool:
    """Return whether the README's generated part is out of date."""
    path = Path(readme_path)
    text = path.read_text()
    return _filled(path, text, Path(results_dir)) != text


def front(inventory: Inventory, relative_to: str | Path) -> str:
    """The generated part of the README: picture, table and text, with links relative to a folder."""
    if not inventory.studies:
        return tables.nothing(inventory)
    base = Path(relative_to)
    parts = [_picture(inventory, base), table(inventory), _below(inventory, base)]
    parts += [f"{_models(inventory)} {tables.origin(inventory.studies)}".strip()]
    parts += [f"{remark[0].upper()}{remark[1:]}." for remark in inventory.remarks()]
    return "\n\n".join(part for part in parts if part)


def table(inventory: Inventory) -> str:
    """One row per selected claim of the studies that have a record, in the order of the ledger."""
    answered = {question.claim.id: question for question in inventory.questions("claim")}
    measured = {record.study for record in inventory.studies}
    rows = [
        _row(entry, entry.front, answered.get(entry.front_id()))
        for entry in ledger.entries()
        if entry.front and entry.study in measured
    ]
    return tables.markdown(["claim", "published", "measured [95 % CI]", "verdict"], rows)


def _filled(path: Path, text: str, results_dir: Path) -> str:
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{path} needs one line {START} and, below it, one line {END}")
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{front(take(results_dir), path.parent)}\n{END}{after}"


def _picture(inventory: Inventory, base: Path) -> str:
    for record in inventory.records:
        for figure in record.figures:
            if (record.study, figure.id) == (SUMMARY, PICTURE):
                png = next(name for name in figure.files if name.endswith(".png"))
                return f"![{figure.caption.split('. ')[0]}]({tables.relative(folder(record) / png, base)})"
    return ""


def _row(entry: Entry, words: Front, question: Question | None) -> list[str]:
    if question is None:
        return [words.claim, words.published, "—", f"no record ({tables.title(entry.study).lower()})"]
    names = [ledger.model_name(record.slug) for _, record in question.answers]
    numbers = [tables.interval(claim, words.plus) for claim, _ in question.answers]
    verdicts = [claim.verdict for claim, _ in question.answers]
    measured = _side_by_side([f"{n} {number}" for n, number in zip(names, numbers, strict=True)], words.unit)
    if len(set(verdicts)) == 1:
        return [words.claim, words.published, measured, verdicts[0]]
    by_model = [f"{name} {verdict}" for name, verdict in zip(names, verdicts, strict=True)]
    return [words.claim, words.published, measured, _side_by_side(by_model)]


def _side_by_side(parts: list[str], unit: str = "") -> str:
    """Join as many parts as fit into a cell, and add the number of those left out."""
    parts = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]  # break lines only between models
    for number in range(len(parts), 0, -1):
        more = [f"{len(parts) - number} more"] if number < len(parts) else []
        text = _BETWEEN.join([f"{_BETWEEN.join(parts[:number])} {unit}".strip(), *more])
        if len(text) <= CELL:
            return text
    raise ValueError(f"a cell of the front page has at most {CELL} characters, {text!r} has {len(text)}")


def _models(inventory: Inventory) -> str:
    """The full names behind the models' short names."""
    slugs = sorted(
        {record.slug for record in inventory.studies if ledger.model_name(record.slug) != record.slug}
    )
    names = [f"{ledger.model_name(slug)} is {slug}" for slug in slugs]
    return f"{', '.join(names)}." if names else ""


def _below(inventory: Inventory, base: Path) -> str:
    """Links to the report, and how many checks are met."""
    claims, checks = list(inventory.verdicts("claim")), [claim for claim, _ in inventory.verdicts("check")]
    report = tables.relative(inventory.root / pages.FILE, base)
    text = f"All {len(claims)} verdicts with conditions, figures and records: [{pages.FILE}]({report})."
    if checks:
        met = sum(claim.verdict == "reproduced" for claim in checks)
        text += f" Of {len(checks)} [checks]({report}#checks), conditions that this suite sets itself, {met} are met."
    return text
