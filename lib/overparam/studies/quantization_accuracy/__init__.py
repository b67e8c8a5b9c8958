"""Quantization accuracy: what each bit costs in quality, and what it buys in bytes and time on this machine.

This module has only the parameters, and imports no torch; the steps are in `study`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from overparam.evaluate import LOCAL_TASKS
from overparam.experiment.params import (
    Count,
    Distinct,
    EmbeddingTasks,
    Increasing,
    ModelName,
    Positive,
    StudyParams,
    Topics,
    among,
)

SCHEMES = (
    "bf16",
    "fp32-compiled",
    "torchao-int8",
    "torchao-int8-dynamic",
    "torchao-int4-g32",
    "torchao-int4-g128",
    "torchao-int4-hqq",
    "torchao-fp8",
    "openvino-fp32",
    "openvino-int8",
    "openvino-int8-weights",
    "openvino-int4-weights",
    "openvino-int4-awq",
    "openvino-int4-gptq",
    "bitsandbytes-int8",
    "bitsandbytes-nf4",
)
Bits = Annotated[int, Field(ge=2, le=8)]
Schemes = Annotated[Distinct[str], among(SCHEMES)]


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "quantization_accuracy"
    subsets: ClassVar = {"mixed_bits": "bits"}

    model: ModelName = Field(
        "all-MiniLM-L6-v2", description="encoder or decoder: bundled name, hub id or folder"
    )
    kind: Literal["auto", "encoder", "decoder"] = Field(
        "auto", description="kind of the model; auto: what its folder and configuration say"
    )
    schemes: Schemes = Field(
        tuple(name for name in SCHEMES if name != "fp32-compiled"),
        min_length=1,
        description="schemes compared with fp32; those that cannot run here are listed with the reason",
    )
    seed: int = Field(42, description="random seed of data, samples and bootstrap")
    max_length: int = Field(64, ge=8, description="maximum tokens per embedded text")
    calibration_texts: int = Field(300, ge=8, description="texts on which NNCF calibrates activations")

    suite: EmbeddingTasks = Field(
        tuple(task for task in LOCAL_TASKS if task != "ReutersR52"),
        min_length=1,
        description="embedding tasks (encoders)",
    )
    suite_items: int = Field(60, ge=20, description="items per embedding task")

    languages: tuple[str, ...] = Field(
        ("en", "fr", "de", "es", "it"), description="languages of the held-out verses (decoders)"
    )
    likelihood_texts: int = Field(24, ge=4, description="held-out texts per language, and of news")
    context_lengths: Increasing[Annotated[int, Field(ge=128)]] = Field(
        (256, 512, 1024), description="context lengths, tokens (decoders)"
    )
    context_windows: Count = Field(
        3, description="texts per context length; the last 64 tokens of each are scored"
    )
    translated_items: int = Field(8, ge=0, description="sentences translated into French (decoders)")
    new_tokens: Count = Field(48, description="maximum tokens per translation")

    bits: tuple[Bits, ...] = Field(
        (8, 6, 5, 4, 3, 2), min_length=2, description="bits per weight in simulated rounding"
    )
    group_size: Count = Field(32, description="weights per scale in simulated rounding and its training")
    probe_texts: int = Field(48, ge=8, description="texts for the sensitivity of each part to rounding")
    mixed_bits: Distinct[Bits] = Field(
        (3, 4), min_length=1, description="uniform bits whose total size mixed bits must match; some of bits"
    )

    topics: Topics = Field(
        ("ReutersR8",), description="classification tasks (encoders); from the hub: glue/sst2, …"
    )
    labelled: Count = Field(600, description="labelled training texts per classification task")
    test_items: int = Field(400, ge=20, description="test texts per classification task")
    characters: int = Field(256, ge=32, description="maximum characters per article or post")
    train_steps: Count = Field(100, description="training steps in full precision")
    qat_steps: Count = Field(
        60, description="further steps with rounding, or as many without it and rounding afterwards"
    )
    train_batch_size: int = Field(16, ge=4, description="texts per training step")
    learning_rate: Positive = Field(2e-4, description="peak learning rate in full precision")
    qat_learning_rate: Positive = Field(1e-4, description="peak learning rate of the further steps")
    qat_bits: tuple[Bits, ...] = Field(
        (8, 4, 3, 2), min_length=1, description="bits per weight, rounded in training or afterwards"
    )
    train_seeds: tuple[int, ...] = Field((42,), min_length=1, description="training seeds")

    cost_texts: int = Field(32, ge=2, description="texts per batch when costs are measured")
    cost_tokens: Count = Field(
        32, description="a quarter of the prompt's tokens when a decoder's costs are measured"
    )
    cost_repeats: int = Field(7, ge=3, description="timed repetitions when costs are measured")

    margin: Positive = Field(1.0, description="loss up to which quality counts as unchanged, %")
    modest_margin: Positive = Field(2.0, description="maximum loss claimed for 8 bits, %")
