"""The steps about trained models: routing that is disturbed, and activations that are made sparse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.experiment.costs import speed_up
from overparam.experiment.study import step
from overparam.measure import speed
from overparam.record import stats
from overparam.studies.sparse_activation.study import Study

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST, AT_RANDOM, LARGEST = "smallest", "random", "largest"
ALL, DOWN = "all matrices", "down_proj"
AS_TRAINED = "as trained"
SHUFFLED, RANDOM_ROUTER = "shuffled experts", "random router"
_CONTEXT = 8  # tokens before the one that is timed


@step
def routing(study: Study) -> pd.DataFrame:
    """Disturb the routing of a trained mixture, and measure what its translations cost in likelihood.

    Returns:
        A row a system: experts a token, and `lost`, the rise of the loss over the model as trained, in nats a token,
        paired by verse, over seeds where the system has some.
    """
    from overparam.compress.experts import controls
    from overparam.data.parallel import verse_pairs
    from overparam.evaluate import likelihood, prompts

    params, (model, tokenizer) = study.params, study.routed
    pairs = verse_pairs("en", "fr", "test", n=params.routed_verses, seed=params.seeds[0])
    asked, answers = (
        prompts.tagged()([pair.source for pair in pairs], "en", "fr"),
        [pair.target for pair in pairs],
    )
    systems: dict[str, list[Any]] = {AS_TRAINED: [nullcontext()]}
    systems |= {f"top-{top_k}": [controls.using_top_k(model, top_k)] for top_k in params.top_ks}
    for name, disturbed in ((SHUFFLED, controls.shuffled_experts), (RANDOM_ROUTER, controls.random_routers)):
        systems[name] = [disturbed(model, seed) for seed in params.control_seeds]
    items: dict[str, list[Any]] = {}
    for name, states in systems.items():
        for number, state in enumerate(states):
            with state:
                scores = likelihood.negative_log_likelihood(
                    model, tokenizer, asked, answers, label=f"scoring {name}"
                )
            study.recorder.keep(scores, system=name, part=f"seed {number}")
            items.setdefault(name, []).append(scores)
    rows = []
    for name, found in items.items():
        lost = stats.difference(items[AS_TRAINED][0], found, statistic="nll_per_token", seed=params.seeds[0])
        rows.append({"system": name, **lost.columns("lost"), "verses": len(pairs), "seeds": len(found)})
    table = pd.DataFrame(rows)
    study.recorder.table("routing", table)
    return table


@step
def activations(study: Study) -> pd.DataFrame:
    """Set inputs of a dense decoder's matrices to zero, and measure what its perplexity loses.

    Thresholds come from one kind of text, quality from another.

    Returns:
        A row a choice of zeros ("smallest" is TEAL), part of the matrices and share: share of zeros `found` on the test
        text, and `worse`, the rise of the perplexity in percent, paired by text. Without a model, no rows.
    """
    from overparam.compress import activation
    from overparam.data import kinds
    from overparam.evaluate import likelihood

    params = study.params
    columns = ["choice", "part", "share", "found", "worse", "worse_low", "worse_high", "texts", "seeds"]
    if params.model is None:
        return pd.DataFrame(columns=columns)
    model, tokenizer = models.load(params.model, causal=True)
    limit = {"truncation": True, "max_length": params.text_length, "return_tensors": "pt"}
    texts = kinds.texts(params.calibration_kind, "train", params.calibration_texts)
    calibration = [tokenizer(text, **limit).input_ids for text in texts]
    both = sorted({*params.shares, *map(_rest, params.shares)})
    thresholds = activation.quantiles(model, calibration, both, seed=params.seeds[0])
    tested = kinds.texts(params.test_kind, "test", params.test_texts)

    def score(part: str, share: float, stays: Callable[[str, Tensor], Tensor]) -> tuple[Any, float]:
        modules = activation.matrices(model, "" if part == ALL else part)
        with activation.zeroed(modules, stays) as zeros:
            found = likelihood.perplexity(
                model, tokenizer, tested, max_length=params.text_length, label=f"{share:.0%} zeros"
            )
        return found, zeros.share

    base = likelihood.perplexity(
        model, tokenizer, tested, max_length=params.text_length, label="scoring texts"
    )
    study.recorder.keep(base, system=AS_TRAINED, part="")
    rows = []
    for share in params.shares:
        small = activation.smallest(thresholds, share)
        large = activation.largest(thresholds, _rest(share))
        random = [activation.at_random(share, seed) for seed in params.control_seeds]
        for choice, part, several in (
            (SMALLEST, ALL, [small]), (SMALLEST, DOWN, [small]), (AT_RANDOM, ALL, random), (LARGEST, ALL, [large]),
        ):  # fmt: skip
            scored = [score(part, share, stays) for stays in several]
            for items, _ in scored:
                study.recorder.keep(items, system=f"{choice} {share:g}", part=part)
            kept = stats.retention(base, [items for items, _ in scored], statistic="perplexity")
            found = float(np.mean([zeros for _, zeros in scored]))
            worse = kept.shifted(-1).scaled(100).columns("worse")
            row = {"choice": choice, "part": part, "share": share, "found": found, **worse}
            rows.append(row | {"texts": len(tested), "seeds": len(several)})
    table = pd.DataFrame(rows, columns=columns)
    study.recorder.table("activations", table)
    return table


@step
def decoding(study: Study) -> pd.DataFrame:
    """Time one token's products with zeros left out, and what that makes of the time of a whole token (Amdahl's law).

    Every timed product runs through the matrices of all layers, which do not fit into a cache, as decoding does.

    Returns:
        A row a part of the matrices and share: `product`, how many times as fast as dense its products are; `token`,
        how many times as fast a whole token would be with them; `part_of_token`, the share of a token's time that the
        dense products take.
    """
    import torch
    from torch.nn import functional

    from overparam.compress import activation

    params = study.params
    columns = ["part", "share", "dtype", "part_of_token", "product", "product_low", "product_high", "token",
               "token_low", "token_high", "repeats"]  # fmt: skip
    if params.model is None:
        return pd.DataFrame(columns=columns)
    dtype = models.working_dtype("auto")
    model, _ = models.load(params.model, causal=True, dtype=dtype)
    found = activation.matrices(model)
    random = torch.Generator().manual_seed(params.seeds[0])
    sizes = sorted({module.in_features for module in found.values()})
    inputs = {size: torch.randn(size, generator=random).to(dtype) for size in sizes}
    uniform = {size: torch.rand(size, generator=random) for size in sizes}
    groups = {
        name: [module for key, module in found.items() if key.endswith(name)] for name in _endings(found)
    }
    calls: dict[str, Callable[[], object]] = {"token": _one_token(model)}
    for name, modules in groups.items():
        x = inputs[modules[0].in_features]
        calls[name] = partial(_each, functional.linear, [(x, each.weight) for each in modules])
        rows = [activation.stored(each.weight) for each in modules]
        for share in params.shares:
            y = x * (uniform[len(x)] >= share)
            calls[f"{name} {share}"] = partial(_each, activation.sparse_product, [(y, each) for each in rows])
    with torch.inference_mode():
        timings = speed.interleaved(calls, repeats=params.time_repeats)
    times = {name: np.array(timing.values) for name, timing in timings.items()}
    table = []
    for part, names in {ALL: list(groups), **({DOWN: [DOWN]} if DOWN in groups else {})}.items():
        dense = np.sum([times[name] for name in names], 0)
        for share in params.shares:
            sparse = np.sum([times[f"{name} {share}"] for name in names], 0)
            whole = np.maximum(times["token"] - dense, 0) + sparse
            table.append(
                {
                    "part": part, "share": share, "dtype": str(dtype).removeprefix("torch."),
                    "part_of_token": float(np.median(dense) / np.median(times["token"])),
                    **speed_up(dense.tolist(), sparse.tolist()).columns("product"),
                    **speed_up(times["token"].tolist(), whole.tolist()).columns("token"),
                    "repeats": len(whole),
                }
            )  # fmt: skip
    result = pd.DataFrame(table, columns=columns)
    study.recorder.table("decoding", result)
    return result


def _rest(share: float) -> float:
    return round(1 - share, 6)


def _each(product: Callable[..., object], arguments: list[tuple[Tensor, Tensor]]) -> None:
    for each in arguments:
        product(*each)


def _endings(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _one_token(model: Any) -> Callable[[], object]:
    """A call that computes one token after a short text, with keys and values kept."""
    import torch

    ids = torch.arange(_CONTEXT)[None] + 3

    with torch.inference_mode():
        kept = model(input_ids=ids, use_cache=True).past_key_values

    def call() -> object:
        with torch.inference_mode():
            out = model(input_ids=ids[:, :1], past_key_values=kept, use_cache=True)
            kept.crop(-1)
        return out

    return call
