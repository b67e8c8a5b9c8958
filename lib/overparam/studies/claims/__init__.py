"""All claims and all studies together, from the records of a results folder; no model is run.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from overparam.publish.inventory import SUMMARY
from overparam.record import ledger
from overparam.record.record import SCRATCH, record_files

RESULTS = SCRATCH.parent


class Params(BaseModel):
    """Parameters of the study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        """Return the hashes that belong to the key of a job: of every record that it reads, and of the ledger."""
        return record_hashes(self.folder) | ledger.hashes()

    def slug(self) -> str:
        """Short name of a parameter set: the folder's."""
        return self.folder.name


def record_hashes(results: Path) -> dict[str, str]:
    """Return the SHA-256 of every record of a results folder but the summary of claims."""
    paths = {path.relative_to(results).as_posix(): path for path in record_files(results)}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if not name.startswith(f"{SUMMARY}/")
    }
