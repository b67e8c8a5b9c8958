import subprocess
import sys
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from overparam.experiment.params import Count, Distinct, Increasing, ModelName, Share, StudyParams
from overparam.record import ledger


class Params(StudyParams):
    study: ClassVar = "quantization_accuracy"
    subsets: ClassVar = {"first": "shares"}

    model: ModelName = "tiny-bert"
    shares: Increasing[Share] = (0.25, 0.5)
    first: Share = 0.25
    names: Distinct[str] = ("a", "b")
    layers: Count | None = Field(3, description="layers kept")


CELL = {"model": "tiny-bert", "shares": [0.25, 0.5], "first": 0.5, "names": ["a"], "layers": 2}


def test_cell_becomes_params_whatever_else_is_defined():
    found = Params.from_cell({**CELL, "pd": pytest, "In": ["x"], "_layer": 1})
    assert found == Params(first=0.5, names=("a",), layers=2)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ({**CELL, "layer": 5}, "no parameter 'layer': did you mean 'layers'"),
        ({"model": "tiny-bert", "layers": 2}, "shares, first, names not set"),
        ({**CELL, "layers": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_cell_is_refused(scope, message):
    with pytest.raises(ValueError, match=message):
        Params.from_cell(scope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tiny-brt"}, "did you mean 'tiny-bert'"),
        ({"shares": (0.5, 0.25)}, "shares must increase"),
        ({"first": 0.3}, "first must be among shares, 0.3 is not"),
        ({"names": ("a", "a")}, "names repeat"),
        ({"depth": 1}, "Extra inputs"),
    ],
)
def test_shared_checks(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_the_ledgers_claims_belong_to_the_drawing_key():
    assert Params().drawing_inputs() == ledger.hashes("quantization_accuracy")


def test_slug_is_the_models_name(tmp_path):
    assert Params(model=str(tmp_path)).slug() == tmp_path.name


def test_params_of_studies_load_no_heavy_library():
    heavy = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pkgutil, importlib, overparam.studies as s\n"
            "[importlib.import_module(f'{s.__name__}.{m.name}') for m in pkgutil.iter_modules(s.__path__) if m.ispkg]\n"
            "print({'torch', 'pandas', 'mteb', 'transformers', 'matplotlib'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy.stdout.strip() == "set()"
