"""The figures of the study, each saved with its points."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from overparam.compress import quantize
from overparam.experiment import charts
from overparam.experiment.charts import BLUE, GREEN, ORANGE, Look
from overparam.record import figures
from overparam.studies.quantization_accuracy.bits import EMBEDDINGS, Curve
from overparam.studies.quantization_accuracy.costs import names_of_calls
from overparam.studies.quantization_accuracy.quality import Quality
from overparam.studies.quantization_accuracy.study import Study
from overparam.studies.quantization_accuracy.training import AFTER, FULL, TRAINED, QualityByBits

_NOTHING = 1e-6  # smaller changes of the outputs are rounding errors of the arithmetic itself
_LIBRARIES = charts.looks(("torch", "torchao", "openvino", "bitsandbytes"), line="")


def plot_front(study: Study, quality: Quality, costs: pd.DataFrame) -> Any:
    """Draw the quality that schemes keep against their bytes, with the Pareto front."""
    megabytes = costs.set_index("scheme")["disk_bytes"] / 1e6
    whole = {"kept": 100.0, "kept_low": 100.0, "kept_high": 100.0}
    kept = {quantize.BASELINE: whole} | {name: each.columns("kept") for name, each in quality.kept.items()}
    data = pd.DataFrame(
        {
            "scheme": name,
            "library": quantize.SCHEMES[name].library,
            "disk_megabytes": megabytes[name],
            **columns,
        }
        for name, columns in kept.items()
    )
    data["on_front"] = charts.on_front(data["disk_megabytes"], data["kept"])
    data = data.sort_values("disk_megabytes", ignore_index=True)
    caption = (
        f"Quality that {study.params.model} keeps against the bytes of its saved weights: {_quality(study)}. "
        "Paired 95 % bootstrap interval. Schemes of nearly the same size are drawn side by side. "
        "Dotted: schemes that no other beats in both (Pareto front). Dashed: the "
        "maximum loss claimed for 8 bits."
    )
    with charts.figure(study, "fig:quantization-front", data, caption=caption, legend=4, height=1) as axes:
        charts.front(axes, data, "disk_megabytes", "kept", "on_front")
        _margin(axes, study)
        largest = float(data["disk_megabytes"].max())
        near = (data["disk_megabytes"].diff() > 0.03 * largest).cumsum()
        beside = near.groupby(near).cumcount() - (near.groupby(near).transform("size") - 1) / 2
        drawn = data.assign(apart=data["disk_megabytes"] + 0.02 * largest * beside)
        charts.curves(axes, drawn, "apart", "kept", by="library", look=_LIBRARIES)
        axes.set(xlim=(0, None), xlabel="saved weights (MB)", ylabel="quality kept (%)")
        colours = drawn["library"].map({name: look.colour for name, look in _LIBRARIES.items()})
        charts.label_points(axes, drawn, "apart", "kept", "scheme", list(colours))
    return axes.figure


def plot_bits(study: Study, curve: Curve) -> Any:
    """Draw quality by bits of simulated rounding, uniform and mixed."""
    data = curve.table.sort_values(["mixed", "bits"], ignore_index=True)
    caption = (
        f"Quality that {study.params.model} keeps by the bits of its weights, all matrices and embedding tables "
        f"rounded in groups of {study.params.group_size} (simulated: accuracy only): "
        f"{_quality(study)}. Mixed bits go to the parts that rounding harms most, at the same total size. "
        "Paired 95 % bootstrap interval. Arrows: values below the axis."
    )
    look = {
        False: Look(BLUE, "o", label="the same bits everywhere"),
        True: Look(ORANGE, "D", "", label="mixed bits of the same size"),
    }
    with charts.figure(study, "fig:quantization-bits", data, caption=caption, legend=2) as axes:
        charts.curves(axes, data, "bits", "kept", by="mixed", look=look)
        _margin(axes, study)
        axes.set_xticks(sorted(set(data["bits"])))
        bottom = max(0.0, float(data["kept_low"].min()) - 3)
        axes.set_ylim(bottom, max(100.0, float(data["kept_high"].max())) + 3)
        axes.set(xlabel="bits per weight", ylabel="quality kept (%)")
        for row in data[data["kept"] < bottom].itertuples():
            label = f"↓ {row.kept:.0f}".replace("-", "−")
            place = (row.bits, bottom)
            axes.annotate(label, place, xytext=(0, 3), textcoords="offset points", fontsize=6, ha="center")
    return axes.figure


def plot_sensitivity(study: Study, table: pd.DataFrame) -> Any:
    """Draw how much the outputs change when one part alone is rounded."""
    bits = min(study.params.mixed_bits)
    data = table[(table["bits"] == bits) & (table["divergence"] > _NOTHING)]
    caption = (
        f"Left: how much the outputs of {study.params.model} change when one part alone is rounded to {bits} bits "
        f"({_kind(study, '1 − cosine to the embedding in full precision', 'divergence of the next token')}, "
        f"mean over {study.params.probe_texts} texts, 95 % bootstrap interval). Right: the part's largest weight "
        "over the root mean square of its weights. Blue: attention; orange: feed-forward; green: embedding tables. "
        "Parts that the outputs do not depend on are left out."
    )
    kind = data["part"].where(data["part"] == EMBEDDINGS, data["part"].str.split().str[-1])
    drawn, order = data.assign(kind=kind), list(data["part"])
    colours = {"attention": BLUE, EMBEDDINGS: GREEN, "feed-forward": ORANGE}
    with charts.figure(
        study,
        "fig:quantization-sensitivity",
        data,
        caption=caption,
        height=max(0.7, 0.055 * len(data)),
        ncols=2,
        sharey=True,
        width_ratios=[2, 1],
    ) as (left, right):
        for axes, column, marker in ((left, "divergence", "o"), (right, "outlier", "s")):
            look = {name: Look(colour, marker) for name, colour in colours.items()}
            charts.dots(axes, drawn, "part", column, by="kind", look=look, order=order)
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlabel(_kind(study, "1 − cosine", "divergence (nats)"))
        right.set(xlabel="largest / rms", xlim=(0, None))
    return left.figure


def plot_speed(study: Study, costs: pd.DataFrame) -> Any:
    """Draw each scheme's speed relative to fp32 eager, for small and large calls."""
    data = costs[["scheme", *(name for name in map(str, costs.columns) if "speed_up" in name)]]
    calls = names_of_calls(study)
    caption = (
        f"Speed of {study.params.model} under each scheme relative to fp32 eager, for {calls['single']} and for "
        f"{_kind(study, '', 'a ')}{calls['batch']}; "
        f"{study.params.cost_repeats} interleaved rounds, 95 % bootstrap interval."
    )
    parts = []
    for call, label in calls.items():
        columns = {f"{call}_speed_up{end}": f"speed_up{end}" for end in ("", "_low", "_high")}
        parts.append(data[["scheme", *columns]].rename(columns=columns).assign(call=label))
    with charts.figure(study, "fig:quantization-speed", data, caption=caption, legend=2, height=0.9) as axes:
        charts.reference(axes, 1, upright=True)
        charts.dots(axes, pd.concat(parts), "scheme", "speed_up", by="call", spread=0.24)
        axes.set(xlim=(0, None), xlabel="times the speed of fp32 eager")
    return axes.figure


