"""Embedding tables: how many positions they have, and rows initialised from vectors of a larger model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def principal_rows(vectors: torch.Tensor, width: int, *, scale: float, seed: int = 0) -> torch.Tensor:
    """Reduce vectors of a larger model to `width` dimensions, to initialise an embedding table.

    They are normalised to unit length, centred, projected on their first principal components, rotated at random
    (which spreads the variance over all dimensions and changes no distance) and scaled.

    Args:
        vectors: float32 [rows, dimensions]
        width: Dimensions of the table.
        scale: Standard deviation of the resulting rows.
        seed: Seed of the rotation.

    Returns:
        float32 [rows, width]

    Raises:
        ValueError: If there are fewer rows, or fewer dimensions, than `width`.
    """
    import torch

    if min(vectors.shape) < width:
        raise ValueError(
            f"{vectors.shape[0]} vectors of {vectors.shape[1]} dimensions have fewer than {width} principal "
            f"components; use a larger model and vocabulary, or a table of at most {min(vectors.shape)} dimensions"
        )
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    unit = unit - unit.mean(0)
    _, _, directions = torch.linalg.svd(unit, full_matrices=False)
    projected = unit @ directions[:width].T
    projected = projected @ _rotation(width, seed)
    return torch.as_tensor(scale * projected / projected.std())


def _rotation(width: int, seed: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    orthogonal, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return torch.as_tensor(orthogonal)


def usable_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum tokens per text that a model has positions for; None if its configuration has no number.

    RoBERTa and similar models count positions from the padding's row, so that a table of 514 rows is for 512 tokens.
    """
    from torch import nn

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return most if padding is None else most - padding - 1
