"""Expert pruning of mixture-of-experts translators: what arXiv 2605.28042 claims, measured on any such model.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from overparam.assets import trained
from overparam.assets.catalogue import TRAINED, check_model_name, published
from overparam.record import ledger

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0)]


class Params(BaseModel):
    """Parameters of the study; every count is a whole number, every share is between 0 and 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("moe-translator", description="bundled name, hub id or folder of a mixture of experts")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is fast"
    )
    prompt: Literal["tagged", "few_shot", "chat"] = Field(
        "tagged", description="how the model is asked: by a tag, by examples, by a chat template"
    )
    corpus: Literal["verses", "flores"] = Field(
        "verses", description="packaged verses, or FLORES+ from the hub"
    )
    languages: tuple[str, ...] = Field(
        ("fr", "de", "es"), min_length=2, description="languages translated into, for calibration and tests"
    )
    unseen: tuple[str, ...] = Field(("it",), description="tested but never used for calibration")
    seed: int = Field(42, description="of data, random scores and bootstrap")

    calibration_items: Annotated[int, Field(ge=8)] = Field(64, description="sentences a language")
    test_items: Annotated[int, Field(ge=8)] = Field(
        32, description="sentences a direction whose likelihood is measured"
    )
    translated_items: Annotated[int, Field(ge=8)] = Field(
        24, description="sentences a language that are translated"
    )
    plain_characters: Annotated[int, Field(ge=64)] = Field(
        400, description="characters of a news or newsgroup text"
    )
    batch_tokens: Count = Field(2048, description="tokens of a batch, padding included")
    max_new_tokens: Count | None = Field(
        None, description="of a translation; null: twice the source's tokens and 20"
    )

    shares: tuple[Share, ...] = Field(
        (0.25, 0.5, 0.625, 0.6875, 0.75, 0.875), min_length=1, description="shares of the experts pruned"
    )
    random_seeds: Annotated[int, Field(ge=3)] = Field(3, description="random choices of experts")
    idle_below: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="share of the uniform load, over all texts here, below which an expert is idle"
    )

    recovery_shares: tuple[Share, ...] = Field((0.5, 0.75, 0.875), description="some of shares")
    recovery_items: Annotated[int, Field(ge=8)] = Field(
        240, description="training sentences, each in every language"
    )
    recovery_steps: Count = 16
    recovery_rows: Count = Field(8, description="rows of a batch")
    recovery_row_length: Annotated[int, Field(ge=64)] = 320
    recovery_learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    lora_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    recovery_seeds: tuple[int, ...] = Field((42,), min_length=1)

    comet: str | None = Field(
        None,
        description="COMET model that scores the translations too, such as Unbabel/XCOMET-XL; null: chrF++ alone",
    )
    dense_reference: str | None = Field(
        "gemma-3-270m", description="a dense model asked by examples on the same test; null: none"
    )
    dense_items: Annotated[int, Field(ge=2)] = Field(8, description="sentences a language that it translates")
    cost_texts: Annotated[int, Field(ge=2)] = Field(
        16, description="texts of a batch when costs are measured"
    )
    cost_repeats: Annotated[int, Field(ge=3)] = 5
    cost_new_tokens: Count = Field(24, description="tokens generated a text when costs are measured")

    negligible_margin: Percent = Field(
        2.0, description="percent of the baseline's score; published at half of the experts: 1.3 % of xCOMET"
    )
    minor_margin: Percent = Field(
        9.0, description="percent of the baseline's score; published at 69 %: 8.8 % of xCOMET"
    )
    recovered_margin: Percent = Field(
        5.0, description="percent of the baseline's score; published at 75 % after recovery: 4.2 % of xCOMET"
    )
    transfer_margin: Percent = Field(
        3.0, description="percent of chrF++ that an unseen language may lose beyond the seen ones"
    )
    usable_margin: Percent = Field(
        15.0, description="percent of the baseline's score that a usable translator may lose"
    )

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return check_model_name(value)

    @field_validator("dense_reference")
    @classmethod
    def _known_reference(cls, value: str | None) -> str | None:
        return value if value is None else check_model_name(value)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        every = (*self.languages, *self.unseen)
        if len(set(every)) < len(every) or "en" in every:
            raise ValueError(
                f"languages and unseen must be different languages other than English, got {every}"
            )
        if outside := [share for share in self.recovery_shares if share not in self.shares]:
            raise ValueError(f"recovery_shares must be among shares, {outside[0]} is not")
        if list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"shares must increase, got {self.shares}")
        if self.translated_items > self.test_items or self.dense_items > self.translated_items:
            raise ValueError("dense_items must be at most translated_items, and those at most test_items")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key of a job: of weights that no pin determines, and of the ledger."""
        weights = trained.hashes(self.model) if self.model in TRAINED else {}
        return weights | ledger.hashes("moe_expert_pruning")

    def resources(self) -> dict[str, float]:
        """Return what a job needs of a machine: published weights in bfloat16 are meant for a GPU."""
        return {"GPU": 1} if self.dtype == "bfloat16" and published(self.model) else {}

    def needs(self) -> dict[str, str]:
        """Return the study that trains the model, if one of this suite does, and what is missing of its outcome."""
        if self.model not in TRAINED:
            return {}
        try:
            trained.folder(self.model)
        except FileNotFoundError as error:
            return {"moe_pretraining": str(error)}
        return {"moe_pretraining": ""}

    def slug(self) -> str:
        """Short name of a parameter set: the model's."""
        return Path(self.model).name
