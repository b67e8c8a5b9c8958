"""The figures of the study; each is saved with the points that it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from overparam.experiment import charts
from overparam.experiment.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, Look
from overparam.measure import roofline
from overparam.record import ledger
from overparam.studies.hardware import LLAMA_CPP
from overparam.studies.hardware.costs import UNITS
from overparam.studies.hardware.settings import AGAIN, Sweep, Tuning
from overparam.studies.hardware.study import Study

LOOKS = {
    "fp32": Look(BLUE, "o"),
    "bf16": Look(ORANGE, "s"),
    "fp32-compiled": Look(PINK, "D"),
    "openvino-fp32": Look(GREEN, "^"),
    "openvino-int8": Look(SKY, "v"),
    "openvino-int8-weights": Look(SKY, "v"),
    "openvino-int4-weights": Look(GREEN, "P"),
    LLAMA_CPP: Look(PINK, "X"),
}
_TOP = 12  # settings in the figure of the sweep


def _points(look: Look) -> Look:
    return Look(look.colour, look.marker, "", label=look.label)


def _plain(axis: Any, steps: tuple[int, ...]) -> None:
    """Label an axis of powers of ten by ordinary numbers, at these steps of each."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_roofline(study: Study, limits: pd.DataFrame, found: pd.DataFrame) -> Any:
    """Draw operations a second against operations a byte, under the roof of this machine."""
    number = study.threads[-1]
    here = roofline.limits(limits, number)
    data = found[(found["threads"] == number) & found["seconds"].notna()].copy()
    data["gflops"] = data["operations"] / data["seconds"] / 1e9
    data["what"] = [f"{ledger.model_name(m)}, {p}" for m, p in zip(data["model"], data["phase"], strict=True)]
    top = max(here.peaks, key=lambda each: here.peaks[each])
    caption = (
        f"Roofline with {number} thread{'s' if number > 1 else ''}: what models reach against the operations they "
        f"do a byte; the line is the most that this machine can do ({here.bandwidth / 1e9:.1f} GB/s; "
        f"{here.peaks[top] / 1e9:.0f} GFLOP/s in {top}). Left of the bend, a model waits for memory."
    )
    columns = ["what", "scheme", "intensity", "gflops", "times_bound", "times_bound_low", "times_bound_high"]
    with charts.figure(
        study, "fig:hardware-roofline", data[columns], caption=caption, legend=3, width=1.4, height=0.95
    ) as axes:
        x = np.geomspace(data["intensity"].min() / 2, data["intensity"].max() * 4, 100)
        axes.plot(
            x, np.minimum(x * here.bandwidth, here.peaks[top]) / 1e9, color=GREY, marker="", linewidth=1
        )
        charts.curves(
            axes, data[["scheme", "intensity", "gflops"]], "intensity", "gflops", by="scheme",
            look={key: _points(look) for key, look in LOOKS.items()},
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        _plain(axes.xaxis, (1, 2, 5))
        _plain(axes.yaxis, (1, 2, 5))
        names = data.sort_values("gflops").groupby("what", sort=False).tail(1)
        charts.label_points(axes, names, "intensity", "gflops", "what", [GREY] * len(names))
    return axes.figure


def plot_decoder(study: Study, found: pd.DataFrame) -> Any:
    """Draw a decoder's tokens a second by precision and backend, of a prompt and one after the other."""
    data = found[(found["model"] == study.params.decoder) & found["seconds"].notna()].copy()
    if data.empty:
        return None
    tokens = np.where(data["phase"] == "prompt", study.params.prompt_tokens, 1)
    data["tokens_per_second"] = tokens / data["seconds"]
    data["with"] = [f"{n:.0f} thread{'s' if n > 1 else ''}" for n in data["threads"]]
    caption = (
        f"{ledger.model_name(str(study.params.decoder))}: tokens a second of a prompt of {study.params.prompt_tokens} "
        "tokens, and one after the other behind it; medians, systems in turns. The best backend depends on the phase."
    )
    columns = ["phase", "scheme", "with", "threads", "tokens_per_second", "ratio", "ratio_low", "ratio_high"]
    with charts.figure(
        study, "fig:hardware-decoder", data[columns], caption=caption, legend=2, width=2, height=0.6, ncols=2,
        sharey=True,
    ) as panels:  # fmt: skip
        looks = dict(
            zip(dict.fromkeys(data["with"]), (Look(SKY, "v", ""), Look(BLUE, "o", "")), strict=False)
        )
        for axes, phase in zip(panels, ("prompt", "token"), strict=True):
            own = data.loc[data["phase"] == phase, ["scheme", "with", "tokens_per_second"]]
            order = list(dict.fromkeys(data["scheme"]))
            charts.dots(axes, own, "scheme", "tokens_per_second", by="with", look=looks, order=order)
            axes.set_xlabel(
                f"tokens a second: {'the prompt' if phase == 'prompt' else 'one after the other'}"
            )
            axes.set_xlim(0, None)
    return panels[0].figure


def plot_sweep(study: Study, swept: Sweep) -> Any:
    """Draw the fastest settings, those of the default's neighbours, and the default with itself."""
    joint = swept.table[(swept.table["grid"] == "joint") & swept.table["ratio_low"].notna()]
    first = joint[joint["cell"] != AGAIN].head(_TOP)
    default = str(study.default)
    more = joint[joint["cell"].isin([default, AGAIN]) & ~joint["cell"].isin(first["cell"])]
    data = pd.concat([first, more])
    caption = (
        f"{ledger.model_name(study.params.model)}: the {len(first)} fastest of {len(joint) - 1} settings, in times the "
        f"speed of the default ({default}), at most {study.params.joint_length} tokens a text; 95 % bootstrap interval "
        f"over {study.params.rounds} rounds in turns. The best of many noisy settings looks better than it is."
    )
    columns = ["cell", "scheme", "ratio", "ratio_low", "ratio_high", "texts_per_second"]
    with charts.figure(
        study, "fig:hardware-sweep", data[columns], caption=caption, legend=3, width=1.4, height=1.1
    ) as axes:
        charts.reference(axes, 1, line="-", upright=True)
        looks = {key: _points(look) for key, look in LOOKS.items()}
        charts.dots(axes, data, "cell", "ratio", by="scheme", look=looks, order=list(data["cell"]))
        axes.set_xlabel("times the speed of the default")
    return axes.figure


def plot_tuning(study: Study, swept: Sweep, tuned: Tuning, same: pd.DataFrame) -> Any:
    """Draw what tuning gained on other texts, and the comparisons of the default with itself."""
    confirmed = tuned.confirmed.assign(panel="confirmed")
    runs = same.sort_values("ratio").reset_index(drop=True)
    runs = runs.assign(panel="same", role="", place=range(len(runs)))
    data = pd.concat([confirmed, runs], ignore_index=True)
    caption = (
        f"Left: on texts that settings were not chosen with. Tuning took {tuned.seconds:.0f} s, "
        f"{tuned.seconds / swept.seconds:.0%} of the full sweep's time, and chose: {tuned.chosen}. Right: the default "
        f"compared with itself, {len(same)} times; orange: the interval leaves 1 out, as one in twenty may. 95 % "
        "bootstrap intervals over rounds."
    )
    columns = ["panel", "role", "place", "ratio", "ratio_low", "ratio_high", "holds"]
    with charts.figure(
        study,
        "fig:hardware-tuning",
        data.reindex(columns=columns),
        caption=caption,
        width=2,
        height=0.5,
        ncols=2,
    ) as (left, right):
        for axes in (left, right):
            charts.reference(axes, 1, line="-", upright=True)
        names = {"tuned": "tuned ÷ default", "best of the sweep": "sweep's best ÷ default",
                 AGAIN: "default ÷ default", "tuned to best": "tuned ÷ sweep's best"}  # fmt: skip
        shown = confirmed.assign(role=confirmed["role"].map(names))
        charts.dots(left, shown, "role", "ratio", look=Look(BLUE, "o"))
        left.margins(y=0.15)
        left.set_xlabel("times as fast")
        for holds, colour in ((True, BLUE), (False, ORANGE)):
            own = runs[runs["holds"] == holds]
            bars = charts.error_bars(own, "ratio")
            right.errorbar(own["ratio"], own["place"], xerr=bars, color=colour, marker="o", linestyle="")
        right.margins(y=0.08)
        right.set(xlabel="times as fast: the default and itself", yticks=[])
    return left.figure


def plot_alignment(study: Study, aligned: pd.DataFrame) -> Any:
    """Draw the speed of layers a unit of work, by their width, and of output layers by their vocabulary."""
    data = aligned[aligned["status"] == ""] if "size" in aligned else aligned.iloc[:0]
    if data.empty:
        return None
    data = data.assign(
        name=[f"{each} {size:.0f}" for each, size in zip(data["layer"], data["size"], strict=True)]
    )
    caption = (
        f"Operations a second of a layer that reads {study.params.shape_rows} tokens, in percent of the aligned one's: "
        f"square layers by width (aligned: {study.params.aligned_width}), output layers by vocabulary (aligned: "
        f"{study.params.vocabularies[-1]}); 95 % bootstrap interval over {study.params.shape_rounds} rounds in turns."
    )
    with charts.figure(study, "fig:hardware-alignment", data, caption=caption, legend=2) as axes:
        charts.reference(axes, 100, line="-", upright=True)
        looks = {"float32": Look(BLUE, "o", ""), "bfloat16": Look(ORANGE, "s", "")}
        charts.dots(axes, data, "name", "speed", by="dtype", look=looks, spread=0.25)
        axes.margins(y=0.1)
        axes.set_xlabel("speed a unit of work (% of the aligned one's)")
    return axes.figure


def plot_sizes(study: Study, sized: pd.DataFrame) -> Any:
    """Draw time and memory of published sizes against what is kept, and speed against bits."""
    ran = sized[sized["status"] == ""]
    parts = [ran[ran["what"] == "time by layers"], ran[ran["what"].str.startswith("memory")], ran[ran["what"].isin(
        ["prompt", "token"])]]  # fmt: skip
    data = pd.concat(parts)
    if data.empty:
        return None
    data = data.assign(
        of=[f"{s}, {w.removeprefix('memory ')}" for s, w in zip(data["shape"], data["what"], strict=True)]
    )
    caption = (
        "Models of a published size with random weights: encoding time by layers kept, resident memory by layers or "
        "experts kept, in percent of the whole model's (dotted: in proportion to layers, and to parameters); speed by "
        "bits, in times 16 bits (dotted: by the bytes that a token reads). 95 % bootstrap interval over "
        f"{study.params.size_rounds} rounds."
    )
    columns = ["of", "shape", "what", "kept", "whole", "share", "share_low", "share_high", "expected"]
    with charts.figure(
        study, "fig:hardware-sizes", data[columns], caption=caption, legend=3, width=2, height=0.75, ncols=3
    ) as (time, held, bits):
        looks = charts.looks(dict.fromkeys(data["shape"]))
        for axes, rows, label in (
            (
                time,
                data[data["what"] == "time by layers"].assign(x=lambda t: t["expected"]),
                "layers kept (%)",
            ),
            (
                held,
                data[data["what"].str.startswith("memory")].assign(x=lambda t: t["expected"]),
                "parameters kept (%)",
            ),
        ):
            charts.curves(axes, rows, "x", "share", by="shape", look=looks)
            charts.diagonal(axes, 100)
            axes.set_xlabel(label)
        time.set_ylabel("time (% of all layers')")
        held.set_ylabel("memory (% of the whole)")
        speeds = data[data["what"].isin(["prompt", "token"])]
        phases = {"prompt": Look(SKY, "v", "--"), "token": Look(BLACK, "*")}
        charts.curves(bits, speeds.sort_values(["shape", "kept"]), "kept", "share", by="what", look=phases)
        tokens = speeds[speeds["what"] == "token"].sort_values("kept")
        bits.plot(tokens["kept"], tokens["expected"], color=GREY, linestyle=":", linewidth=0.8, marker="")
        bits.set(xlabel="bits of a weight", ylabel="times as fast as 16 bits", xticks=[4, 8, 16])
    return time.figure


def plot_costs(study: Study, priced: pd.DataFrame) -> Any:
    """Draw quality kept against price, of every system of the other studies."""
    data = priced.dropna(subset=["kept", "eur_per_million"]).copy()
    data = data[np.isfinite(data["kept"])]
    if data.empty:
        return None
    data["curve"] = [
        f"{ledger.model_name(m)}: {s.replace('_', ' ')}"
        for m, s in zip(data["model"], data["study"], strict=True)
    ]
    caption = (
        f"Quality kept against the price of a million, at {study.params.price_per_hour:g} € an hour and "
        f"{study.params.utilisation:.0%} utilisation: texts embedded, tokens read, tokens written. "
        "Points of one model and study; "
        "their machines are named in their records."
    )
    columns = ["curve", "unit", "system", "eur_per_million", "kept", "kept_low", "kept_high"]
    with charts.figure(
        study,
        "fig:hardware-costs",
        data[columns],
        caption=caption,
        legend=3,
        width=2,
        height=0.7,
        ncols=3,
        sharey=True,
    ) as panels:
        every = charts.looks(dict.fromkeys(data["curve"]))
        looks = {key: Look(look.colour, look.marker, "") for key, look in every.items()}
        for axes, unit in zip(panels, UNITS, strict=True):
            own = data.loc[data["unit"] == unit, ["curve", "eur_per_million", "kept"]]
            charts.curves(axes, own, "eur_per_million", "kept", by="curve", look=looks)
            axes.set(xscale="log", xlabel=f"€ per million {unit}")
            _plain(axes.xaxis, (1, 3))
        panels[0].set(ylabel="quality kept (%)", ylim=(0, 110))
    return panels[0].figure
