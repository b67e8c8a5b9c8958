"""The record of one job: what was run, on which data and machine, what came out, and which files belong to it.

`start` returns a `Recorder`. It writes tables, scores and figures into the job's folder, and `Recorder.finish` writes
``record.json`` last, so a folder without one is unfinished. The batch runner then adds the executed notebook with
`seal` and gives the folder its final name with `files.replace_folder`; without the runner, `finish` does the latter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overparam.record.claims import Claim
from overparam.record.provenance import git_state, machine, provenance
from overparam.record.stats import Estimate
from overparam.support.files import digest, replace_folder, sha256, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

T = TypeVar("T")
SCHEMA = 1
STEPS_NAME = "steps.json.gz"  # what the steps returned
FILE_NAME = "record.json"
NOTEBOOK_NAME = "executed.ipynb"
SCRATCH = Path(__file__).resolve().parents[3] / "results" / "scratch"  # for runs without the batch runner
UNFINISHED = (".partial", ".failed")  # endings of folders that hold no result
RUNNER = ".runner"  # folder of the batch runner's locks and logs in a results folder
# what the report writes into a results folder, beside the records
REPORT_FILES = ("REPORT.md", "figures.json", "ro-crate-metadata.json", "gallery")


class SchemaError(ValueError):
    """A record with a schema version that this version of overparam cannot read."""


@dataclass(frozen=True)
class FileRef:
    """A file in the record's folder, with the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Metric:
    """One measured number with its unit, and its confidence interval if `estimate` is given."""

    value: float
    unit: str = ""
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Figure:
    """One figure: its stable id, its caption, and its PDF, PNG and CSV as {name: SHA-256}."""

    id: str
    caption: str
    files: dict[str, str]


@dataclass
class Record:
    """What one job leaves; stored as ``record.json``.

    Attributes:
        schema: Version of this layout.
        study: Name of the study.
        slug: Short name of the parameter set; first part of the folder's name.
        profile: Profile that it belongs to, or "interactive".
        params: The validated parameters.
        key: Identity of what was measured: hash over the code that measures, parameters and inputs.
        status: Always "complete" in a stored record.
        command: One shell line that runs this job again.
        started: UTC time, ISO 8601.
        seconds: Wall time from `start` to `finish`.
        seeds: Every seed that was used.
        provenance: Code version, packages, hardware, threads, and hashes of weights and data under "inputs".
        metrics: Name → number or estimate.
        tables: Name → CSV.
        items: Name → parquet of per-item scores.
        artifacts: File name → any other file, such as those of a saved model.
        figures: In the order in which they were saved.
        claims: With verdicts.
        notebook: The executed notebook; None for a run by hand.
        sealed: SHA-256 of all other fields, to detect manual edits; older records have none.
        path: Where the record was read from; not stored.
    """

    study: str
    slug: str
    profile: str
    params: dict[str, Any]
    key: str
    command: str
    started: str
    seeds: list[int]
    provenance: dict[str, Any]
    status: str = "running"
    seconds: float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    tables: dict[str, FileRef] = field(default_factory=dict)
    items: dict[str, FileRef] = field(default_factory=dict)
    artifacts: dict[str, FileRef] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notebook: FileRef | None = None
    sealed: str | None = None
    schema: int = SCHEMA
    path: Path | None = field(default=None, compare=False)

    def files(self) -> dict[str, str]:
        """Return every file of this record except record.json itself, as {name: SHA-256}."""
        refs = [*self.tables.values(), *self.items.values(), *self.artifacts.values()]
        refs += [self.notebook] if self.notebook else []
        files = {ref.file: ref.sha256 for ref in refs}
        for figure in self.figures:
            files |= figure.files
        return files


