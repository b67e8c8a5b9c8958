"""Muon for fused experts: `torch.optim.Muon` only takes matrices, and experts are stacks of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Muon's author


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for each matrix of a stack [..., rows, columns].

    The method is Jordan's Muon (kellerjordan.github.io/posts/muon) with the update scale of Moonlight (arXiv
    2502.16982), so that AdamW's learning rates and weight decay can be used. It computes in float32: `torch.optim.Muon`
    iterates in bfloat16, in which many CPUs are slower.

    Args:
        params: Parameters of two or more dimensions, or groups of them. Of a group with ``interleaved``, even and odd
            columns are two matrices, as in gpt_oss' gate and up projections.
        lr: Learning rate.
        momentum: Momentum of the running mean of gradients (Nesterov).
        weight_decay: Decoupled weight decay.
        iterations: Newton–Schulz steps.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        defaults["interleaved"] = False
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"Muon needs matrices, got a parameter of shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                if group["interleaved"]:
                    update = update.unflatten(-1, (-1, 2)).movedim(-1, -3)  # [..., 2, rows, columns / 2]
                scale = 0.2 * max(update.shape[-2:]) ** 0.5
                update = orthogonalised(update, group["iterations"])
                if group["interleaved"]:
                    update = update.movedim(-3, -1).flatten(-2)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
        return loss


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Return the nearest (semi-)orthogonal matrix to each of [..., rows, columns], within about 20 %."""
    a, b, c = _COEFFICIENTS
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:])
    x = x.mT if (tall := shape[-2] > shape[-1]) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # [matrices, smaller, smaller]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)
