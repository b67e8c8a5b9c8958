"""All claims and all studies together, from the records of a results folder, without running a model.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from overparam.experiment.params import StudyParams
from overparam.publish.inventory import SUMMARY
from overparam.record import ledger
from overparam.record.record import SCRATCH, record_files

RESULTS = SCRATCH.parent


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "claims"

    results: str = Field("reference", description="a folder below results/, or the path of a results folder")

    @field_validator("results")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if not (RESULTS / value).is_dir():
            raise ValueError(f"there is no results folder {value!r}: run a profile first")
        return value

    @property
    def folder(self) -> Path:
        """The results folder."""
        return RESULTS / self.results

    def key_inputs(self) -> dict[str, str]:
        """Return hashes for the measuring key: of every record that is read, and of the ledger."""
        return record_hashes(self.folder) | ledger.hashes()

    def slug(self) -> str:
        """Return a short name of the parameter set: the folder's."""
        return self.folder.name


def record_hashes(results: Path) -> dict[str, str]:
    """Return the SHA-256 of every record of a results folder except the summary of claims."""
    paths = {path.relative_to(results).as_posix(): path for path in record_files(results)}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if not name.startswith(f"{SUMMARY}/")
    }
