"""Loading and saving checkpoints, counting their parameters, and tiny twins of big architectures."""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.models.counts import ParameterCounts, count_parameters
    from overparam.models.folder_recipe import Embedder, Recipe, recipe
    from overparam.models.kinds import Kind, decodes, is_decoder
    from overparam.models.loading import (
        bf16_is_fast,
        load,
        provenance,
        quiet,
        random_twin,
        required_memory,
    )
    from overparam.models.memory import check_memory, working_device, working_dtype
    from overparam.models.structure import Blocks, blocks, sharing_copy
    from overparam.models.tiny import tiny_config
    from overparam.models.twins import MOE_TWINS, TWINS, tiny_tokenizer, tiny_twin
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "MOE_TWINS",
    "TWINS",
    "Blocks",
    "Embedder",
    "Kind",
    "ParameterCounts",
    "Recipe",
    "bf16_is_fast",
    "blocks",
    "check_memory",
    "count_parameters",
    "decodes",
    "is_decoder",
    "load",
    "provenance",
    "quiet",
    "random_twin",
    "recipe",
    "required_memory",
    "sharing_copy",
    "tiny_config",
    "tiny_tokenizer",
    "tiny_twin",
    "working_device",
    "working_dtype",
]
