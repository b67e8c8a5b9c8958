import io
import json
import time

from overparam.runner.display import Display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(out, tmp_path):
    progress = tmp_path / "progress"
    with Display(out) as display:
        display.submitted("[1/2] toy/alpha", "mine", progress, expected=3600)
        display.submitted("[2/2] toy/beta", "queued", tmp_path / "other")
        (tmp_path / "progress.cell").write_text(json.dumps({"cell": 3, "cells": 7, "token": "mine"}))
        (tmp_path / "other.cell").write_text(json.dumps({"cell": 9, "cells": 9, "token": "of another run"}))
        step = {"label": "scoring", "done": 2, "total": 8, "seconds": 20, "remaining": 60}
        progress.write_text(json.dumps(step))
        (tmp_path / "progress.notes").write_text('{"note": "converting"}\n{"note": "unfini')
        time.sleep(0.8)
        begun = [display.ended("mine"), display.ended("queued")]
    return out.getvalue(), begun


def test_a_terminal_shows_all_jobs_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    text, begun = show(Terminal(), tmp_path)
    line = "[1/2] toy/alpha  cell 3/7  scoring  2/8, 1:00 left in this step, 0:00 elapsed, about 1:00:00 left"
    assert line in text
    assert "1 more to start" in text
    assert "[1/2] toy/alpha  converting" in text
    assert "unfini" not in text
    assert "9/9" not in text
    assert begun == [True, False]


def test_plain_lines_elsewhere(tmp_path):
    text, _ = show(io.StringIO(), tmp_path)
    step = "cell 3/7  scoring  2/8, 1:00 left in this step, 0:00 elapsed, about 1:00:00 left"
    assert text.splitlines() == ["[1/2] toy/alpha  converting", f"[1/2] toy/alpha  {step}"]


def test_the_time_for_all_jobs_is_shown_where_that_of_each_is_known(tmp_path):
    out = io.StringIO()
    with Display(out) as display:
        display.later = 600.0
        display.submitted("[1/3] toy/alpha", "mine", tmp_path / "progress", expected=120)
        display.submitted("[2/3] toy/beta", "queued", tmp_path / "other", expected=60)
        (tmp_path / "progress.cell").write_text(json.dumps({"cell": 3, "cells": 7, "token": "mine"}))
        time.sleep(0.8)
    assert "about 2:00 left, about 13:00 for all jobs" in out.getvalue()
