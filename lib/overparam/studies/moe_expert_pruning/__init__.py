"""Expert pruning of mixture-of-experts translators: what arXiv 2605.28042 claims, measured on any such model.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from overparam.assets import trained
from overparam.assets.catalogue import TRAINED
from overparam.experiment.params import Count, Increasing, ModelName, Percent, Positive, Share, StudyParams


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "moe_expert_pruning"
    subsets: ClassVar = {"recovery_shares": "shares"}

    model: ModelName = Field(
        "moe-translator", description="mixture of experts: bundled name, hub id or folder"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 where the processor is fast at it"
    )
    prompt: Literal["tagged", "few_shot", "chat"] = Field(
        "tagged", description="how to ask for a translation: language tag, examples, or chat template"
    )
    corpus: Literal["verses", "flores"] = Field(
        "verses", description="verses: Bible verses that come with the suite; flores: FLORES+ from the hub"
    )
    languages: tuple[str, ...] = Field(
        ("fr", "de", "es"), min_length=2, description="target languages, for calibration and tests"
    )
    unseen: tuple[str, ...] = Field(("it",), description="target languages tested but not calibrated on")
    seed: int = Field(42, description="random seed of data, random scores and bootstrap")

    calibration_items: int = Field(64, ge=8, description="calibration sentences per language")
    test_items: int = Field(32, ge=8, description="sentences per direction whose likelihood is measured")
    translated_items: int = Field(24, ge=8, description="sentences translated per language")
    plain_characters: int = Field(
        400, ge=64, description="maximum characters of a text that is not translated"
    )
    batch_tokens: Count = Field(2048, description="maximum tokens per batch, padding included")
    max_new_tokens: Count | None = Field(
        None, description="maximum tokens per translation; null: twice the source's tokens plus 20"
    )

    shares: Increasing[Share] = Field(
        (0.25, 0.5, 0.625, 0.6875, 0.75, 0.875), min_length=1, description="shares of the experts to prune"
    )
    budget_text: Literal["read and written", "written"] = Field(
        "read and written",
        description="whose routing the published budgets compare with English: source and translation, or the latter",
    )
    random_seeds: int = Field(3, ge=3, description="random selections of experts, as a control")
    idle_below: float = Field(
        0.25, ge=0, le=1, description="an expert is idle below this share of the uniform load, over all texts"
    )

    recovery_shares: tuple[Share, ...] = Field(
        (0.5, 0.75, 0.875), description="shares pruned before recovery training; some of shares"
    )
    recovery_items: int = Field(240, ge=8, description="training sentences, each in every language")
    recovery_steps: Count = Field(16, description="training steps of recovery")
    recovery_rows: Count = Field(8, description="rows per batch of recovery")
    recovery_row_length: int = Field(320, ge=64, description="tokens per row of recovery")
    recovery_learning_rate: Positive = Field(5e-4, description="peak learning rate when all weights train")
    lora_learning_rate: Positive = Field(3e-3, description="peak learning rate when LoRA adapters train")
    recovery_seeds: tuple[int, ...] = Field((42,), min_length=1, description="training seeds of recovery")

    comet: str | None = Field(
        None, description="COMET model that also scores translations, e.g. Unbabel/XCOMET-XL; null: none"
    )
    dense_reference: ModelName | None = Field(
        "gemma-3-270m", description="dense model that translates the same test from examples; null: none"
    )
    dense_items: int = Field(8, ge=2, description="sentences that the dense model translates per language")
    cost_texts: int = Field(16, ge=2, description="texts per batch when costs are measured")
    cost_repeats: int = Field(5, ge=3, description="timed repetitions when costs are measured")
    cost_new_tokens: Count = Field(24, description="tokens generated per text when costs are measured")

    negligible_margin: Percent = Field(
        2.0,
        description="negligible loss, % of the baseline; published at half of the experts: 1.3 % of xCOMET",
    )
    minor_margin: Percent = Field(
        9.0, description="minor loss, % of the baseline; published at 69 % pruned: 8.8 % of xCOMET"
    )
    recovered_margin: Percent = Field(
        5.0, description="loss after recovery, % of the baseline; published at 75 % pruned: 4.2 % of xCOMET"
    )
    task_margin: Positive = Field(
        0.1, description="how much more another task may lose than translation, nats a token"
    )
    transfer_margin: Percent = Field(
        3.0,
        description="maximum extra loss of chrF++ in an unseen language, compared with calibrated ones, %",
    )
    usable_margin: Percent = Field(
        15.0, description="maximum loss of a translator that is still usable, % of the baseline"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        every = (*self.languages, *self.unseen)
        if len(set(every)) < len(every) or "en" in every:
            raise ValueError(
                f"languages and unseen must be different languages other than English, got {every}"
            )
        if self.translated_items > self.test_items or self.dense_items > self.translated_items:
            raise ValueError("dense_items must be at most translated_items, and those at most test_items")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return hashes for the measuring key: of weights that are not pinned."""
        return trained.hashes(self.model) if self.model in TRAINED else {}

    def needs(self) -> dict[str, str]:
        """Return the study that trains the model, if there is one, and what is missing of its results."""
        if self.model not in TRAINED:
            return {}
        try:
            trained.folder(self.model)
        except FileNotFoundError as error:
            return {"moe_pretraining": str(error)}
        return {"moe_pretraining": ""}
