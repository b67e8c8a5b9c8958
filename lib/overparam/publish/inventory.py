"""What a results folder holds, read so that one broken record does not hide the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.ledger import Entry
from overparam.record.record import UNFINISHED, Record, load, record_files

SUMMARY = "claims"  # the study that reads the records of all others


@dataclass
class Inventory:
    """The records of a results folder, and what is wrong with it or missing from it.

    Attributes:
        root: The results folder.
        records: One for each study and slug, the newest, by study and slug.
        superseded: Older records of the same study and slug.
        problems: What could not be read or is contradictory, a line each.
        failed: Jobs that ended in an error and have no newer record, as study/slug.
        missing: Claims of the ledger that no record answers though the profile's results should.
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
        """The records that measured something: all but the summary of claims."""
        return [record for record in self.records if record.study != SUMMARY]

    def claims(self) -> Iterator[tuple[Claim, Record]]:
        """Every claim with its record: by study, then claim, then slug."""
        for study in dict.fromkeys(record.study for record in self.studies):
            of_study = [record for record in self.studies if record.study == study]
            for claim_id in dict.fromkeys(claim.id for record in of_study for claim in record.claims):
                for record in of_study:
                    yield from ((claim, record) for claim in record.claims if claim.id == claim_id)

    def remarks(self) -> list[str]:
        """Problems, failures and what is superseded, missing or unknown: a line each, for readers."""
        lines = list(self.problems)
        lines += [f"{name}: failed the last time it ran; there is no record of it" for name in self.failed]
        lines += [
            f"{record.study}/{folder(record).name} is superseded by a newer record of {record.slug}"
            for record in self.superseded
        ]
        for study in dict.fromkeys(entry.study for entry in self.missing):
            number = sum(entry.study == study for entry in self.missing)
            lines.append(f"missing: {study}, of which {number} claims have no record")
        lines += [f"{name} is not in the ledger" for name in self.unknown]
        return lines


def folder(record: Record) -> Path:
    """The folder that a record was read from."""
    assert record.path is not None  # records of an inventory were read from files
    return record.path.parent


def take(results_dir: str | Path) -> Inventory:
    """Read a results folder; a folder that is not there is one without records."""
    root = Path(results_dir)
    found = Inventory(root)
    for path in record_files(root):
        try:
            record = load(path)
        except (ValueError, OSError) as error:
            found.problems.append(f"{str(error).replace(f'{root}/', '')} (left out of the report)")
            continue
        if record.status != "complete":
            name = path.parent.relative_to(root)
            found.problems.append(f"{name}: its record says {record.status!r}, not 'complete' (left out)")
            continue
        found.records.append(record)
    found.records.sort(key=lambda record: (record.study, record.slug, record.started, record.key))
    newest = {(record.study, record.slug): record for record in found.records}
    found.superseded = [record for record in found.records if newest[record.study, record.slug] is not record]
    found.records = list(newest.values())
    for record in found.records:
        ids = [claim.id for claim in record.claims]
        for claim_id in sorted({each for each in ids if ids.count(each) > 1}):
            found.problems.append(
                f"{_name(record)}: two verdicts on one claim, {claim_id}; the first is shown"
            )
            first = next(claim for claim in record.claims if claim.id == claim_id)
            record.claims = [claim for claim in record.claims if claim.id != claim_id or claim is first]
    found.failed = sorted(_failed(root, found.records))
    answered = {claim.id for claim, _ in found.claims()}
    expected = ledger.entries(root.resolve().name)
    found.missing = [e for e in expected if not any(ledger.find(claim_id) == e for claim_id in answered)]
    found.unknown = [
        f"{_name(record)}: {claim.id}" for claim, record in found.claims() if ledger.find(claim.id) is None
    ]
    return found


def _name(record: Record) -> str:
    return f"{record.study}/{record.slug}"


def _failed(root: Path, records: list[Record]) -> Iterator[str]:
    done = {(record.study, folder(record).name) for record in records}
    for path in root.glob(f"*/*{UNFINISHED[1]}"):
        if (path.parent.name, path.name.removesuffix(UNFINISHED[1])) not in done:
            yield f"{path.parent.name}/{path.name}"
