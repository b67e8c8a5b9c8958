"""Trailing-layer pruning of text encoders: what L3Prune (arXiv 2410.14578) claims, measured on any model.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from overparam.assets.catalogue import check_model_name, published
from overparam.evaluate import LOCAL_TASKS
from overparam.record import ledger

_PACKAGED_SOURCES = 4  # of training triplets; a batch comes from one of them

Count = Annotated[int, Field(ge=1)]


class Params(BaseModel):
    """Parameters of the study; every count is a whole number, every share is named so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("gemma-3-270m", description="bundled name, hub id or folder")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is fast"
    )
    pooling: Literal["own", "weighted_mean", "mean", "last", "cls"] = Field(
        "own", description="own: what the model's folder says, else weighted_mean; any other replaces it"
    )
    recipe: Literal["plain", "published"] = Field(
        "plain", description="how texts are read, pooled and drawn; published: as in L3Prune's code"
    )
    chat_template: str | None = Field(
        "own", description="of the published recipe: a text with {text}; own: the tokenizer's; null: none"
    )
    instructions: bool = Field(False, description="put each task's instruction before its texts when scored")
    max_length: Count = Field(128, description="tokens of a text")
    batch_tokens: Count = Field(1024, description="tokens of an encoding batch, padding included")
    seed: int = Field(42, description="of data, batches and bootstrap")

    tasks: tuple[str, ...] = Field(LOCAL_TASKS, min_length=1, description="local or MTEB tasks")
    max_items: Annotated[int, Field(ge=20)] | None = Field(
        40, description="items judged a task; null: all, at most 1000"
    )

    training_data: str | None = Field(
        None, description="folder or hub id of published triplets; null: packaged texts"
    )
    max_chars: Annotated[int, Field(ge=16)] = Field(96, description="characters of a training text")
    loss_triplets: Count = Field(192, description="triplets of the initial loss")
    loss_batch_size: Annotated[int, Field(ge=2)] = 64
    loss_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="factor on the cosine, 1 / temperature; null: the recipe's, plain 20, published 50"
    )

    extra_depths: tuple[Count, ...] = Field(
        (), description="train at these depths too, counts of blocks kept"
    )
    train_seeds: tuple[int, ...] = Field((42,), min_length=1)
    train_steps: Count = 16
    train_batch_size: Annotated[int, Field(ge=2)] = 12
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 4
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="published: 0.05, which costs a third of the time on a CPU"
    )
    train_scale: Annotated[float, Field(gt=0)] = 20.0

    rule_tasks: tuple[str, ...] = Field(
        ("VerseParaphrase", "VerseFrench", "VerseGerman", "VersePairs"),
        description="tasks on which rules that keep other than leading layers are compared; a subset of tasks",
    )
    random_seeds: Annotated[int, Field(ge=3)] = Field(3, description="random choices of layers")
    cost_texts: Annotated[int, Field(ge=2)] = Field(
        16, description="texts of a batch when costs are measured"
    )
    cost_repeats: Annotated[int, Field(ge=3)] = 5

    negligible_margin: Annotated[float, Field(ge=0)] = Field(
        1.5, description="points: the largest published loss of a `large` pick (Llama-3-8B)"
    )
    modest_margin: Annotated[float, Field(ge=0)] = Field(
        6.9, description="points: the largest published loss of a `small` pick (Llama-3-8B)"
    )
    export: bool = Field(
        True, description="save the trained picks as sentence-transformers folders in the user's cache"
    )

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return check_model_name(value)

    @field_validator("chat_template")
    @classmethod
    def _one_place(cls, value: str | None) -> str | None:
        if value not in (None, "own") and value.count("{text}") != 1:
            raise ValueError(f"chat_template must be own, null, or hold {{text}} once, got {value!r}")
        return value

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(LOCAL_TASKS):
            from overparam.evaluate.registry import (
                check_task,
            )  # loads mteb, which local tasks need not pay for

            for task in value:
                check_task(task)
        if len(set(value)) < len(value):
            raise ValueError("tasks repeat")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        outside = [task for task in self.rule_tasks if task not in self.tasks]
        if outside:
            raise ValueError(f"rule_tasks must be among tasks, {outside[0]!r} is not")
        if self.warmup_steps >= self.train_steps:
            raise ValueError(
                f"warmup_steps must be below train_steps = {self.train_steps}, got {self.warmup_steps}"
            )
        if self.training_data is None and self.train_steps < _PACKAGED_SOURCES:
            raise ValueError(
                f"train_steps must be at least {_PACKAGED_SOURCES}, one for each packaged source"
            )
        if self.loss_triplets < self.loss_batch_size:
            raise ValueError(f"loss_triplets must be at least loss_batch_size = {self.loss_batch_size}")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key of a job: of the ledger's claims that it judges."""
        return ledger.hashes("trailing_layer_pruning")

    def resources(self) -> dict[str, float]:
        """Return what a job needs of a machine: published weights in bfloat16 are meant for a GPU."""
        return {"GPU": 1} if self.dtype == "bfloat16" and published(self.model) else {}

    def slug(self) -> str:
        """Short name of a parameter set: the model's."""
        return Path(self.model).name
