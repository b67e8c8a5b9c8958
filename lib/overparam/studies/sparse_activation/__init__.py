"""What sparse activation saves: a mixture of experts against dense models, and zeros in the inputs of matrices.

This module is light: it holds the parameters. The steps are in `study`, `training` and `inference`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overparam.assets import trained
from overparam.experiment.params import (
    Count,
    Distinct,
    Increasing,
    ModelName,
    Percent,
    Positive,
    Share,
    StudyParams,
    among,
    check_mixture,
)

ACTIVE, MIXTURE, TOTAL = "dense, active size", "mixture", "dense, total size"
RANDOM, UPCYCLED = "mixture, random router", "mixture, upcycled"
ARMS = (ACTIVE, MIXTURE, TOTAL, RANDOM, UPCYCLED)
KINDS = ("news", "chat", "documentation", "code", "languages")  # of text
Kind = Literal["news", "chat", "documentation", "code", "languages"]


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "sparse_activation"
    code_in_key: ClassVar = False  # hours of training: `version` says when the recipe's outcome changed

    arms: Annotated[Distinct[str], among(ARMS)] = Field(
        ARMS,
        description="what is trained; the mixture, and dense models of its active and of its total size, at least",
    )
    vocabulary: int = Field(4000, ge=300, description="tokens of the vocabulary")
    hidden: Count = Field(128, description="width of the hidden states")
    layers: Count = Field(4, description="transformer blocks")
    heads: Count = Field(4, description="attention heads")
    key_value_heads: Count = Field(2, description="heads of the keys and values")
    experts: int = Field(8, ge=2, description="experts per layer")
    top_k: Count = Field(2, description="experts that each token uses per layer")
    expert_width: Count = Field(128, description="hidden units per expert")

    kinds: Annotated[Distinct[str], among(KINDS)] = Field(
        KINDS, description="kinds of text, in equal shares of the tokens"
    )
    max_texts: Count | None = Field(
        None, description="use only the first texts of each kind, for a trial; null: all"
    )
    steps: Count = Field(700, description="optimizer steps of every training")
    rows: Count = Field(16, description="rows per step")
    row_length: int = Field(200, ge=32, description="tokens per row")
    warmup: int = Field(
        40, ge=0, description="steps of linear warm-up; the learning rate is constant afterwards"
    )
    learning_rates: Increasing[Positive] = Field(
        (1e-3, 3e-3, 1e-2),
        min_length=1,
        description="peak learning rates of AdamW, the same choice for every model",
    )
    tuning_steps: Count = Field(150, description="steps after which the learning rate is chosen")
    balance: Percent = Field(0.01, description="factor of the load-balancing loss of the mixture")
    capacity: float = Field(
        1.5, ge=1, description="tokens that an expert takes in training, in multiples of the mean load"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products in training; bfloat16 is fast with AMX and slow without"
    )
    seeds: Distinct[int] = Field(
        (42, 43, 44), min_length=1, description="of weights and of the order of the texts"
    )
    checkpoint_every: Count = Field(50, description="steps between checkpoints and points of the curves")
    validation_batches: Count = Field(2, description="held-out batches per kind of text and point")
    version: Count = Field(
        1, description="version of the recipe; raise it when a code change changes a training"
    )
    committed_curves: bool = Field(
        False,
        description="judge by the reference record's curves; the training of this run is drawn beside them",
    )

    routed_model: ModelName = Field("moe-translator", description="mixture whose routing is disturbed")
    top_ks: Increasing[Count] = Field((1, 2, 4), description="experts per token that are tried on it")
    routed_verses: Count = Field(
        100, description="held-out verses that it translates, from English into French"
    )
    control_seeds: Distinct[int] = Field(
        (0, 1, 2), min_length=1, description="of shuffled experts, random routers and random zeros"
    )

    model: ModelName | None = Field(
        "gemma-3-270m",
        description="dense decoder whose activations are made sparse; null: none, that part is left out",
    )
    shares: Increasing[Share] = Field(
        (0.3, 0.5, 0.7), description="of the inputs of matrices that become zeros"
    )
    calibration_kind: Kind = Field("documentation", description="kind of text that the thresholds come from")
    test_kind: Kind = Field("news", description="kind of text that quality is measured on")
    calibration_texts: Count = Field(16, description="texts that the thresholds come from")
    test_texts: Count = Field(40, description="texts that quality is measured on")
    text_length: int = Field(128, ge=8, description="tokens of each of these texts at most")
    time_repeats: int = Field(30, ge=3, description="timed products, tokens, and training steps")

    margin: Percent = Field(2.0, description="what counts as kept: rise of the perplexity, %")
    saving: Percent = Field(50.0, description="what counts as saved, % of the cost at equal loss")
    flops_margin: Percent = Field(1.0, description="counted operations may differ from the closed form, %")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_mixture(self)
        if missing := {ACTIVE, MIXTURE, TOTAL} - set(self.arms):
            raise ValueError(f"arms must have {', '.join(sorted(missing))}: nothing can be compared without")
        if UPCYCLED in self.arms and self.experts % self.top_k:
            raise ValueError(
                f"upcycling needs experts = {self.experts} to be a multiple of top_k = {self.top_k}"
            )
        if not self.warmup <= self.tuning_steps <= self.steps:
            raise ValueError(f"warmup <= tuning_steps <= steps must hold, got {self.warmup}, {self.tuning_steps}, "
                             f"{self.steps}")  # fmt: skip
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key: of the mixture's weights, and of the curves that are read."""
        routed = trained.hashes(self.routed_model) if self.routed_model == "moe-translator" else {}
        return routed | (
            trained.table_hash(self.study, self.slug(), "curves.csv") if self.committed_curves else {}
        )

    def slug(self) -> str:
        """Return the name of the mixture that is trained."""
        return f"{self.experts}-experts-top-{self.top_k}"