def plot_training(study: Study, trained: QualityByBits) -> Any:
    """Draw accuracy or perplexity by bits, rounded after training or trained with rounding, and flipped answers.

    None if nothing was trained.
    """
    data = trained.table
    if data.empty:
        return None
    measure = _kind(study, "accuracy", "perplexity")
    answers = _kind(study, "answers", "most likely next tokens")
    tasks = list(dict.fromkeys(data["task"]))
    taught = _kind(study, f"on {', '.join(tasks)}", "with verses and articles")
    caption = (
        f"{study.params.model} fine-tuned {taught}: rounded after training, or trained with rounding "
        f"for as many steps. Top: {measure} (dashed: full precision), 95 % bootstrap interval over texts and "
        f"{len(study.params.train_seeds)} seed(s). Bottom: {answers} that differ from full "
        "precision's, right or wrong."
    )
    look = {
        (task, way): Look(colour, marker, label=f"{task}, {way}")
        for task, marker in zip(tasks, figures.MARKERS, strict=False)
        for way, colour in ((AFTER, ORANGE), (TRAINED, BLUE))
    }
    shifted = data.assign(shifted=data["bits"] + data["way"].map({AFTER: -0.05, TRAINED: 0.05})).sort_values(
        "bits"
    )
    with charts.figure(
        study, "fig:quantization-training", data, caption=caption, legend=1, height=1.2, nrows=2, sharex=True
    ) as (top, bottom):
        for value in data.loc[data["way"] == FULL, measure]:
            charts.reference(top, value)
        charts.curves(top, shifted, "shifted", measure, by=["task", "way"], look=look)
        charts.curves(bottom, shifted, "shifted", "flipped", by=["task", "way"], look=look)
        top.set_ylabel(_kind(study, "accuracy (%)", "perplexity"))
        bottom.set_xticks(sorted({bits for bits in data["bits"] if bits < 32}))
        bottom.set(ylim=(0, None), xlabel="bits of the weights of linear layers")
        bottom.set_ylabel(_kind(study, "flipped answers (%)", "other tokens (%)"))
    return top.figure


def plot_views(study: Study, quality: Quality) -> Any:
    """Draw the perplexity in percent of full precision, by language and by length of the context.

    None of an encoder, which has none.
    """
    if not quality.read:
        return None
    data = quality.table[quality.table["perplexity"].notna() & (quality.table["scheme"] != quantize.BASELINE)]
    data = data[["scheme", "view", "of_fp32", "of_fp32_low", "of_fp32_high"]]
    caption = (
        f"Perplexity of {study.params.model} under each scheme in percent of full precision: on the same verses in "
        "several languages, on news, and on the last tokens of running text after contexts of several lengths. "
        "Paired 95 % bootstrap interval over texts, or over tokens after a context."
    )
    with charts.figure(study, "fig:quantization-views", data, caption=caption, legend=2, height=1.3) as axes:
        charts.reference(axes, 100, upright=True)
        charts.dots(axes, data, "view", "of_fp32", by="scheme", spread=0.07, markersize=2.5, linewidth=0.8)
        axes.set_xlabel("perplexity (% of fp32)")
    return axes.figure


def _kind(study: Study, encoder: str, decoder: str) -> str:
    """Choose the words for the kind of model."""
    return decoder if study.decoder else encoder


def _quality(study: Study) -> str:
    tasks = f"mean score of {len(study.params.suite)} embedding tasks"
    return _kind(study, tasks, "100 − increase in perplexity (%)")


def _margin(axes: Any, study: Study) -> None:
    margin = study.params.modest_margin
    charts.reference(axes, 100 - margin, f"−{margin:g} %")
