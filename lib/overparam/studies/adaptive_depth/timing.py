"""The step about real time: a run that stops computing, against the plain model, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.costs import speed_up
from overparam.experiment.study import step
from overparam.measure import energy, speed
from overparam.record import stats
from overparam.studies.adaptive_depth.bounds import at_saving, confidence, halves, threshold
from overparam.studies.adaptive_depth.study import MAX_LENGTH, Study

if TYPE_CHECKING:
    import torch

    from overparam.compress.exits import Exits

PLAIN, DISABLED, NEVER, CALIBRATED = "plain model", "exits disabled", "never sure", "calibrated"
TORCH, OPENVINO = "PyTorch", "OpenVINO"
ONE, REGROUPED, WAITING = "one by one", "batch, regrouped", "batch, waiting"
_DRAWS = 2000
_COUNTED = 2  # runs of each text whose energy is counted
_NEVER = 2.0  # a confidence that no exit has: every exit is computed and no text leaves

Call = Callable[[], object]


@step
def timing(study: Study, by_depth: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Time the main encoder on texts of the first task, one by one and in batches, in PyTorch and OpenVINO.

    Plain model and exits take turns text by text, so that other load meets both, and the fastest of a text's turns
    counts, since other load only slows. Time with exits includes them.

    Returns:
        A row an engine, way of running and setting: `layers_saved` and `time_saved` in percent of the plain model's in
        the same engine, and `ratio`, time saved for each layer saved, with bootstrap intervals over texts (batches:
        over rounds); `milliseconds` a text; `kwh` a million texts for some rows, and `energy_method`.
    """
    import torch

    from overparam.compress import exits

    params = study.params
    task = params.tasks[0]
    case = study.cases[params.model, task]
    test = halves(study).test
    chosen = np.random.default_rng(params.seed).permutation(test)
    sure = confidence(case)[test]
    settings = {DISABLED: float("inf"), NEVER: _NEVER, CALIBRATED: threshold(study, case)}
    settings |= {f"{share:.0%}": at_saving(sure, share)[0] for share in params.timed_savings}
    variants = {name: replace(case.exits, threshold=each) for name, each in settings.items()}
    singles = [_tokens(study, [case.texts[i]]) for i in chosen[: params.timed_texts]]
    batch = _tokens(study, [case.texts[i] for i in np.resize(chosen, params.timed_batch)])
    model = study.encoders[params.model][0]
    engines: dict[str, tuple[Any, Any]] = {TORCH: (model, model)}
    if params.openvino:
        engines[OPENVINO] = (_whole(model), exits.Segments(model))
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(params.threads)
    try:
        for engine, (whole, stopping) in engines.items():
            plain = partial(_plain, whole, case.exits)
            rows += _one_by_one(study, engine, plain, stopping, variants, singles)
            rows += _together(study, engine, plain, stopping, variants, batch)
    finally:
        torch.set_num_threads(before)
    table = pd.DataFrame(rows)
    study.recorder.table("timing", table)
    return table


