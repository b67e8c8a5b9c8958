"""The steps about when to leave: bounds that are verified by resplits, controls, and which texts leave early."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.adaptive_depth import LABELS
from overparam.studies.adaptive_depth.study import RESAMPLES, Case, Study, texts_of

RULE, RISK, METHOD = "probability", "newly wrong", "ltt"  # that are judged, set before any run
FIXED, RANDOM, SHUFFLED, ORACLE = "fixed depth", "random exits", "shuffled confidences", "oracle"
_CURVE = 5  # every so many thresholds make a point of a curve
_SHUFFLES = 3
_EXAMPLES = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Halves:
    """Which texts of the pool calibrate in each split, bool [splits, texts]; the first split is the one judged."""

    calibrates: NDArray[np.bool_]

    @property
    def n(self) -> int:
        """Texts that calibrate in each."""
        return int(self.calibrates[0].sum())

    @property
    def test(self) -> NDArray[np.int64]:
        """Test texts of the split that is judged."""
        return np.flatnonzero(~self.calibrates[0])


def halves(study: Study) -> Halves:
    """Split the pool at random, again and again."""
    params, draw = study.params, np.random.default_rng(study.params.seed)
    n = round(params.calibration * params.pool)
    rows = [draw.permutation(params.pool) < n for _ in range(params.resplits)]
    return Halves(np.stack(rows))


def confidence(case: Case, rule: str = RULE, teaching: str = LABELS) -> Floats:
    """Confidences of a case's exits, [texts, exits]."""
    from overparam.compress import exits

    return exits.confidences(case.logits[teaching], rule, case.learned[teaching])


def loss(case: Case, risk: str = RISK, teaching: str = LABELS) -> Floats:
    """Losses of a case's exits against the full model, [texts, exits]."""
    from overparam.compress import exits

    return exits.losses(case.logits[teaching].argmax(-1), case.labels, risk)


def threshold(study: Study, case: Case) -> float:
    """The threshold of the judged rule, risk, method and alpha, from the calibration half of the judged split."""
    from overparam.compress import exits

    params, chosen = study.params, halves(study).calibrates[0]
    left = exits.leave(confidence(case)[chosen], exits.THRESHOLDS)
    place = exits.calibrate(
        exits.risks(left, loss(case)[chosen]), alpha=params.alpha, delta=params.delta, method=METHOD
    )
    return float(exits.THRESHOLDS[place])


