"""The steps about more parameters: what they learn by heart, how they overfit, and how loss falls with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.study import step
from overparam.record import stats
from overparam.record.stats import Estimate
from overparam.studies.anatomy import small
from overparam.studies.anatomy.study import Study

Array = NDArray[np.float64]
SYMBOLS = 64  # of random strings: 6 bits each
STRING = 32  # symbols of a string
TRAIN, TEST = "training text", "held-out text"
_BATCH = 16  # rows of a step
_STRING_STEPS = 6  # in an epoch of strings, at every size: models of all sizes get as many
_CAPACITY_RATE, _OVERFIT_RATE = 5e-3, 3e-3
_HELD_OUT = 6_144  # bytes of text for choices, and as many for tests
_HUBER = 1e-3  # from here on, errors of the logarithm count linearly
_RESAMPLES = 100  # of the scaling law
_BITS = math.log2(SYMBOLS)


@step
def capacity(study: Study) -> pd.DataFrame:
    """Let models of growing size learn random strings by heart, and measure how many bits they store.

    Nothing can be learned from random strings but the strings: what a string takes fewer bits for than its symbols have
    is stored in the weights (arXiv 2505.24832).

    Returns:
        A row a size: parameters, bits `offered`, and `stored`, `per_parameter` with its interval over strings, and the
        same for strings that were not seen, `unseen`.
    """
    params, seed, rows = study.params, study.params.seeds[0], []
    for width in params.capacity_widths:
        model = small.build(width, symbols=SYMBOLS, window=STRING, seed=seed)
        size = small.size(model)
        number = math.ceil(params.capacity_bits * size / (_BITS * STRING))
        draw = np.random.default_rng([seed, width])
        strings, others = (
            draw.integers(SYMBOLS, size=(count, STRING)) for count in (number, min(number, 256))
        )
        steps = params.capacity_epochs * _STRING_STEPS
        small.train(
            model,
            small.shuffled(strings, math.ceil(number / _STRING_STEPS), seed),
            steps=steps,
            rate=_CAPACITY_RATE,
            seed=seed,
            decay=steps // 2,
            label=f"learning strings by heart, width {width}",
        )
        seen, unseen = (stored_bits(small.scores(model, each))[:, None] for each in (strings, others))
        study.recorder.keep(seen, system=f"width {width}", part="bits of a string")
        found, control = (stats.bootstrap(items).scaled(number / size) for items in (seen, unseen))
        rows.append(
            {"width": width, "parameters": size, "strings": number, "offered": number * STRING * _BITS / size,
             "stored": found.value * size, **found.columns("per_parameter"), **control.columns("unseen")}
        )  # fmt: skip
    table = pd.DataFrame(rows, columns=None if rows else ["width", "parameters", "per_parameter"])
    study.recorder.table("capacity", table)
    return table


def stored_bits(nats: Array) -> Array:
    """Return the bits that are stored of each string, from its mean cross entropy a symbol."""
    return STRING * (_BITS - nats / math.log(2))


def growth(table: pd.DataFrame) -> Estimate:
    """Return the slope of the logarithm of the bits stored over that of the parameters, with its interval (Student).

    Of two sizes, it has no interval and bounds nothing.
    """
    from scipy import stats as scipy_stats

    x, y = np.log(table["parameters"].to_numpy(float)), np.log(table["stored"].to_numpy(float))
    fit = scipy_stats.linregress(x, y)
    freedom = len(x) - 2
    half = math.inf if freedom < 1 else float(scipy_stats.t.ppf(0.975, freedom) * fit.stderr)
    return Estimate(float(fit.slope), float(fit.slope - half), float(fit.slope + half), len(x))


@step
def overfitting(study: Study) -> dict[str, pd.DataFrame]:
    """Train models of growing size on a small corpus, and measure the loss on it and on held-out text by epoch.

    The epoch of early stopping is chosen on one held-out text, and its loss measured on another.

    Returns:
        ``curves``: a row a model, seed and epoch, losses in nats a byte. ``ends``: a row a model: loss of the held-out
        text at the chosen epoch (`stopped`) and at the end, the `gap` to the training text at the end, and what early
        stopping `saved`, with intervals over rows of text and seeds.
    """
    params = study.params
    curves, ends = [], []
    models = [(width, 0.0) for width in params.widths]
    models += [(params.widths[-1], params.dropout)] if params.widths else []
    train = small.rows_of_text("train", params.corpus_bytes) if models else np.empty((0, 0), np.int64)
    chosen_on, test = (
        (small.rows_of_text(split, _HELD_OUT) for split in ("validation", "test"))
        if models
        else (train, train)
    )
    for width, dropout in models:
        runs = [
            _overfit(params.epochs, width, dropout, seed, train, chosen_on, test) for seed in params.seeds
        ]
        size = small.size(small.build(width, seed=0))
        of = {"width": width, "parameters": size, "dropout": dropout}
        for seed, (points, _) in zip(params.seeds, runs, strict=True):
            curves += [{**of, "seed": seed, **point} for point in points]
        stopped, last, learned = (
            [items[key][:, None] for _, items in runs] for key in ("stopped", "last", "train")
        )
        gap = _gap(last, learned)
        saved = stats.difference(stopped, last)
        best = [int(items["epoch"]) for _, items in runs]
        ends.append(
            {**of, "best_epoch": float(np.mean(best)), **stats.bootstrap(stopped).columns("stopped"),
             **stats.bootstrap(last).columns("last"), **gap.columns("gap"), **saved.columns("saved"),
             "training": float(np.mean([each.mean() for each in learned])), "seeds": len(params.seeds)}
        )  # fmt: skip
    found = {"curves": pd.DataFrame(curves), "ends": pd.DataFrame(ends)}
    for key, table in found.items():
        study.recorder.table(f"overfitting_{key}", table)
    return found


def _overfit(
    epochs: int, width: int, dropout: float, seed: int, train: Any, chosen_on: Any, test: Any
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Points of the curves, and the scores of rows at the epoch of early stopping and at the end."""
    model = small.build(width, dropout=dropout, seed=seed)
    every = math.ceil(len(train) / _BATCH)
    points: list[dict[str, float]] = []
    best: dict[str, Any] = {}

    def measure(done: int) -> None:
        scored = {
            name: small.scores(model, rows)
            for name, rows in ((TRAIN, train[: len(test)]), ("chosen", chosen_on), (TEST, test))
        }
        points.append({"epoch": done // every, **{name: float(each.mean()) for name, each in scored.items()}})
        if not best or scored["chosen"].mean() < best["loss"]:
            best.update(loss=scored["chosen"].mean(), epoch=done // every, stopped=scored[TEST])
        best.update(last=scored[TEST], train=scored[TRAIN])

    label = f"overfitting, width {width}, dropout {dropout:g}"
    small.train(
        model, small.shuffled(train, _BATCH, seed), steps=epochs * every, rate=_OVERFIT_RATE, seed=seed, every=every,
        at=measure, label=label,
    )  # fmt: skip
    return points, best


def _gap(test: list[Array], train: list[Array]) -> Estimate:
    """Held-out minus training loss; the two texts are drawn apart, and their intervals joined."""
    ends = [stats.bootstrap(items) for items in (test, train)]
    value = ends[0].value - ends[1].value
    half = math.hypot(*((each.high - each.low) / 2 for each in ends))
    return Estimate(value, value - half, value + half, ends[0].n)


@step
def scaling_law(study: Study) -> dict[str, pd.DataFrame]:
    """Train models of growing size once over text, fit L = E + A / N^a + B / D^b, and predict the largest one.

    The learning rate is chosen for each size. As it is constant after the warm-up, every point is a training that ends
    there. The fit minimises Huber's loss of the logarithms (arXiv 2203.15556, approach 3); the intervals come from
    fits to resampled points, the law's own error included.

    Returns:
        ``points``: a row a size and number of bytes. ``fit``: a row a constant, with its interval. ``held_out``: a row
        a number of bytes: loss of the largest model, predicted and measured.
    """
    params, seed, points = study.params, study.params.seeds[0], []
    if not params.law_widths:
        return {"points": pd.DataFrame(), "fit": pd.DataFrame(), "held_out": pd.DataFrame()}
    test = small.rows_of_text("test", 4 * _HELD_OUT)
    rows = small.rows_of_text("train", params.law_bytes[-1])
    every = math.ceil(params.law_bytes[0] / (_BATCH * small.WINDOW))
    for width in params.law_widths:
        tried = {}
        if len(params.law_rates) > 1:
            for rate in params.law_rates:
                tried[rate] = _law_points(width, rows, test, every, rate, seed)[-1]["loss"]
        rate = min(tried, key=lambda each: tried[each]) if tried else params.law_rates[0]
        size = small.size(small.build(width, seed=0))
        table = small.BYTES * width + small.WINDOW * width
        total = len(rows) // _BATCH
        points += [
            {"width": width, "parameters": size, "tables": 100 * table / size, "rate": rate, **point}
            for point in _law_points(width, rows, test, total, rate, seed, params.law_bytes)
        ]
    table_of_points = pd.DataFrame(points)
    largest = table_of_points["width"] == params.law_widths[-1]
    fitted, held = table_of_points[~largest], table_of_points[largest]
    law = fit_law(fitted["parameters"], fitted["bytes"], fitted["loss"])
    drawn = _resampled_laws(fitted, law, seed)
    fit = pd.DataFrame(
        {"constant": name, "value": value, "low": low, "high": high}
        for name, value, low, high in zip(
            ("E", "A", "a", "B", "b"), law, *np.quantile(drawn, [0.025, 0.975], axis=0), strict=True
        )
    )
    predicted = [
        {"parameters": row["parameters"], "bytes": row["bytes"], "measured": row["loss"],
         "predicted": float(predict(law, row["parameters"], row["bytes"])),
         **dict(zip(("predicted_low", "predicted_high"),
                    np.quantile([predict(each, row["parameters"], row["bytes"]) for each in drawn], [0.025, 0.975]),
                    strict=True))}
        for row in held.to_dict("records")
    ]  # fmt: skip
    found = {"points": table_of_points, "fit": fit, "held_out": pd.DataFrame(predicted)}
    for key, table_ in found.items():
        study.recorder.table(f"law_{key}", table_)
    return found


def _law_points(
    width: int, rows: Any, test: Any, steps: int, rate: float, seed: int, at_bytes: tuple[int, ...] = ()
) -> list[dict[str, float]]:
    """Loss on held-out text after a number of bytes; without any, at the end."""
    model, points = small.build(width, seed=seed), []
    stops = [min(steps, math.ceil(each / (_BATCH * small.WINDOW))) for each in at_bytes] or [steps]

    def measure(done: int) -> None:
        if done in stops:
            points.append(
                {
                    "bytes": float(done * _BATCH * small.WINDOW),
                    "loss": float(small.scores(model, test).mean()),
                }
            )

    batches: Iterator[Any] = islice(small.shuffled(rows, _BATCH, seed), steps)
    label = f"scaling law, width {width}, rate {rate:g}"
    every = math.gcd(*stops) if len(stops) > 1 else steps
    small.train(model, batches, steps=steps, rate=rate, seed=seed, every=every, at=measure, label=label)
    return points


def predict(law: Array, parameters: Any, seen: Any) -> Any:
    """Return the loss that a law (E, A, a, B, b) says for parameters and bytes seen."""
    floor, more, power, data, power_data = law
    return floor + more * np.asarray(parameters) ** -power + data * np.asarray(seen) ** -power_data


def fit_law(parameters: Any, seen: Any, loss: Any, start: Array | None = None) -> Array:
    """Fit L = E + A / N^a + B / D^b: E, A, a, B, b, all positive, both powers from 0.01 to 2.

    Args:
        parameters: N of each point.
        seen: D of each point.
        loss: L of each point.
        start: A law to begin with; by default, the best fit from several beginnings.

    Raises:
        ValueError: Fewer points than constants.
    """
    from scipy.optimize import minimize

    n, d, y = (np.log(np.asarray(each, np.float64)) for each in (parameters, seen, loss))
    if len(y) < 5:
        raise ValueError(f"a law of five constants needs at least 5 points, got {len(y)}")

    def huber(x: Array) -> tuple[float, Array]:
        powers = np.exp(x[[2, 4]])
        parts = np.stack([np.full_like(n, x[0]), x[1] - powers[0] * n, x[3] - powers[1] * d])
        said = np.logaddexp.reduce(parts, axis=0)
        floor, more, data = np.exp(parts - said)
        off = (said - y) / _HUBER
        pull = np.clip(off, -1, 1)
        slopes = np.stack([floor, more, -more * powers[0] * n, data, -data * powers[1] * d])
        return float((pull * (off - pull / 2)).sum()), np.asarray(slopes @ pull / _HUBER)

    low, high = np.log([1e-3, 1e-3, 0.01, 1e-3, 0.01]), np.log([10.0, 1e9, 2.0, 1e9, 2.0])
    if start is None:
        starts = [
            np.array([np.log(floor), power * n.mean(), np.log(power), power * d.mean(), np.log(power)])
            for floor in (0.3, 1.0) for power in (0.1, 0.3, 0.6)
        ]  # fmt: skip
    else:
        starts = [np.log(start)]
    fits = [
        minimize(
            huber, np.clip(each, low, high), jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
            options={"maxiter": 2000 if start is None else 150},
        )
        for each in starts
    ]  # fmt: skip
    best: Array = min(fits, key=lambda each: float(each.fun)).x
    return np.asarray(np.exp(best))


def _resampled_laws(points: pd.DataFrame, law: Array, seed: int) -> Array:
    """Laws fitted to the law's own values with resampled residuals. float64 [resamples, 5]."""
    draw = np.random.default_rng(seed)
    n, d, loss = (points[name].to_numpy(float) for name in ("parameters", "bytes", "loss"))
    said = predict(law, n, d)
    left = np.log(loss / said) * math.sqrt(len(loss) / max(1, len(loss) - 5))  # five constants were fitted
    return np.array(
        [
            fit_law(n, d, said * np.exp(draw.choice(left, size=len(left))), start=law)
            for _ in range(_RESAMPLES)
        ]
    )
