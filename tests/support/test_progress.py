import json

from overparam.support import progress


def test_runner_reads_where_a_step_is(tmp_path, monkeypatch, capsys):
    status = tmp_path / "status"
    monkeypatch.setenv("OVERPARAM_PROGRESS", str(status))
    seen = []
    for item in progress.track("abc", "spelling"):
        seen.append((item, json.loads(status.read_text())["done"]))
    progress.note("once")
    line = json.loads(status.read_text())
    assert [item for item, _ in seen] == ["a", "b", "c"]
    assert (line["label"], line["done"], line["total"]) == ("spelling", 3, 3)
    assert json.loads((tmp_path / "status.notes").read_text()) == {"note": "once"}
    assert capsys.readouterr() == ("", "")


def test_reader_at_the_keyboard_sees_a_bar(monkeypatch, capsys):
    monkeypatch.delenv("OVERPARAM_PROGRESS", raising=False)
    assert list(progress.track(iter("ab"), "spelling", total=2)) == ["a", "b"]
    assert "spelling" in capsys.readouterr().err
