"""What parameters are: counted exactly, watched while they are trained, and what more of them do.

This module is light: it holds the parameters. The steps are in `study`, `watch`, `learning` and `tuning`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

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
)

Range = Annotated[
    Increasing[Positive], Field(min_length=3, max_length=3)
]  # low, middle, high of an assumption


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "anatomy"

    model: ModelName = Field("moe-translator", description="mixture that is counted, drawn and fine-tuned")
    published: Distinct[str] | None = Field(
        None, description="published models whose parameters are tabled; null: all"
    )
    length: Count = Field(1024, description="tokens of a sequence, for operations a token")
    utilisation: Range = Field(
        (0.3, 0.4, 0.5), description="share of the devices' peak, assumed: low, middle, high"
    )
    price: Range = Field((1.5, 2.0, 4.0), description="of a device hour in dollars, assumed")
    overhead: Range = Field(
        (1.05, 1.1, 1.3), description="energy of a data centre ÷ that of its devices, assumed"
    )
    grid: Range = Field((0.05, 0.4, 0.7), description="kg of CO2e a kWh, assumed")

    rates: Increasing[Positive] = Field(
        (0.2, 0.46, 0.49),
        description="learning rates with which two weights find a line: arrives, oscillates, diverges",
    )
    watched_width: int = Field(
        128, ge=8, description="width of the small transformer whose weights are watched"
    )
    watched_steps: Count = Field(200, description="optimizer steps for which one weight is watched")
    zeroed_weights: int = Field(100, ge=10, description="weights that are set to zero, one at a time")
    differences: Count = Field(10, description="derivatives that are compared with central differences")

    capacity_widths: Increasing[Count] = Field(
        (8, 16, 24), description="widths of models that learn random strings by heart; none: left out"
    )
    capacity_epochs: Count = Field(300, description="times that such a model sees each string")
    capacity_bits: Positive = Field(4.0, description="bits to learn, for each parameter of the model")

    widths: Increasing[Count] = Field(
        (24, 48, 96), description="widths of models that overfit a small corpus; none: left out"
    )
    corpus_bytes: int = Field(12_000, ge=500, description="bytes of text that they are trained on")
    epochs: Count = Field(20, description="times that they see it")
    dropout: Share = Field(0.2, description="of the largest of them once more")

    tuned: bool = Field(True, description="fine-tune the model with LoRA and in full")
    tuning_pairs: Count = Field(48, description="pairs of texts that it is fine-tuned on")
    tuning_epochs: Count = Field(6, description="times that it sees them")
    tuning_rank: Count = Field(8, description="rank of the adapters")
    tuning_rates: Increasing[Positive] = Field(
        (3e-3, 1e-2), min_length=1, description="learning rates, the best on validation texts is taken"
    )
    tuning_items: int = Field(100, ge=2, description="pairs on which quality is measured")

    law_widths: Increasing[Count] = Field(
        (), description="widths of models for a scaling law, of which the largest is held out; none: left out"
    )
    law_bytes: Increasing[Count] = Field(
        (250_000, 500_000, 1_000_000),
        min_length=3,
        description="bytes of text after which their loss is measured",
    )
    law_rates: Increasing[Positive] = Field(
        (2e-3, 5e-3), min_length=1, description="learning rates of these models"
    )

    sentence: str = Field(
        "In the beginning God created the heavens and the earth.",
        description="whose routing is drawn",
    )
    seeds: Distinct[int] = Field(
        (42,), min_length=1, description="of weights, order of texts and choice of weights"
    )
    within: Percent = Field(2.0, description="published and counted parameters may differ by so much, %")
    on_par: Positive = Field(0.05, description="losses may differ by so many nats a token and count as equal")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("capacity_widths", "widths", "law_widths"):
            if odd := [width for width in getattr(self, name) if width % 4]:
                raise ValueError(f"{name} must be multiples of 4, the heads of these models, got {odd[0]}")
        if self.watched_width % 4:
            raise ValueError(f"watched_width must be a multiple of 4, got {self.watched_width}")
        if 0 < len(self.law_widths) < 4:
            raise ValueError(
                f"law_widths needs at least 4 sizes, three to fit and one held out, got {self.law_widths}"
            )
        if self.overhead[0] < 1 or self.utilisation[-1] > 1:
            raise ValueError(
                "overhead must be at least 1 and utilisation at most 1, "
                f"got {self.overhead} and {self.utilisation}"
            )
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key: of the model's weights."""
        return trained.hashes(self.model) if self.model == "moe-translator" else {}
