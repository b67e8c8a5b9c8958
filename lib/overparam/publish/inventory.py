"""The contents of a results folder; a broken record does not hide the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.ledger import Entry
from overparam.record.provenance import is_committed
from overparam.record.record import UNFINISHED, Record, load, record_files

SUMMARY = "claims"  # the study that summarises the records of all others


@dataclass(frozen=True)
class Question:
    """A claim or a check, with the verdict of each record.

    Attributes:
        study: The study that answers it.
        entry: Its entry in the ledger, or None if it has none.
        answers: (claim with its verdict, record), one per model.
    """

    study: str
    entry: Entry | None
    answers: list[tuple[Claim, Record]]

    @property
    def claim(self) -> Claim:
        """The first answer; statement, source and published value are the same in all."""
        return self.answers[0][0]


@dataclass
class Inventory:
    """The records of a results folder, and what is wrong or missing.

    Attributes:
        root: The results folder.
        records: The newest record of each study and slug, in the order of the ledger's studies, then by slug.
        superseded: Older records of the same study and slug.
        problems: Unreadable and contradictory records, a line each.
        failed: Jobs that ended in an error and have no newer record, as study/slug.
        missing: Entries of the ledger that the profile's results should answer, but no record does.
        unknown: Claims of records that are not in the ledger, as study/slug: id.
    """

    root: Path
    records: list[Record] = field(default_factory=list)
    superseded: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missing: list[Entry] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def studies(self) -> list[Record]:
        """The records of studies: all except the summary of claims."""
        return [record for record in self.records if record.study != SUMMARY]

    def questions(self, type: Literal["claim", "check"] | None = None) -> list[Question]:
        """Claims and checks with an answer, by study, in the order of the ledger.

        Args:
            type: Only claims, or only checks; both by default. Without an entry in the ledger, it counts as a claim.
        """
        answers: dict[tuple[str, str], list[tuple[Claim, Record]]] = {}
        for record in self.studies:
            for claim in record.claims:
                answers.setdefault((record.study, claim.id), []).append((claim, record))
        every = [Question(study, ledger.find(claim_id), each) for (study, claim_id), each in answers.items()]
        every.sort(key=lambda each: (_place(each.study), ledger.position(each.claim.id)))
        return [each for each in every if type in (None, each.entry.type if each.entry else "claim")]

    def verdicts(self, type: Literal["claim", "check"] | None = None) -> Iterator[tuple[Claim, Record]]:
        """All answers of `questions`."""
        for question in self.questions(type):
            yield from question.answers

    def uncommitted(self) -> list[str]:
        """Records that were made with uncommitted changes, as study/slug, unless they are committed themselves."""
        return [
            _name(record)
            for record in self.records
            if record.provenance["git"]["dirty"] and not (record.path and is_committed(record.path))
        ]

    def remarks(self) -> list[str]:
        """Lines for readers about problems, failures, and superseded, missing or unknown entries."""
        lines = list(self.problems)
        lines += [f"{name}: failed the last time it ran; there is no record of it" for name in self.failed]
        lines += [
            f"{record.study}/{folder(record).name} is superseded by a newer record of {record.slug}"
            for record in self.superseded
        ]
        for study in dict.fromkeys(entry.study for entry in self.missing):
            number = sum(entry.study == study for entry in self.missing)
            lines.append(f"missing: {study}, where no record answers {number} claims or checks")
        lines += [f"{name} is not in the ledger" for name in self.unknown]
        return lines


def folder(record: Record) -> Path:
    """The folder that a record was read from."""
    assert record.path is not None  # set by `record.load`
    return record.path.parent


def take(results_dir: str | Path) -> Inventory:
    """Read a results folder; a missing folder has no records."""
    root = Path(results_dir)
    inventory = Inventory(root)
    for path in record_files(root):
        try:
            record = load(path)
        except (ValueError, OSError) as error:
            inventory.problems.append(f"{str(error).replace(f'{root}/', '')} (left out of the report)")
            continue
        if record.status != "complete":
            name = path.parent.relative_to(root)
            inventory.problems.append(f"{name}: its record says {record.status!r}, not 'complete' (left out)")
            continue
        inventory.records.append(record)
    every = sorted(inventory.records, key=lambda one: (*_place(one.study), one.slug, one.started, one.key))
    newest = {(record.study, record.slug): record for record in every}
    inventory.superseded = [record for record in every if newest[record.study, record.slug] is not record]
    inventory.records = list(newest.values())
    for record in inventory.records:
        ids = [claim.id for claim in record.claims]
        for claim_id in sorted({each for each in ids if ids.count(each) > 1}):
            inventory.problems.append(
                f"{_name(record)}: two verdicts on one claim, {claim_id}; the first is shown"
            )
            first = next(claim for claim in record.claims if claim.id == claim_id)
            record.claims = [claim for claim in record.claims if claim.id != claim_id or claim is first]
    inventory.failed = sorted(_failed(root, inventory.records))
    answered = {claim.id for claim, _ in inventory.verdicts()}
    expected = ledger.entries(root.resolve().name)
    inventory.missing = [e for e in expected if not any(ledger.find(claim_id) == e for claim_id in answered)]
    inventory.unknown = [
        f"{_name(record)}: {claim.id}"
        for claim, record in inventory.verdicts()
        if ledger.find(claim.id) is None
    ]
    return inventory


def _place(study: str) -> tuple[int, str]:
    """Sort key of studies: the ledger's order, then others by name."""
    order = ledger.studies()
    return (order.index(study) if study in order else len(order), study)


def _name(record: Record) -> str:
    return f"{record.study}/{record.slug}"


def _failed(root: Path, records: list[Record]) -> Iterator[str]:
    done = {(record.study, folder(record).name) for record in records}
    for path in root.glob(f"*/*{UNFINISHED[1]}"):
        if (path.parent.name, path.name.removesuffix(UNFINISHED[1])) not in done:
            yield f"{path.parent.name}/{path.name}"
