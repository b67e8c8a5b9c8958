"""Quantization accuracy: what each bit costs in quality, and what it buys in bytes and time on this machine.

This module is light: it holds the parameters. The steps are in `study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from overparam.assets.catalogue import check_model_name
from overparam.evaluate import GLUE_TASKS, LOCAL_TASKS, TOPIC_TASKS
from overparam.record import ledger

Count = Annotated[int, Field(ge=1)]
Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[float, Field(gt=0)]
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


class Params(BaseModel):
    """Parameters of the study; every count is a whole number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "all-MiniLM-L6-v2", description="bundled name, hub id or folder; an encoder or a decoder"
    )
    kind: Literal["auto", "encoder", "decoder"] = Field(
        "auto", description="which of both it is; auto: what its folder and its configuration say"
    )
    schemes: tuple[str, ...] = Field(
        tuple(name for name in SCHEMES if name != "fp32-compiled"),
        min_length=1,
        description="beside fp32; those that this machine cannot run are listed with the reason",
    )
    seed: int = Field(42, description="of data, draws and bootstrap")
    max_length: Annotated[int, Field(ge=8)] = Field(64, description="tokens of a text that is embedded")
    calibration_texts: Annotated[int, Field(ge=8)] = Field(
        300, description="real texts that show NNCF what activations look like"
    )

    suite: tuple[str, ...] = Field(
        tuple(task for task in LOCAL_TASKS if task != "ReutersR52"),
        min_length=1,
        description="embedding tasks, of an encoder",
    )
    suite_items: Annotated[int, Field(ge=20)] = Field(60, description="items judged a task of the suite")

    languages: tuple[str, ...] = Field(("en", "fr", "de", "es", "it"), description="of verses, for a decoder")
    likelihood_texts: Annotated[int, Field(ge=4)] = Field(
        24, description="held-out texts a language, and of news"
    )
    context_lengths: tuple[Annotated[int, Field(ge=128)], ...] = Field(
        (256, 512, 1024), description="tokens of context, for a decoder"
    )
    context_windows: Count = Field(3, description="texts of each length; their last 64 tokens are scored")
    translated_items: Annotated[int, Field(ge=0)] = Field(
        8, description="sentences into French, for a decoder"
    )
    new_tokens: Count = Field(48, description="the most that a translation has")

    bits: tuple[Bits, ...] = Field((8, 6, 5, 4, 3, 2), min_length=2, description="of simulated rounding")
    group_size: Count = Field(
        32, description="weights that share a scale when rounding is simulated or trained"
    )
    probe_texts: Annotated[int, Field(ge=8)] = Field(
        48, description="texts that show what a part's rounding changes"
    )
    mixed_bits: tuple[Bits, ...] = Field(
        (3, 4), min_length=1, description="uniform bits whose size mixed ones have"
    )

    topics: tuple[str, ...] = Field(
        ("ReutersR8",), description="classification that an encoder is trained for; of the hub: glue/sst2, …"
    )
    labelled: Count = Field(600, description="labelled texts a task")
    test_items: Annotated[int, Field(ge=20)] = Field(400, description="test texts a task")
    characters: Annotated[int, Field(ge=32)] = Field(256, description="of an article or post")
    train_steps: Count = Field(100, description="of fine-tuning in full precision")
    qat_steps: Count = Field(
        60, description="more, with rounding; the same without it, before rounding afterwards"
    )
    train_batch_size: Annotated[int, Field(ge=4)] = 16
    learning_rate: Positive = 2e-4
    qat_learning_rate: Positive = 1e-4
    qat_bits: tuple[Bits, ...] = Field(
        (8, 4, 3, 2), min_length=1, description="of trained and of plain rounding"
    )
    train_seeds: tuple[int, ...] = Field((42,), min_length=1)

    cost_texts: Annotated[int, Field(ge=2)] = Field(
        32, description="texts of a batch when costs are measured"
    )
    cost_tokens: Count = Field(32, description="tokens that a decoder writes when costs are measured")
    cost_repeats: Annotated[int, Field(ge=3)] = 7

    margin: Positive = Field(1.0, description="percent of the quality that may go where none is said to")
    modest_margin: Positive = Field(2.0, description="percent that 8 bits are said to cost at most")

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return check_model_name(value)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for name, given, allowed in (
            ("schemes", self.schemes, SCHEMES),
            ("suite", self.suite, LOCAL_TASKS),
            ("topics", self.topics, (*TOPIC_TASKS, *GLUE_TASKS)),
            ("mixed_bits", self.mixed_bits, self.bits),
        ):
            if unknown := [each for each in given if each not in allowed]:
                raise ValueError(
                    f"{name} must be among {', '.join(map(str, allowed))}, {unknown[0]!r} is not"
                )
            if len(set(given)) < len(given):
                raise ValueError(f"{name} repeat")
        if list(self.context_lengths) != sorted(set(self.context_lengths)):
            raise ValueError(f"context_lengths must increase, got {self.context_lengths}")
        return self

    def key_inputs(self) -> dict[str, str]:
        """Return the hashes that belong to the key of a job: of the ledger's claims that it judges."""
        return ledger.hashes("quantization_accuracy")

    def slug(self) -> str:
        """Short name of a parameter set: the model's."""
        return Path(self.model).name
