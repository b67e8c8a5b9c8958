"""The ledger of claims, ``claims.yaml``: what was published, and how it is measured here.

A study calls `judged` with a claim's id and its measurement; statement, source, published value, rule and unit come
from the ledger, and the verdict from `claims.judge`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overparam.record import claims
from overparam.record.claims import Claim, Kind
from overparam.record.stats import Estimate
from overparam.support.files import digest

if TYPE_CHECKING:
    import pandas as pd

LEDGER = Path(__file__).with_name("claims.yaml")
FRONT_ROWS = 24  # maximum rows of the table on the front page
CELL = 90  # maximum characters per cell there
_OWN = "this suite"  # appears in the source of every check, and of no claim
_WORD = r"\{\w+[^}]*\}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Points(_Strict):
    """Published numbers as a table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | bool | int | float, ...], ...]


class Paper(_Strict):
    """A paper whose claims are tested; `cite` is how sources name it."""

    cite: str
    title: str
    authors: str
    year: int
    arxiv: str | None = None
    url: str
    conditions: str
    points: Points | None = None


class Common(_Strict):
    """Conversion of a measured number to points or percent: factor · (number − origin)."""

    origin: float
    factor: float
    unit: str


class Front(_Strict):
    """A short row of the table on the front page.

    Attributes:
        claim: The statement.
        published: The published value.
        of: Id of the claim to show, if the entry stands for several.
        plus: Added to the measured number: with 100, a change of −7 % is shown as 93 % kept.
        unit: Unit of the number shown.
    """

    claim: str = Field(max_length=CELL)
    published: str = Field(max_length=CELL)
    of: str | None = None
    plus: float = 0.0
    unit: str


class Entry(_Strict):
    """One claim of the ledger, or one check.

    Attributes:
        id: Id of the claim in records; with {words}, a pattern for several ids.
        type: "claim" for a published statement, "check" for a condition that this suite sets itself.
        front: Its row on the front page, for some claims.
        study: The study that answers it.
        paper: Name of the paper that states it, or that a check refers to.
        statement: The claim in our own words; {words} are filled in by the study.
        source: Paper and section or table; {paper} is the paper's `cite`.
        published: The published value, as shown to readers.
        published_value: The same as a number in `unit`, if it is one.
        kind: The rule of `claims.judge`.
        measures: What the number describes; times differ between any two runs.
        metric: What is measured here.
        margin: The margin of the rule, and where it is set.
        unit: Unit of the measured number.
        common: Conversion to points or percent; None if the unit is one of these.
        figure: Id of the figure that shows it.
        profiles: Profiles whose results should answer it.
    """

    id: str
    type: Literal["claim", "check"] = "claim"
    front: Front | None = None
    study: str
    paper: str | None = None
    statement: str
    source: str
    published: str
    published_value: float | None = None
    kind: Kind
    measures: Literal["quality", "size", "time"]
    metric: str
    margin: str
    unit: str
    common: Common | None = None
    figure: str
    profiles: tuple[str, ...]

    def answers(self, claim_id: str) -> bool:
        """Return whether a claim id of a record belongs to this entry."""
        return bool(re.fullmatch(pattern(self.id), claim_id))

    def front_id(self) -> str:
        """Id of the claim shown on the front page."""
        return (self.front and self.front.of) or self.id

    def cited(self) -> str:
        """The source with the paper's name filled in."""
        return self.source.replace("{paper}", papers()[self.paper].cite if self.paper else "")

    def shown(self) -> str:
        """The statement with "…" in place of its {words}."""
        return without_words(self.statement)

    def in_common(self, value: float) -> float:
        """Convert a number in `unit` to points or percent."""
        return self.common.factor * (value - self.common.origin) if self.common else value


class _File(_Strict):
    models: dict[str, str]
    papers: dict[str, Paper]
    claims: tuple[Entry, ...]


@cache
def _file() -> _File:
    return read(LEDGER)


def read(path: Path) -> _File:
    """Read a ledger.

    Raises:
        ValueError: for unknown or missing fields, repeated ids, a paper that is not listed, a claim that is a goal of
            this suite or a check that is not, or a front page with too many or too few rows.
    """
    try:
        ledger = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} is not a valid ledger: {error}") from error
    if problems := [*_wrong_entries(ledger), *_wrong_front(ledger.claims)]:
        raise ValueError(f"{path.name}: {'; '.join(problems)}")
    return ledger


def _wrong_entries(file: _File) -> Iterator[str]:
    ids = [entry.id for entry in file.claims]
    if repeated := sorted({each for each in ids if ids.count(each) > 1}):
        yield f"more than one claim {', '.join(repeated)}"
    if unknown := sorted({e.paper for e in file.claims if e.paper and e.paper not in file.papers}):
        yield f"lists no paper {', '.join(unknown)}"
    for entry in file.claims:
        own = _OWN in entry.source
        if entry.type == "claim" and own:
            yield f"{entry.id} is a goal of {_OWN}, so it needs `type: check`"
        if entry.type == "check" and not own:
            yield f"{entry.id} is a check, so its source must say that it is a goal of {_OWN}"


