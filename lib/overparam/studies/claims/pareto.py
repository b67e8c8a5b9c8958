"""Quality kept against size and speed, read from the tables of each study's records."""

from __future__ import annotations

import pandas as pd

from overparam.publish.inventory import Inventory, folder
from overparam.record import ledger
from overparam.record.record import Record
from overparam.record.stats import Estimate

COLUMNS = ["study", "model", "curve", "size_percent", "speed", "kept_percent", "low", "high"]
BITS = "quantization_accuracy"  # it compares bytes, and keeps scores and speeds as metrics
# Of each study: name of its curve, tables with the score kept, column that joins them with the costs, the score and
# its interval in percent of the full model's, column of the costs for the speed, rows that are drawn.
SOURCES = {
    "trailing_layer_pruning": (
        *("fewer layers", ["trained"], "depth"),
        *(["100 * retention", "100 * retention_low", "100 * retention_high"], "batch_seconds", "depth > 0"),
    ),
    "moe_expert_pruning": (
        *(
            "fewer experts",
            ["quality", "recovery"],
            "share_pruned",
            ["100 + change_percent", "100 + low", "100 + high"],
        ),
        *("generate_all_seconds", "calibration != 'one language'"),
    ),
    "distillation_retention": (
        *("distilled", ["suite"], "share", ["kept", "kept_low", "kept_high"]),
        *("batch_seconds", "system in ['teacher', 'distilled']"),
    ),
}


def points(found: Inventory) -> pd.DataFrame:
    """Every compressed model whose quality and cost were measured, and the full ones.

    Args:
        found: The records; a study that measures neither, or whose tables are gone, has no rows.

    Returns:
        Columns: study, model, curve; size_percent, its parameters (of a quantized model: its bytes) in percent of the
        full model's; speed, in times the full model's; kept_percent with low and high, its score in percent of the
        full model's.
    """
    parts = []
    for record in found.records:
        rows = _bits(record) if record.study == BITS else _joined(record)
        parts.append(rows.assign(study=record.study, model=ledger.model_name(record.slug)))
    some = [part for part in parts if len(part)] or [pd.DataFrame()]
    return pd.concat(some, ignore_index=True).reindex(columns=COLUMNS)


def _joined(record: Record) -> pd.DataFrame:
    if record.study not in SOURCES:
        return pd.DataFrame()
    curve, names, by, columns, seconds, drawn = SOURCES[record.study]
    paths = [folder(record) / record.tables[name].file for name in ("costs", *names) if name in record.tables]
    if len(paths) <= len(names) or not all(path.is_file() for path in paths):
        return pd.DataFrame()
    costs, *scores = (pd.read_csv(path) for path in paths)
    rows = pd.concat(scores).query(drawn).merge(costs, on=by)
    full = costs.sort_values("parameters").iloc[-1]
    values = [100 * rows["parameters"] / full["parameters"], full[seconds] / rows[seconds]]
    values += [rows.eval(column) for column in columns]
    return pd.DataFrame(dict(zip(COLUMNS[3:], values, strict=True))).assign(curve=curve)


def _bits(record: Record) -> pd.DataFrame:
    rows = [[100.0, 1.0, 100.0, 100.0, 100.0]]
    for name in (name.removeprefix("kept_") for name in record.metrics if name.startswith("kept_")):
        share, speed = (record.metrics.get(f"{what}_{name}") for what in ("disk_share", "speed_up"))
        kept = record.metrics[f"kept_{name}"].estimate
        if share and speed and isinstance(kept, Estimate):
            rows.append([share.value, speed.value, kept.value, kept.low, kept.high])
    return pd.DataFrame(rows, columns=COLUMNS[3:]).assign(curve="fewer bits")
