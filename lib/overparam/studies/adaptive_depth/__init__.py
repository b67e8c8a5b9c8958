"""Adaptive depth: fewer layers for easier inputs, with a bound on what that costs.

This module is light: it holds the parameters. The steps are in `study`, `bounds`, `timing`, `retrieval` and `decoders`.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from overparam.assets import trained
from overparam.compress.exits.calibration import smallest_alpha
from overparam.experiment.params import (
    Count,
    Increasing,
    ModelName,
    Percent,
    Positive,
    Share,
    StudyParams,
    Topics,
)

LABELS, FULL = "labels", "full model"  # what exits are taught by
TRAINED = "trained for all depths"


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "adaptive_depth"

    model: ModelName = Field("all-mpnet-base-v2", description="encoder that gets exits")
    small: ModelName | None = Field(
        "all-MiniLM-L6-v2",
        description="second encoder, as it is and trained for all depths; null: none, and no retrieval",
    )
    tasks: Topics = Field(
        ("ReutersR8", "ReutersR52", "Newsgroups"), min_length=1, description="topics that are classified"
    )
    characters: int = Field(96, ge=16, description="of each text at most")
    labelled: Count = Field(300, description="texts that train the exits, per task")
    unlabelled: Count = Field(60, description="further texts: for self-distillation and the learned rule")
    pool: int = Field(460, ge=4, description="test texts, which each split divides into calibration and test")
    calibration: Share = Field(0.6, description="share of the pool that calibrates")
    resplits: int = Field(200, ge=3, description="splits over which the bounds are verified")
    alphas: Increasing[Share] = Field((0.01, 0.02, 0.05), description="bounds on the risk")
    alpha: Share = Field(0.01, description="of them, the one that is judged")
    delta: Share = Field(
        0.1, description="share of calibrations that may miss the bound, for Learn-then-Test"
    )
    seed: int = Field(42, description="of texts, splits and trainings")

    train_steps: Count = Field(60, description="steps of the training for all depths")
    train_batch_size: int = Field(16, ge=2, description="triplets per step")
    learning_rate: Positive = Field(5e-4, description="of that training")
    lora_rank: Count = Field(4, description="of its adapters")
    queries: Count = Field(200, description="verses whose paraphrases are searched")
    searched: Count = Field(600, description="verses to search")

    timed_texts: int = Field(8, ge=2, description="texts that are timed one by one")
    timed_batch: int = Field(32, ge=2, description="texts that are timed together")
    timed_savings: Increasing[Share] = Field(
        (0.25, 0.5, 0.75), description="layers saved at which time is measured, about"
    )
    repeats: int = Field(4, ge=2, description="timed rounds, text by text; of batches half as many")
    threads: Count = Field(1, description="of PyTorch while it is timed; one is steady beside other work")
    openvino: bool = Field(True, description="time the blocks in OpenVINO, too")

    decoder: ModelName | None = Field("gemma-3-270m", description="decoder with exits; null: none")
    translator: ModelName | None = Field("moe-translator", description="second decoder; null: none")
    decoder_tokens: Count = Field(100, description="tokens whose exits are compared with the last")
    prompts: Count = Field(50, description="texts that are continued with and without self-speculation")
    new_tokens: Count = Field(4, description="tokens of a continuation at most")
    draft_layers: Count = Field(15, description="first layers that draft")
    drafts: Count = Field(2, description="tokens drafted at once")

    saving: Percent = Field(25.0, description="what counts as saved, % of the layers")
    proportion: Share = Field(0.8, description="time saved for each layer saved that counts as real")
    overhead: Percent = Field(3.0, description="what the loop may cost with exits disabled, % of the time")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.alpha not in self.alphas:
            raise ValueError(f"alpha must be among alphas = {self.alphas}, got {self.alpha}")
        n = round(self.calibration * self.pool)
        least = smallest_alpha(n, delta=self.delta, method="ltt")
        if not 1 <= n < self.pool or least > self.alphas[0]:
            raise ValueError(
                f"{n} of {self.pool} texts calibrate, which allows no alpha below {least:.4f}, got {self.alphas[0]}: "
                "give a larger pool or calibration"
            )
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key: of a translator that this suite has trained."""
        return trained.hashes("moe-translator") if self.translator == "moe-translator" else {}
