"""Saving figures, always this way: PDF, PNG and a CSV of the points under one file stem, traceable to the run."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler

from overparam.record.record import Figure, Recorder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MplFigure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 85 / 25.4  # inches: one column

_RC: dict[Any, Any] = {
    "figure.figsize": (WIDTH, 0.68 * WIDTH),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that bytes agree between machines
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=OKABE_ITO) + cycler(marker=MARKERS),
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 2,
}
_SIZES = ("figure.figsize", "figure.dpi", "savefig.dpi", "savefig.bbox", "figure.constrained_layout.use")
_SAVE_RC: dict[Any, Any] = {"pdf.fonttype": 42, "savefig.dpi": 300, "savefig.bbox": None}


@contextmanager
def style() -> Iterator[None]:
    """Style for print: 85 mm wide, 8-pt type, Okabe–Ito colours, each with its own marker."""
    with _known(_RC):
        yield


@contextmanager
def _known(settings: dict[Any, Any]) -> Iterator[None]:
    """Use matplotlib's defaults with `settings` within the block, ignoring a personal matplotlibrc."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        if own := os.environ.get("OVERPARAM_STYLE"):
            mpl.rcParams.update(read_style(Path(own)))
        yield


def read_style(path: Path) -> dict[Any, Any]:
    """Return the settings of a matplotlib style file.

    Raises:
        ValueError: for a file that is missing or not a style file, or that changes sizes, on which layouts rely.
    """
    if not path.is_file():
        raise ValueError(f"there is no style file {path}")
    with warnings.catch_warnings(record=True) as caught, mpl.rc_context():
        warnings.simplefilter("always")
        messages = io.StringIO()
        handler = logging.StreamHandler(messages)
        logging.getLogger("matplotlib").addHandler(handler)
        try:
            settings: dict[Any, Any] = dict(mpl.rc_params_from_file(path, use_default_template=False))
        finally:
            logging.getLogger("matplotlib").removeHandler(handler)
    problems = [*messages.getvalue().splitlines(), *(str(each.message) for each in caught)]
    if problems or not settings:
        raise ValueError(
            f"{path} is not a matplotlib style file: {problems[0] if problems else 'it sets nothing'}"
        )
    if sizes := [name for name in settings if name in _SIZES]:
        raise ValueError(
            f"{path} changes sizes, which the figures' layouts rely on: remove {', '.join(sizes)}"
        )
    return settings


def publish(fig: MplFigure, id: str, *, data: pd.DataFrame, caption: str, recorder: Recorder) -> MplFigure:
    """Save a pyplot figure under a stem made from its id (``fig:layers-cost`` → ``figure_cost``), close and return it.

    Arguments and errors as in `save`.
    """
    stem = "_".join(["figure", *id.removeprefix("fig:").split("-")[1:]])
    save(fig, stem, data=data, caption=caption, id=id, recorder=recorder)
    plt.close(fig)
    return fig


def save(
    fig: MplFigure, stem: str, *, data: pd.DataFrame, caption: str, id: str, recorder: Recorder
) -> dict[str, str]:
    """Save a figure as ``<stem>.pdf``, ``.png`` and ``.csv``, and register it in the record.

    The same figure, code and key give the same bytes. Metadata of PDF and PNG hold id, git sha and key.

    Args:
        fig: The figure, without a title (the caption replaces it).
        stem: File name without ending.
        data: Exactly the points that are drawn.
        caption: What a reader needs to know to read it.
        id: Stable id such as ``fig:layers-initial-loss``.
        recorder: Recorder of the running job.

    Returns:
        {file name: SHA-256}.

    Raises:
        ValueError: for a malformed id or stem, an empty caption, no data, or a title inside the figure.
    """
    if not re.fullmatch(r"fig:[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"id must look like 'fig:layers-initial-loss', got {id!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", stem):
        raise ValueError(f"stem must be letters, digits, - and _, got {stem!r}")
    if not caption.strip() or data.empty:
        raise ValueError(f"{id} needs a caption and the data that it draws")
    if fig.get_suptitle() or (len(fig.axes) == 1 and fig.axes[0].get_title()):
        raise ValueError(f"{id} has a title: move it into caption=")
    run = recorder.record
    described = f"git {run.provenance['git']['sha']}, key {run.key}, study {run.study}"
    software = f"overparam with matplotlib {mpl.__version__}"
    pdf, png = io.BytesIO(), io.BytesIO()
    with _known(_RC | _SAVE_RC):
        fig.savefig(
            pdf,
            format="pdf",
            metadata={
                "Title": id,
                "Subject": described,
                "Creator": software,
                "Producer": software,
                "CreationDate": None,
                "ModDate": None,
            },
        )
        fig.savefig(png, format="png", metadata={"Title": id, "Description": described, "Software": software})
    contents = {
        f"{stem}.pdf": pdf.getvalue(),
        f"{stem}.png": png.getvalue(),
        f"{stem}.csv": data.to_csv(index=False, lineterminator="\n").encode(),
    }
    others = [f for f in run.figures if f.id != id]
    taken = [f.id for f in others if set(f.files) & set(contents)]
    if taken or f"{stem}.csv" in {ref.file for ref in run.tables.values()}:
        raise ValueError(f"stem {stem!r} of {id} is taken by {', '.join(taken) or 'a table'}: choose another")
    for name, content in contents.items():
        recorder.write_file(name, content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    recorder.figure(Figure(id, caption, files))
    return files
