"""A started study and its steps: what is measured once, and replayed when only figures and verdicts are made anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from overparam.record import record
from overparam.record.record import Recorder


class Started(Protocol):
    """A study that runs: every one has at least its recorder."""

    recorder: Recorder


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Started)


def step(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a function of a study a step: its first argument is the study, and what it returns is kept with the record.

    When only figures, verdicts or text have changed, the runner executes the notebook again and each step returns what
    it returned when it measured. It should return numbers, tables, arrays and dataclasses of these; whatever else is in
    them cannot be used by figures and verdicts.
    """

    def called(study: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return study.recorder.step(_name(function), lambda: function(study, *args, **kwargs))

    return wraps(function)(called)


def begins(function: Callable[P, S]) -> Callable[P, S]:
    """Make a function that starts a study a step of it: when nothing is measured, no model is loaded."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> S:
        if recorder := record.resumed():
            return recorder.step(_name(function), lambda: function(*args, **kwargs))
        study = function(*args, **kwargs)
        return study.recorder.step(_name(function), lambda: study)

    return called


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
