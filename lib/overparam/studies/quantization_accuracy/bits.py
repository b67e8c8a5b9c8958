"""Quality by bits, simulated; which parts suffer most; and bits that are spent where they matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from overparam import models
from overparam.compress import quantize
from overparam.experiment import sweep
from overparam.experiment.study import step
from overparam.experiment.subjects.base import System
from overparam.experiment.subjects.decoder import Decoder
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import Study
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = "embedding tables"


@dataclass(frozen=True)
class Curve:
    """Quality by bits.

    Attributes:
        table: One row a number of bits, uniform, and one a mixed setting: bytes and what is kept, in percent.
        mixed: What a mixed setting keeps less what uniform bits of at least its size keep, in points of percent, by
            those bits.
    """

    table: pd.DataFrame
    mixed: dict[int, stats.Estimate]


def parts(model: PreTrainedModel) -> dict[str, list[str]]:
    """The matrices of a model by part: embedding tables, and attention and feed-forward of every block."""
    layers = models.blocks(model.base_model).layers
    path = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, list[str]] = {}
    for name in quantize.matrices(model):
        inside = name.startswith(f"{path}.")
        if inside:
            number, rest = name.removeprefix(f"{path}.").split(".", 1)
            # BERT's attention has its own "output.dense", its feed-forward "intermediate" and "output"
            kind = "attention" if "attn" in rest or rest.startswith("attention") else "feed-forward"
            part = f"block {int(number) + 1}, {kind}"
        elif "embed" in name or name.startswith("wte"):
            part = EMBEDDINGS
        else:
            part = "other"
        found.setdefault(part, []).append(name)
    return found


@step
def sensitivity(study: Study) -> pd.DataFrame:
    """Round one part at a time, at every number of bits, and measure how far the model's outputs move.

    `divergence` is, of an encoder, 1 − cosine to the embeddings of full precision; of a decoder, the divergence of
    the next token in nats. `outlier` is the part's largest weight over its root mean square.
    """
    from overparam.compress.quantize import rounding

    model, params = study.model, study.params
    named = parts(model)
    texts = study.train_texts[-params.probe_texts :]
    run = study.plain(model)
    base = study.subject.outputs(run, texts)
    weights = quantize.matrices(model)
    size = {bits: rounding.sizes(model, bits, group_size=params.group_size) for bits in params.bits}
    outliers = {part: max(quantize.outliers(model, names).values()) for part, names in named.items()}
    rows = []
    jobs = [(part, bits) for part in named for bits in sorted(params.bits)]
    for part, bits in progress.track(jobs, "one part at a time"):
        with quantize.rounded(model, dict.fromkeys(named[part], bits), group_size=params.group_size):
            moved = study.subject.divergence(base, study.subject.outputs(run, texts))
        rows.append(
            {
                "part": part,
                "bits": bits,
                "parameters": sum(weights[name].numel() for name in named[part]),
                "size_bits": sum(size[bits][name] for name in named[part]),
                **stats.bootstrap(moved, n_resamples=CURVE_RESAMPLES).columns("divergence"),
                "outlier": outliers[part],
            }
        )
    table = pd.DataFrame(rows)
    study.recorder.table("sensitivity", table)
    return table


def allocated(table: pd.DataFrame, bits: int) -> dict[str, int]:
    """Bits by part that take no more room than uniform `bits`, by the divergences of `sensitivity`."""

    def by_part(column: str) -> dict[str, dict[int, float]]:
        return {
            str(part): {int(b): each for b, each in zip(rows["bits"], rows[column], strict=True)}
            for part, rows in table.groupby("part", sort=False)
        }

    size = {part: {b: int(each) for b, each in found.items()} for part, found in by_part("size_bits").items()}
    budget = sum(found[bits] for found in size.values())
    return quantize.allocate_bits(by_part("divergence"), size, budget)


@step
def curve(study: Study, sensitive: pd.DataFrame) -> Curve:
    """Measure quality at every number of bits, and of mixed settings of the same size."""
    params, model = study.params, study.model
    named = parts(model)
    settings: dict[str, tuple[int, dict[str, int]]] = {}
    for bits in params.bits:
        settings[f"{bits} bits"] = (bits, dict.fromkeys(quantize.matrices(model), bits))
    chosen = {bits: allocated(sensitive, bits) for bits in params.mixed_bits}
    for bits, by_part in chosen.items():
        settings[f"mixed, size of {bits} bits"] = (
            bits, {name: its for part, its in by_part.items() for name in named[part]}
        )  # fmt: skip
    kept, gains = _kept(
        study,
        {label: by_name for label, (_, by_name) in settings.items()},
        [(f"mixed, size of {b} bits", f"{b} bits") for b in params.mixed_bits],
    )
    rows = [
        {
            "setting": label,
            "bits": bits,
            "mixed": label.startswith("mixed"),
            "bytes": quantize.stored_bytes(model, by_name, group_size=params.group_size),
            **kept[label].columns("kept"),
        }
        for label, (bits, by_name) in settings.items()
    ]
    table = pd.DataFrame(rows)
    study.recorder.table("bits", table)
    study.recorder.table(
        "mixed_bits", pd.DataFrame([{"size_of": b, **by_part} for b, by_part in chosen.items()])
    )
    for label, each in kept.items():
        study.recorder.metric(
            f"simulated_{label.replace(', ', '_').replace(' ', '_')}", each, "% of full precision"
        )
    return Curve(table, dict(zip(params.mixed_bits, gains, strict=True)))


def _kept(
    study: Study, settings: Mapping[str, Mapping[str, int]], pairs: list[tuple[str, str]]
) -> tuple[dict[str, stats.Estimate], list[stats.Estimate]]:
    """What settings, bits by matrix, keep of the quality, and what the first of each pair keeps more than the other."""
    subject, run = study.subject, study.plain(study.model)
    known = study.decoder  # whose items in full precision `quality` has kept, of other texts apart
    if isinstance(subject, Decoder):
        subject = subject.joined()

    @contextmanager
    def rounded(by_name: Mapping[str, int]) -> Iterator[object]:
        with quantize.rounded(study.model, by_name, group_size=study.params.group_size):
            yield run

    systems = [System.ready("simulated: none", run)]
    systems += [
        System("simulated: " * known + label, partial(rounded, by_name))
        for label, by_name in settings.items()
    ]
    base, *others = every = subject.score(systems)
    sweep.keep(study, subject, systems[known:], every[known:])
    scores = dict(zip(settings, others, strict=True))
    kept = {label: subject.kept([base], [each]) for label, each in scores.items()}
    return kept, [subject.gained([base], [scores[before]], [scores[after]]) for after, before in pairs]
