"""Trailing-layer pruning of text encoders: what L3Prune (arXiv 2410.14578) claims, measured on any model.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from overparam.evaluate import LOCAL_TASKS
from overparam.experiment.params import Count, Distinct, ModelName, Percent, Positive, StudyParams

_PACKAGED_SOURCES = 4  # of training triplets; a batch comes from one of them


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "trailing_layer_pruning"
    subsets: ClassVar = {"rule_tasks": "tasks"}

    model: ModelName = Field("gemma-3-270m", description="bundled name, hub id or folder")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 where the processor is fast at it"
    )
    pooling: Literal["own", "weighted_mean", "mean", "last", "cls"] = Field(
        "own", description="how tokens are pooled; own: as the model's folder says, or else weighted_mean"
    )
    recipe: Literal["plain", "published"] = Field(
        "plain", description="how texts are read, pooled and sampled; published: as in L3Prune's code"
    )
    chat_template: str | None = Field(
        "own",
        description="published recipe: template, a text with {text}; own: the tokenizer's; null: none",
    )
    instructions: bool = Field(False, description="put each task's instruction before its texts when scored")
    max_length: Count = Field(128, description="maximum tokens per text")
    batch_tokens: Count = Field(1024, description="maximum tokens per encoding batch, padding included")
    seed: int = Field(42, description="random seed of data, batches and bootstrap")

    tasks: Distinct[str] = Field(LOCAL_TASKS, min_length=1, description="embedding tasks, local or MTEB's")
    max_items: int | None = Field(40, ge=20, description="items per task; null: all, at most 1000")

    training_data: str | None = Field(
        None, description="folder or hub id of published triplets; null: texts that come with the suite"
    )
    max_chars: int = Field(96, ge=16, description="maximum characters per training text")
    loss_triplets: Count = Field(192, description="triplets of the initial loss")
    loss_batch_size: int = Field(64, ge=2, description="triplets per batch of the initial loss")
    loss_scale: float | None = Field(
        None,
        gt=0,
        description="factor on the cosine, 1 / temperature; null: the recipe's, plain 20, published 50",
    )

    extra_depths: tuple[Count, ...] = Field((), description="further depths to train, as layers kept")
    train_seeds: tuple[int, ...] = Field((42,), min_length=1, description="training seeds")
    train_steps: Count = Field(16, description="training steps per depth")
    train_batch_size: int = Field(12, ge=2, description="triplets per training step")
    learning_rate: Positive = Field(5e-4, description="peak learning rate of LoRA training")
    warmup_steps: int = Field(4, ge=0, description="steps of linear warm-up")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="LoRA dropout; published: 0.05, which takes a third of the time on a CPU"
    )
    train_scale: Positive = Field(20.0, description="factor on the cosine in training, 1 / temperature")

    rule_tasks: tuple[str, ...] = Field(
        ("VerseParaphrase", "VerseFrench", "VerseGerman", "VersePairs"),
        description="tasks on which rules for choosing layers are compared; some of tasks",
    )
    random_seeds: int = Field(3, ge=3, description="random selections of layers, as a control")
    cost_texts: int = Field(16, ge=2, description="texts per batch when costs are measured")
    cost_repeats: int = Field(5, ge=3, description="timed repetitions when costs are measured")

    negligible_margin: Percent = Field(
        1.5, description="negligible loss, points: the largest published one of a `large` pick (Llama-3-8B)"
    )
    modest_margin: Percent = Field(
        6.9, description="modest loss, points: the largest published one of a `small` pick (Llama-3-8B)"
    )
    export: bool = Field(
        True, description="save the trained picks as sentence-transformers folders in the user's cache"
    )

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
            from overparam.evaluate.registry import check_task  # loads mteb, which local tasks do not need

            for task in value:
                check_task(task)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
