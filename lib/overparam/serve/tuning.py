"""The fastest setting for a user's own model and texts on this machine, found within a time budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.measure import tune
from overparam.serve.encoding import SCHEMES, Encoders, Setting, cores, settings
from overparam.support import progress

_CONFIRM = 0.25  # share of the budget that is kept to confirm the winner on other texts
_ROUNDS = 15
_MOST = 32  # texts that are timed, in each half


@dataclass(frozen=True)
class Tuned:
    """The fastest setting.

    Attributes:
        setting: The fastest setting, or the default if none was shown to be faster.
        gain: How many times as fast as the default it is on texts that it was not chosen with, with its interval.
        low: Lower end of the 95 % interval of `gain`.
        high: Upper end.
        cosine: Mean cosine between its embeddings and those of full precision.
        table: What was compared, and what was not, with the reason: see `tune.Comparison`.
        encoders: The model, with all that was prepared.
    """

    setting: Setting
    gain: float
    low: float
    high: float
    cosine: float
    table: pd.DataFrame
    encoders: Encoders

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts with this setting, float32 [texts, width]."""
        return self.encoders.embed(texts, self.setting)

    def __str__(self) -> str:
        return (
            f"{self.setting}: {self.gain:.2f} [{self.low:.2f}, {self.high:.2f}] times as fast as the default, "
            f"cosine {self.cosine:.4f}"
        )


def autotune(
    name: str,
    texts: Sequence[str],
    *,
    budget_s: float = 60.0,
    schemes: Sequence[str] = SCHEMES,
    batches: Sequence[int] = (1, 8, 32),
    threads: Sequence[int] | None = None,
    max_length: int = 256,
    lowest_cosine: float = 0.98,
    seed: int = 0,
) -> Tuned:
    """Find the fastest setting of an encoder for texts like these.

    Texts are dealt out to two halves: settings are chosen on one and confirmed on the other. The default is full
    precision in PyTorch, 32 texts at once, all cores, sorted by length.

    Args:
        name: A bundled name, a folder, or a hub id of an encoder.
        texts: At least 8, such as will be embedded; the first 64 are used.
        budget_s: Seconds for all of it except loading the model and exporting it once.
        schemes: Of `quantize.SCHEMES`.
        batches: Texts at once.
        threads: Of the processor; by default one, and all.
        max_length: Tokens of a text at most.
        lowest_cosine: Schemes whose embeddings are further from full precision's than this are left out.
        seed: Of the order in which settings are tried.

    Raises:
        ValueError: Too few texts, or a budget that ends before any setting was compared.
    """
    if len(texts) < 8:
        raise ValueError(
            f"texts must be at least 8, half to choose with and half to confirm, got {len(texts)}"
        )
    chosen, other = list(texts[0 : 2 * _MOST : 2]), list(texts[1 : 2 * _MOST : 2])
    encoders = Encoders(*models.load(name), calibration=chosen, max_length=max_length)
    default = Setting(threads=max(threads or (cores(),)))
    not_run = {
        scheme: encoders.reason_against(scheme) or "" for scheme in schemes if scheme != default.scheme
    }
    started = time.perf_counter()
    base = encoders.embed(chosen, default)
    cosines, counts = {default.scheme: 1.0}, sorted(threads or {1, cores()})
    for scheme in progress.track([s for s, reason in not_run.items() if not reason], "preparing"):
        for number in counts:
            vectors = encoders.embed(chosen, Setting(scheme, default.batch, number))
        cosines[scheme] = cosine(base, vectors)
        if cosines[scheme] < lowest_cosine:
            not_run[scheme] = f"its embeddings have a cosine of {cosines[scheme]:.3f} with full precision's"
    running = [default.scheme, *(scheme for scheme, reason in not_run.items() if not reason)]
    grid = settings(running, batches, counts, default=default)
    by_name = {str(setting): setting for setting in grid}
    left = (1 - _CONFIRM) * budget_s - (time.perf_counter() - started)
    if left <= 0:
        raise ValueError(
            f"budget_s = {budget_s:g} ended while {len(running)} schemes were prepared: give more, or fewer schemes"
        )
    cells = {text: encoders.call(chosen, setting) for text, setting in by_name.items()}
    found = tune.halving(cells, str(default), budget_s=left, prepared=True, seed=seed)
    best = by_name[found.best]
    gain = low = high = 1.0
    if best != default:
        both = {str(each): encoders.call(other, each) for each in (default, best)}
        sure: Any = tune.paired(both, str(default), rounds=_ROUNDS).table.set_index("cell").loc[str(best)]
        gain, low, high = (float(sure[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    reasons = pd.DataFrame(
        [{"cell": scheme, "status": reason} for scheme, reason in not_run.items() if reason]
    )
    table = pd.concat([found.table, reasons], ignore_index=True)
    return Tuned(best, gain, low, high, cosines[best.scheme], table, encoders)


def cosine(base: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the mean cosine between two sets of embeddings, row by row."""
    products = (base * other).sum(axis=1)
    return float(np.mean(products / (np.linalg.norm(base, axis=1) * np.linalg.norm(other, axis=1))))
