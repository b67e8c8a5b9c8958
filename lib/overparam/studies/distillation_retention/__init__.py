"""Distillation retention: how much of its teacher a student with a tenth of the parameters keeps.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from overparam.assets.catalogue import check_model_name, published
from overparam.evaluate import GLUE_TASKS, LOCAL_TASKS, TOPIC_TASKS
from overparam.record import ledger

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Params(BaseModel):
    """Parameters of the study; every count is a whole number, every share is between 0 and 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str = Field("all-MiniLM-L6-v2", description="bundled name, hub id or folder of a text encoder")
    shares: tuple[Share, ...] = Field(
        (0.1, 0.05), min_length=1, description="of the teacher's parameters, embedding tables included"
    )
    task_share: Share = Field(0.1, description="one of shares: the student of the comparisons")
    max_length: Annotated[int, Field(ge=8)] = Field(64, description="tokens of a text")
    seed: int = Field(42, description="of data, first weights and bootstrap")

    texts: Annotated[int, Field(ge=64)] = Field(
        8000, description="unlabelled texts that the students learn to embed"
    )
    objective: Literal["cosine", "relational", "both"] = "cosine"
    steps: Count = 600
    batch_size: Annotated[int, Field(ge=4)] = 32
    learning_rate: Positive = 1e-3
    suite: tuple[str, ...] = Field(
        tuple(task for task in LOCAL_TASKS if task != "ReutersR52"),
        min_length=1,
        description="embedding tasks; ReutersR52 needs a third of all texts",
    )
    suite_items: Annotated[int, Field(ge=20)] = Field(60, description="items judged a task of the suite")

    topics: tuple[str, ...] = Field(
        TOPIC_TASKS, min_length=1, description="classification with labels; of the hub: glue/sst2, …"
    )
    labelled: Count = Field(800, description="labelled texts a task")
    unlabelled: Annotated[int, Field(ge=0)] = Field(
        1600, description="further texts a task that the teacher labels"
    )
    test_items: Annotated[int, Field(ge=20)] = Field(400, description="test texts a task")
    characters: Annotated[int, Field(ge=32)] = Field(256, description="of an article or post")
    teacher_steps: Count = 150
    teacher_batch_size: Annotated[int, Field(ge=4)] = 16
    teacher_learning_rate: Positive = 2e-4
    student_steps: Count = 150
    student_batch_size: Annotated[int, Field(ge=4)] = 32
    student_learning_rate: Positive = 1e-3
    temperature: Positive = Field(2.0, description="of the soft targets")
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.9, description="of the soft targets; the labels have the rest"
    )
    train_seeds: tuple[int, ...] = Field(
        (42,), min_length=1, description="of teachers and of the student of task_share; others take the first"
    )

    per_class: tuple[Count, ...] = Field((8, 32), description="labelled texts of a class, small to large")
    ready_made: tuple[str, ...] = Field(
        (), description="other encoders that stand beside the students in the suite"
    )
    general_models: tuple[str, ...] = Field(
        ("all-MiniLM-L6-v2",), description="encoders that are used as they are, by a probe"
    )
    kinds: dict[str, Literal["encoder", "decoder"]] = Field(
        {}, description="of general_models, where their folders and configurations do not say it"
    )
    decoder_teacher: str | None = Field(None, description="a decoder to distil by next token; null: none")
    decoder_student: str | None = Field(None, description="its student, with the same tokenizer")
    decoder_texts: Annotated[int, Field(ge=8)] = Field(512, description="texts that the decoder learns from")
    decoder_steps: Count = 50
    decoder_batch_size: Count = 8
    decoder_learning_rate: Positive = 1e-5
    cost_texts: Annotated[int, Field(ge=2)] = Field(
        32, description="texts of a batch when costs are measured"
    )
    cost_repeats: Annotated[int, Field(ge=3)] = 7

    retention_target: Annotated[float, Field(gt=0, le=100)] = Field(
        90.0, description="percent of the teacher's score that the claim says is kept"
    )
    export: bool = Field(
        True, description="save the students of the first seed as folders in the user's cache"
    )

    @field_validator("teacher", "decoder_teacher", "decoder_student")
    @classmethod
    def _known_model(cls, value: str | None) -> str | None:
        return value if value is None else check_model_name(value)

    @field_validator("general_models", "ready_made")
    @classmethod
    def _known_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_model_name, value))

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if (self.decoder_teacher is None) != (self.decoder_student is None):
            raise ValueError("decoder_teacher and decoder_student are given together, or both are null")
        if self.task_share not in self.shares:
            raise ValueError(f"task_share must be among shares, {self.task_share} is not")
        if unknown := sorted(set(self.kinds) - set(self.general_models)):
            raise ValueError(f"kinds must be of general_models, {unknown[0]!r} is not among them")
        for name, given, allowed in (
            ("suite", self.suite, LOCAL_TASKS),
            ("topics", self.topics, (*TOPIC_TASKS, *GLUE_TASKS)),
        ):
            if unknown := [task for task in given if task not in allowed]:
                raise ValueError(f"{name} must be among {', '.join(allowed)}, {unknown[0]!r} is not")
        for name, values in (("shares", self.shares), ("topics", self.topics), ("suite", self.suite)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} repeat")
        if list(self.per_class) != sorted(set(self.per_class)):
            raise ValueError(f"per_class must increase, got {self.per_class}")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key of a job: of the ledger's claims that it judges."""
        return ledger.hashes("distillation_retention")

    def resources(self) -> dict[str, float]:
        """Return what a job needs of a machine: decoders from the hub are meant for a GPU."""
        return {"GPU": 1} if self.decoder_teacher and published(self.decoder_teacher) else {}

    def slug(self) -> str:
        """Short name of a parameter set: the teacher's."""
        return Path(self.teacher).name
