"""One notebook with one parameter set, as a plan holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overparam.runner import state
from overparam.runner.state import Changes, State


@dataclass(frozen=True)
class Job:
    """One notebook with one validated parameter set.

    Attributes:
        study: Name of the study.
        slug: Short name of the parameter set, unique within study and profile.
        notebook: The notebook.
        params: Every parameter, as plain JSON values.
        profile: Name of the profile.
        key: The measuring key.
        parts: What the key is made from: hashes by name, and the parameters.
        drawing: The drawing key ("key"), and what it is made from.
        directory: Folder of the finished record.
        command: One shell line that runs this job again.
        state: Whether its record is up to date, must be redrawn or measured, or is being made by another process.
        reason: Why it is due, in a few words, or empty.
        module: Full name of the study's module.
        changes: Differences from the last record: part of the key → names.
        resources: Resources that it needs, such as {"GPU": 1}.
        needs: Studies that must be done first → what of their results is missing now; empty if nothing.
        expected: Seconds that it took last time, or its profile's estimate; None if unknown.
    """

    study: str
    slug: str
    notebook: Path
    params: dict[str, Any]
    profile: str
    key: str
    parts: dict[str, Any] = field(repr=False)
    directory: Path
    command: str
    state: State
    reason: str
    drawing: dict[str, Any] = field(default_factory=dict, repr=False)
    module: str = ""
    changes: Changes = field(default_factory=dict, repr=False)
    resources: dict[str, float] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    expected: float | None = None

    @property
    def name(self) -> str:
        """The job's name on the command line: study/slug."""
        return f"{self.study}/{self.slug}"

    @property
    def partial(self) -> Path:
        """Where the job works until it is done."""
        return self.directory.with_name(f".{self.directory.name}.partial")

    def beside(self, ending: str) -> Path:
        """Return one of the runner's files for this job: its "lock", "log" or "progress"."""
        return state.lock_of(self.directory).with_suffix(f".{ending}")

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain values."""
        return asdict(self) | {"notebook": str(self.notebook), "directory": str(self.directory)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """Return the job that `to_dict` gave."""
        paths = {name: Path(values[name]) for name in ("notebook", "directory")}
        return cls(**{**values, **paths})
