"""A started study and its steps: what is measured once, and replayed when only figures and verdicts are made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from overparam.experiment.params import StudyParams
from overparam.record import record
from overparam.record.record import Record, Recorder

OwnParams = TypeVar("OwnParams", bound=StudyParams)


@dataclass
class Study(Generic[OwnParams]):
    """A started study: what every step gets as its first argument. A study adds what its own steps share.

    Attributes:
        params: The validated parameters.
        recorder: Of the record that the run leaves.
    """

    params: OwnParams
    recorder: Recorder

    def finish(self) -> Record:
        """Write the per-item scores and the record; its last file is record.json."""
        self.recorder.finish()
        return self.recorder.record


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Study[Any])


def open_record(
    params: StudyParams, *, inputs: Mapping[str, str] | None = None, seeds: Sequence[int] | None = None
) -> Recorder:
    """Begin the record of a study with its parameters.

    Args:
        params: Of the study, which they name.
        inputs: Name → SHA-256 of weights and data.
        seeds: Seeds used; by default the parameters ``seed`` and ``train_seeds``.
    """
    if seeds is None:
        own = {getattr(params, "seed", None), *getattr(params, "train_seeds", ())} - {None}
        seeds = sorted(seed for seed in own if seed is not None)
    plain = params.model_dump(mode="json")
    return record.start(params.study, plain, slug=params.slug(), inputs=inputs, seeds=seeds)


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
