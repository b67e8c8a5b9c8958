"""Quality kept against size and speed, read from the tables of each study's records."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from overparam.publish.inventory import Inventory, folder
from overparam.record.record import Record
from overparam.record.stats import Estimate

COLUMNS = ["study", "model", "system", "size_percent", "speed", "kept_percent", "low", "high"]


def points(found: Inventory) -> pd.DataFrame:
    """Every compressed model whose quality and cost were measured.

    Args:
        found: The records; a study that measures neither, or whose tables are gone, has no rows.

    Returns:
        Columns: study, model, system; size_percent, its parameters (of a quantized model: its bytes) in
        percent of the full model's; speed, in times the
        full model's; kept_percent with low and high, its score in percent of the full model's.
    """
    rows = [
        pd.DataFrame(_READERS[record.study](record)).assign(study=record.study, model=record.slug)
        for record in found.records
        if record.study in _READERS and _has_tables(record)
    ]
    return pd.concat(rows, ignore_index=True)[COLUMNS] if rows else pd.DataFrame(columns=COLUMNS)


def _has_tables(record: Record) -> bool:
    return all(
        (folder(record) / record.tables[name].file).is_file()
        for name in _TABLES[record.study]
        if name in record.tables
    )


def _table(record: Record, name: str) -> pd.DataFrame:
    return pd.read_csv(folder(record) / record.tables[name].file)


def _costs(record: Record, by: str, full: float, seconds: str) -> pd.DataFrame:
    """Size in percent and speed in times of the full model, by the column `by`."""
    costs = _table(record, "costs").set_index(by)
    parameters, times = costs["parameters"], costs[seconds]
    return pd.DataFrame({"size_percent": 100 * parameters / parameters[full], "speed": times[full] / times})


def _layers(record: Record) -> pd.DataFrame:
    trained = _table(record, "trained")
    costs = _costs(record, "depth", trained["depth"].max(), "batch_seconds")
    kept = trained.set_index("depth")[["retention", "retention_low", "retention_high"]].mul(100)
    kept.columns = pd.Index(["kept_percent", "low", "high"])
    return costs.join(kept, how="inner").assign(system="leading layers, trained").reset_index(drop=True)


def _experts(record: Record) -> pd.DataFrame:
    costs = _costs(record, "share_pruned", 0.0, "generate_all_seconds")
    quality, recovery = _table(record, "quality"), _table(record, "recovery")
    published = (quality["method"] == "routing_mass") & (quality["allocation"] == "divergence")
    guarded = (quality["method"] == "routing_mass_super") & (quality["share_pruned"] > 0)
    alone = quality["calibration"] == "one language"
    recovered = (recovery["method"] == "routing_mass") & (recovery["targets"] == "parent")
    systems = {
        "routing mass": quality[published & ~alone],
        "super experts kept, one language each": quality[guarded & alone],
        "recovered": recovery[recovered & (recovery["trained"] == "all parameters")],
    }
    parts = []
    for name, rows in systems.items():
        kept = rows.set_index("share_pruned")[["change_percent", "low", "high"]].add(100)
        kept = kept.rename(columns={"change_percent": "kept_percent"})
        parts.append(costs.join(kept, how="inner").assign(system=name))
    return pd.concat(parts).reset_index(drop=True)


def _students(record: Record) -> pd.DataFrame:
    suite = _table(record, "suite")
    kept = suite[suite["system"].isin(["teacher", "distilled"])].set_index("share")[
        ["kept", "kept_low", "kept_high"]
    ]
    kept.columns = pd.Index(["kept_percent", "low", "high"])
    costs = _costs(record, "share", 1.0, "batch_seconds")
    return costs.join(kept, how="inner").assign(system="distilled students").reset_index(drop=True)


def _schemes(record: Record) -> pd.DataFrame:
    costs = _table(record, "costs").set_index("scheme")
    whole = costs.loc["fp32", "disk_bytes"]
    rows = []
    for library in ("torchao", "openvino", "bitsandbytes"):
        names = [
            name
            for name in costs.index
            if name.startswith(f"{library}-") and f"kept_{name}" in record.metrics
        ]
        for name in ["fp32", *names] if names else []:
            metric = record.metrics.get(f"kept_{name}")
            kept = metric.estimate if metric and metric.estimate else Estimate(100.0, 100.0, 100.0, 1)
            rows.append(
                {
                    "system": f"quantized, {library}",
                    "size_percent": 100 * costs.loc[name, "disk_bytes"] / whole,
                    "speed": record.metrics[f"speed_up_{name}"].value if metric else 1.0,
                    "kept_percent": kept.value,
                    "low": kept.low,
                    "high": kept.high,
                }
            )
    return pd.DataFrame(rows)


_READERS: dict[str, Callable[[Record], pd.DataFrame]] = {
    "trailing_layer_pruning": _layers,
    "moe_expert_pruning": _experts,
    "distillation_retention": _students,
    "quantization_accuracy": _schemes,
}
_TABLES = {
    "trailing_layer_pruning": ("trained", "costs"),
    "moe_expert_pruning": ("quality", "recovery", "costs"),
    "distillation_retention": ("suite", "costs"),
    "quantization_accuracy": ("costs",),
}
