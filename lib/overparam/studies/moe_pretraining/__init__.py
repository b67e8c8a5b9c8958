"""Pre-training of a small mixture-of-experts translator: the model that the expert-pruning study prunes.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Params(BaseModel):
    """Parameters of the pre-training; every count is a whole number, every share is between 0 and 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    code_in_key: ClassVar[bool] = False  # hours of training: `version` says when the recipe's outcome changed

    vocabulary: Annotated[int, Field(ge=300)] = Field(8000, description="tokens, shared by all languages")
    hidden: Count = Field(256, description="width of the hidden states")
    layers: Count = 6
    experts: Count = Field(16, description="experts a layer")
    top_k: Count = Field(2, description="experts of a token")
    expert_width: Count = 256
    heads: Count = 8
    key_value_heads: Count = 4
    embedding_donor: str | None = Field(
        "gemma-3-270m", description="its embeddings' principal components begin ours; null: random"
    )

    unseen_share: Share = Field(0.35, description="share of the verses also translated into Italian")
    reverse_share: Share = Field(0.5, description="share of the verses also translated into English")
    plain_share: Annotated[float, Field(ge=0)] = Field(
        0.3, description="pieces of English news and newsgroup text for each verse"
    )
    max_texts: Count | None = Field(None, description="use the first texts of each corpus only, for a trial")

    steps: Count = 900
    rows: Count = Field(24, description="rows of a batch")
    row_length: Annotated[int, Field(ge=128)] = Field(320, description="tokens of a row")
    accumulate: Count = Field(2, description="batches a step")
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    warmup: Annotated[int, Field(ge=0)] = 30
    decay: Annotated[int, Field(ge=0)] = Field(260, description="steps of the linear decay at the end")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    balance: tuple[tuple[int, float], ...] = Field(
        ((0, 0.01), (350, 0.1)),
        description="(from step, factor) of the load-balancing loss, which looks at each layer by itself",
    )
    compiled: bool = Field(True, description="compile the decoder, which takes a minute or two once")
    seed: int = 42
    version: int = Field(1, description="raised when a change to the code changes the outcome")

    checkpoint_every: Count = Field(50, description="steps between checkpoints and points of the curve")
    validation_batches: Count = 4
    test_verses: Annotated[int, Field(ge=1, le=1000)] = Field(
        200, description="held-out verses translated a direction, and texts of each plain corpus"
    )
    beams: Count = 4
    minimum_load: Share = Field(
        0.25, description="share of the uniform load below which an expert counts as idle"
    )
    minimum_busy: Share = Field(0.9, description="share of all experts that must not be idle")
    goal: Annotated[float, Field(ge=0)] = Field(42.0, description="chrF++ from English into each language")

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.top_k >= self.experts:
            raise ValueError(f"top_k must be below experts = {self.experts}, got {self.top_k}")
        if self.hidden % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                "hidden must be a multiple of heads, and heads of key_value_heads, "
                f"got {self.hidden}, {self.heads}, {self.key_value_heads}"
            )
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup and decay must fit into steps = {self.steps}")
        return self

    def slug(self) -> str:
        """Short name of a parameter set."""
        return "moe-translator"
