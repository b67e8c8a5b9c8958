"""Parameters of a study: shared types and checks, and the way from a notebook's cell.

This module is light, so that a plan can be checked without loading torch, pandas or mteb.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from overparam.assets.catalogue import check_model_name, published
from overparam.evaluate import GLUE_TASKS, LOCAL_TASKS, TOPIC_TASKS
from overparam.record import ledger
from overparam.support.suggest import hint

_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
_NEAR = 0.85  # from here on two names differ by a slip of the finger

T = TypeVar("T")


def _increasing(values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{info.field_name} must increase, got {values}")
    return values


def _distinct(values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{info.field_name} repeat")
    return values


def among(allowed: Iterable[str]) -> AfterValidator:
    """Return a check that every value of a tuple is one of those that are allowed."""
    names = tuple(allowed)

    def check(values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        _check_among(str(info.field_name), values, names, ", ".join(names))
        return values

    return AfterValidator(check)


def _check_among(name: str, values: Iterable[Any], allowed: Iterable[Any], what: str) -> None:
    valid = set(allowed)
    if unknown := [value for value in values if value not in valid]:
        raise ValueError(f"{name} must be among {what}, {unknown[0]!r} is not")


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
ModelName = Annotated[str, AfterValidator(check_model_name)]
Increasing = Annotated[tuple[T, ...], AfterValidator(_increasing)]
Distinct = Annotated[tuple[T, ...], AfterValidator(_distinct)]
EmbeddingTasks = Annotated[Distinct[str], among(LOCAL_TASKS)]
Topics = Annotated[Distinct[str], among((*TOPIC_TASKS, *GLUE_TASKS))]


def check_mixture(params: Any) -> None:
    """Refuse the shape of a mixture of experts that is to be built, given as parameters of these names.

    Raises:
        ValueError: Not fewer experts per token than there are, or widths that heads do not divide.
    """
    if params.top_k >= params.experts:
        raise ValueError(f"top_k must be below experts = {params.experts}, got {params.top_k}")
    if params.hidden % params.heads or params.heads % params.key_value_heads:
        raise ValueError(
            "hidden must be a multiple of heads, and heads of key_value_heads, "
            f"got {params.hidden}, {params.heads}, {params.key_value_heads}"
        )


class StudyParams(BaseModel):
    """Parameters of a study; unknown names are errors, and nothing is changed afterwards.

    Attributes:
        study: Name of the study: that of its package and of its notebook.
        subsets: Parameter -> the parameter that its values must be among.
        code_in_key: False for a run of hours that is made again only when a parameter changes, one of which says
            what version of the recipe it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: ClassVar[str]
    subsets: ClassVar[Mapping[str, str]] = {}
    code_in_key: ClassVar[bool] = True

    @model_validator(mode="after")
    def _subsets(self) -> Self:
        for part, whole in self.subsets.items():
            value = getattr(self, part)
            values = value if isinstance(value, tuple | dict) else (value,)
            _check_among(part, values, getattr(self, whole), whole)
        return self

    @classmethod
    def from_cell(cls, scope: Mapping[str, Any]) -> Self:
        """Return the parameters that a notebook's cell has set.

        Args:
            scope: ``globals()`` of the notebook.

        Raises:
            ValueError: When a parameter is not set, or a name is nearly that of a parameter.
            pydantic.ValidationError: When a value is not valid.
        """
        fields = cls.model_fields
        for name, value in scope.items():
            plain = isinstance(value, _PLAIN) and not name.startswith("_")
            if plain and name not in fields and difflib.get_close_matches(name, fields, 1, _NEAR):
                raise ValueError(f"{cls.study} has no parameter {name!r}: {hint(name, fields)}")
        if missing := [name for name in fields if name not in scope]:
            raise ValueError(
                f"{cls.study}: {', '.join(missing)} not set: run the cell tagged 'parameters' first, "
                "which sets every parameter"
            )
        return cls(**{name: scope[name] for name in fields})

    def drawing_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the drawing key of a job: of the ledger's claims that it judges."""
        return ledger.hashes(self.study)

    def resources(self) -> dict[str, float]:
        """Return what a job needs of a machine: published weights in bfloat16 are meant for a GPU."""
        gpu = getattr(self, "dtype", None) == "bfloat16" and published(getattr(self, "model", ""))
        return {"GPU": 1} if gpu else {}

    def slug(self) -> str:
        """Return a short name of the parameter set: the model's."""
        return Path(getattr(self, "model", self.study)).name
