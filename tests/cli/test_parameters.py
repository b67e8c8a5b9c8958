import importlib
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from overparam.cli import parameters

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COMMAND = "run `python -m overparam.cli.parameters`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_of_a_notebook_are_those_of_its_params(path):
    assert path.read_text(encoding="utf-8") == parameters.commented(path), COMMAND


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_says_what_it_is(path):
    study = path.stem.partition("_")[2]
    params = importlib.import_module(f"overparam.studies.{study}").Params
    assert params.study == study
    assert not [name for name, field in params.model_fields.items() if not field.description]


def test_cell_has_a_comment_for_each_value_and_breaks_long_lists():
    class Params(BaseModel):
        rate: float = Field(1e-05, description="learning rate")
        names: tuple[str, ...] = Field(("é" * 60, "b" * 60), description="tasks")

    source = parameters.cell_source(Params)
    assert source == (
        f'# learning rate\nrate = 1e-05\n# tasks\nnames = [\n    "{"é" * 60}",\n    "{"b" * 60}",\n]'
    )
