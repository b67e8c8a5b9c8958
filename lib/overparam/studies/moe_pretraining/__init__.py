"""Pre-training of a small mixture-of-experts translator: the model that the expert-pruning study prunes.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overparam.assets import trained
from overparam.experiment.params import Count, Percent, Positive, StudyParams, check_mixture

Proportion = Annotated[float, Field(ge=0, le=1)]


class Params(StudyParams):
    """Parameters of the pre-training."""

    study: ClassVar = "moe_pretraining"
    code_in_key: ClassVar = False  # hours of training: `version` says when the recipe's outcome changed

    architecture: Literal["gpt_oss", "qwen3_moe"] = Field(
        "gpt_oss",
        description="gpt_oss: learned attention sinks, biases, clamped SwiGLU; qwen3_moe: none of these",
    )
    sinks: bool = Field(
        True, description="learned attention sinks; false: the same gpt_oss model without them"
    )
    vocabulary: int = Field(8000, ge=300, description="tokens of the vocabulary, shared by all languages")
    hidden: Count = Field(256, description="width of the hidden states")
    layers: Count = Field(6, description="transformer blocks")
    experts: Count = Field(32, description="experts per layer")
    top_k: Count = Field(4, description="experts that each token uses per layer")
    expert_width: Count = Field(128, description="hidden units per expert")
    heads: Count = Field(4, description="attention heads")
    key_value_heads: Count = Field(2, description="heads of the keys and values")
    embedding_donor: str | None = Field(
        "gemma-3-270m",
        description="model whose embeddings' principal components initialize ours; null: random",
    )

    translation_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the training tokens that is translation; the rest is plain text",
    )
    unseen_share: Proportion = Field(0.35, description="share of the verses also translated into Italian")
    reverse_share: Proportion = Field(0.5, description="share of the verses also translated into English")
    max_texts: Count | None = Field(
        None, description="use only the first texts of each corpus, for a trial; null: all"
    )

    steps: int = Field(
        2700, ge=0, description="optimizer steps; 0: no training, the repository's translator is measured"
    )
    rows: Count = Field(24, description="rows per batch")
    row_length: int = Field(320, ge=128, description="tokens per row")
    accumulate: Count = Field(2, description="batches per optimizer step")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all"
    )
    learning_rate: Positive = Field(3e-3, description="peak learning rate")
    warmup: int = Field(30, ge=0, description="steps of linear warm-up")
    decay: int = Field(540, ge=0, description="steps of linear decay at the end")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="label smoothing of the training loss; 0: none"
    )
    balance: tuple[tuple[int, float], ...] = Field(
        ((0, 0.1),),
        description="(from step, factor) of the load-balancing loss, which is computed per layer",
    )
    capacity: Positive | None = Field(
        1.25,
        description="tokens that an expert takes in training, times the mean load; others are dropped; null: all",
    )
    compiled: bool = Field(False, description="compile the decoder, which takes a minute or two once")
    seed: int = Field(42, description="random seed of weights, order of the texts, and samples")
    version: int = Field(
        2, description="version of the recipe; raise it when a code change changes the model"
    )

    checkpoint_every: Count = Field(50, description="steps between checkpoints and points of the curve")
    validation_batches: Count = Field(4, description="held-out batches per point of the curve")
    test_verses: int = Field(
        200,
        ge=1,
        le=1000,
        description="held-out verses translated per direction, and texts of each plain corpus",
    )
    beams: Count = Field(4, description="beams of the beam search")
    removed_verses: int = Field(
        16,
        ge=0,
        le=1000,
        description="verses per language on which the model is measured without each expert in turn; 0: not measured",
    )
    minimum_load: Proportion = Field(
        0.25, description="an expert is idle below this share of the uniform load"
    )
    minimum_busy: Proportion = Field(0.9, description="share of all experts that must not be idle")
    removal_margin: Positive = Field(
        0.1, description="how much the loss may rise without any one expert, nats a token"
    )
    goal: Percent = Field(48.0, description="chrF++ to reach from English into each language")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_mixture(self)
        if self.architecture == "qwen3_moe" and (self.capacity is not None or not self.sinks):
            raise ValueError(
                "qwen3_moe has no sinks to leave out and no capacity: give sinks true and capacity null"
            )
        if self.compiled and self.capacity is not None:
            raise ValueError("compiled needs capacity null: batches without padding differ in length")
        if self.steps and self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup and decay must fit into steps = {self.steps}")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return hashes for the measuring key: without training, of the weights that are measured."""
        return {} if self.steps else trained.hashes(self.slug())

    def slug(self) -> str:
        """Return the name of the model that is trained, or measured."""
        if not self.steps:
            return "moe-translator"
        if self.architecture == "qwen3_moe":
            return "moe-translator-qwen3"
        return "moe-translator" if self.sinks else "moe-translator-without-sinks"
