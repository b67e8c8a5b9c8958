import pytest
from tests.runner.conftest import write_notebook

from overparam.runner import code


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """What a study of a package with these files reaches: {file: text} → `code.Reached`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    cells = (("code", "from reach.study import Params, steps\nsteps.measure(Params())", []),)
    write_notebook(tmp_path / "01_study.ipynb", cells)

    def reached(**files):
        files = {"study/__init__": "Params = 1", "study/steps": "", "__init__": ""} | files
        for name, text in files.items():
            path = tmp_path / "reach" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        code.forget()
        return code.reached(tmp_path / "01_study.ipynb", "reach.study")

    return reached


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("x = 1", "x = 1  # one", True),
        ("x = 1", '"""Ones."""\n\nx = 1', True),
        ("def f():\n    return 1", 'def f():\n    """One."""\n    return 1', True),
        ("x = Field(1, description='one')", "x = Field(1, description='the # of\\n ones')", True),
        ("x = '# one'", "x = '# two'", False),
        ("x = f'{1}# one'", "x = f'{1}# two'", False),
        ("if a:\n    b()\n    c()", "if a:\n    b()\nc()", False),
        ("x = 'é'  # é", "x = 'é'", True),
        ("x = 1", "x = 2", False),
    ],
)
def test_only_code_counts(reach, before, after, same):
    first, second = reach(**{"study/steps": before}), reach(**{"study/steps": after})
    assert (first.measuring == second.measuring) is same


def test_what_stands_beside_a_name_that_a_package_passes_on_is_not_reached(reach):
    files = {
        "tools/__init__": '"""Tools."""\nfrom reach.tools.saw import cut\nfrom reach.tools.drill import bore\n'
        '__all__ = ["bore", "cut"]',
        "tools/saw": "from reach.steel import blade\ndef cut(): ...",
        "tools/drill": "def bore(): ...",
        "steel": "blade = 1",
    }
    by_name = reach(**files, **{"study/steps": "from reach.tools import cut"})
    assert {"reach.tools.saw", "reach.steel"} <= by_name.measuring.keys()
    assert "reach.tools.drill" not in by_name.measuring
    use = {"study/steps": "from reach import tools\ntools.bore()"}
    by_attribute = reach(**use)
    assert "reach.tools.drill" in by_attribute.measuring
    assert "reach.tools.saw" not in by_attribute.measuring
    lazy = files["tools/__init__"].replace("from reach.tools", "    from reach.tools")
    head = "from typing import TYPE_CHECKING\nfrom overparam.support import lazy\nif TYPE_CHECKING:\n"
    body, _, names = lazy.partition('"""Tools."""\n')[2].partition("__all__")
    text = f"{head}{body}else:\n    __getattr__, __dir__ = lazy.exports(__name__)\n__all__{names}"
    assert reach(**use, **{"tools/__init__": text}).measuring == by_attribute.measuring


def test_a_package_with_code_of_its_own_is_reached_whole(reach):
    files = {"tools/__init__": "from reach.tools.saw import cut\nsharp = True", "tools/saw": "def cut(): ..."}
    found = reach(**files, **{"study/steps": "from reach import tools\ntools.sharp"})
    assert {"reach.tools", "reach.tools.saw"} <= found.measuring.keys()


def test_plots_and_verdicts_of_a_study_only_draw(reach):
    found = reach(**{"study/plots": "from reach import colours", "colours": "red = 1", "plots": "x = 1"})
    assert {"reach.study.plots", "reach.colours"} <= found.drawing.keys()
    assert "reach.study.steps" in found.measuring
