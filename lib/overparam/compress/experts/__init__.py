"""Expert pruning of mixtures of experts: which experts a task uses, how many each layer keeps, and the cut itself.

The method is that of arXiv 2605.28042 (routing mass, and layer budgets by divergence from English). Alternatives are
the scores of REAP (arXiv 2510.13999) and of Koishekenov et al. (arXiv 2212.09811); controls are random, inverted,
uniform and inverse choices.
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.experts.allocation import (
        allocate,
        allocate_by_rise,
        allocate_inverse,
        allocate_uniform,
        divergence,
        expected_overlap,
        kept_overlap,
        select,
    )
    from overparam.compress.experts.layout import ExpertTensor, MoeLayer, layers
    from overparam.compress.experts.proof import prove
    from overparam.compress.experts.pruning import prune
    from overparam.compress.experts.recovery import Lora, recover
    from overparam.compress.experts.routing import RoutingStatistics, collect, routing_mass
    from overparam.compress.experts.scoring import METHODS, scores, super_experts
    from overparam.compress.experts.storage import load_pruned, save_pruned
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "METHODS",
    "ExpertTensor",
    "Lora",
    "MoeLayer",
    "RoutingStatistics",
    "allocate",
    "allocate_by_rise",
    "allocate_inverse",
    "allocate_uniform",
    "collect",
    "divergence",
    "expected_overlap",
    "kept_overlap",
    "layers",
    "load_pruned",
    "prove",
    "prune",
    "recover",
    "routing_mass",
    "save_pruned",
    "scores",
    "select",
    "super_experts",
]
