"""How a text is routed: additive statistics of every expert, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from overparam.compress.experts.layout import MoeLayer, decoder_of, layers
from overparam.compress.experts.proof import prove
from overparam.compress.experts.watching import Routing, forward, not_called, not_finite, watched
from overparam.models.proof import evaluating


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over a calibration text, for each expert of each mixture-of-experts layer.

    Sums rather than means, so that statistics of parts of a text (batches, processes) can be added with ``+``, as long
    as no sequence is split. If layers differ in their number of experts, shorter rows are filled with zeros.

    Attributes:
        n_experts: Experts of each layer. int64 [layers]
        sequences: Number of sequences with counted tokens.
        tokens: Number of counted tokens.
        mass_sum: Sum over sequences of the mean over tokens of the normalised top-k weights.
            float64 [layers, experts]
        routed: Tokens routed to each expert. float64 [layers, experts]
        top1: Tokens for which the expert is the first choice. float64 [layers, experts]
        top1_gate_sum: Sum over those tokens of the softmax of the router's logits at the expert.
            float64 [layers, experts]
        gated_norm_sum: Sum over routed tokens of the gate that the model applies × norm of the expert's output; None
            if not collected. float64 [layers, experts]
        renormalised_norm_sum: The same with gates that sum to one over the experts of a token.
            float64 [layers, experts]
    """

    n_experts: NDArray[np.int64]
    sequences: int
    tokens: int
    mass_sum: NDArray[np.float64]
    routed: NDArray[np.float64]
    top1: NDArray[np.float64]
    top1_gate_sum: NDArray[np.float64]
    gated_norm_sum: NDArray[np.float64] | None = None
    renormalised_norm_sum: NDArray[np.float64] | None = None

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Statistics of both texts together.

        Raises:
            ValueError: If the layers differ in their experts, or only one side has the norms for REAP.
        """
        if not np.array_equal(self.n_experts, other.n_experts):
            raise ValueError(
                f"statistics of layers with {self.n_experts.tolist()} and {other.n_experts.tolist()} experts cannot "
                "be added: they are of different models"
            )
        if (self.gated_norm_sum is None) != (other.gated_norm_sum is None):
            raise ValueError(
                "only one of the two statistics was collected with reap=True; collect both in the same way"
            )
        added: dict[str, Any] = {}
        for field in fields(self)[1:]:
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            added[field.name] = None if mine is None else mine + theirs
        return replace(self, **added)

    @property
    def routing_mass(self) -> NDArray[np.float64]:
        """Mean over sequences of `mass_sum`; rows sum to one. float64 [layers, experts]."""
        return self.mass_sum / self.sequences

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share of tokens routed to each expert; rows sum to top-k. float64 [layers, experts]."""
        return self.routed / self.tokens


@dataclass
class _Sums:
    """Running sums of one layer, on its device. float64 [experts]."""

    mass: torch.Tensor
    routed: torch.Tensor
    top1: torch.Tensor
    top1_gate: torch.Tensor
    gated_norm: torch.Tensor
    renormalised_norm: torch.Tensor
    calls: int = 0


@dataclass
class _Counted:
    """The counted tokens of the current batch.

    Attributes:
        rows: Indices of the counted tokens, in the order in which routers see tokens. int64 [counted]
        share: For each counted token, 1 / (counted tokens of its sequence). float64 [counted]
        tokens: Number of all tokens, padding included.
    """

    rows: torch.Tensor
    share: torch.Tensor
    tokens: int


def routing_mass(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]
) -> NDArray[np.float64]:
    """Return the share of the routing that each expert gets (arXiv 2605.28042).

    The router's top-k weights of each token are normalised to sum to one, then averaged over the tokens of a sequence
    and over sequences. In the paper, a sequence is instruction, source, and the model's own translation.

    Arguments and errors are those of `collect`.

    Returns:
        float64 [layers, experts]; rows sum to one.
    """
    return collect(model, batches).routing_mass


