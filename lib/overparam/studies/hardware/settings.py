"""The steps about an encoder's settings: quality by precision, a full sweep, and tuning in a part of its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from overparam.experiment.study import step
from overparam.experiment.subjects.base import System
from overparam.experiment.subjects.encoder import Encoder
from overparam.experiment.sweep import compare, score
from overparam.measure import tune
from overparam.serve.encoding import EMULATED, Setting, one_knob, settings
from overparam.serve.tuning import cosine
from overparam.studies.hardware.study import Study, mean_bits
from overparam.support import progress

AGAIN = "the default, again"


@dataclass(frozen=True)
class Sweep:
    """The full sweep.

    Attributes:
        table: A row a setting and length of texts: the `Setting`; `grid` ("joint", or "one choice" that differs from
            the default); `ratio`, how many times as fast as the default, with its interval; `texts_per_second`;
            `padding`, share of tokens; `seconds`, `first`, `rounds` and `status` as in `tune.Comparison`.
        best: Its fastest setting at the joint length.
        seconds: That the joint grid took, preparations left out.
    """

    table: pd.DataFrame
    best: str
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """Tuning within a share of the sweep's time.

    Attributes:
        table: Of `tune.halving`.
        chosen: The setting that it chose.
        seconds: That it took.
        confirmed: On other texts, in turns: a row for the setting that was chosen, the sweep's best, and the default
            once more: `ratio` to the default; and `to_best`, of the chosen one to the sweep's best.
    """

    table: pd.DataFrame
    chosen: str
    seconds: float
    confirmed: pd.DataFrame


@step
def quality(study: Study) -> pd.DataFrame:
    """Measure what each precision of the encoder keeps of its quality.

    Returns:
        A row a scheme: `kept`, percent of full precision's mean score with its interval, paired by item; `cosine` to
        its embeddings; `megabytes` of the weights; `status`, empty or why it does not run.
    """
    params, encoders = study.params, study.encoders(study.params.model)
    reasons = {scheme: encoders.reason_against(scheme) or "" for scheme in params.schemes}
    running = [scheme for scheme, reason in reasons.items() if not reason]
    setting = {scheme: Setting(scheme, study.default.batch, study.threads[-1]) for scheme in running}

    def embed(scheme: Any, texts: list[str]) -> Any:
        return encoders.embed(texts, setting[scheme])

    unit = encoders.embedder.recipe.unit_length
    subject = Encoder(embed, params.suite, params.suite_items, params.seed, unit)
    found = compare(subject, score(study, subject, [System.ready(name, name) for name in running]))
    kept = found.table.set_index("system")
    base = encoders.embed(study.texts[1], setting["fp32"])
    count = sum(p.numel() for p in encoders.model.parameters())
    rows: list[dict[str, Any]] = []
    for scheme, reason in reasons.items():
        row: dict[str, Any] = {"model": params.model, "scheme": scheme, "status": reason}
        if not reason:
            row |= {name: kept.loc[scheme, name] for name in ("kept", "kept_low", "kept_high")}
            row["cosine"] = cosine(base, encoders.embed(study.texts[1], setting[scheme]))
            row["megabytes"] = mean_bits(encoders.quantized(scheme)) * count / 8e6
        rows.append(row)
    table = pd.DataFrame(rows)
    study.recorder.table("quality", table)
    return table


@step
def same(study: Study) -> pd.DataFrame:
    """Compare the default with itself, again and again: how often does the interval hold 1, as it should?

    Returns:
        A row a comparison: `ratio` with its interval, and whether that `holds` 1.
    """
    params, encoders = study.params, study.encoders(study.params.model)
    call = encoders.call(study.texts[0][: params.same_texts], study.default, length=params.joint_length)
    rows = []
    for run in progress.track(range(params.same_runs), "comparing the default with itself"):
        found = tune.paired({"a": call, "b": call}, "a", rounds=params.rounds, seed=run).table.set_index(
            "cell"
        )
        row: Any = found.loc["b"]
        value, low, high = (float(row[name]) for name in ("ratio", "ratio_low", "ratio_high"))
        rows.append(
            {"run": run, "ratio": value, "ratio_low": low, "ratio_high": high, "holds": low <= 1 <= high}
        )
    table = pd.DataFrame(rows)
    study.recorder.table("same", table)
    study.recorder.metric("same_holds", int(table["holds"].sum()), f"of {len(table)} comparisons")
    return table


@step
def sweep(study: Study, found: pd.DataFrame) -> Sweep:
    """Time every setting, in turns with the default: all choices combined at one length, one at a time at the others.

    Args:
        study: The study.
        found: From `quality`: schemes that run.
    """
    params, encoders = study.params, study.encoders(study.params.model)
    running = list(found.loc[found["status"] == "", "scheme"])
    default = study.default
    grid = settings(running, params.batches, study.threads, default=default)
    parts, best, seconds = [], str(default), 0.0
    for length in params.lengths:
        joint = length == params.joint_length
        chosen = grid if joint else one_knob(grid, default)
        for setting in progress.track(
            [s for s in chosen if s.batch == default.batch and s.by_length], "preparing"
        ):
            encoders.embed(study.texts[0], setting, length=length)  # compiles what is compiled
        cells = {
            str(setting): encoders.call(study.texts[0], setting, length=length) for setting in chosen
        } | {AGAIN: encoders.call(study.texts[0], default, length=length)}
        timed = tune.paired(
            cells, str(default), rounds=params.rounds, give_up=params.give_up, seed=params.seed
        )
        rows = timed.table.assign(
            length=length, grid="joint" if joint else "one choice",
            texts_per_second=len(study.texts[0]) / timed.table["seconds"],
        )  # fmt: skip
        named = {str(setting): setting for setting in chosen} | {AGAIN: default}
        for name in ("scheme", "batch", "threads", "by_length"):
            rows[name] = [getattr(named[cell], name) for cell in rows["cell"]]
        rows["padding"] = [
            encoders.padding(study.texts[0], named[cell], length=length) for cell in rows["cell"]
        ]
        parts.append(rows)
        if joint:
            sure = rows[(rows["cell"] != AGAIN) & rows["ratio_low"].notna()]
            best, seconds = str(sure.iloc[0]["cell"]), timed.seconds
    left_out = [{"cell": scheme, "scheme": scheme, "status": reason, "grid": "not run"}
                for scheme, reason in zip(found["scheme"], found["status"], strict=True) if reason]  # fmt: skip
    if "bf16" in running and sum(each.scheme == "bf16" for each in grid) == 1:
        left_out.append({"cell": "bf16", "scheme": "bf16", "status": EMULATED, "grid": "not run"})
    table = pd.concat([*parts, pd.DataFrame(left_out)], ignore_index=True)
    study.recorder.table("sweep", table)
    study.recorder.metric("sweep_seconds", seconds, "s")
    return Sweep(table, best, seconds)


@step
def tuning(study: Study, swept: Sweep) -> Tuning:
    """Find the fastest setting in a share of the sweep's time, and confirm it, and the sweep's, on other texts."""
    params, encoders = study.params, study.encoders(study.params.model)
    joint = swept.table[(swept.table["grid"] == "joint") & (swept.table["cell"] != AGAIN)]
    default, length = study.default, params.joint_length
    by_name = {
        str(row["cell"]): Setting(
            row["scheme"], int(row["batch"]), int(row["threads"]), bool(row["by_length"])
        )
        for row in joint.to_dict("records")
    }
    by_name = dict(sorted(by_name.items()))
    cells = {name: encoders.call(study.texts[0], setting, length=length) for name, setting in by_name.items()}
    found = tune.halving(
        cells, str(default), budget_s=params.tuning_share * swept.seconds, prepared=True, seed=params.seed
    )
    other = {
        name: encoders.call(study.texts[1], by_name[name], length=length)
        for name in dict.fromkeys((str(default), found.best, swept.best))
    }
    other[AGAIN] = encoders.call(study.texts[1], default, length=length)
    sure = tune.paired(other, str(default), rounds=2 * params.rounds, seed=params.seed + 1)
    rows = [
        {"role": role, **_row(sure.table, name)}
        for role, name in (("tuned", found.best), ("best of the sweep", swept.best), (AGAIN, AGAIN))
    ]
    rows.append(
        {"role": "tuned to best", "cell": found.best, **_between(sure.rounds, found.best, swept.best)}
    )
    confirmed = pd.DataFrame(rows)
    study.recorder.table("tuning", found.table)
    study.recorder.table("confirmed", confirmed)
    study.recorder.metric("tuning_seconds", found.seconds, "s")
    return Tuning(found.table, found.best, found.seconds, confirmed)


def _row(table: pd.DataFrame, name: str) -> dict[str, Any]:
    row = table.set_index("cell").loc[name]
    return {"cell": name, **{each: row[each] for each in ("ratio", "ratio_low", "ratio_high", "rounds")}}


def _between(rounds: pd.DataFrame, one: str, other: str) -> dict[str, Any]:
    """How many times as fast one cell is as another, by their ratios to the default in the same rounds."""
    logs = rounds.assign(log=np.log(rounds["reference"] / rounds["seconds"]))
    grid = logs.pivot(index="round", columns="cell", values="log")
    both = [grid[name].to_numpy() if name in grid else np.zeros(len(grid)) for name in (one, other)]
    value, low, high = tune.interval(list(both[0] - both[1]))
    return {"ratio": value, "ratio_low": low, "ratio_high": high, "rounds": len(grid)}
