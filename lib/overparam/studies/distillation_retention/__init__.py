"""Distillation retention: how much of its teacher a student with a tenth of the parameters keeps.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from overparam.assets.catalogue import published
from overparam.evaluate import LOCAL_TASKS, TOPIC_TASKS
from overparam.experiment.params import (
    Count,
    Distinct,
    EmbeddingTasks,
    Increasing,
    ModelName,
    Positive,
    Share,
    StudyParams,
    Topics,
)


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "distillation_retention"
    subsets: ClassVar = {"task_share": "shares", "kinds": "general_models"}

    teacher: ModelName = Field("all-MiniLM-L6-v2", description="text encoder: bundled name, hub id or folder")
    shares: Distinct[Share] = Field(
        (0.1, 0.05), min_length=1, description="sizes of the students: shares of the teacher's parameters"
    )
    task_share: Share = Field(0.1, description="one of shares: the student that is fine-tuned and compared")
    max_length: int = Field(64, ge=8, description="maximum tokens per text")
    seed: int = Field(42, description="random seed of data, initial weights and bootstrap")

    texts: int = Field(8000, ge=64, description="unlabelled texts that the students learn to embed")
    objective: Literal["cosine", "relational", "both"] = Field(
        "cosine", description="loss: cosine of the embeddings, similarities within a batch, or both"
    )
    steps: Count = Field(600, description="training steps of a student on unlabelled texts")
    batch_size: int = Field(32, ge=4, description="texts per training step of a student")
    learning_rate: Positive = Field(1e-3, description="peak learning rate of a student")
    suite: EmbeddingTasks = Field(
        tuple(task for task in LOCAL_TASKS if task != "ReutersR52"),
        min_length=1,
        description="embedding tasks; ReutersR52 takes a third of all texts",
    )
    suite_items: int = Field(60, ge=20, description="items per embedding task")

    topics: Topics = Field(
        TOPIC_TASKS, min_length=1, description="classification tasks with labels; from the hub: glue/sst2, …"
    )
    labelled: Count = Field(800, description="labelled training texts per classification task")
    unlabelled: int = Field(1600, ge=0, description="further texts per task that only the teacher labels")
    test_items: int = Field(400, ge=20, description="test texts per classification task")
    characters: int = Field(256, ge=32, description="maximum characters per article or post")
    teacher_steps: Count = Field(150, description="training steps when the teacher is fine-tuned on a task")
    teacher_batch_size: int = Field(16, ge=4, description="texts per training step of the teacher")
    teacher_learning_rate: Positive = Field(2e-4, description="peak learning rate of the teacher")
    student_steps: Count = Field(150, description="training steps when a student is fine-tuned on a task")
    student_batch_size: int = Field(32, ge=4, description="texts per training step of a fine-tuned student")
    student_learning_rate: Positive = Field(1e-3, description="peak learning rate of a fine-tuned student")
    temperature: Positive = Field(2.0, description="softmax temperature of the teacher's soft targets")
    soft_weight: float = Field(0.9, ge=0, le=1, description="weight of the soft targets; labels get the rest")
    train_seeds: tuple[int, ...] = Field(
        (42,),
        min_length=1,
        description="training seeds of teachers and of the task_share student; other students use the first",
    )

    per_class: Increasing[Count] = Field((8, 32), description="labelled texts per class, smallest set first")
    ready_made: tuple[ModelName, ...] = Field(
        (), description="existing encoders scored beside the students on the embedding tasks"
    )
    general_models: tuple[ModelName, ...] = Field(
        ("all-MiniLM-L6-v2",), description="encoders used without training, under a linear probe"
    )
    kinds: dict[str, Literal["encoder", "decoder"]] = Field(
        {}, description="kind of a general model, if its folder and configuration do not say it"
    )
    decoder_teacher: ModelName | None = Field(
        None, description="decoder to distil by next-token prediction; null: none"
    )
    decoder_student: ModelName | None = Field(
        None, description="student of that decoder, with the same tokenizer"
    )
    decoder_texts: int = Field(512, ge=8, description="texts that the decoder student learns from")
    decoder_steps: Count = Field(50, description="training steps of the decoder student")
    decoder_batch_size: Count = Field(8, description="texts per training step of the decoder student")
    decoder_learning_rate: Positive = Field(1e-5, description="peak learning rate of the decoder student")
    cost_texts: int = Field(32, ge=2, description="texts per batch when costs are measured")
    cost_repeats: int = Field(7, ge=3, description="timed repetitions when costs are measured")

    retention_target: float = Field(
        90.0, gt=0, le=100, description="score kept according to the claim, % of the teacher's"
    )
    export: bool = Field(True, description="save the first seed's students as folders in the user's cache")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.decoder_teacher is None) != (self.decoder_student is None):
            raise ValueError("decoder_teacher and decoder_student are given together, or both are null")
        return self

    def resources(self) -> dict[str, float]:
        """Return what a job needs of a machine: decoders from the hub are meant for a GPU."""
        return {"GPU": 1} if self.decoder_teacher and published(self.decoder_teacher) else {}

    def slug(self) -> str:
        """Return a short name of the parameter set: the teacher's."""
        return Path(self.teacher).name