@step
def saved(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Calibrate every rule, and one depth for all texts, on one half of the pool, test on the other, many times.

    A test half has noise of its own, and few errors in one half are more in the other. So the same is done once more
    with calibrations that are drawn from the pool with replacement: the pool is then the population that they promise
    something about, and its risk is known.

    Returns:
        A row an encoder, task, teaching, risk, rule, method and alpha: `saved` layers in percent, mean over splits, and
        on the judged split with its bootstrap interval (``judged``); the mean test `risk`, and `above`, the share of
        splits whose test risk is above alpha, both in percent, with standard errors over splits (``_error``); and
        `drawn_risk` and `drawn_above`, the same over draws, of the pool's risk.
    """
    from overparam.compress import exits

    params, split, rows = study.params, halves(study), []
    calibrates = split.calibrates.astype(np.float64).T  # [texts, splits]
    draw = np.random.default_rng(params.seed)
    even = np.full(params.pool, 1 / params.pool)
    drawn = (
        draw.multinomial(split.n, even, size=params.resplits).astype(np.float64).T
    )  # how often, [texts, draws]
    for (encoder, task), case in study.cases.items():
        for teaching, logits in case.logits.items():
            layers = logits.shape[1]
            lefts = {
                rule: exits.leave(confidence(case, rule, teaching), exits.THRESHOLDS) for rule in exits.RULES
            }
            lefts[FIXED] = np.repeat(np.arange(layers)[::-1, None], len(case.labels), axis=1)
            for risk in exits.RISKS:
                costs = loss(case, risk, teaching)
                for rule, left in lefts.items():
                    most = exits.risks(left, costs)
                    real = np.take_along_axis(costs, left.T, axis=1).T
                    for method in exits.METHODS:
                        for alpha in params.alphas:
                            at, again = (
                                exits.positions(
                                    totals, split.n, alpha=alpha, delta=params.delta, method=method
                                )
                                for totals in (most @ calibrates, most @ drawn)
                            )
                            row = _over_splits(left[at], real[at], ~split.calibrates, layers, alpha)
                            row |= _over_draws(100 * real[again].mean(1), alpha)
                            named = {"encoder": encoder, "task": task, "teaching": teaching, "risk_of": risk}
                            rows.append(named | {"rule": rule, "method": method, "alpha": alpha} | row)
    table = pd.DataFrame(rows)
    study.recorder.table("saved", table)
    return table


def _over_splits(
    left: NDArray[np.int64], lost: Floats, tests: NDArray[np.bool_], layers: int, alpha: float
) -> dict[str, Any]:
    """What splits [splits, texts] save and lose on their test halves."""
    n = tests.sum(1)
    share = 100 * (1 - (left + 1) / layers)
    risk = 100 * (lost * tests).sum(1) / n
    above = 100.0 * (risk > 100 * alpha + 1e-9)
    judged = stats.bootstrap(share[0][tests[0]], n_resamples=RESAMPLES)
    splits = len(n)
    return {
        "saved": float(((share * tests).sum(1) / n).mean()),
        **judged.columns("judged"),
        "risk": float(risk.mean()),
        "risk_error": float(risk.std(ddof=1) / np.sqrt(splits)),
        "above": float(above.mean()),
        "above_error": float(np.sqrt(above.mean() * (100 - above.mean()) / splits)),
        "splits": splits,
        "texts": int(n[0]),
    }


def _over_draws(risk: Floats, alpha: float) -> dict[str, float]:
    """What the pool loses over draws, [draws], in percent."""
    above, draws = 100.0 * (risk > 100 * alpha + 1e-9), len(risk)
    return {
        "drawn_risk": float(risk.mean()),
        "drawn_risk_error": float(risk.std(ddof=1) / np.sqrt(draws)),
        "drawn_above": float(above.mean()),
        "drawn_above_error": float(np.sqrt(above.mean() * (100 - above.mean()) / draws)),
    }


@step
def curves(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Draw every rule out over its thresholds, and the controls, on the main encoder.

    Returns:
        A row a task, system and point: `saved` layers and texts that are `lost` (newly wrong), in percent of the pool.
    """
    from overparam.compress import exits

    rows = []
    for task in study.params.tasks:
        case = study.cases[study.params.model, task]
        costs, layers = loss(case), case.logits[LABELS].shape[1]
        systems = {rule: [confidence(case, rule)] for rule in exits.RULES}
        systems[SHUFFLED] = [exits.shuffled(systems[RULE][0], seed) for seed in range(_SHUFFLES)]
        for name, several in systems.items():
            points = []
            for sure in several:
                left = exits.leave(sure, exits.THRESHOLDS[::_CURVE])
                lost = np.take_along_axis(costs, left.T, axis=1).T
                points.append(np.stack([1 - (left + 1).mean(1) / layers, lost.mean(1)], axis=1))
            rows += [_point(task, name, *each) for each in np.mean(points, axis=0)]
        rows += [_point(task, FIXED, 1 - (k + 1) / layers, costs[:, k].mean()) for k in range(layers)]
        for left in exits.leave(systems[RULE][0], exits.THRESHOLDS[::_CURVE]):
            share = np.bincount(left, minlength=layers) / len(left)  # leave at random, as many at each exit
            rows.append(_point(task, RANDOM, 1 - (left + 1).mean() / layers, (costs @ share).mean()))
        best = exits.oracle(costs)
        rows.append(_point(task, ORACLE, 1 - (best + 1).mean() / layers, 0.0))
    table = pd.DataFrame(rows)
    study.recorder.table("curves", table)
    return table


def _point(task: str, system: str, saved: float, lost: float) -> dict[str, Any]:
    return {"task": task, "system": system, "saved": 100 * float(saved), "lost": 100 * float(lost)}


@step
def controls(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Compare the calibrated exits with controls of the same mean depth, on the test half of the judged split.

    A fixed depth between two layers is a mixture of both; of random exits with the same histogram the expected loss is
    taken.

    Returns:
        A row a task: layers `saved`, `accuracy` of the full model and `accuracy_early`, texts `lost` (newly wrong), all
        in percent; and how many percent of the texts each control loses more, paired by text: `fixed`, `random`.
    """
    from overparam.compress import exits

    rows = []
    test = halves(study).test
    for task in study.params.tasks:
        case = study.cases[study.params.model, task]
        predicted, labels = case.logits[LABELS].argmax(-1)[test], case.labels[test]
        costs, layers = loss(case)[test], predicted.shape[1]
        found = threshold(study, case)
        left = exits.leave(confidence(case)[test], found)
        lost = costs[np.arange(len(left)), left]
        share = np.bincount(left, minlength=layers) / len(left)
        more = {
            name: stats.difference(lost, other).scaled(100)
            for name, other in (("fixed", exits.fixed(costs, left.mean())), ("random", costs @ share))
        }
        early = predicted[np.arange(len(left)), left] == labels
        study.recorder.keep(np.stack([left + 1.0, lost], 1), encoder=study.params.model, task=f"left: {task}")
        rows.append(
            {
                "task": task, "threshold": found, "saved": 100 * (1 - (left + 1).mean() / layers),
                "accuracy": 100 * float((predicted[:, -1] == labels).mean()),
                "accuracy_early": 100 * float(early.mean()),
                **stats.bootstrap(lost).scaled(100).columns("lost"),
                **more["fixed"].columns("fixed"), **more["random"].columns("random"), "texts": len(left),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("controls", table)
    return table


@step
def difficulty(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Ask whether texts that are easy by other measures leave earlier.

    Measures that know no encoder: length in words, rare words (mean negative logarithm of a word's frequency), and the
    loss of a bag-of-words model on the right class. The depth is that at which the judged rule leaves at the threshold
    with which half of the layers are saved: a calibrated one may leave too few texts to tell.

    Returns:
        A row a task and measure: Spearman's `rho` with the depth, and `partial`, with length partialled out; bootstrap
        intervals over the test texts of the judged split; mean depth of each fifth of the texts, from easy to hard.
    """
    from overparam.evaluate import classification

    params, rows = study.params, []
    test = halves(study).test
    for task in params.tasks:
        case = study.cases[params.model, task]
        texts, labels = [case.texts[i] for i in test], case.labels[test]
        sure = confidence(case)[test]
        _, left = at_saving(sure, 0.5)
        found = texts_of(params, task)
        chances = classification.bag_of_words(found.texts, found.labels, texts, seed=params.seed)
        right = chances[np.arange(len(labels)), labels]
        measures = {
            "words": np.array([len(text.split()) for text in texts], dtype=float),
            "rare words": _rareness(found.texts, texts),
            "bag-of-words loss": -np.log(np.maximum(right, 1e-9)),
        }
        for name, values in measures.items():
            rho = stats.bootstrap(np.stack([values, left], 1), statistic="spearman", n_resamples=RESAMPLES)
            partial = _partial(left, values, measures["words"], params.seed) if name != "words" else rho
            order = np.argsort(values, kind="stable")
            fifths = {
                f"fifth_{k}": float((left[part] + 1).mean())
                for k, part in enumerate(np.array_split(order, 5), 1)
            }
            named = {"task": task, "measure": name, "layers": sure.shape[1], "texts": len(texts)}
            rows.append(named | rho.columns("rho") | partial.columns("partial") | fifths)
    table = pd.DataFrame(rows)
    study.recorder.table("difficulty", table)
    return table


def at_saving(sure: Floats, share: float) -> tuple[float, NDArray[np.int64]]:
    """The threshold that saves about this share of the layers, and the exits at which texts leave."""
    from overparam.compress import exits

    left = exits.leave(sure, exits.THRESHOLDS)
    saves = 1 - (left + 1).mean(1) / sure.shape[1]
    place = int(np.abs(saves - share).argmin())
    return float(exits.THRESHOLDS[place]), left[place]


def _rareness(train: list[str], texts: list[str]) -> Floats:
    counts = Counter(word for text in train for word in text.lower().split())
    total = sum(counts.values()) + 1
    rare = [[-np.log((counts[word] or 0.5) / total) for word in text.lower().split()] for text in texts]
    return np.array([np.mean(each) for each in rare])


def _partial(depth: Any, values: Floats, length: Floats, seed: int) -> stats.Estimate:
    """Spearman's correlation of two columns with a third one partialled out, and its bootstrap interval."""
    columns = np.stack([np.asarray(depth, dtype=float), values, length])
    draw = np.random.default_rng(seed)
    n = columns.shape[1]
    found = [partial_spearman(*columns[:, draw.integers(n, size=n)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [0.025, 0.975])
    return stats.Estimate(partial_spearman(*columns), float(low), float(high), n)


def partial_spearman(x: Floats, y: Floats, z: Floats) -> float:
    """Return Spearman's correlation of x and y with z partialled out; 0 where a column is constant."""
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef([rankdata(each) for each in (x, y, z)]))
        found = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    return float(np.nan_to_num(found, posinf=0.0, neginf=0.0))


@step
def examples(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Show the texts that leave first, and those that stay longest, of the first task.

    Returns:
        Five rows each: `text`, `topic`, the full model's class (`full`), and the layers that it took at the threshold
        of `difficulty`.
    """
    params = study.params
    task = params.tasks[0]
    case = study.cases[params.model, task]
    test = halves(study).test
    sure = confidence(case)[test]
    _, left = at_saving(sure, 0.5)
    order = np.lexsort((-sure.max(1), left))
    names = texts_of(params, task).classes
    rows = []
    for leaves, chosen in (("first", order[:_EXAMPLES]), ("last", order[::-1][:_EXAMPLES])):
        for at in chosen:
            i = test[at]
            full = names[int(case.logits[LABELS][i, -1].argmax())]
            rows.append(
                {
                    "leaves": leaves, "layers": int(left[at]) + 1, "topic": names[case.labels[i]], "full": full,
                    "text": case.texts[i],
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("examples", table)
    return table
