"""Exits: a small classifier after every block of an encoder, and texts that leave at the first one that is sure.

An exit is a linear classifier of the pooled hidden states; depth counts blocks, and the last exit is the full model.
When a text may leave is decided by a confidence and a threshold; thresholds are calibrated so that the risk, which is
loss against the full model, stays below a bound: by conformal risk control (arXiv 2208.02814) or Learn-then-Test
(arXiv 2110.01052), which both apply to exits (arXiv 2405.20915).
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.exits.calibration import (
        METHODS,
        RISKS,
        THRESHOLDS,
        calibrate,
        losses,
        positions,
        risks,
        smallest_alpha,
    )
    from overparam.compress.exits.heads import Exits, Ran, distilled, fit, load
    from overparam.compress.exits.rules import (
        RULES,
        confidences,
        fixed,
        leave,
        oracle,
        predictor,
        shuffled,
        streaks,
    )
    from overparam.compress.exits.running import early
    from overparam.compress.exits.segments import Segments
    from overparam.compress.exits.speculation import ceiling, decode, next_tokens, share_of_head
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "METHODS",
    "RISKS",
    "RULES",
    "THRESHOLDS",
    "Exits",
    "Ran",
    "Segments",
    "calibrate",
    "ceiling",
    "confidences",
    "decode",
    "distilled",
    "early",
    "fit",
    "fixed",
    "leave",
    "load",
    "losses",
    "next_tokens",
    "oracle",
    "positions",
    "predictor",
    "risks",
    "share_of_head",
    "shuffled",
    "smallest_alpha",
    "streaks",
]
