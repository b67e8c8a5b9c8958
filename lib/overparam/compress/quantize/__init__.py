"""Quantization: schemes of maintained libraries, simulated rounding at any number of bits, and training for it."""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.quantize.allocation import allocate_bits
    from overparam.compress.quantize.coverage import Coverage
    from overparam.compress.quantize.exporting import export
    from overparam.compress.quantize.reasons import reason_against
    from overparam.compress.quantize.rounding import (
        matrices,
        outliers,
        round_to_nearest,
        round_weights,
        rounded,
        stored_bytes,
    )
    from overparam.compress.quantize.schemes import BASELINE, SCHEMES, Scheme, refuse_quantized
    from overparam.compress.quantize.systems import (
        HiddenStates,
        Quantized,
        StepwiseDecoder,
        batches,
        embed,
        load,
        quantize,
        states_of,
        steps_of,
    )
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "BASELINE",
    "SCHEMES",
    "Coverage",
    "HiddenStates",
    "Quantized",
    "Scheme",
    "StepwiseDecoder",
    "allocate_bits",
    "batches",
    "embed",
    "export",
    "load",
    "matrices",
    "outliers",
    "quantize",
    "reason_against",
    "refuse_quantized",
    "round_to_nearest",
    "round_weights",
    "rounded",
    "states_of",
    "steps_of",
    "stored_bytes",
]