def _wrong_front(entries: tuple[Entry, ...]) -> Iterator[str]:
    chosen = [entry for entry in entries if entry.front]
    if len(chosen) > FRONT_ROWS:
        yield f"{len(chosen)} claims have `front`, the maximum is {FRONT_ROWS}"
    for entry in chosen:
        if entry.type == "check":
            yield f"{entry.id} is a check: only claims can have `front`"
        shown = entry.front_id()
        if "{" in shown or not entry.answers(shown):
            yield f"{entry.id} stands for several claims: name one of them in `front: {{of: …}}`, got {shown!r}"
    without = {e.study for e in entries if e.type == "claim"} - {e.study for e in chosen}
    if without:
        yield f"no claim of {', '.join(sorted(without))} has `front`: each study needs at least one"


def entries(profile: str | None = None) -> tuple[Entry, ...]:
    """All entries, or those that a profile's results should answer (all for a user's own profile)."""
    known = {name for entry in _file().claims for name in entry.profiles}
    return tuple(e for e in _file().claims if profile not in known or profile in e.profiles)


def papers() -> dict[str, Paper]:
    """The papers by name."""
    return _file().papers


def studies() -> list[str]:
    """The studies in the order of the ledger, which is that of their notebooks."""
    return list(dict.fromkeys(entry.study for entry in _file().claims))


def position(claim_id: str) -> int:
    """Position of a claim in the ledger, for sorting; unknown claims come last."""
    entry = find(claim_id)
    return _file().claims.index(entry) if entry else len(_file().claims)


def model_name(slug: str) -> str:
    """A model's short name for tables and figures; the slug itself if the ledger has none."""
    return _file().models.get(slug, slug)


def find(claim_id: str) -> Entry | None:
    """The entry for a claim id: the one with exactly that id, or the first whose pattern matches."""
    exact = [entry for entry in _file().claims if entry.id == claim_id]
    return next(iter(exact or [entry for entry in _file().claims if entry.answers(claim_id)]), None)


def published_value(claim_id: str) -> float:
    """The published number of a claim, in its unit.

    Raises:
        ValueError: when the ledger has none.
    """
    entry = find(claim_id)
    if entry is None or entry.published_value is None:
        raise ValueError(f"{LEDGER.name} has no published number for {claim_id!r}")
    return entry.published_value


def points(paper: str) -> pd.DataFrame:
    """The published numbers of a paper as a table."""
    import pandas as pd

    table = papers()[paper].points
    if table is None:
        raise ValueError(f"the ledger has no published points of {paper!r}")
    return pd.DataFrame(table.rows, columns=list(table.columns))


def hashes(study: str | None = None) -> dict[str, str]:
    """Hash of the ledger's entries that decide a study's verdicts, for drawing keys: {"claims.yaml": SHA-256}.

    Without a study, the hash of the whole ledger, including the rows of the front page.
    """
    if study is None:
        return {"claims.yaml": digest(_file().model_dump())}
    own = [entry for entry in _file().claims if entry.study == study]
    cited = {name: paper.model_dump() for name, paper in papers().items() if name in {e.paper for e in own}}
    return {"claims.yaml": digest([[entry.model_dump(exclude={"type", "front"}) for entry in own], cited])}


def without_words(template: str) -> str:
    """A text of the ledger with "…" in place of its {words}."""
    return re.sub(_WORD, "…", template)


def pattern(template: str) -> str:
    """A regular expression that matches every text that a template with {words} can become."""
    parts = re.split(_WORD, template)
    return ".+".join(re.escape(part) for part in parts)


def judged(
    claim_id: str,
    *,
    measured: Estimate | None,
    margin: float,
    direction_within: float | None = None,
    note: str = "",
    words: Mapping[str, Any] | None = None,
) -> Claim:
    """Build a claim of the ledger with its verdict.

    Args:
        claim_id: An id that the ledger has, or that matches one of its patterns.
        measured: The estimate, in the ledger's unit; None if it was not measured.
        margin: Margin of the rule, from the parameters of the run.
        direction_within: See `claims.judge`.
        note: Differences from the published conditions.
        words: Values for the {words} of the ledger's texts.

    Raises:
        ValueError: as `claims.judged`, and for an unknown id or a missing word.
    """
    entry = find(claim_id)
    if entry is None:
        raise ValueError(f"claim {claim_id!r} is not in the ledger: add it to {LEDGER.name}")
    try:
        statement, published, unit = (
            text.format(**(words or {})) for text in (entry.statement, entry.published, entry.unit)
        )
    except KeyError as error:
        raise ValueError(f"claim {claim_id!r} needs the word {error} in words=") from error
    return claims.judged(
        claim_id,
        statement,
        source=entry.cited(),
        published=published,
        kind=entry.kind,
        measured=measured,
        margin=margin,
        published_value=entry.published_value if entry.kind == "difference" else None,
        direction_within=direction_within,
        unit=unit,
        figure=entry.figure,
        note=note,
    )
