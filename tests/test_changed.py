from uuid import uuid4

from tests import changed
from tests.changed import ROOT


def names(*files):
    return [
        path.relative_to(ROOT / "tests").as_posix()
        for path in changed.tests_of([ROOT / file for file in files])
    ]


def test_the_tests_that_import_what_changed_come_first():
    found = names("lib/overparam/record/stats.py")
    assert "record/test_stats.py" in found[:8]
    assert found.index("record/test_stats.py") < found.index("cli/test_run_all.py")


def test_a_changed_test_or_helper_selects_the_tests_that_hold_it():
    assert names("tests/models/test_recipe.py") == ["models/test_recipe.py"]
    assert set(names("tests/evaluate/conftest.py")) >= {
        "evaluate/test_embedding.py",
        "evaluate/test_topics.py",
    }
    assert set(names("tests/waiting.py")) == {
        "assets/test_packages.py",
        "runner/test_cluster.py",
        "runner/test_execute.py",
    }


def test_a_file_that_nothing_imports_belongs_to_the_files_that_name_it():
    assert "record/test_ledger.py" in names("lib/overparam/record/claims.yaml")
    assert "notebooks/test_smoke.py" in names("lib/overparam/profiles/smoke.yaml")
    assert "studies/test_quantization_accuracy.py" in names("notebooks/04_quantization_accuracy.ipynb")
    assert names(f"results/{uuid4().hex}.pdf") == []


def test_nothing_to_do_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(changed, "changed", lambda *_: [])
    assert changed.main([]) == 0
    assert "0 files changed, 0 test files lead to them" in capsys.readouterr().out