def collect(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], *, reap: bool = False
) -> RoutingStatistics:
    """Collect the routing statistics of a text in one pass, without the language-modelling head.

    The text is streamed, so memory does not grow with its length. The model is not changed, also not after an error.

    Args:
        model: A mixture of experts, see `layers`; in a model of images and text, only the language model is run.
        batches: Mappings with ``input_ids`` [sequences, tokens]; with ``attention_mask`` of the same shape if there is
            padding, on either side; and optionally with ``count_mask``, to count only some tokens, such as generated
            ones. A sequence without counted tokens is not counted.
        reap: Also collect what REAP's score needs: norms of the experts' outputs, for routed tokens.

    Raises:
        ValueError: If the model is dense or unknown, a mask has another shape than the tokens, no token is counted,
            or the routing is not finite.
        NotExactError: If the observed routing does not explain what the layers compute (`prove`).
        RuntimeError: If a router is never called, for example because another kernel computes the layer.
    """
    moe_layers = layers(model)
    decoder = decoder_of(model)
    prove(model)
    sums = [
        _Sums(*torch.zeros(6, layer.n_experts, dtype=torch.float64, device=_device(layer)))
        for layer in moe_layers
    ]
    counted = _Counted(torch.empty(0), torch.empty(0), 0)
    sequences = tokens = 0
    with torch.inference_mode(), evaluating(model), ExitStack() as stack:
        for layer, running in zip(moe_layers, sums, strict=True):
            stack.enter_context(_watched(layer, running, counted, reap))
        for batch in batches:
            ids = batch["input_ids"]
            mask = _mask(batch, "attention_mask", torch.ones_like(ids))
            wanted = _mask(batch, "count_mask", mask) & mask
            lengths = wanted.sum(dim=1, keepdim=True)  # [sequences, 1]
            if not lengths.any():
                continue
            counted.rows = wanted.flatten().nonzero().squeeze(1)
            counted.share = (1 / lengths.double()).expand_as(wanted)[wanted]
            counted.tokens = wanted.numel()
            sequences += int((lengths > 0).sum())
            tokens += int(lengths.sum())
            forward(decoder, ids, mask)
            _check(moe_layers, sums)
    if not tokens:
        raise ValueError(
            "the calibration text has no tokens: there are no batches, or masks exclude all tokens"
        )
    width = max(layer.n_experts for layer in moe_layers)

    def table(name: str) -> NDArray[np.float64]:
        rows = [getattr(running, name).cpu().numpy() for running in sums]
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    return RoutingStatistics(
        np.array([layer.n_experts for layer in moe_layers], dtype=np.int64),
        sequences,
        tokens,
        table("mass"),
        table("routed"),
        table("top1"),
        table("top1_gate"),
        table("gated_norm") if reap else None,
        table("renormalised_norm") if reap else None,
    )


def _watched(layer: MoeLayer, sums: _Sums, counted: _Counted, reap: bool) -> AbstractContextManager[None]:
    """Add to `sums` at every call of the layer."""

    def of_counted(routing: Routing, values: torch.Tensor) -> torch.Tensor:
        if len(routing.indices) != counted.tokens:
            raise ValueError(
                f"the experts of layer {layer.index} see {len(routing.indices)} of {counted.tokens} tokens, so the "
                "counted tokens cannot be identified"
            )
        return values[counted.rows.to(values.device)]

    def routed(routing: Routing) -> None:
        logits, gates, indices = (
            of_counted(routing, each) for each in (routing.logits, routing.gates, routing.indices)
        )  # [counted, experts], [counted, top_k] twice
        shares = _normalised(gates)
        sums.calls += 1
        _scatter(sums.mass, indices, shares * counted.share.to(shares.device)[:, None])
        _scatter(sums.routed, indices, torch.ones_like(shares))
        first = indices.gather(1, shares.argmax(dim=1, keepdim=True))  # [counted, 1]
        chosen = Routing(logits, gates, indices).probabilities(first)
        _scatter(sums.top1, first, torch.ones_like(chosen))
        _scatter(sums.top1_gate, first, chosen)

    def contributed(routing: Routing, norms: torch.Tensor) -> None:
        indices, norms = of_counted(routing, routing.indices), of_counted(routing, norms).double()
        total = of_counted(routing, routing.gates).double().sum(dim=1, keepdim=True)
        _scatter(sums.gated_norm, indices, norms)
        _scatter(sums.renormalised_norm, indices, norms / total)

    return watched(layer, routed, contributed if reap else None)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    """Top-k weights that sum to one. float64 [tokens, top_k]."""
    gates = weights.double()
    return gates / gates.sum(dim=1, keepdim=True)


def _scatter(sums: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Add the values of (token, choice) pairs to the sums of their experts."""
    sums.index_add_(0, indices.flatten(), values.flatten())


def _device(layer: MoeLayer) -> torch.device:
    return next(layer.router.parameters()).device


def _mask(batch: Mapping[str, torch.Tensor], name: str, default: torch.Tensor) -> torch.Tensor:
    """One mask of a batch. bool [sequences, tokens]."""
    mask = batch.get(name)
    if mask is None:
        return default.bool()
    if mask.shape != batch["input_ids"].shape:
        raise ValueError(
            f"{name} must have the shape of input_ids, {list(batch['input_ids'].shape)}, got {list(mask.shape)}"
        )
    return mask.bool()


def _check(moe_layers: list[MoeLayer], sums: list[_Sums]) -> None:
    """Raise where a router was bypassed or the routing is not finite."""
    for layer, running in zip(moe_layers, sums, strict=True):
        if not running.calls:
            raise not_called(layer)
    totals = [float(running.mass.sum() + running.gated_norm.sum()) for running in sums]
    if not np.isfinite(totals).all():
        raise not_finite(moe_layers[int(np.argmin(np.isfinite(totals)))])
