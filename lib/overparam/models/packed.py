"""Linear layers of 8 or 4 bits by PyTorch's own kernels, without further packages: for the speed of fewer bits.

Weights are rounded to the nearest: by row to 8 bits, in groups of 32 to 4 bits. Inputs stay in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
BITS = (8, 4)


class PackedLinear(nn.Module):
    """A linear layer without gradients whose weights take 8 or 4 bits."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        """Round and pack the weights of a layer.

        Raises:
            ValueError: Neither 8 nor 4 bits, or groups do not divide the columns.
        """
        super().__init__()
        self.scale: torch.Tensor
        self.weight: torch.Tensor
        if bits not in BITS:
            raise ValueError(f"bits must be 8 or 4, got {bits}")
        if bits == 4 and linear.in_features % GROUP:
            raise ValueError(f"groups of {GROUP} do not divide {linear.in_features} columns")
        self.bits, self.rows = bits, linear.out_features
        weight = linear.weight.detach()  # [rows, columns]
        self.bias = linear.bias
        self.cuda_kernel = weight.device.type == "cuda"
        (self._pack8 if bits == 8 else self._pack4)(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., columns] and return [..., rows]."""
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        if self.bits == 8:
            out = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        elif self.cuda_kernel:
            out = torch._weight_int4pack_mm(flat, self.weight, GROUP, self.scale)
        else:
            out = torch._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scale)
        out = out.view(*x.shape[:-1], self.rows).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def _pack8(self, weight: torch.Tensor) -> None:
        scale = (weight.abs().amax(dim=1) / 127).float().clamp(min=1e-8)
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("weight", (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))

    def _pack4(self, weight: torch.Tensor) -> None:
        groups = weight.float().view(self.rows, -1, GROUP)
        low = groups.amin(dim=-1)
        step = ((groups.amax(dim=-1) - low) / 15).clamp(min=1e-8)  # [rows, groups]
        codes = ((groups - low[..., None]) / step[..., None]).round().clamp(0, 15).to(torch.int32)
        codes = codes.view(self.rows, -1)
        self.register_buffer(
            "scale", torch.stack([step, low + 8 * step], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
        )
        if self.cuda_kernel:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, 8)
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("weight", packed)


def pack(model: PreTrainedModel, bits: int) -> int:
    """Replace all linear layers of a model by packed ones, and return the bytes that a token reads of them.

    A head that shares its table with the input embeddings gets a copy of its own, as look-ups need the table.
    """
    total = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                packed = PackedLinear(child, bits)
                setattr(parent, name, packed)
                total += sum(each.nbytes for each in packed.buffers())
    return total
