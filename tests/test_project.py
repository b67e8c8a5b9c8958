import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from overparam.compress import experts

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {
        re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements
    }


def test_conda_environment_installs_the_project_and_lists_nothing_twice():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert names(conda) == {"python", "pip"}
    assert "-e .[dev]" in pip
    assert all(entry.startswith("-") for entry in pip)


def test_every_dependency_is_bounded_and_locked():
    required = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["dev"])
    locked = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert required - {"pip"} <= locked
    assert all(re.search(r"[<>=]", entry) for entry in PROJECT["dependencies"])


def test_fixed_packages_are_there():
    fixed = [
        "jupyterlab",
        "papermill",
        "torch",
        "transformers",
        "datasets",
        "matplotlib",
        "seaborn",
        "evaluate",
        "mteb",
    ]
    assert set(fixed) <= names(PROJECT["dependencies"])


def test_citation_has_what_citation_file_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1


def readme_example(beginning):
    """The Python example of README whose first line begins so."""
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(rf"```python\n({beginning}.*?)```", text, flags=re.S)
    return example


def test_example_in_readme_runs(monkeypatch, tmp_path):
    example = readme_example("# your own model")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example.replace("gemma-3-270m", "tiny-gemma3"), scope)
    assert (tmp_path / "pruned" / "config.json").is_file()
    assert scope["model"].config.num_hidden_layers == scope["cuts"].large


def test_student_example_in_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    example = readme_example("# your own teacher")
    scope = {}
    exec(example.replace("[:256]", "[:32]").replace("steps=20", "steps=2"), scope)
    student = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert student.encode(["In the beginning"]).shape == (1, 384)
    assert sum(p.numel() for p in student.parameters()) < 0.11 * scope["teacher"].num_parameters()


def test_expert_example_in_readme_runs(monkeypatch, tmp_path):
    example = readme_example("# a bundled name")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example.replace("moe-translator", "tiny-qwen3_moe"), scope)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer-experts")
    assert {layer.n_experts for layer in experts.layers(reloaded)} == set(scope["half"]) == {4}


def test_example_of_zeros_in_readme_runs(monkeypatch, tmp_path):
    example = readme_example("# what to set to zero")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example.replace("all-MiniLM-L6-v2", "tiny-bert"), scope)
    again = type(scope["model"]).from_pretrained(tmp_path / "half-zeros")
    assert 0.45 < scope["weights"].count_zeros(again).of_layers <= 0.5


def test_example_of_exits_in_readme_runs(monkeypatch, tmp_path):
    example = readme_example("# what to classify")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example.replace("all-MiniLM-L6-v2", "tiny-bert"), scope)
    assert (tmp_path / "exits" / "exits.safetensors").is_file()
    assert scope["ran"].classes[0] in range(8)
    assert 1 <= scope["ran"].depths[0] <= scope["model"].config.num_hidden_layers


def test_quantization_example_in_readme_runs(monkeypatch, tmp_path):
    example = readme_example("# what to quantize")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example, scope)
    assert scope["vectors"].shape == (1, 384)
    assert sum(file.stat().st_size for file in (tmp_path / "in-8-bits").iterdir()) < 0.27 * 90.9e6
    assert type(scope["again"].run) is type(scope["small"].run)


def test_counting_example_in_readme_runs(capsys):
    example = readme_example("# what to count")
    scope = {}
    exec(example, scope)
    printed = capsys.readouterr().out
    assert printed.startswith("moe-translator: 22,130,304 parameters")
    assert printed.splitlines()[-1].startswith("25% active")
    assert scope["found"].total == 22_130_304


def test_tuning_example_in_readme_runs():
    example = readme_example("# what to tune")
    small = example.replace("[:64]", "[:8]").replace(
        "budget_s=60", 'budget_s=20, schemes=("fp32",), batches=(8, 32)'
    )
    scope = {}
    exec(small, scope)
    assert scope["vectors"].shape == (8, 384)
    assert scope["tuned"].gain >= 1 or scope["tuned"].low < 1


def test_no_pickle_is_read():
    reads = re.compile(r"import pickle|from pickle|torch\.load\(|allow_pickle|read_pickle|joblib|dill|shelve")
    assert not [
        path for path in (ROOT / "lib").rglob("*.py") if reads.search(path.read_text(encoding="utf-8"))
    ]
