"""The steps of the summary of claims, in the order of the notebook."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from overparam.experiment import study as experiment
from overparam.publish import inventory, tables
from overparam.publish.inventory import Inventory
from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.ledger import Entry
from overparam.record.record import Record
from overparam.studies.claims import Params, record_hashes

_MOST = 4  # claims of one kind that a figure shows


@dataclass
class Study(experiment.Study[Params]):
    """A started summary: the records of a results folder, and the record of the summary itself."""

    found: Inventory


def start(params: Params) -> Study:
    """Read the records, and open the record of the summary."""
    recorder = experiment.open_record(
        params,
        inputs=record_hashes(params.folder),
    )
    return Study(params, recorder, inventory.take(params.folder))


def claim_table(study: Study) -> pd.DataFrame:
    """Every claim that a record answers, and every claim of the ledger that none does."""
    rows = [
        _row(claim, source) | {"verdict": claim.verdict} for claim, source in study.found.verdicts("claim")
    ]
    rows += [
        _open(entry) | {"verdict": "no record"} for entry in study.found.missing if entry.type == "claim"
    ]
    columns = ["claim", "published", "study", "model", "measured [95 % CI]", "verdict", "rule"]
    table = pd.DataFrame(rows, columns=columns).fillna("")
    study.recorder.table("claims_table", table)
    for verdict, number in sorted(
        Counter(claim.verdict for claim, _ in study.found.verdicts("claim")).items()
    ):
        study.recorder.metric(verdict.replace(" ", "_"), number, "verdicts")
    return table


def check_table(study: Study) -> pd.DataFrame:
    """The conditions that this suite sets itself, and whether its models meet them."""
    rows = [
        _row(claim, source) | {"outcome": tables.outcome(claim)}
        for claim, source in study.found.verdicts("check")
    ]
    rows += [
        _open(entry) | {"outcome": "no record"} for entry in study.found.missing if entry.type == "check"
    ]
    names = {"claim": "check", "published": "condition"}
    columns = ["check", "condition", "study", "model", "measured [95 % CI]", "outcome", "rule"]
    table = pd.DataFrame(
        [{names.get(k, k): v for k, v in row.items()} for row in rows], columns=columns
    ).fillna("")
    study.recorder.table("checks_table", table)
    return table


def _row(claim: Claim, source: Record) -> dict[str, str]:
    return {
        "claim": claim.statement,
        "published": claim.published,
        "study": source.study,
        "model": source.slug,
        "measured [95 % CI]": tables.measured_text(claim),
        "rule": claim.rule,
    }


def _open(entry: Entry) -> dict[str, str]:
    published = ledger.without_words(entry.published)
    return {"claim": entry.shown(), "published": published, "study": entry.study, "measured [95 % CI]": "—"}


def counts(study: Study) -> pd.DataFrame:
    """How many verdicts of each kind the claims of each study have."""
    rows = {tables.title(name): numbers for name, numbers in tables.counts(study.found)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(tables.VERDICTS))


def conditions(study: Study) -> pd.DataFrame:
    """What differs from the published conditions, a row for each claim and record."""
    rows = []
    for claim, source in study.found.verdicts("claim"):
        entry = ledger.find(claim.id)
        paper = ledger.papers()[entry.paper] if entry and entry.paper else None
        rows.append(
            {
                "claim": claim.statement,
                "model": source.slug,
                "published conditions": paper.conditions if paper else "a goal of this suite",
                "measured here": entry.metric if entry else "(not in the ledger)",
                "what differs": claim.note,
                "margin": entry.margin if entry else f"{claim.margin:g} {claim.unit}",
            }
        )
    columns = ["claim", "model", "published conditions", "measured here", "what differs", "margin"]
    table = pd.DataFrame(rows, columns=columns)
    study.recorder.table("conditions", table)
    return table


def forest(study: Study) -> pd.DataFrame:
    """Measured and published numbers of every claim in points or percent.

    Of a claim that is made of more than `_MOST` things, such as the size of each published model, only the one that is
    furthest from what was published; the tables have all.

    Returns:
        Columns: claim, statement, model, study, verdict, unit, value, low, high; published, NaN where it is no number;
        bound, the end of what the claim's rule accepts.
    """
    rows = []
    for claim, source in study.found.verdicts("claim"):
        entry = ledger.find(claim.id)
        if entry is None or claim.measured is None:
            continue
        value, low, high = (
            entry.in_common(number)
            for number in (claim.measured.value, claim.measured.low, claim.measured.high)
        )
        bound = {"no_worse": -claim.margin, "better": claim.margin}.get(entry.kind)
        rows.append(
            {
                "claim": claim.id,
                "statement": claim.statement,
                "model": ledger.model_name(source.slug),
                "study": source.study,
                "verdict": claim.verdict,
                "unit": entry.common.unit if entry.common else claim.unit,
                "value": value,
                "low": low,
                "high": high,
                "published": None
                if entry.published_value is None
                else entry.in_common(entry.published_value),
                "bound": None if bound is None else entry.in_common(bound),
                "entry": entry.id,
            }
        )
    return _furthest(pd.DataFrame(rows))


def _furthest(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    kind = [table["study"], table["entry"]]
    number = table["claim"].groupby(kind).transform("nunique")
    apart = (table["value"] - table["published"].astype(float).fillna(0)).abs()
    many, furthest = number > _MOST, apart.groupby(kind).transform("idxmax") == table.index
    words = table["statement"] + " (the furthest of " + number.astype(str) + ")"
    shown = table.assign(statement=table["statement"].where(~many, words))
    return shown[~many | furthest].drop(columns="entry").reset_index(drop=True)
