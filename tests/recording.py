"""One finished record, for tests of records and of what is made of them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from overparam.record import claims, figures, record
from overparam.record.stats import Estimate


@pytest.fixture(autouse=True)
def no_runner(monkeypatch):
    for name in ("JOB_DIR", "JOB_KEY", "COMMAND", "PROGRESS", "PROFILE"):
        monkeypatch.delenv(f"OVERPARAM_{name}", raising=False)


def _draw(recorder, points):
    with figures.style():
        fig, ax = plt.subplots()
        ax.plot(points["depth"], points["loss"])
        ax.set(xlabel="depth (layers)", ylabel="loss (nats)")
        figures.save(fig, "loss", data=points, caption="Loss.", id="fig:layers-loss", recorder=recorder)
        plt.close(fig)


@pytest.fixture
def make_record():
    """Write one finished record with a table, items, two claims and, if asked for, a figure."""

    def make(directory, slug="tiny", study="layers", finish=True, figure=False):
        recorder = record.start(study, {"model": slug, "seed": 3}, slug=slug, directory=directory)
        points = pd.DataFrame({"depth": [0, 1, 2], "loss": [3.0, 1.0, 2.0]})
        recorder.metric("parameters", 268_000_000)
        recorder.metric("retention", Estimate(0.98, 0.95, np.inf, 40), "ratio")
        recorder.table("by_depth", points)
        recorder.items("scores", pd.DataFrame({"item": ["a", "b"], "score": [0.5, 0.25]}))
        if figure:
            _draw(recorder, points)
        recorder.claim(
            claims.judged(
                "large",
                "A light cut | costs next to nothing",
                source="arXiv 2410.14578, abstract",
                published="−0.3 points at −21 %",
                kind="difference",
                published_value=-0.3,
                measured=Estimate(-0.42, -0.9, -0.001, 40),
                margin=1.0,
                figure="fig:layers-loss",
            )
        )
        recorder.claim(
            claims.judged(
                "speed",
                "Cost falls with depth",
                source="arXiv 2410.14578, abstract",
                published="in proportion",
                kind="proportional",
                measured=None,
                margin=0.1,
                note="too small to time",
            )
        )
        return recorder.finish() if finish else recorder

    return make
