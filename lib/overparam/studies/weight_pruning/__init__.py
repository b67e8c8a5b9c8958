"""Weight pruning: which share of single weights can be set to zero, by which rule, and what zeros buy.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overparam.experiment.params import (
    Count,
    Distinct,
    EmbeddingTasks,
    Increasing,
    ModelName,
    Percent,
    Share,
    StudyParams,
    among,
)

METHODS = ("magnitude", "wanda", "sparsegpt", "wanda_refit")
KINDS = ("news", "chat", "documentation", "code", "languages")  # of text
Kind = Literal["news", "chat", "documentation", "code", "languages"]


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "weight_pruning"

    model: ModelName = Field(
        "all-MiniLM-L6-v2", description="encoder or decoder: bundled name, hub id or folder"
    )
    methods: Annotated[Distinct[str], among(METHODS)] = Field(
        METHODS, min_length=1, description="how the weights that go are chosen; magnitude at least"
    )
    sparsities: Increasing[Share] = Field(
        (0.1, 0.3, 0.5, 0.7), min_length=1, description="shares of the layers' weights that become zero"
    )
    two_of_four: bool = Field(True, description="also two zeros in every four inputs, the pattern of GPUs")
    control_seeds: Distinct[int] = Field((0, 1, 2), min_length=1, description="of random choices, a control")
    seed: int = Field(42, description="of the order of texts")

    calibration_kind: Kind = Field("documentation", description="kind of text that weights are chosen by")
    other_kind: Kind = Field("chat", description="another kind, to see what the choice of text changes")
    calibration_texts: Count = Field(32, description="texts that weights are chosen by")
    fewer_texts: Increasing[Count] = Field(
        (4, 16), description="smaller numbers of them, to see what they change"
    )
    text_length: int = Field(128, ge=8, description="tokens of a text at most")

    tasks: EmbeddingTasks = Field(
        ("LeeSTS", "ReutersR8", "VerseParaphrase", "VerseFrench", "VersePairs"),
        min_length=1,
        description="embedding tasks that an encoder is scored on",
    )
    max_items: int = Field(60, ge=8, description="items per task")
    test_kinds: Annotated[Distinct[str], among(KINDS)] = Field(
        ("news", "documentation", "code"), min_length=1, description="kinds of text that a decoder reads"
    )
    test_texts: int = Field(24, ge=4, description="texts per kind that a decoder reads")
    probe_texts: int = Field(
        8, ge=2, description="texts on which outputs are compared with the unpruned model's"
    )

    bits: Distinct[int] = Field((8, 4, 3), description="bits of rounded weights, compared at equal bytes")
    layer_shares: Increasing[Share] = Field(
        (0.25, 0.5), description="shares of the layers left out from the end, compared at equal bytes"
    )
    product_tokens: Increasing[Count] = Field(
        (1, 64), description="tokens of the sparse products that are timed"
    )
    product_sparsities: Increasing[Share] = Field(
        (0.5, 0.8, 0.9, 0.95), description="shares of zeros of the sparse products that are timed"
    )
    cost_texts: int = Field(16, ge=2, description="texts of a timed batch")
    cost_repeats: int = Field(15, ge=3, description="timed rounds")

    margin: Percent = Field(2.0, description="loss up to which quality counts as unchanged, %")
    time_margin: Percent = Field(3.0, description="change of time that counts as none, %")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "magnitude" not in self.methods:
            raise ValueError("methods must have magnitude: the others are compared with it")
        if self.fewer_texts and self.fewer_texts[-1] >= self.calibration_texts:
            raise ValueError(
                f"fewer_texts must be below calibration_texts = {self.calibration_texts}, got {self.fewer_texts}"
            )
        return self
