"""The routing of each token in a mixture-of-experts layer, read where its block calls the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.experts.layout import MoeLayer
from overparam.models.hooks import hooks


@dataclass(frozen=True)
class Routing:
    """One call of the experts.

    Attributes:
        logits: The router's ratings of experts; some routers return their softmax instead, see `probabilities`.
            [tokens, experts]
        gates: Factors by which the model multiplies the outputs of the chosen experts. [tokens, top_k]
        indices: The chosen experts. [tokens, top_k]
    """

    logits: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor

    def probabilities(self, chosen: torch.Tensor) -> torch.Tensor:
        """The softmax of the logits over all experts, at one expert per token. float64 [tokens, 1]."""
        logits = self.logits.float()
        picked = logits.gather(1, chosen)
        if bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-2).all()):
            return picked.double()
        return (picked - logits.logsumexp(dim=1, keepdim=True)).exp().double()


@contextmanager
def watched(
    layer: MoeLayer,
    routed: Callable[[Routing], None],
    contributed: Callable[[Routing, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    """Call the given functions at every call of the layer.

    Args:
        layer: The layer.
        routed: Called with the routing of all tokens, padding included.
        contributed: Called with the routing, and the norm of each chosen expert's contribution, gate × output.
            float32 [tokens, top_k]
    """
    logits: list[Any] = []
    pending: list[Routing] = []

    def after_router(_: Any, __: Any, output: Any) -> None:
        logits[:] = [output]

    # Each (token, expert) pair becomes a separate token with one expert and weight one, so that the experts return
    # their outputs before the gates, in any implementation.
    def before_experts(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        routing = _routing(layer, logits[0] if logits else None, args)
        routed(routing)
        if contributed is None:
            return None
        pending.append(routing)
        if len(args) == 1:
            return None
        hidden_states, indices, weights = args
        pairs = hidden_states.repeat_interleave(indices.shape[1], dim=0)  # [tokens * top_k, hidden]
        return pairs, indices.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1)

    def after_experts(_: Any, args: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
        routing = pending.pop()
        norms = torch.linalg.vector_norm(outputs.flatten(end_dim=-2), dim=1, dtype=torch.float32)
        assert contributed is not None
        if len(args) == 1:  # every expert gets every token, already multiplied by its gate
            contributed(routing, norms.view(layer.n_experts, -1).T.gather(1, routing.indices))
            return outputs
        contributed(routing, norms.view(routing.indices.shape) * routing.gates.abs())
        separate = outputs.reshape(*routing.indices.shape, -1)  # [tokens, top_k, hidden]
        return (separate * routing.gates[..., None]).sum(dim=1).to(outputs.dtype)

    handles = [
        layer.router.register_forward_hook(after_router),
        layer.experts.register_forward_pre_hook(before_experts),
    ]
    if contributed is not None:
        handles.append(layer.experts.register_forward_hook(after_experts))
    with hooks(handles):
        yield


def _routing(layer: MoeLayer, output: Any, args: tuple[Any, ...]) -> Routing:
    """Read the routing from the router's output and the arguments of the experts."""
    rated = [
        each.flatten(end_dim=-2)
        for each in (output if isinstance(output, tuple) else (output,))
        if isinstance(each, torch.Tensor) and each.is_floating_point() and each.shape[-1] == layer.n_experts
    ]
    if len(args) == 1 and len(rated) == 2:  # Llama 4: scores, zero except for chosen experts, and logits
        gates, indices = rated[0].topk(layer.top_k, dim=1)
        return Routing(rated[1], gates, indices)
    if len(args) == 3 and rated:
        _, indices, gates = args
        if indices.shape == gates.shape and not indices.is_floating_point():
            return Routing(rated[0], gates, indices)
    shapes = [list(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__ for each in args]
    raise ValueError(
        f"layer {layer.index} ({type(layer.block).__name__}) calls its experts in an unknown way, with {shapes} "
        "instead of hidden states, indices and weights: its routing cannot be read"
    )


def forward(decoder: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Run a decoder, without its head, on a batch padded on either side. [sequences, tokens] twice."""
    decoder(
        input_ids=input_ids.to(decoder.device),
        attention_mask=mask.to(decoder.device),
        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0).to(decoder.device),
        use_cache=False,
    )


def not_called(layer: MoeLayer) -> RuntimeError:
    """The error for a layer that another kernel computes without its router and experts."""
    return RuntimeError(
        f"the router of layer {layer.index} was not called: another kernel computes the layer; "
        "load the model with use_kernels=False"
    )


def not_finite(layer: MoeLayer) -> ValueError:
    """The error for a layer that computes NaN or infinity."""
    return ValueError(
        f"the routing is not finite (NaN) from layer {layer.index} on; load the model in float32 or bfloat16"
    )
