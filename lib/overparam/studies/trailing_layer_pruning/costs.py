"""What a depth costs: parameters, bytes, latency, throughput, memory and energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import depth
from overparam.experiment import costs as measuring
from overparam.experiment.study import step
from overparam.measure import disk, memory
from overparam.record import stats
from overparam.studies.trailing_layer_pruning.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESAMPLES = 2000
_STEP = "overparam.studies.trailing_layer_pruning.encoding:encode_saved"


@step
def costs(study: Study, depths: Sequence[int]) -> tuple[pd.DataFrame, stats.Estimate]:
    """Measure each depth in `depths`, the unpruned model among them.

    Peak memory is that of encoding in a fresh process, loading excluded.

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

    def save(model: PreTrainedModel, folder: Path) -> tuple[int, dict[str, Any]]:
        depth.save(model, study.tokenizer, folder)
        files = (folder / "config.json", *folder.glob("model*"))  # without the tokenizer
        return sum(disk.disk_bytes(file) for file in files), {
            "folder": str(folder),
            "texts": texts,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_tokens": params.batch_tokens,
            "max_length": study.max_length,
        }

    sizes = measuring.sizes(pruned, save, _STEP, memory.peak_memories)
    own = {}
    for keep, model in pruned.items():
        counts, (weights, peak) = models.count_parameters(model), sizes[keep]
        own[keep] = {
            "parameters": counts.total,
            "embedding_parameters": counts.embedding,
            "block_parameters": counts.block,
            "disk_bytes": weights,
            "peak_bytes": peak.peak_bytes,
        }
    found = measuring.measure(
        "depth",
        own,
        {
            name: measuring.Step(
                {keep: _encoding(study, model, some) for keep, model in pruned.items()}, len(some)
            )
            for name, some in (("batch", texts), ("single", texts[:1]))
        },
        repeats=params.cost_repeats,
        energy_step="batch",
        energy_repeats=params.cost_repeats,
        unit="tokens",
        units=tokens,
    )
    table = found.table.assign(tokens_per_second=tokens / found.table["batch_seconds"])
    study.recorder.table("costs", table)
    study.recorder.table("latencies", found.latencies)
    slope = proportionality({keep: timing.values for keep, timing in found.timings["batch"].items()})
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


def _encoding(study: Study, model: PreTrainedModel, texts: list[str]) -> Callable[[], None]:
    from overparam.studies.trailing_layer_pruning.encoding import encode

    params = study.params
    return lambda: encode(model, study.tokenizer, texts, params.batch_tokens, study.max_length)
