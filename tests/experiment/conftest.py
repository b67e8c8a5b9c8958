"""A study as CONTRIBUTING.md says to write one, small enough to read: how often does a biased coin fall on heads?"""

import os
import sys
from pathlib import Path

import pytest
from tests.runner.conftest import write_notebook

LIB = Path(__file__).parents[2] / "lib"

PARAMS = """
from typing import ClassVar
from pydantic import Field
from overparam.experiment.params import Count, StudyParams

class Params(StudyParams):
    study: ClassVar = "coin"

    model: str = Field("penny", description="name of the coin")
    throws: Count = Field(400, description="throws per bias")
    seed: int = Field(42, description="of the throws")
"""
STUDY = '''
import os
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import pandas as pd
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.record import stats
from cointoss.coin import Params

@dataclass
class Study(experiment.Study[Params]):
    coin: object = None

@begins
def start(params: Params) -> Study:
    return Study(params, experiment.open_record(params), coin=object())

@step
def throw(study: Study) -> pd.DataFrame:
    """Heads per bias, with their interval."""
    with Path(os.environ["COIN_LOG"]).open("a") as log:
        log.write("thrown ")
    random = np.random.default_rng(study.params.seed)
    rows = []
    for bias in (0.25, 0.5, 0.75):
        heads = (random.random((study.params.throws, 1)) < bias).astype(float)
        study.recorder.keep(heads, system=f"bias {bias}", task="heads")
        rows.append({"bias": bias, **stats.bootstrap(heads).scaled(100).columns("heads")})
    table = pd.DataFrame(rows)
    study.recorder.table("throws", table)
    study.recorder.metric("throws", len(table) * study.params.throws)
    return table
'''
PLOTS = """
from overparam.experiment import charts

def plot(study, table):
    with charts.figure(study, "fig:coin-heads", table, caption="Heads by bias.") as axes:
        charts.curves(axes, table, "bias", "heads")
        axes.set(xlabel="bias", ylabel="heads (%)")
    return axes.figure
"""
VERDICTS = """
from overparam.record import claims
from overparam.record.stats import Estimate

def verdicts(study, table):
    row = table.iloc[-1]
    claim = claims.judged(
        "coin-heads", "A biased coin falls on its heavy side", source="Bernoulli 1713", published="75 %",
        kind="difference", published_value=75.0, margin=10.0,
        measured=Estimate(row["heads"], row["heads_low"], row["heads_high"], study.params.throws),
        figure="fig:coin-heads",
    )
    study.recorder.claim(claim)
    return [claim]
"""
CELLS = (
    ("markdown", "# A coin", []),
    ("code", "from cointoss.coin import Params", []),
    ("code", 'model = "penny"\nthrows = 400\nseed = 42', ["parameters"]),
    (
        "code",
        "from cointoss.coin import plots, verdicts\nfrom cointoss.coin import study as steps\n"
        "study = steps.start(Params.from_cell(globals()))",
        [],
    ),
    ("code", "table = steps.throw(study)\ntable.round(1)", []),
    ("code", "plots.plot(study, table)", []),
    ("code", "verdicts.verdicts(study, table)", []),
    ("code", "record = study.finish()\nprint(record.key)", []),
)


@pytest.fixture
def coin(tmp_path, monkeypatch):
    """The project of the study above, importable here and in kernels; COIN_LOG says how often it was measured."""
    root = tmp_path / "project"
    write_notebook(root / "notebooks" / "01_coin.ipynb", CELLS)
    package = root / "lib" / "cointoss"
    for name, text in {
        "__init__.py": "",
        "coin/__init__.py": PARAMS,
        "coin/study.py": STUDY,
        "coin/plots.py": PLOTS,
        "coin/verdicts.py": VERDICTS,
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(root / "lib"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "lib"), str(LIB)]))
    monkeypatch.setenv("COIN_LOG", str(root / "log"))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "cointoss"]:
        del sys.modules[name]
