"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from overparam.compress import quantize
from overparam.record import figures
from overparam.studies.quantization_accuracy.bits import EMBEDDINGS, Curve
from overparam.studies.quantization_accuracy.costs import names_of_calls
from overparam.studies.quantization_accuracy.quality import Quality
from overparam.studies.quantization_accuracy.study import Study
from overparam.studies.quantization_accuracy.training import AFTER, FULL, TRAINED, Trained

GREY = "#777777"
_NOTHING = 1e-6  # moves of the outputs that are rounding errors of the arithmetic itself
_LIBRARIES = ("torch", "torchao", "openvino", "bitsandbytes")


def plot_front(study: Study, quality: Quality, costs: pd.DataFrame) -> Any:
    """Draw what schemes keep against the bytes that they take, and which of them nothing beats in both."""
    rows = [
        {
            "scheme": name,
            "library": quantize.SCHEMES[name].library,
            "disk_megabytes": size / 1e6,
            **kept.columns("kept"),
        }
        for name, kept in quality.kept.items()
        for size in [float(costs.loc[costs["scheme"] == name, "disk_bytes"].iloc[0])]
    ]
    whole = float(costs.loc[costs["scheme"] == quantize.BASELINE, "disk_bytes"].iloc[0])
    first = {"scheme": quantize.BASELINE, "library": "torch", "disk_megabytes": whole / 1e6}
    data = pd.DataFrame([first | {"kept": 100.0, "kept_low": 100.0, "kept_high": 100.0}, *rows])
    bytes_, kept_ = data["disk_megabytes"], data["kept"]
    data["on_front"] = [
        not (((bytes_ <= size) & (kept_ > share)) | ((bytes_ < size) & (kept_ >= share))).any()
        for size, share in zip(bytes_, kept_, strict=True)
    ]
    data = data.sort_values("disk_megabytes", ignore_index=True)
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, figures.WIDTH))
        front = data[data["on_front"]]
        axes.step(
            front["disk_megabytes"],
            front["kept"],
            where="post",
            color=GREY,
            marker="",
            linewidth=0.8,
            linestyle=":",
        )
        _margin(
            axes,
            100 - study.params.modest_margin,
            f"−{study.params.modest_margin:g} %",
            float(data["disk_megabytes"].max()),
        )
        near = (data["disk_megabytes"].diff() > 0.03 * data["disk_megabytes"].max()).cumsum()
        beside = near.groupby(near).cumcount() - (near.groupby(near).transform("size") - 1) / 2
        apart = data["disk_megabytes"] + 0.02 * data["disk_megabytes"].max() * beside
        for number, scheme in enumerate(data["scheme"]):
            row = data[data["scheme"] == scheme]
            axes.errorbar(
                apart[row.index], row["kept"], yerr=figures.error_bars(row, "kept"), label=scheme, linestyle="",
                color=figures.OKABE_ITO[_LIBRARIES.index(quantize.SCHEMES[scheme].library)],
                marker=figures.MARKERS[number % 8], fillstyle="full" if number < 8 else "none",
            )  # fmt: skip
        figure.legend(loc="outside upper center", ncols=2, fontsize=6)
        axes.set_xlabel("saved weights (MB)")
        axes.set_ylabel("quality kept (%)")
        axes.set_xlim(left=0)
        caption = (
            f"Quality that {study.params.model} keeps against the bytes of its saved weights: {_what(study)}. "
            "Paired 95 % bootstrap interval. Schemes of nearly the same size are drawn side by side. "
            "Dotted: schemes that no other beats in both (Pareto front). Dashed: the "
            "loss that 8 bits are said to stay within."
        )
        return figures.publish(
            figure, "fig:quantization-front", data=data, caption=caption, recorder=study.recorder
        )


