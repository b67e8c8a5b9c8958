import stat
import sys

import numpy as np
import pytest

from overparam.evaluate.comet import comet

# Stands in for unbabel-comet's command: the score is the share of the reference's words in the translation.
SCRIPT = """#!{python}
import json, sys
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
read = lambda flag: open(value[flag], encoding="utf-8").read().splitlines()
assert value["--model"] == "some/model", value
rows = []
for source, translation, reference in zip(read("-s"), read("-t"), read("-r"), strict=True):
    words = set(reference.split())
    rows.append({{"src": source, "mt": translation, "COMET": len(words & set(translation.split())) / len(words)}})
json.dump({{value["-t"]: rows}}, open(value["--to_json"], "w"))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    file = tmp_path / "comet-score"
    file.write_text(SCRIPT.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("OVERPARAM_COMET", str(file))
    return file


def test_failed_generations_score_zero_and_the_others_keep_their_places(command):
    items = comet(
        ["s", "s", "s"],
        ["ein\nWort", "ein Wort", "kein Wort"],
        ["ein Wort", "ein Wort", "ein Wort"],
        failures=[None, "loop", None],
        model="some/model",
    )
    np.testing.assert_array_equal(items, [[1.0], [0.0], [0.5]])


def test_nothing_is_run_when_all_failed(monkeypatch):
    monkeypatch.setenv("OVERPARAM_COMET", "no-such-command")
    assert comet(["s"], [""], ["r"], failures=["empty"]).tolist() == [[0.0]]


def test_a_missing_or_failing_command_says_what_to_do(command, monkeypatch):
    with pytest.raises(RuntimeError, match=r"failed with other/model: AssertionError.*licence"):
        comet(["s"], ["h"], ["r"], failures=[None], model="other/model")
    monkeypatch.setenv("OVERPARAM_COMET", "no-such-command")
    with pytest.raises(RuntimeError, match="pipx install unbabel-comet"):
        comet(["s"], ["h"], ["r"], failures=[None])


def test_unequal_lists_are_named():
    with pytest.raises(ValueError, match="got 1, 1, 2 and 1"):
        comet(["s"], ["h"], ["r", "r"], failures=[None])
