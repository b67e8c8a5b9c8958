"""Which precision, backend, batch and threads suit a model on this machine, how near its limits, at what cost.

This module is light: it holds the parameters. The steps are in `study`, `settings`, `sizes` and `costs`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from overparam.experiment.params import (
    Count,
    Distinct,
    EmbeddingTasks,
    Increasing,
    ModelName,
    Percent,
    Positive,
    Share,
    StudyParams,
    among,
)
from overparam.models.published_shapes import shape
from overparam.publish.inventory import SUMMARY
from overparam.record.record import SCRATCH, record_files
from overparam.support.files import digest

LLAMA_CPP = "llama.cpp"
ENCODER_SCHEMES = ("fp32", "bf16", "fp32-compiled", "openvino-fp32", "openvino-int8", "openvino-int8-weights")
DECODER_SCHEMES = ("fp32", "bf16", "openvino-int8-weights", "openvino-int4-weights", LLAMA_CPP)
RESULTS = SCRATCH.parent


class Params(StudyParams):
    """Parameters of the study."""

    study: ClassVar = "hardware"
    subsets: ClassVar = {"joint_length": "lengths"}

    model: ModelName = Field("all-MiniLM-L6-v2", description="encoder whose settings are swept and tuned")
    encoders: Distinct[ModelName] = Field(
        ("all-MiniLM-L6-v2", "all-mpnet-base-v2"), description="encoders on the roofline"
    )
    decoder: ModelName | None = Field(
        "gemma-3-270m", description="decoder on the roofline; null: none, that part is left out"
    )
    threads: Increasing[Count] | None = Field(None, description="of the processor; null: one, and all")

    dtypes: Annotated[Distinct[str], among(("float32", "bfloat16", "int8"))] = Field(
        ("float32", "bfloat16", "int8"), description="whose peak is measured"
    )
    matrix_sizes: Increasing[Count] = Field(
        (512, 1024, 2048), description="sides of the matrices of the peak"
    )
    copied_mb: Count = Field(512, description="MiB of the array of the bandwidth; far more than any cache")
    tries: Count = Field(20, description="of each limit, the best of which counts")
    roofline_rounds: int = Field(9, ge=5, description="timed rounds on the roofline")
    roofline_batches: Increasing[Count] = Field((1, 16), description="texts at once on the roofline")
    roofline_tokens: Count = Field(64, description="tokens of each of them")
    prompt_tokens: Count = Field(128, description="tokens that the decoder reads")
    new_tokens: Count = Field(4, description="tokens that it writes in one timed call")

    schemes: Annotated[Distinct[str], among(ENCODER_SCHEMES)] = Field(
        ("fp32", "bf16", "fp32-compiled", "openvino-fp32", "openvino-int8"),
        description="precisions and backends of the encoder; full precision, at least",
    )
    decoder_schemes: Annotated[Distinct[str], among(DECODER_SCHEMES)] = Field(
        DECODER_SCHEMES, description="those of the decoder; full precision, at least"
    )
    batches: Increasing[Count] = Field((1, 8, 32), description="texts at once in the sweep")
    default_batch: Count = Field(32, description="of the default setting, as in sentence-transformers")
    lengths: Increasing[Count] = Field((16, 64, 256), description="tokens of a text at most")
    joint_length: Count = Field(64, description="of these: where all choices are combined")
    texts: int = Field(32, ge=4, description="texts that one timed call embeds, in each half")
    rounds: int = Field(15, ge=5, description="timed rounds")
    give_up: float = Field(
        6.0, gt=1, description="a setting this many times as slow as the default is not timed twice"
    )
    tuning_share: Share = Field(0.2, description="time that tuning may take, of the full sweep's")
    same_runs: Count = Field(20, description="comparisons of the default with itself")
    same_texts: Count = Field(4, description="texts of each of their calls")
    edge_mb: Count = Field(1000, description="resident MB that an edge device has")

    suite: EmbeddingTasks = Field(("LeeSTS", "VersePairs"), description="tasks of the encoder's quality")
    suite_items: Count = Field(60, description="items a task")
    likelihood_texts: Count = Field(12, description="texts of the decoder's quality")
    next_tokens: Count = Field(40, description="prompts after which the decoder's next token is compared")

    widths: Increasing[Count] = Field(
        (632, 639, 640, 641, 656, 672), description="of square layers; their neighbours' speed is compared"
    )
    aligned_width: Count = Field(640, description="of these: what the others are compared with")
    vocabularies: Increasing[Count] = Field(
        (50257, 50304), min_length=2, max_length=2, description="rows of an output layer: odd, and padded"
    )
    shape_rows: Count = Field(256, description="tokens that such a layer reads")
    shape_dtypes: Annotated[Distinct[str], among(("float32", "bfloat16"))] = Field(
        ("float32", "bfloat16"), description="of such layers"
    )
    shape_rounds: int = Field(31, ge=5, description="timed rounds of such layers")

    shapes_by_layers: Distinct[str] = Field(
        ("Qwen3-0.6B", "Llama-3.2-1B"),
        description="published sizes, built with random weights, timed by layers kept",
    )
    layer_shares: Increasing[Share] = Field((0.25, 0.5, 0.75), description="layers kept, of all")
    shapes_by_experts: Distinct[str] = Field((), description="published mixtures, whose memory is measured")
    expert_shares: Increasing[Share] = Field((0.25, 0.5), description="experts kept, of all")
    shapes_by_bits: Distinct[str] = Field(
        ("Qwen3-0.6B",), description="published decoders, timed in fewer bits"
    )
    bits: Distinct[Literal[8, 4]] = Field((8, 4), description="of their weights")
    size_tokens: Count = Field(64, description="tokens of the texts and prompts of published sizes")
    size_rounds: int = Field(7, ge=5, description="timed rounds of published sizes")

    price_per_hour: Positive = Field(0.10, description="of this machine, in euros")
    utilisation: float = Field(0.5, gt=0, le=1, description="share of the hour in which it works")
    results: str = Field(
        "reference", description="a folder below results/, or a path: records whose costs are priced"
    )

    near_bound: float = Field(
        2.0, ge=1, description="what counts as near the bound, in multiples of its time"
    )
    gain: Percent = Field(50.0, description="what tuning should gain, % of the default's speed")
    near_best: Percent = Field(10.0, description="how far tuning may stay behind the best setting, %")
    memory_margin: Percent = Field(3.0, description="how far memory may be from the parameters' share, %")
    slope_margin: Percent = Field(0.1, description="how far time by depth may be from proportional")
    alignment_margin: Percent = Field(5.0, description="of what alignment is worth, points")
    seed: int = Field(0, description="of the order of settings, and of the texts")

    @field_validator("shapes_by_layers", "shapes_by_experts", "shapes_by_bits")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            shape(name)
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("schemes", "decoder_schemes"):
            if "fp32" not in getattr(self, field):
                raise ValueError(f"{field} must have fp32: everything is compared with it")
        if self.aligned_width not in self.widths:
            raise ValueError(f"aligned_width must be among widths = {self.widths}, got {self.aligned_width}")
        if self.default_batch not in self.batches:
            raise ValueError(
                f"default_batch must be among batches = {self.batches}, got {self.default_batch}"
            )
        if not (RESULTS / self.results).is_dir():
            raise ValueError(f"there is no results folder {self.results!r}")
        return self

    def drawing_inputs(self) -> dict[str, str]:
        """Return the hashes of the drawing key: of the ledger, and of the records whose costs are priced."""
        return super().drawing_inputs() | {"records": digest(priced_records(self))}


def priced_records(params: Params) -> list[str]:
    """Return the records whose costs are priced, by their folders, which have their keys in their names."""
    root = RESULTS / params.results
    found = [path.parent.relative_to(root).as_posix() for path in record_files(root)]
    return sorted(name for name in found if name.partition("/")[0] not in (SUMMARY, params.study))