class Recorder:
    """Collects what one job leaves; see `start`."""

    def __init__(self, record: Record, directory: Path, final: Path | None):
        self.record = record
        self.directory = directory
        self._final = final
        self._kept: list[pd.DataFrame] = []
        self._clock = time.monotonic()
        self._returned: dict[str, Any] = {}  # what each step returned, as `steps` encodes it
        self._replayed: dict[str, Any] | None = None
        self._calls: Counter[str] = Counter()
        self._in_step = False

    @property
    def replays(self) -> bool:
        """Whether this is a redraw: steps return their recorded values, and nothing is measured."""
        return self._replayed is not None

    def step(self, name: str, make: Callable[[], T]) -> T:
        """Run a step and record its value; in a redraw, return the recorded value without running it.

        Args:
            name: Name of the step; a repeated name gets a number.
            make: The step. A step called inside another is recorded as part of the outer one.

        Raises:
            ValueError: when redrawing, if the record has no such step.
        """
        if self._in_step:
            return make()
        self._calls[name] += 1
        name = name if self._calls[name] == 1 else f"{name} {self._calls[name]}"
        if self._replayed is not None:
            if name not in self._replayed:
                raise ValueError(
                    f"the record has no step {name!r}, which the notebook now needs: measure again with "
                    f"`{self.record.command} --force`"
                )
            recorded: T = self._replayed[name]
            return recorded
        self._in_step = True
        try:
            value = make()
        finally:
            self._in_step = False
        from overparam.record import steps  # imported here: it loads pandas, which the runner does not need

        self._returned[name] = steps.encode(value, self)
        return value

    def replay(self) -> None:
        """Begin a redraw: steps return their recorded values, and figures and claims start empty.

        Raises:
            ValueError: when the record has no values of steps (as older ones), or they cannot be read.
        """
        from overparam.record import steps

        path = self.directory / STEPS_NAME
        if not path.is_file():
            raise ValueError(
                "the record was made by an older version, without the values of its steps: to redraw its figures, "
                f"measure again first: `{self.record.command}`"
            )
        self._replayed = steps.load(path.read_bytes(), self)
        self.record.figures, self.record.claims = [], []

    def metric(self, name: str, value: Estimate | float, unit: str = "") -> None:
        """Record a number or an estimate under a name, replacing an earlier one of that name."""
        if isinstance(value, Estimate):
            self.record.metrics[name] = Metric(value.value, unit, value)
        else:
            self.record.metrics[name] = Metric(float(value), unit)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Record a table as ``<name>.csv``."""
        data = frame.to_csv(index=False, lineterminator="\n").encode()
        self.record.tables[name] = self.write_file(f"{name}.csv", data)

    def items(self, name: str, frame: pd.DataFrame) -> None:
        """Record per-item scores as ``<name>.parquet``."""
        data = frame.to_parquet(index=False, compression="zstd", compression_level=19)
        self.record.items[name] = self.write_file(f"{name}.parquet", data)

    def keep(self, values: NDArray[np.float64], **columns: object) -> None:
        """Add per-item scores to items.parquet, which `finish` writes.

        Args:
            values: Scores, or the values that a statistic is computed from. [items, k]
            columns: What was scored, such as ``system="int8", task="sts"``.
        """
        import pandas as pd

        if self.replays:
            return
        scores = {f"value_{k}": column.astype("float32") for k, column in enumerate(values.T)}
        self._kept.append(pd.DataFrame({**columns, "item": range(len(values))} | scores))

    def artifact(self, name: str, data: bytes) -> None:
        """Record a file of any other kind, replacing an earlier artifact of that name.

        Raises:
            ValueError: when a table, an item file or a figure has that name.
        """
        self.record.artifacts.pop(name, None)
        if name in self.record.files():
            raise ValueError(f"{name!r} is the name of another file of this record")
        self.record.artifacts[name] = self.write_file(name, data)

    def artifact_folder(self, folder: Path) -> None:
        """Record every file of a folder (such as a saved model), so that the record's folder can be loaded like it.

        Raises:
            ValueError: if it has a subfolder or a name that is taken; nothing is recorded then.
        """
        paths = sorted(folder.iterdir())
        taken = {*self.record.files(), FILE_NAME, NOTEBOOK_NAME} - self.record.artifacts.keys()
        for path in paths:
            if not path.is_file() or path.name in taken:
                reason = "is the name of another file of this record" if path.is_file() else "is not a file"
                raise ValueError(f"cannot record the files of a folder: {path.name!r} {reason}")
        for path in paths:
            self.artifact(path.name, path.read_bytes())

    def claim(self, claim: Claim) -> None:
        """Record the verdict on a claim, replacing an earlier one with the same id."""
        self.record.claims = [*(c for c in self.record.claims if c.id != claim.id), claim]

    def figure(self, figure: Figure) -> None:
        """Register a saved figure (called by `figures.save`), replacing an earlier one with the same id."""
        self.record.figures = [*(f for f in self.record.figures if f.id != figure.id), figure]

    def input(self, name: str, sha256: str) -> None:
        """Record the SHA-256 of weights or data, where it becomes known only during the run."""
        self.record.provenance["inputs"][name] = sha256

    def write_file(self, name: str, data: bytes) -> FileRef:
        """Write one file of the record's folder atomically."""
        if Path(name).name != name or name in (FILE_NAME, NOTEBOOK_NAME):
            raise ValueError(
                f"a file of a record needs a plain name, not a path or a reserved name, got {name!r}"
            )
        if name in self.record.artifacts:
            raise ValueError(f"{name!r} is the name of an artifact of this record")
        write_atomic(self.directory / name, data)
        return FileRef(name, hashlib.sha256(data).hexdigest())

    def finish(self) -> Path:
        """Write items.parquet and, as the last file, ``record.json``; return its path."""
        if self._kept:
            import pandas as pd

            scores = pd.concat(self._kept, ignore_index=True)
            names = [name for name, column in scores.items() if pd.api.types.is_string_dtype(column)]
            self.items("items", scores.astype(dict.fromkeys(names, "category")))
        if self.replays:
            write(self.record, self.directory)
            self.record.path = self.directory / FILE_NAME
            return self.record.path
        if self._returned:
            from overparam.record import steps

            self.artifact(STEPS_NAME, steps.dump(self._returned))
        self.record.seconds = round(time.monotonic() - self._clock, 3)
        if proofs := sys.modules.get("overparam.models.proof"):  # loaded where a study has models
            self.record.provenance["proof_seconds"] = round(proofs.seconds(), 3)
        self.record.status = "complete"
        self.record.provenance |= machine()  # again: by now torch is loaded, and knows GPUs and threads
        write(self.record, self.directory)
        if self._final is not None:
            replace_folder(self.directory, self._final)
            self.directory, self._final = self._final, None
        self.record.path = self.directory / FILE_NAME
        return self.record.path


