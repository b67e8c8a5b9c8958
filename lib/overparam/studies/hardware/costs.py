"""What a query costs: latency, money and energy beside quality, over the systems of the other studies' records.

Nothing is run: it reads tables. A study that a record lacks has no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from overparam.publish import inventory
from overparam.publish.inventory import folder
from overparam.record import ledger
from overparam.record.record import Record
from overparam.record.stats import Estimate
from overparam.studies.hardware import RESULTS
from overparam.studies.hardware.study import Study

TEXTS, READ, WRITTEN = UNITS = ("texts", "tokens read", "tokens written")
_MILLION = 1e6
# Of each study: the column that names its systems, what its throughput counts, columns of latency and throughput,
# tables and columns of the quality kept in percent, with its interval.
SOURCES = {
    "trailing_layer_pruning": (
        "depth", READ, "single_seconds", "tokens_per_second", "kwh_per_million_tokens",
        ("trained",), ("100 * retention", "100 * retention_low", "100 * retention_high"),
    ),
    "moe_expert_pruning": (
        "share_pruned", WRITTEN, "generate_one_seconds", "generate_all_tokens_per_second", "kwh_per_million_tokens",
        ("quality", "recovery"), ("100 + change_percent", "100 + low", "100 + high"),
    ),
    "distillation_retention": (
        "share", TEXTS, "single_seconds", "texts_per_second", "kwh_per_million_texts",
        ("suite",), ("kept", "kept_low", "kept_high"),
    ),
}  # fmt: skip
COLUMNS = ["study", "model", "system", "unit", "latency_s", "per_second", "eur_per_million", "kwh_per_million",
           "energy_method", "kept", "kept_low", "kept_high"]  # fmt: skip


def per_million(per_second: float, price_per_hour: float, utilisation: float = 1.0) -> float:
    """Return the price of a million units, in the currency of the price.

    Args:
        per_second: Units a second while the machine works.
        price_per_hour: Of the machine, whether it works or not.
        utilisation: Share of the time in which it works.

    Raises:
        ValueError: A number is not above 0, or the utilisation is above 1.
    """
    if not (per_second > 0 and price_per_hour > 0 and 0 < utilisation <= 1):
        raise ValueError(
            "per_second and price_per_hour must be above 0 and utilisation in (0, 1], "
            f"got {per_second:g}, {price_per_hour:g} and {utilisation:g}"
        )
    return price_per_hour / (per_second * 3600 * utilisation) * _MILLION


def costs(study: Study) -> pd.DataFrame:
    """Price every system of the records; the price and utilisation are parameters.

    Returns:
        A row a system: `latency_s`, seconds of one text, or of a token of a decoder; `per_second` and what it counts
        (`unit`); `eur_per_million` and `kwh_per_million` of these, and `energy_method`, which says whether energy was
        measured, or computed from time and so is the same information; `kept`, percent of quality with its interval.
    """
    params = study.params
    found = inventory.take(RESULTS / params.results)
    rows = [row for record in found.studies for row in _priced(record)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["eur_per_million"] = [
        per_million(each, params.price_per_hour, params.utilisation) for each in table["per_second"]
    ]
    study.recorder.table("costs", table)
    return table


def _priced(record: Record) -> Iterator[dict[str, Any]]:
    table = _read(record, "costs")
    name = {"study": record.study, "model": ledger.model_name(record.slug)}
    if table is None:
        return
    if record.study == "quantization_accuracy":
        yield from ({**name, **row} for row in _bits(record, table))
    if record.study not in SOURCES:
        return
    by, unit, latency, speed, energy, tables, columns = SOURCES[record.study]
    scores = [each for each in (_read(record, each) for each in tables) if each is not None]
    kept = pd.concat(scores) if scores else pd.DataFrame(columns=[by])
    for row in table.to_dict("records"):
        own = kept[kept[by] == row[by]]
        ends = [float(own.eval(column).iloc[0]) for column in columns] if len(own) else [float("nan")] * 3
        yield {
            **name, "system": f"{by.replace('_', ' ')} {row[by]:g}", "unit": unit, "latency_s": row[latency],
            "per_second": row[speed], "kwh_per_million": row.get(energy), "energy_method": row.get("energy_method"),
            **dict(zip(COLUMNS[-3:], ends, strict=True)),
        }  # fmt: skip


def _bits(record: Record, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Schemes: a batch of an encoder counts texts, a token of a decoder counts itself."""
    decoder = "cache_in" in table and table["cache_in"].notna().any()
    texts = int(record.params.get("cost_texts", 1))
    for row in table.to_dict("records"):
        kept = record.metrics.get(f"kept_{row['scheme']}")
        ends = kept.estimate if kept and isinstance(kept.estimate, Estimate) else None
        seconds = row["single_seconds"] if decoder else row["batch_seconds"] / texts
        full = row["scheme"] == "fp32"
        yield {
            "system": row["scheme"], "unit": WRITTEN if decoder else TEXTS, "latency_s": row["single_seconds"],
            "per_second": 1 / seconds,
            # the energy of the record is that of a batch: of an encoder, so many texts; of a decoder, a prompt
            "kwh_per_million": float("nan") if decoder else row["kwh_per_million_batches"] / texts,
            "energy_method": row["energy_method"], "kept": 100.0 if full or not ends else ends.value,
            "kept_low": 100.0 if full else ends.low if ends else float("nan"),
            "kept_high": 100.0 if full else ends.high if ends else float("nan"),
        }  # fmt: skip


def _read(record: Record, name: str) -> pd.DataFrame | None:
    if name not in record.tables:
        return None
    path = folder(record) / record.tables[name].file
    return pd.read_csv(path) if path.is_file() else None
