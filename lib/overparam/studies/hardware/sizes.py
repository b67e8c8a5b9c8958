"""The steps about shapes: what alignment is worth, and what models of a published size cost, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd

from overparam import models
from overparam.experiment.study import step
from overparam.measure import roofline, tune
from overparam.models import published_shapes
from overparam.studies.hardware.study import Study
from overparam.support import progress


@step
def alignment(study: Study) -> pd.DataFrame:
    """Time layers of aligned and odd widths, and output layers of an odd and a padded vocabulary, in turns.

    Returns:
        A row a `layer` ("width" or "vocabulary"), dtype and size: `speed`, operations a second in percent of the
        aligned one's, with its interval; `status`, empty or why it was not measured.
    """
    import torch

    params = study.params
    rows: list[dict[str, Any]] = []
    for dtype in params.shape_dtypes:
        if dtype == "bfloat16" and not models.bf16_is_fast():
            rows.append(
                {"layer": "width", "dtype": dtype, "status": "emulated on this processor: not measured"}
            )
            continue
        for layer, sizes, base in (
            ("width", params.widths, params.aligned_width),
            ("vocabulary", params.vocabularies, params.vocabularies[-1]),
        ):
            cells = {
                str(size): _product(
                    layer, size, params.aligned_width, params.shape_rows, getattr(torch, dtype)
                )
                for size in sizes
            }
            with roofline.threads(study.threads[-1]), torch.inference_mode():
                found = tune.paired(cells, str(base), rounds=params.shape_rounds, seed=params.seed)
            ratio: Any = found.table.set_index("cell")
            for size in sizes:
                work = (size / base) ** (2 if layer == "width" else 1)
                speed = {name.replace("ratio", "speed"): 100 * work * ratio.loc[str(size), name]
                         for name in ("ratio", "ratio_low", "ratio_high")}  # fmt: skip
                rows.append({"layer": layer, "dtype": dtype, "size": size, **speed, "rounds": params.shape_rounds,
                             "status": ""})  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("alignment", table)
    return table


def _product(layer: str, size: int, width: int, rows: int, dtype: Any) -> Callable[[], object]:
    import torch

    inner = size if layer == "width" else width
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(size, inner).to(dtype)
    return lambda: torch.nn.functional.linear(x, weight)


@step
def sizes(study: Study) -> pd.DataFrame:
    """Measure models of a published size: time and memory by layers kept, memory by experts, speed by bits.

    The models that were loaded before are freed first.

    Returns:
        A row a shape and measurement, `what`: "time by layers" (`kept` of `whole`; `share` of the full time in percent;
        with kept = whole, the time itself), "slope" of relative time over relative depth, "memory by layers" and
        "memory by experts" (`share` of the full model's resident bytes, `expected`, that of its parameters), "prompt"
        and "token" (`share`: how many times as fast as 16 bits; `kept`: bits; `expected`: how many times fewer bytes a
        token reads). `status`: empty, or why it was not measured, with the memory that it needs.
    """
    from overparam.models import shape_costs, shapes

    study.release()
    params, rows = study.params, []
    time_dtype = models.working_dtype("auto")
    with roofline.threads(study.threads[-1]):
        for name in progress.track(params.shapes_by_layers, "published sizes, by layers"):
            kept = shape_costs.kept_layers(name, params.layer_shares)
            rows += _guarded(study, name, "time by layers", partial(_time, study, name, kept, time_dtype))
            rows += _guarded(study, name, "memory by layers", partial(_memory, name, kept, "layers"))
        for name in progress.track(params.shapes_by_experts, "published sizes, by experts"):
            whole = shapes.experts_of(name)
            kept = sorted({*(max(1, round(share * whole)) for share in params.expert_shares), whole})
            rows += _guarded(study, name, "memory by experts", partial(_memory, name, kept, "experts"))
        for name in progress.track(params.shapes_by_bits, "published sizes, by bits"):
            rows += _guarded(study, name, "prompt", partial(_bits, study, name))
    rows += list(_not_asked(study, time_dtype))
    columns = ["shape", "what", "dtype", "kept", "whole", "parameters", "megabytes", "seconds", "share", "share_low",
               "share_high", "expected", "rounds", "status"]  # fmt: skip
    table = pd.DataFrame(rows).reindex(columns=columns).fillna({"status": ""})
    study.recorder.table("sizes", table)
    return table


def _guarded(study: Study, name: str, what: str, measure: Callable[[], Any]) -> list[dict[str, Any]]:
    """Rows of a measurement, or one that says how much memory is missing; afterwards its memory is free again."""
    try:
        return [{"shape": name, **row} for row in measure()]
    except (MemoryError, ValueError) as error:
        return [{"shape": name, "what": what, "status": str(error).removeprefix(f"{name} ")}]
    finally:
        study.release()


def _time(study: Study, name: str, kept: list[int], dtype: Any) -> Iterator[dict[str, Any]]:
    from overparam.models import shape_costs

    params = study.params
    found = shape_costs.time_by_layers(
        name, kept, dtype=dtype, tokens=params.size_tokens, repeats=params.size_rounds
    )
    yield from shape_costs.time_rows(
        found, published_shapes.shape(name).published_layers, str(dtype), params.seed
    )


def _memory(name: str, kept: list[int], by: str) -> Iterator[dict[str, Any]]:
    import torch

    from overparam.models import shape_costs

    found = shape_costs.resident(name, kept, by=by, dtype=torch.bfloat16, causal=by == "experts")
    yield from shape_costs.memory_rows(found, by, "bfloat16")


def _bits(study: Study, name: str) -> Iterator[dict[str, Any]]:
    from overparam.models import shape_costs

    params = study.params
    found = shape_costs.speed_by_bits(
        name, params.bits, prompt=params.size_tokens, repeats=params.size_rounds
    )
    yield from shape_costs.bits_rows(found, params.seed)


def _not_asked(study: Study, dtype: Any) -> Iterator[dict[str, Any]]:
    """Published sizes that this run does not measure, with the memory that they need."""
    from overparam.models import shapes

    params = study.params
    asked = {*params.shapes_by_layers, *params.shapes_by_experts, *params.shapes_by_bits}
    for name, shape in published_shapes.SHAPES.items():
        if name in asked:
            continue
        needed = shapes.ROOM * dtype.itemsize * 1e9 * shape.billions
        yield {
            "shape": name, "what": "not run", "dtype": str(dtype).removeprefix("torch."),
            "parameters": 1e9 * shape.billions, "megabytes": needed / 1e6,
            "status": f"not measured in this run: needs {needed / 2**30:.1f} GiB",
        }  # fmt: skip