def start(
    study: str,
    params: Mapping[str, Any],
    *,
    slug: str,
    key: str | None = None,
    inputs: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    directory: str | Path | None = None,
) -> Recorder:
    """Begin the record of one job.

    Args:
        study: Name of the study.
        params: The validated parameters (plain JSON values; ``Params.model_dump(mode="json")``).
        slug: Short name of the parameter set.
        key: Identity of the run; by default the batch runner's, or a hash over study, parameters and inputs.
        inputs: Name → SHA-256 of weights and data.
        seeds: Seeds used; by default the parameters ``seed`` and ``seeds``.
        directory: Final folder; by default the batch runner's, or ``results/scratch/<study>/<slug>-<key8>``. An
            existing folder is replaced only when the record is finished.
    """
    if recorder := resumed():
        return recorder
    inputs = dict(inputs or {})
    key = (
        key
        or os.environ.get("OVERPARAM_JOB_KEY")
        or digest({"study": study, "params": params, "inputs": inputs})
    )
    runner_directory = os.environ.get("OVERPARAM_JOB_DIR")
    profile = os.environ.get("OVERPARAM_PROFILE", "interactive")
    sets = [f"--set {study}.{name}={shlex.quote(json.dumps(value))}" for name, value in params.items()]
    record = Record(
        study=study,
        slug=slug,
        profile=profile,
        params=dict(params),
        key=key,
        command=os.environ.get("OVERPARAM_COMMAND") or " ".join(["python run_all.py --only", study, *sets]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seeds=list(seeds) if seeds is not None else _seeds(params),
        provenance=provenance() | {"inputs": inputs},
    )
    final: Path | None = None
    if directory is None and runner_directory:
        working = Path(runner_directory)
    else:
        final = Path(directory or SCRATCH / study / f"{slug}-{key[:8]}")
        working = final.with_name(f".{final.name}.partial")
        shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True, exist_ok=True)
    return Recorder(record, working, final)


def resumed() -> Recorder | None:
    """Return the recorder of a job that is being redrawn, or None."""
    if not os.environ.get("OVERPARAM_REPLAY"):
        return None
    directory = Path(os.environ["OVERPARAM_JOB_DIR"])
    recorder = Recorder(load(directory), directory, None)
    recorder.replay()
    return recorder


def seal(
    directory: Path,
    notebook: bytes,
    *,
    slug: str | None = None,
    key_parts: Mapping[str, Any] | None = None,
    drawing: Mapping[str, Any] | None = None,
) -> Record:
    """Add the executed notebook to a finished record, and write ``record.json`` again, last.

    Args:
        directory: The job's folder.
        notebook: The executed notebook, written as ``executed.ipynb``.
        slug: The batch runner's name of the parameter set.
        key_parts: What the key was made from; kept in the provenance under "key".
        drawing: The drawing key ("key") and what it was made from; kept under "drawing" with the git version.

    Raises:
        FileNotFoundError: when there is no record.
        ValueError: when the record is invalid, or a file is missing or differs from its hash.
    """
    record = load(directory)
    write_atomic(directory / NOTEBOOK_NAME, notebook)
    record.notebook = FileRef(NOTEBOOK_NAME, hashlib.sha256(notebook).hexdigest())
    record.slug = slug or record.slug
    if key_parts is not None:
        record.provenance["key"] = dict(key_parts)
    if drawing is not None:
        record.provenance["drawing"] = {**drawing, "git": git_state(Path(__file__).parent)}
    write(record, directory)
    if wrong := problems(record):
        raise ValueError("; ".join(wrong))
    return record


