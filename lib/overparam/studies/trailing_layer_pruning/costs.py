"""What a depth costs: parameters, bytes, latency, throughput, memory and energy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import depth
from overparam.experiment.study import step
from overparam.measure import disk, energy, memory, speed
from overparam.record import stats
from overparam.studies.trailing_layer_pruning.study import Study
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESAMPLES = 2000
_STEP = "overparam.studies.trailing_layer_pruning.encoding:encode_saved"


@step
def costs(study: Study, depths: Sequence[int]) -> tuple[pd.DataFrame, stats.Estimate]:
    """Measure each depth in `depths`, the unpruned model among them.

    Depths take turns while they are timed, so that a drift of the machine meets all alike. Peak memory is that of
    encoding in a fresh process, loading excluded.

    Returns:
        A row a depth, and the slope of relative encoding time over relative depth (1: proportional).
    """
    params = study.params
    texts = [t.query for t in study.triplets(max(params.cost_texts, 4), seed=params.seed)][
        : params.cost_texts
    ]
    tokens = sum(
        len(ids) for ids in study.tokenizer(texts, truncation=True, max_length=study.max_length)["input_ids"]
    )
    pruned = {keep: depth.truncated(study.model, keep) for keep in depths}
    batch = speed.interleaved(
        {str(keep): _encoding(study, model, texts) for keep, model in pruned.items()},
        repeats=params.cost_repeats,
    )
    single = speed.interleaved(
        {str(keep): _encoding(study, model, texts[:1]) for keep, model in pruned.items()},
        repeats=params.cost_repeats,
    )
    saved: list[int] = []
    jobs = progress.track(_memory_jobs(study, pruned, texts, saved), "measuring memory", total=len(pruned))
    peaks = list(memory.peak_memories(_STEP, jobs))
    rows, raw = [], []
    for (keep, model), peak, weights in zip(
        progress.track(pruned.items(), "measuring energy"), peaks, saved, strict=True
    ):
        counts = models.count_parameters(model)
        with energy.energy() as used:
            for _ in range(params.cost_repeats):
                _encoding(study, model, texts)()
        here = batch[str(keep)]
        rows.append(
            {
                "depth": keep,
                "parameters": counts.total,
                "embedding_parameters": counts.embedding,
                "block_parameters": counts.block,
                "disk_bytes": weights,
                "batch_seconds": here.median,
                "batch_seconds_low": here.low,
                "batch_seconds_high": here.high,
                "tokens_per_second": tokens / here.median,
                "single_seconds": single[str(keep)].median,
                "peak_bytes": peak.peak_bytes,
                "kwh_per_million_tokens": used.kwh / (params.cost_repeats * tokens) * 1e6,
                "energy_method": used.method,
            }
        )
        raw += [
            {"depth": keep, "texts": len(texts) if timing is here else 1, "seconds": seconds}
            for timing in (here, single[str(keep)])
            for seconds in timing.values
        ]
    table = pd.DataFrame(rows)
    study.recorder.table("costs", table)
    study.recorder.table("latencies", pd.DataFrame(raw))
    slope = proportionality({keep: batch[str(keep)].values for keep in depths})
    study.recorder.metric("cost_slope", slope)
    return table, slope


def proportionality(seconds: dict[int, Sequence[float]]) -> stats.Estimate:
    """Slope of relative time over relative depth, by least squares, with a percentile bootstrap over repeats.

    Args:
        seconds: {depth: raw times}; times are divided by the deepest one's median.
    """
    depths = np.array(sorted(seconds), dtype=float)
    relative = depths / depths.max()
    generator = np.random.default_rng(0)

    def slope(medians: NDArray[np.float64]) -> NDArray[np.float64]:  # [..., depths] -> [...]
        ratio = medians / medians[..., -1:]
        centred = relative - relative.mean()
        return np.asarray((ratio * centred).sum(-1) / (centred**2).sum())

    columns = [np.asarray(seconds[int(keep)]) for keep in depths]
    draws = [
        np.median(generator.choice(column, size=(_RESAMPLES, len(column))), axis=1) for column in columns
    ]
    low, high = np.percentile(slope(np.stack(draws, axis=-1)), [2.5, 97.5])
    point = slope(np.array([np.median(column) for column in columns]))
    return stats.Estimate(float(point), float(low), float(high), sum(len(column) for column in columns))


def _memory_jobs(
    study: Study, pruned: dict[int, PreTrainedModel], texts: list[str], saved: list[int]
) -> Iterator[dict[str, Any]]:
    """Save one model after the other and ask for its peak memory; bytes of the weights go to `saved`."""
    for model in pruned.values():
        with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
            depth.save(model, study.tokenizer, folder)
            files = (Path(folder) / "config.json", *Path(folder).glob("model*"))  # without the tokenizer
            saved.append(sum(disk.disk_bytes(file) for file in files))
            yield {
                "folder": folder,
                "texts": texts,
                "dtype": str(model.dtype).removeprefix("torch."),
                "batch_tokens": study.params.batch_tokens,
                "max_length": study.max_length,
            }


def _encoding(study: Study, model: PreTrainedModel, texts: list[str]) -> Callable[[], None]:
    from overparam.studies.trailing_layer_pruning.encoding import encode

    params = study.params
    return lambda: encode(model, study.tokenizer, texts, params.batch_tokens, study.max_length)
