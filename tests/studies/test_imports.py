"""Heavy libraries load where they are used: what plans, replays and draws starts without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "mteb", "torchao", "nncf", "openvino", "sentence_transformers", "datasets")
REPORT = f"""
import sys
HEAVY = {HEAVY!r}
def loaded():
    return [name for name in HEAVY if name in sys.modules]
"""
EVERY_STUDY = """
import importlib, json, pkgutil
from overparam import studies
found = {}
for module in pkgutil.walk_packages(studies.__path__, "overparam.studies."):
    if module.name.rpartition(".")[2] != "encoding":  # run in processes that measure memory: loads all it needs
        importlib.import_module(module.name)
        found[module.name] = loaded()
print(json.dumps(found))
"""
DRY_RUN = """
import contextlib, io, json
import run_all
with contextlib.redirect_stdout(io.StringIO()):
    assert run_all.main(["--profile", "smoke", "--dry-run"]) == 0
print(json.dumps(loaded() + [name for name in ("pandas", "matplotlib", "papermill") if name in sys.modules]))
"""


def run(code):
    ran = subprocess.run(
        [sys.executable, "-c", REPORT + code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def loaded_by():
    return run(EVERY_STUDY)


@pytest.mark.parametrize("name", ["plots", "verdicts", "study"])
def test_every_study_is_drawn_judged_and_replayed_without_the_libraries_of_its_models(loaded_by, name):
    found = {module: heavy for module, heavy in loaded_by.items() if module.rpartition(".")[2] == name}
    assert len(found) >= 5
    assert not {module: heavy for module, heavy in found.items() if heavy}


def test_no_module_of_a_study_loads_them_when_it_is_imported(loaded_by):
    assert not {module: heavy for module, heavy in loaded_by.items() if heavy}


def test_a_plan_is_made_without_models_tables_figures_or_kernels():
    assert run(DRY_RUN) == []