def write(record: Record, directory: Path) -> None:
    """Write ``record.json``."""
    values = asdict(record) | {"claims": [claim.to_dict() for claim in record.claims]}
    del values["path"], values["sealed"]
    for name, metric in record.metrics.items():
        values["metrics"][name]["estimate"] = metric.estimate.to_dict() if metric.estimate else None
    ordered = {"schema": values.pop("schema"), **values}
    ordered["sealed"] = record.sealed = digest(ordered)
    text = json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(directory / FILE_NAME, text.encode() + b"\n")


def load(path: str | Path) -> Record:
    """Read a record from its folder or its ``record.json``.

    Raises:
        FileNotFoundError: when there is none.
        SchemaError: for a record of another schema version.
        ValueError: for a file that is not a valid record.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(path.read_text())
        schema = values["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record: {error!r}") from error
    if schema != SCHEMA:
        raise SchemaError(
            f"{path} has schema version {schema!r}, this version of overparam reads {SCHEMA}: "
            "use the version that made it, or another results folder"
        )
    try:
        values["metrics"] = {
            name: Metric(**(m | {"estimate": Estimate.from_dict(m["estimate"]) if m["estimate"] else None}))
            for name, m in values["metrics"].items()
        }
        values["tables"] = {name: FileRef(**ref) for name, ref in values["tables"].items()}
        values["items"] = {name: FileRef(**ref) for name, ref in values["items"].items()}
        # records made before there were artifacts have none
        values["artifacts"] = {name: FileRef(**ref) for name, ref in values.get("artifacts", {}).items()}
        values["figures"] = [Figure(**figure) for figure in values["figures"]]
        values["claims"] = [Claim.from_dict(claim) for claim in values["claims"]]
        values["notebook"] = FileRef(**values["notebook"]) if values["notebook"] else None
        unknown = set(values) - {f.name for f in fields(Record)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return Record(**values, path=path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid record: {error}") from error


def find(results_dir: str | Path) -> list[Record]:
    """Read every finished record below a folder, in the order of their paths."""
    return [load(path) for path in record_files(results_dir)]


def record_files(results_dir: str | Path) -> list[Path]:
    """Return every ``record.json`` below a folder, in order, except those of unfinished jobs and of the gallery."""
    root = Path(results_dir)
    return [path for path in sorted(root.rglob(FILE_NAME)) if not _no_result(path.relative_to(root))]


def orphans(results_dir: str | Path, records: Sequence[Record]) -> list[Path]:
    """Return the files of a results folder that belong neither to a record nor to the report, in order."""
    root = Path(results_dir)
    named = {path for record in records if (path := record.path)}
    named |= {path.parent / name for record in records if (path := record.path) for name in record.files()}
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and path not in named and not _no_result(path.relative_to(root))
    ]


def missing_or_orphaned(results_dir: str | Path) -> list[str]:
    """List what is wrong with a results folder: files missing or changed, and files that no record names."""
    records = find(results_dir)
    wrong = [problem for record in records for problem in problems(record)]
    return wrong + [f"{path}: no record names this file" for path in orphans(results_dir, records)]


def problems(record: Record) -> list[str]:
    """List what changed since a record was written: the record itself, or files that it names."""
    assert record.path is not None  # set by `load`
    wrong = []
    if record.sealed is not None:
        content = json.loads(record.path.read_text())
        del content["sealed"]
        if digest(content) != record.sealed:
            wrong.append(f"{record.path}: edited since it was written (its own SHA-256 differs)")
    for name, expected in record.files().items():
        path = record.path.parent / name
        if not path.is_file():
            wrong.append(f"{path}: named by the record, but missing")
        elif sha256(path) != expected:
            wrong.append(f"{path}: changed since the record was made (SHA-256 differs)")
    return wrong


def _no_result(relative: Path) -> bool:
    return any(part.endswith(UNFINISHED) or part in (RUNNER, *REPORT_FILES) for part in relative.parts)


def _seeds(params: Mapping[str, Any]) -> list[int]:
    several = params.get("seeds")
    seeds = [params.get("seed"), *(several if isinstance(several, list | tuple) else [])]
    return [seed for seed in seeds if isinstance(seed, int)]