def plot_bits(study: Study, curve: Curve) -> Any:
    """Draw quality by bits of simulated rounding, uniform and mixed."""
    data = curve.table.sort_values(["mixed", "bits"], ignore_index=True)
    with figures.style():
        figure, axes = plt.subplots()
        for mixed, label, colour, marker in (
            (False, "the same bits everywhere", figures.OKABE_ITO[0], "o"),
            (True, "mixed bits of the same size", figures.OKABE_ITO[1], "D"),
        ):
            rows = data[data["mixed"] == mixed]
            axes.errorbar(rows["bits"], rows["kept"], yerr=figures.error_bars(rows, "kept"), color=colour,
                          marker=marker, linestyle="" if mixed else "-", label=label)  # fmt: skip
        _margin(
            axes,
            100 - study.params.modest_margin,
            f"−{study.params.modest_margin:g} %",
            float(data["bits"].max()),
        )
        axes.set_xticks(sorted(set(data["bits"])))
        axes.set_xlabel("bits of a weight")
        axes.set_ylabel("quality kept (%)")
        bottom = max(0.0, float(data["kept_low"].min()) - 3)
        axes.set_ylim(bottom, max(100.0, float(data["kept_high"].max())) + 3)
        for row in data[data["kept"] < bottom].itertuples():
            label = f"↓ {row.kept:.0f}".replace("-", "−")
            place = (row.bits, bottom)
            axes.annotate(label, place, xytext=(0, 3), textcoords="offset points", fontsize=6, ha="center")
        figures.legend_above(figure)
        caption = (
            f"Quality that {study.params.model} keeps by the bits of its weights, all matrices and embedding tables "
            f"rounded in groups of {study.params.group_size} (simulated: accuracy only): "
            f"{_what(study)}. Mixed bits go to the parts that rounding harms most, and take no more room. "
            "Paired 95 % bootstrap interval. Arrows: values below the axis."
        )
        return figures.publish(
            figure, "fig:quantization-bits", data=data, caption=caption, recorder=study.recorder
        )


def plot_sensitivity(study: Study, table: pd.DataFrame) -> Any:
    """Draw how far the outputs move when one part is rounded alone."""
    bits = min(study.params.mixed_bits)
    data = table[(table["bits"] == bits) & (table["divergence"] > _NOTHING)]
    names = list(data["part"])
    with figures.style():
        height = max(0.7, 0.055 * len(names)) * figures.WIDTH
        figure, (left, right) = plt.subplots(
            1, 2, sharey=True, figsize=(figures.WIDTH, height), width_ratios=[2, 1]
        )
        places = np.arange(len(names))[::-1]
        colours = [_colour(name) for name in names]
        errors = figures.error_bars(data, "divergence")
        for colour in dict.fromkeys(colours):
            chosen = np.array([each == colour for each in colours])
            left.errorbar(data["divergence"][chosen], places[chosen], xerr=errors[:, chosen], color=colour, marker="o",
                          linestyle="")  # fmt: skip
            right.plot(data["outlier"][chosen], places[chosen], color=colour, marker="s", linestyle="")
        left.set_yticks(places, names, fontsize=5.5)
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlabel("divergence (nats)" if study.decoder else "1 − cosine")
        right.set_xlabel("largest / rms")
        right.set_xlim(left=0)
        caption = (
            f"Left: how far the outputs of {study.params.model} move when one part alone is rounded to {bits} bits "
            f"({'divergence of the next token' if study.decoder else '1 − cosine to the embedding in full precision'}, "
            f"mean over {study.params.probe_texts} texts, 95 % bootstrap interval). Right: the part's largest weight "
            "over the root mean square of its weights. Blue: attention; orange: feed-forward; green: embedding tables. "
            "A part that the outputs do not depend on is left out."
        )
        return figures.publish(
            figure, "fig:quantization-sensitivity", data=data, caption=caption, recorder=study.recorder
        )


def plot_speed(study: Study, costs: pd.DataFrame) -> Any:
    """Draw how many times as fast as fp32 eager each scheme is, for small and large calls."""
    data = costs[["scheme", *(name for name in map(str, costs.columns) if "speed_up" in name)]]
    small, large = names_of_calls(study)
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, 0.9 * figures.WIDTH))
        places = np.arange(len(data))[::-1]
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
        for column, label, colour, marker, shift in (
            ("single_speed_up", small, figures.OKABE_ITO[0], "o", 0.12),
            ("batch_speed_up", large, figures.OKABE_ITO[1], "s", -0.12),
        ):
            errors = figures.error_bars(data, column)
            axes.errorbar(
                data[column],
                places + shift,
                xerr=errors,
                color=colour,
                marker=marker,
                linestyle="",
                label=label,
            )
        axes.set_yticks(places, data["scheme"], fontsize=6)
        axes.set_xlabel("times the speed of fp32 eager")
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper center", ncols=2, fontsize=6)
        caption = (
            f"Speed of {study.params.model} under each scheme over that of fp32 eager, for {small} and for "
            f"{'a ' if study.decoder else ''}{large}; "
            f"{study.params.cost_repeats} rounds in which schemes take turns, 95 % bootstrap interval."
        )
        return figures.publish(
            figure, "fig:quantization-speed", data=data, caption=caption, recorder=study.recorder
        )


