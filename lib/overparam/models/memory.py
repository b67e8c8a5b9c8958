"""Whether a model fits into memory, checked before any long work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from overparam.models.loading import bf16_is_fast, required_memory
from overparam.support import progress

if TYPE_CHECKING:
    import torch


def working_dtype(choice: str) -> torch.dtype:
    """Return the dtype of the weights: "float32", "bfloat16", or "auto" for bfloat16 where it is fast."""
    import torch

    if choice == "auto":
        return torch.bfloat16 if bf16_is_fast() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def working_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_memory(name: str, dtype: torch.dtype, *, times_weights: float, purpose: str) -> None:
    """Show how much memory a study of `name` needs, and refuse to begin if less is free.

    Args:
        name: As for `load`.
        dtype: Dtype of the weights.
        times_weights: Peak memory of the study, in multiples of the weights.
        purpose: What the memory is needed for, such as "with a copy in training".

    Raises:
        MemoryError: If more memory is needed than is free.
    """
    import torch

    weights = required_memory(name, dtype=dtype)
    needed = times_weights * weights
    gpu = working_device() == "cuda"
    available = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    progress.note(
        f"{name} in {str(dtype).removeprefix('torch.')}: weights {weights / 2**30:.2f} GiB, "
        f"about {needed / 2**30:.1f} GiB {purpose}; {available / 2**30:.1f} GiB are free"
    )
    if needed > available:
        raise MemoryError(
            f"{name} needs about {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are free: "
            "use a smaller model, dtype=bfloat16, or a machine with more memory"
        )
