"""The steps that watch parameters: two that find a line, and those of a small transformer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.anatomy import small
from overparam.studies.anatomy.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARRIVES, OSCILLATES, DIVERGES = "arrives", "oscillates", "diverges"
_INPUTS = np.array([0.0, 1.0, 2.0, 3.0])  # x of the points (x, 2 x + 1)
_STEPS = 60
_EPSILON = 1e-3  # of central differences of fourth order, in float64
_SMALL = 1e-6  # derivatives below this are lost in the rounding of the loss
_ROWS = 16  # of text in a step
_TESTED = 2048  # bytes on which losses are compared
_RATE = 3e-3


def two_weights(rate: float, steps: int = _STEPS) -> pd.DataFrame:
    """Find the line y = 2 x + 1 by gradient descent on both of its weights, from zero.

    Args:
        rate: Learning rate.
        steps: Of gradient descent.

    Returns:
        A row a step, before its update: the weights `a` (2 at the end) and `b` (1), their gradients, and the loss.
    """
    targets, a, b, rows = 2 * _INPUTS + 1, 0.0, 0.0, []
    for number in range(steps + 1):
        error = a * _INPUTS + b - targets
        slope_a, slope_b = float((error * _INPUTS).mean()), float(error.mean())
        rows.append({"step": number, "a": a, "b": b, "gradient a": slope_a, "gradient b": slope_b,
                     "loss": float((error**2).mean() / 2)})  # fmt: skip
        a, b = a - rate * slope_a, b - rate * slope_b
    return pd.DataFrame(rows)


def curvature() -> float:
    """Return the largest curvature of that loss: gradient descent diverges at rates above 2 ÷ curvature."""
    design = np.stack([_INPUTS, np.ones_like(_INPUTS)])
    return float(np.linalg.eigvalsh(design @ design.T / len(_INPUTS))[-1])


def behaviour(path: pd.DataFrame) -> str:
    """Say what gradient descent did: it diverged, its weight a passed its goal back and forth, or it just arrived."""
    if path["loss"].iloc[-1] > path["loss"].iloc[0]:
        return DIVERGES
    turns = (np.diff(np.sign(np.diff(path["a"]))) != 0).sum()
    return OSCILLATES if turns > len(path) / 4 else ARRIVES


@step
def line(study: Study) -> pd.DataFrame:
    """Run gradient descent on two weights with every rate.

    Returns:
        The rows of `two_weights` for every rate, with what it did.
    """
    paths = [(rate, two_weights(rate)) for rate in study.params.rates]
    table = pd.concat(
        [path.assign(rate=rate, behaviour=behaviour(path)) for rate, path in paths], ignore_index=True
    )
    study.recorder.table("two_weights", table)
    return table


@step
def one_weight(study: Study) -> dict[str, pd.DataFrame]:
    """Watch a weight of a small transformer while it is trained, check derivatives, and set weights to zero.

    Returns:
        ``path``: a row a step with the weight's value, gradient and step, and the loss. ``derivatives``: backward pass
        against central differences in float64. ``zeroed``: by how much the loss rises when one weight is zero, for
        weights drawn at random; ``parts``: the share of all changes that the most important tenth makes, with its
        interval over weights.
    """
    params, seed = study.params, study.params.seeds[0]
    model = small.build(params.watched_width, seed=seed)
    need = min(params.watched_steps * _ROWS * small.WINDOW, 500_000)
    rows = small.rows_of_text("train", need)
    places = small.weight_places(model, params.zeroed_weights + params.differences, seed)
    name, index = places[0]
    path = _watched(model, rows, name, index, params.watched_steps, seed)
    derivatives = derivatives_of(model, rows[:_ROWS], places[: params.differences])
    tested = small.rows_of_text("test", _TESTED)
    changes = zeroed(model, tested, places[params.differences :])
    study.recorder.keep(
        changes["change"].to_numpy()[:, None], system="one weight zero", part="change of the loss"
    )
    part = most_important(changes["change"].to_numpy(), seed=seed)
    found = {
        "path": path,
        "derivatives": derivatives,
        "zeroed": changes,
        "parts": pd.DataFrame(
            [{"share of weights": 10.0, **part.scaled(100).columns("share"), "weights": part.n,
              "parameters": small.size(model)}]
        ),
    }  # fmt: skip
    for key, table in found.items():
        study.recorder.table(f"one_weight_{key}", table)
    return found


def _watched(
    model: PreTrainedModel, rows: NDArray[np.int64], name: str, index: int, steps: int, seed: int
) -> pd.DataFrame:
    parameter, found = model.get_parameter(name), []

    def see(_: Any) -> None:  # the gradient is complete
        assert parameter.grad is not None
        found.append(
            {
                "value": float(parameter.data.view(-1)[index]),
                "gradient": float(parameter.grad.view(-1)[index]),
            }
        )

    handle = parameter.register_post_accumulate_grad_hook(see)
    try:
        log = small.train(
            model,
            small.shuffled(rows, _ROWS, seed),
            steps=steps,
            rate=_RATE,
            seed=seed,
            label="watching one weight",
        )
    finally:
        handle.remove()
    table = pd.DataFrame(found)
    after = [*table["value"].iloc[1:], float(parameter.data.view(-1)[index])]
    table.insert(0, "step", range(1, len(table) + 1))
    return table.assign(update=np.array(after) - table["value"], loss=log.loss, weight=f"{name}[{index}]")


def derivatives_of(
    model: PreTrainedModel, rows: NDArray[np.int64], places: list[tuple[str, int]]
) -> pd.DataFrame:
    """Compare the derivatives of the loss by some weights with central differences, both in float64.

    Returns:
        A row a weight: `backward`, `difference`, and how far `apart` they are, as a share of the larger (or of 1e-6 if
        both are smaller).
    """
    import torch

    exact = copy.deepcopy(model).double()
    loss: Any = small.losses(exact, rows).mean()
    loss.backward()
    found = []
    for name, index in places:
        gradient = exact.get_parameter(name).grad
        assert gradient is not None
        backward, weight = float(gradient.view(-1)[index]), small.value(exact, name)
        before, ends = weight[index].item(), []
        with torch.no_grad():
            for steps in (1, -1, 2, -2):
                weight[index] = before + steps * _EPSILON
                ends.append(float(small.losses(exact, rows).mean()))
            weight[index] = before
        difference = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * _EPSILON)
        apart = abs(backward - difference) / max(abs(backward), abs(difference), _SMALL)
        found.append(
            {"weight": f"{name}[{index}]", "backward": backward, "difference": difference, "apart": apart}
        )
    return pd.DataFrame(found)


def zeroed(model: PreTrainedModel, rows: NDArray[np.int64], places: list[tuple[str, int]]) -> pd.DataFrame:
    """Set weights to zero, one at a time, and measure what the loss does, in nats a byte.

    In float64: most changes are far smaller than float32 can tell.
    """
    exact = copy.deepcopy(model).double()
    base, found = small.scores(exact, rows).mean(), []
    for name, index in places:
        weight = small.value(exact, name)
        before = weight[index].item()
        weight[index] = 0.0
        change = float(small.scores(exact, rows).mean() - base)
        weight[index] = before
        found.append({"weight": f"{name}[{index}]", "value": before, "change": change})
    return pd.DataFrame(found)


def most_important(changes: NDArray[np.float64], *, share: float = 0.1, seed: int = 0) -> stats.Estimate:
    """Return the share of all changes of the loss (their sizes) that the largest tenth of them makes.

    The interval is a percentile bootstrap over weights.
    """
    sizes = np.abs(changes)

    def part(values: NDArray[np.float64]) -> NDArray[np.float64]:
        ordered = np.sort(values, axis=-1)[..., ::-1]
        most = max(1, round(share * values.shape[-1]))
        total = ordered.sum(axis=-1)
        return np.asarray(ordered[..., :most].sum(axis=-1) / np.where(total > 0, total, 1))

    drawn = np.random.default_rng(seed).integers(len(sizes), size=(10_000, len(sizes)))
    low, high = np.quantile(part(sizes[drawn]), [0.025, 0.975])
    return stats.Estimate(float(part(sizes)), float(low), float(high), len(sizes))