def plot_training(study: Study, trained: Trained) -> Any:
    """Draw accuracy or perplexity by bits, rounded after training or trained with rounding, and what flipped.

    None where nothing was trained.
    """
    data = trained.table
    if data.empty:
        return None
    measure = "perplexity" if study.decoder else "accuracy"
    tasks = list(dict.fromkeys(data["task"]))
    with figures.style():
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(figures.WIDTH, 1.2 * figures.WIDTH))
        for number, task in enumerate(tasks):
            full = data[(data["task"] == task) & (data["way"] == FULL)].iloc[0]
            top.axhline(full[measure], color=GREY, linestyle="--", linewidth=0.8, marker="")
            for way, colour, shift in (
                (AFTER, figures.OKABE_ITO[1], -0.05),
                (TRAINED, figures.OKABE_ITO[0], 0.05),
            ):
                rows = data[(data["task"] == task) & (data["way"] == way)].sort_values("bits")
                errors = figures.error_bars(rows, measure)
                marker, label = figures.MARKERS[number], f"{task}, {way}"
                top.errorbar(
                    rows["bits"] + shift,
                    rows[measure],
                    yerr=errors,
                    color=colour,
                    marker=marker,
                    label=label,
                )
                bottom.plot(rows["bits"] + shift, rows["flipped"], color=colour, marker=marker)
        bottom.set_xticks(sorted({bits for bits in data["bits"] if bits < 32}))
        bottom.set_xlabel("bits of the weights of linear layers")
        top.set_ylabel(measure if study.decoder else "accuracy (%)")
        bottom.set_ylabel("other tokens (%)" if study.decoder else "flipped answers (%)")
        bottom.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=1, fontsize=6)
        taught = "with verses and articles" if study.decoder else f"on {', '.join(tasks)}"
        answers = "likeliest next tokens" if study.decoder else "answers"
        caption = (
            f"{study.params.model} fine-tuned {taught}: rounded after training, or trained with rounding "
            f"for as many steps. Top: {measure} (dashed: full precision), 95 % bootstrap interval over texts and "
            f"{len(study.params.train_seeds)} seed(s). Bottom: {answers} that differ from full "
            "precision's, right or wrong."
        )
        return figures.publish(
            figure, "fig:quantization-training", data=data, caption=caption, recorder=study.recorder
        )


def plot_views(study: Study, quality: Quality) -> Any:
    """Draw the perplexity of a decoder in percent of full precision, by language and by length of the context."""
    if not study.decoder:
        return None
    data = quality.table[quality.table["perplexity"].notna() & (quality.table["scheme"] != quantize.BASELINE)]
    data = data[["scheme", "view", "of_fp32", "of_fp32_low", "of_fp32_high"]]
    names = list(dict.fromkeys(data["view"]))
    schemes = list(dict.fromkeys(data["scheme"]))
    with figures.style():
        figure, axes = plt.subplots(figsize=(figures.WIDTH, 1.3 * figures.WIDTH))
        places = np.arange(len(names))[::-1]
        axes.axvline(100, color=GREY, linewidth=0.8, linestyle="--")
        for number, scheme in enumerate(schemes):
            rows = data[data["scheme"] == scheme].set_index("view").reindex(names)
            errors = figures.error_bars(rows, "of_fp32")
            axes.errorbar(
                rows["of_fp32"], places - 0.07 * (number - (len(schemes) - 1) / 2), xerr=errors,
                color=figures.OKABE_ITO[number % 8], marker=figures.MARKERS[number % 8], linestyle="", label=scheme,
                markersize=2.5, linewidth=0.8,
            )  # fmt: skip
        axes.set_yticks(places, names, fontsize=6)
        axes.set_xlabel("perplexity (% of fp32)")
        figure.legend(loc="outside upper center", ncols=2, fontsize=6)
        caption = (
            f"Perplexity of {study.params.model} under each scheme in percent of full precision: on the same verses in "
            "several languages, on news, and on the last tokens of running text after contexts of several lengths. "
            "Paired 95 % bootstrap interval over texts, or over tokens after a context."
        )
        return figures.publish(
            figure, "fig:quantization-views", data=data, caption=caption, recorder=study.recorder
        )


def _what(study: Study) -> str:
    if study.decoder:
        return "100 less the rise of its perplexity in percent"
    return f"mean score of {len(study.params.suite)} embedding tasks"


def _margin(axes: Axes, at: float, label: str, right: float) -> None:
    axes.axhline(at, color=GREY, linestyle="--", linewidth=0.8, marker="")
    axes.annotate(
        label,
        (right, at),
        xytext=(0, -2),
        textcoords="offset points",
        color=GREY,
        fontsize=6,
        ha="right",
        va="top",
    )


def _colour(part: str) -> str:
    if part == EMBEDDINGS:
        return figures.OKABE_ITO[2]
    return figures.OKABE_ITO[0] if part.endswith("attention") else figures.OKABE_ITO[1]