def _tokens(study: Study, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = study.encoders[study.params.model][1]
    found = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _whole(model: Any) -> Any:
    from overparam.compress.quantize.exporting import export
    from overparam.compress.quantize.openvino import Encoder

    return Encoder(export(model, decoder=False))


def _plain(whole: Any, exits: Exits, batch: Mapping[str, torch.Tensor]) -> object:
    """The model as it is, with the last exit as its classifier."""
    import torch

    with torch.inference_mode():
        hidden = whole(**batch)
        states = hidden if isinstance(hidden, torch.Tensor) else hidden.last_hidden_state
        mask = batch["attention_mask"][:, :, None].to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return (pooled @ exits.weights[-1] + exits.biases[-1]).softmax(-1)


def _one_by_one(
    study: Study, engine: str, plain: Any, stopping: Any, variants: dict[str, Exits], texts: list[Any]
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *variants)}
    depth: dict[str, list[int]] = {name: [] for name in variants}
    for text in texts:
        calls: dict[str, Call] = {PLAIN: partial(plain, text)}
        calls |= {name: partial(each.run, stopping, text) for name, each in variants.items()}
        timed = speed.interleaved(calls, warmup=1, repeats=study.params.repeats)
        for name, timing in timed.items():
            seconds[name].append(min(timing.values))
        for name, each in variants.items():
            depth[name].append(int(each.run(stopping, text).depths[0]))
    layers = len(next(iter(variants.values())).weights)
    rows = []
    for name in variants:
        found = _saved(
            np.array(seconds[PLAIN]),
            np.array(seconds[name]),
            np.array(depth[name]) / layers,
            study.params.seed,
        )
        row = {"engine": engine, "way": ONE, "setting": name, **found, "texts": len(texts)}
        rows.append(row | {"milliseconds": 1000 * float(np.mean(seconds[name]))})
    for name in (DISABLED, CALIBRATED):
        with energy.energy() as used:
            for text in texts * _COUNTED:
                variants[name].run(stopping, text)
        row = next(each for each in rows if each["setting"] == name)
        kwh = used.kwh / (len(texts) * _COUNTED) * 1e6
        row |= {"kwh_per_million_texts": kwh, "energy_method": used.method}
    return rows


def _together(
    study: Study, engine: str, plain: Any, stopping: Any, variants: dict[str, Exits], batch: Any
) -> list[dict[str, Any]]:
    calls: dict[str, Call] = {PLAIN: partial(plain, batch)}
    names = {}
    for setting, each in variants.items():
        for way, regroup in ((REGROUPED, True), (WAITING, False)):
            if setting not in (NEVER, DISABLED):
                names[f"{setting} {way}"] = (setting, way)
                calls[f"{setting} {way}"] = partial(each.run, stopping, batch, regroup=regroup)
    timed = speed.interleaved(calls, warmup=1, repeats=max(2, study.params.repeats // 2))
    n, rows = len(batch["input_ids"]), []
    for name, (setting, way) in names.items():
        depths = variants[setting].run(stopping, batch).depths
        took = speed_up(timed[name].values, timed[PLAIN].values).scaled(-100).shifted(100)
        saves = 100 * (1 - float(depths.mean()) / len(variants[setting].weights))
        time = stats.Estimate(took.value, took.high, took.low, took.n)
        ratio = time.scaled(1 / saves).columns("ratio") if saves > 0 else {}
        row = {"engine": engine, "way": way, "setting": setting, "layers_saved": saves}
        row |= time.columns("time_saved") | ratio
        rows.append(row | {"texts": n, "milliseconds": 1000 * timed[name].median / n})
    return rows


def _saved(
    plain: NDArray[np.float64], early: NDArray[np.float64], depth: NDArray[np.float64], seed: int
) -> dict[str, float]:
    """Layers and time saved in percent, and their ratio, with bootstrap intervals over texts."""
    draws = np.random.default_rng(seed).integers(len(plain), size=(_DRAWS, len(plain)))

    def saves(at: NDArray[np.int64]) -> tuple[Any, Any]:
        return 1 - depth[at].mean(-1), 1 - early[at].mean(-1) / plain[at].mean(-1)

    layers, time = saves(np.arange(len(plain)))
    many_layers, many_time = saves(draws)
    low, high = np.quantile(many_time, [0.025, 0.975])
    found = {
        "layers_saved": 100 * float(layers),
        "time_saved": 100 * float(time),
        "time_saved_low": 100 * float(low),
        "time_saved_high": 100 * float(high),
    }
    if layers > 0 and (many_layers > 0).all():
        low, high = np.quantile(many_time / many_layers, [0.025, 0.975])
        found |= {"ratio": float(time / layers), "ratio_low": float(low), "ratio_high": float(high)}
    return found
