"""The steps about training, in the order of the notebook: a mixture against dense models on equal text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.assets import trained
from overparam.evaluate import equal_loss as horizontal
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.measure import flops
from overparam.record.stats import Estimate
from overparam.studies.sparse_activation import ACTIVE, MIXTURE, TOTAL, UPCYCLED, Params, training
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COSTS = {"tokens": "tokens", "flops": "operations", "seconds": "seconds"}  # of a training
BASES = (ACTIVE, TOTAL)
BYTES = 2  # a weight takes, as models are stored
_LEVELS = 12  # losses at which two curves are compared


@dataclass
class Study(experiment.Study[Params]):
    """A started study.

    Attributes:
        routed: The mixture whose routing is disturbed, and its tokenizer.
    """

    routed: tuple[PreTrainedModel, PreTrainedTokenizerBase]


@begins
def start(params: Params) -> Study:
    """Check memory, load the mixture whose routing is disturbed, and open the record.

    Raises:
        MemoryError: A training or a model does not fit.
        ValueError: `top_ks` has more experts than the mixture.
        FileNotFoundError: There is no reference record, whose curves are asked for.
    """
    import torch

    from overparam.compress import experts
    from overparam.data import corpora, kinds

    training.check_memory(params)
    if params.model:
        models.check_memory(params.model, torch.float32, times_weights=2.5, purpose="with its activations")
    if params.committed_curves:
        trained.table(params.study, params.slug(), "curves.csv")
    routed = models.load(params.routed_model, causal=True)
    fewest = min(layer.n_experts for layer in experts.layers(routed[0]))
    if params.top_ks[-1] > fewest:
        raise ValueError(
            f"top_ks must be at most {fewest}, the experts of {params.routed_model}, got {params.top_ks}"
        )
    used = {*params.kinds, *((params.calibration_kind, params.test_kind) if params.model else ())}
    inputs = (
        kinds.provenance(*sorted(used))
        | corpora.provenance("verses")
        | models.provenance(params.routed_model)
    )
    inputs |= (models.provenance(params.model) if params.model else {}) | params.key_inputs()
    seeds = sorted({*params.seeds, *params.control_seeds, training.VALIDATION_SEED})
    return Study(params, experiment.open_record(params, inputs=inputs, seeds=seeds), routed)


@step
def count(study: Study) -> pd.DataFrame:
    """Count the operations of a forward pass and the bytes of each model.

    Returns:
        A row a model: operations a token by part, from the closed form; `counted` by PyTorch with experts one by one,
        and `counted_grouped` with grouped products, which it does not see; parameters, with and without the table of
        embeddings; bytes of the weights.
    """
    params, rows = study.params, []
    for arm in (ACTIVE, MIXTURE, TOTAL):
        model = training.build(params, arm, params.seeds[0]).eval()
        form = flops.per_token(model.config, params.row_length)
        of = models.count_parameters(model)
        rows.append(
            {
                "arm": arm,
                **{
                    part: getattr(form, part)
                    for part in ("attention", "router", "experts", "head", "blocks", "total")
                },
                "counted": flops.counted(model, params.row_length),
                "counted_grouped": flops.counted(model, params.row_length, experts="grouped_mm"),
                "parameters": of.total,
                "parameters_without_embeddings": of.total - of.embedding,
                "active_without_embeddings": of.active,
                "bytes": BYTES * of.total,
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("operations", table)
    return table


@step
def speed(study: Study) -> pd.DataFrame:
    """Time a training step of each model, in turns.

    Returns:
        A row a model: `seconds` of a step with their 95 % interval, and `tokens_per_second`.
    """
    timings, tokens = training.speeds(study.params)
    table = pd.DataFrame(
        {"arm": arm, "seconds": each.median, "seconds_low": each.low, "seconds_high": each.high,
         "tokens_per_second": tokens / each.median}
        for arm, each in timings.items()
    )  # fmt: skip
    study.recorder.table("speeds", table)
    return table


@step
def tune(study: Study) -> pd.DataFrame:
    """Train every model for some steps with every learning rate, and choose the one with the lowest held-out loss.

    Returns:
        A row a model and rate: `loss`, missing where the training diverged; `chosen`; `at_edge` where a rate beyond
        the grid might be better.

    Raises:
        FloatingPointError: Every rate diverged.
    """
    params, rows = study.params, []
    for arm in (ACTIVE, MIXTURE, TOTAL):
        for rate in params.learning_rates:
            rows.append({"arm": arm, "learning_rate": rate, "loss": _tuned(params, arm, rate)})
    table = pd.DataFrame(rows)
    if table.groupby("arm")["loss"].count().min() == 0:
        raise FloatingPointError("a model diverged with every learning rate: give lower learning_rates")
    best = table.loc[table.groupby("arm")["loss"].idxmin()]
    table["chosen"] = table.index.isin(best.index)
    ends = (params.learning_rates[0], params.learning_rates[-1])
    table["at_edge"] = table["chosen"] & table["learning_rate"].isin(ends) & (len(params.learning_rates) > 1)
    study.recorder.table("learning_rates", table)
    return table


def _tuned(params: Params, arm: str, rate: float) -> float:
    if len(params.learning_rates) == 1:
        return 0.0
    try:
        found = training.train(
            params, arm, seed=params.seeds[0], learning_rate=rate, steps=params.tuning_steps
        )
    except FloatingPointError as error:
        progress.note(str(error))
        return float("nan")
    return float(training.curve(found)["loss"].iloc[-1])


@step
def train(study: Study, operations: pd.DataFrame, speeds: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Train every model with every seed, each with the learning rate chosen for its kind.

    Returns:
        A row a model, seed and point of its learning curve: cost so far (`tokens`, `flops`, `flops_blocks` without the
        head, `seconds` at the measured speed), `bytes` of the weights, held-out `loss` (mean over kinds of
        text) and ``loss_<kind>``.
    """
    params, parts, use = study.params, [], []
    rates = tuned[tuned["chosen"]].set_index("arm")["learning_rate"]
    of: Any = operations.set_index("arm")
    prices = {
        "flops": flops.TRAINING * of["total"],
        "flops_blocks": flops.TRAINING * of["blocks"],
        "seconds": 1 / speeds.set_index("arm")["tokens_per_second"],
    }
    for arm in params.arms:
        like = arm if arm in of.index else MIXTURE
        for seed in params.seeds:
            run = training.train(params, arm, seed=seed, learning_rate=float(rates[like]), steps=params.steps)
            found = training.curve(run).assign(arm=arm, seed=seed, bytes=int(of.loc[like, "bytes"]))
            half = run.log.tokens[params.steps // 2 - 1] if arm == UPCYCLED else 0
            dense = found["tokens"].clip(upper=half)
            for column, price in prices.items():  # of a token
                found[column] = dense * price[ACTIVE] + (found["tokens"] - dense) * price[like]
            parts.append(found)
            least, entropy = (
                training.expert_use(run.model, training.texts(params)) if like == MIXTURE else (1.0, 1.0)
            )
            use.append(
                {
                    "arm": arm, "seed": seed, "learning_rate": float(rates[like]),
                    "dropped": float(np.mean(run.log.dropped)), "least_load": least, "entropy": entropy,
                }
            )  # fmt: skip
    table = pd.concat(parts, ignore_index=True)
    first = ["arm", "seed", "step", *COSTS, "flops_blocks", "bytes", "loss"]
    table = table[[*first, *(name for name in table if name not in first)]]
    study.recorder.table("curves", table)
    study.recorder.table("trainings", pd.DataFrame(use))
    study.recorder.metric("tokens_per_training", int(table["tokens"].max()))
    study.recorder.metric(
        "training_hours", float(table.groupby(["arm", "seed"])["seconds"].max().sum() / 3600), "h"
    )
    return table


@step
def judged_curves(study: Study, live: pd.DataFrame) -> pd.DataFrame:
    """Return the learning curves that are judged: those of this run, or those of the reference record.

    Raises:
        ValueError: The reference record lacks a model that is judged.
    """
    if not study.params.committed_curves:
        return live
    curves = pd.read_csv(trained.table(study.params.study, study.params.slug(), "curves.csv"))
    if missing := {ACTIVE, MIXTURE, TOTAL} - set(curves["arm"]):
        raise ValueError(
            f"the reference curves lack {', '.join(sorted(missing))}: run the reference profile again"
        )
    return curves


@step
def final_losses(study: Study, curves: pd.DataFrame) -> pd.DataFrame:
    """Compare the losses at the end of training, by kind of text.

    Returns:
        A row a model and kind ("all" is their mean): `loss`, and `above`, its distance from the mixture's of the same
        seed, both in nats a token, with Student's interval over seeds.
    """
    ends = _ends(curves)
    rows = []
    for arm, own in ends.groupby("arm", sort=False):
        base = ends[ends["arm"] == MIXTURE].set_index("seed").loc[own["seed"]]
        for column in [name for name in map(str, curves) if name.startswith("loss")]:
            difference = own[column].to_numpy() - base[column].to_numpy()
            rows.append(
                {
                    "arm": arm, "kind": column.removeprefix("loss").removeprefix("_") or "all", "seeds": len(own),
                    **horizontal.mean(own[column]).columns("loss"), **horizontal.mean(difference).columns("above"),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("final_losses", table)
    return table


@step
def savings(study: Study, curves: pd.DataFrame) -> pd.DataFrame:
    """Find how much of a dense model's training cost the mixture saves until both have the same loss.

    Returns:
        A row a dense model (`base`), `cost` and `loss`: `saved` in percent of the dense model's cost, with Student's
        interval over seeds; losses outside of a curve are left out. `lowest` marks the lowest loss that all reach.
    """
    rows = []
    for base in BASES:
        pairs = list(_pairs(curves, base))
        lowest = horizontal.common_loss(*((each["tokens"], each["loss"]) for pair in pairs for each in pair))
        highest = min(float(each["loss"].iloc[0]) for pair in pairs for each in pair)
        levels = np.linspace(max(highest, lowest), lowest, _LEVELS if highest > lowest else 1)
        for cost in (*COSTS, "flops_blocks"):
            for loss in levels:
                found = [
                    [horizontal.reached(each[cost], each["loss"], loss) for each in side]
                    for side in zip(*pairs, strict=True)
                ]
                rows.append(
                    {
                        "base": base, "cost": cost, "loss": float(loss), "lowest": bool(loss == lowest),
                        **horizontal.saved(*found).columns("saved"), "seeds": len(pairs),
                    }
                )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("savings", table)
    for row in table[table["lowest"]].to_dict("records"):
        name = f"saved_{row['cost']}_{'active' if row['base'] == ACTIVE else 'total'}"
        estimate = Estimate(row["saved"], row["saved_low"], row["saved_high"], row["seeds"])
        study.recorder.metric(name, estimate, "% of the dense model's cost at equal loss")
    return table


@step
def dense_equivalent(study: Study, curves: pd.DataFrame, operations: pd.DataFrame) -> pd.DataFrame:
    """Find the dense model that has the mixture's loss after the same tokens, between the two that were trained.

    Size is interpolated over its logarithm. `saved` is what the mixture saves of that model's operations a token, or
    of its bytes, in percent; where the mixture is better than the larger dense model, or worse than the smaller, that
    model's cost is taken and the interval is open.
    """
    ends = (
        _ends(curves)
        .pivot(index="seed", columns="arm", values="loss")
        .dropna(subset=[ACTIVE, MIXTURE, TOTAL])
    )
    of: Any = operations.set_index("arm")
    rows = []
    for cost in ("total", "blocks", "bytes"):
        dense = [
            horizontal.reached(of.loc[list(BASES), cost], [row[ACTIVE], row[TOTAL]], row[MIXTURE])
            for _, row in ends.iterrows()
        ]
        own = [horizontal.Reached(float(of.loc[MIXTURE, cost]))] * len(dense)
        rows.append(
            {
                "cost": cost, "mixture": own[0].cost, "dense": float(np.exp(np.mean(np.log([d.cost for d in dense])))),
                "outside": sum(d.outside != 0 for d in dense), **horizontal.saved(dense, own).columns("saved"),
                "seeds": len(dense),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("dense_equivalent", table)
    return table


def _ends(curves: pd.DataFrame) -> pd.DataFrame:
    """The last point of every training."""
    ends: pd.DataFrame = curves.loc[curves.groupby(["arm", "seed"], sort=False)["step"].idxmax()]
    return ends


def _pairs(curves: pd.DataFrame, base: str) -> Iterator[tuple[Any, Any]]:
    """The curves of a dense model and the mixture, by seed."""
    for _, group in curves.groupby("seed"):
        both = [group[group["arm"] == arm] for arm in (base, MIXTURE)]
        if all(len(each) for each in both):
            yield both[0], both[1]
