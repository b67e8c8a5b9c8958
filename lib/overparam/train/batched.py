"""A gpt_oss decoder computed fast on CPUs while it is trained: no padding, and experts in batched products.

transformers computes packed rows with a mask over whole rows and loops over the experts. Here the tokens of a batch
are one sequence without padding; attention is computed tree by tree, which leaves out all that a mask would hide;
all experts of a layer are one batched product over buffers of bounded size, with a backward pass that gathers instead
of scattering; and the loss is computed in chunks that keep no logits. The numbers are the same as transformers',
up to rounding, where no token finds its expert full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overparam.data.packing import IGNORED, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "overparam_batched"  # under which transformers finds the attention and the experts of this module
_ROUNDED = 64  # capacities are multiples of it: buffers of few sizes, which the allocator can use again
_CHUNK = 1024  # targets whose logits are in memory at once


@dataclass(frozen=True)
class Span:
    """A tree among the tokens of a batch: where it begins and ends, and what is added to its attention scores."""

    start: int
    stop: int
    mask: Tensor  # [tokens, tokens]: 0 or minus infinity


@dataclass(frozen=True)
class Flat:
    """The tokens of a packed batch in one row, without padding.

    Attributes:
        input_ids: [1, tokens].
        positions: [1, tokens].
        labels: [tokens]; `IGNORED` where nothing is predicted.
        spans: The trees, in order.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    spans: list[Span]


def flat(batch: Packed) -> Flat:
    """Put the trees of a batch in one row."""
    real = batch.tree > 0
    starts = [
        (row, np.flatnonzero(batch.tree[row] == number))
        for row in range(len(batch.tree))
        for number in range(1, int(batch.tree[row].max(initial=0)) + 1)
    ]
    spans, at = [], 0
    for row, where in starts:
        branch = batch.branch[row, where]
        seen = (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
        hidden = torch.from_numpy(~(seen & np.tri(len(where), dtype=bool)))
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        spans.append(Span(at, at + len(where), mask))
        at += len(where)
    return Flat(
        torch.from_numpy(batch.input_ids[real])[None],
        torch.from_numpy(batch.positions[real])[None],
        torch.from_numpy(batch.labels[real]),
        spans,
    )


@dataclass
class Load:
    """What the experts of one forward pass were sent, one value a layer.

    Attributes:
        capacity: Tokens that an expert takes, in multiples of the mean load; None for all that it is sent.
        dropped: Share of the assignments that found their expert full.
    """

    capacity: float | None
    dropped: list[float] = field(default_factory=list)


@contextmanager
def batched(model: PreTrainedModel, capacity: float | None) -> Iterator[Load]:
    """Compute a gpt_oss model by this module inside of the block; `hidden_states` needs it.

    Args:
        model: A gpt_oss decoder.
        capacity: See `Load`; training needs a bound, since nearly all tokens choose the same experts at first.
    """
    load = Load(capacity)
    config = model.config
    before = config._attn_implementation_internal, config._experts_implementation_internal
    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    config._attn_implementation_internal = config._experts_implementation_internal = NAME
    for router in routers:  # bfloat16 would round the scores that choose
        router.forward = torch.autocast("cpu", enabled=False)(router.forward)
    for module in experts:
        module.load = load
    try:
        yield load
    finally:
        config._attn_implementation_internal, config._experts_implementation_internal = before
        for router in routers:
            del router.forward
        for module in experts:
            del module.load


def hidden_states(decoder: Any, tokens: Flat, *, router_logits: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return hidden states [tokens, hidden], and router logits [tokens, experts] by layer where they are asked for."""
    nothing = {"full_attention": None, "sliding_attention": None}  # the spans say what is seen
    out = decoder(
        input_ids=tokens.input_ids,
        attention_mask=nothing,
        position_ids=tokens.positions,
        use_cache=False,
        spans=tokens.spans,
        **({"output_router_logits": True} if router_logits else {}),
    )
    return out.last_hidden_state[0], out.router_logits if router_logits else ()


class _TreeAttention(torch.autograd.Function):
    """Attention with learned sinks inside of each span."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, spans: list[Span], scaling: float) -> Tensor:
        # query [heads, tokens, width]; key and value [groups, tokens, width]
        each = query.shape[0] // key.shape[0]
        out = torch.empty_like(query)
        probabilities = []
        sink = sinks.detach().float()[:, None, None]
        for span in spans:
            here = slice(span.start, span.stop)
            keys = key[:, here].repeat_interleave(each, 0)
            scores = torch.bmm(query[:, here], keys.mT).float().mul_(scaling).add_(span.mask)  # [heads, n, n]
            top = torch.maximum(scores.amax(-1, keepdim=True), sink)
            scores.sub_(top).exp_()
            scores.div_(scores.sum(-1, keepdim=True).add_((sink - top).exp_()))
            kept = scores.to(query.dtype)
            probabilities.append(kept)
            torch.bmm(kept, value[:, here].repeat_interleave(each, 0), out=out[:, here])
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.spans, ctx.scaling, ctx.sinks = spans, scaling, sinks.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        groups, each = key.shape[0], query.shape[0] // key.shape[0]
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        d_sinks = torch.zeros(query.shape[0])
        for span, p in zip(ctx.spans, probabilities, strict=True):
            here = slice(span.start, span.stop)
            g, q = grad[:, here], query[:, here]
            n, width = q.shape[1:]
            keys, values = (x[:, here].repeat_interleave(each, 0) for x in (key, value))
            d_value[:, here] = torch.bmm(p.mT, g).view(groups, each, n, width).sum(1)
            d_scores = torch.bmm(g, values.mT).float()
            weights = p.float()
            mean = (d_scores * weights).sum(-1, keepdim=True)
            d_sinks -= ((1 - weights.sum(-1)) * mean[..., 0]).sum(-1)
            d_scores = d_scores.sub_(mean).mul_(weights).mul_(ctx.scaling).to(q.dtype)
            torch.bmm(d_scores, keys, out=d_query[:, here])
            d_key[:, here] = torch.bmm(d_scores.mT, q).view(groups, each, n, width).sum(1)
        return d_query, d_key, d_value, d_sinks.to(ctx.sinks), None, None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    *, scaling: float, s_aux: Tensor, spans: list[Span], **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key = query[0].to(value.dtype), key[0].to(value.dtype)  # rotary positions are float32
    out = _TreeAttention.apply(query, key, value[0], s_aux, spans, scaling)  # [heads, tokens, width]
    return out.transpose(0, 1)[None], None


class _Experts(torch.autograd.Function):
    """All experts of a layer on the tokens that they are sent, weighted and summed for each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, slots: Tensor, sources: Tensor, shape: tuple[int, int],
        gate: Tensor, up: Tensor, down: Tensor, gate_bias: Tensor, up_bias: Tensor, down_bias: Tensor,
        alpha: float, limit: float,
    ) -> Tensor:  # fmt: skip
        # slots [tokens, top_k]: an assignment's place in the buffer, or the buffer's length if it is dropped;
        # sources [experts * capacity]: a place's token, or the number of tokens if it is empty
        dtype, width = gate.dtype, hidden.shape[-1]
        padded = torch.cat([hidden.to(dtype), hidden.new_zeros(1, width, dtype=dtype)])
        buffer = padded[sources].view(*shape, width)  # [experts, capacity, hidden]
        a = torch.baddbmm(gate_bias[:, None], buffer, gate)
        b = torch.baddbmm(up_bias[:, None], buffer, up)
        inner = _glu(a, b, alpha, limit)
        out = torch.baddbmm(down_bias[:, None], inner, down).view(-1, width)
        out = torch.cat([out, out.new_zeros(1, width)])
        total = torch.zeros(hidden.shape, dtype=torch.float32)
        for k in range(slots.shape[1]):
            total.addcmul_(out[slots[:, k]].float(), weights[:, k, None].float())
        ctx.save_for_backward(weights, slots, sources, buffer, a, b, inner, out, gate, up, down)
        ctx.constants = alpha, limit, hidden.dtype
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, slots, sources, buffer, a, b, inner, out, gate, up, down = ctx.saved_tensors
        alpha, limit, hidden_dtype = ctx.constants
        tokens, width = grad.shape
        d_weights = torch.stack([(out[slots[:, k]].float() * grad).sum(-1) for k in range(slots.shape[1])], 1)
        of_slots = torch.zeros(len(sources) + 1)
        of_slots[slots.flatten()] = weights.flatten().float()  # the last place is of those that are dropped
        padded = torch.cat([grad.float(), grad.new_zeros(1, width, dtype=torch.float32)])
        d_out = padded[sources].mul_(of_slots[:-1, None]).to(gate.dtype).view_as(buffer)
        d_down, d_down_bias = torch.bmm(inner.mT, d_out), d_out.sum(1)
        d_a, d_b = _glu_backward(torch.bmm(d_out, down.mT), a, b, alpha, limit)
        d_gate, d_up = torch.bmm(buffer.mT, d_a), torch.bmm(buffer.mT, d_b)
        d_buffer = torch.baddbmm(torch.bmm(d_a, gate.mT), d_b, up.mT).view(-1, width)
        d_buffer = torch.cat([d_buffer, d_buffer.new_zeros(1, width)])
        d_hidden = d_buffer[slots[:, 0]].float()
        for k in range(1, slots.shape[1]):
            d_hidden += d_buffer[slots[:, k]]
        return (
            d_hidden.to(hidden_dtype), d_weights.to(weights.dtype), None, None, None,
            d_gate, d_up, d_down, d_a.sum(1), d_b.sum(1), d_down_bias, None, None,
        )  # fmt: skip


def _glu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """The clamped SwiGLU of gpt_oss."""
    gate = gate.clamp(max=limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))


def _glu_backward(grad: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    clamped, up_clamped = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(clamped * alpha)
    d_up = (grad * clamped).mul_(sigmoid).mul_(up.abs() <= limit)
    slope = (clamped * alpha).mul_(1 - sigmoid).add_(1).mul_(sigmoid)
    return up_clamped.add_(1).mul_(grad).mul_(slope).mul_(gate <= limit), d_up


def _experts(module: Any, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
    number, (tokens, top_k) = module.num_experts, router_indices.shape
    chosen = router_indices.flatten()
    loads = torch.bincount(chosen, minlength=number)
    capacity = int(loads.max())
    if module.load.capacity is not None:
        capacity = min(capacity, int(module.load.capacity * tokens * top_k / number) + 1)
    capacity = -(-capacity // _ROUNDED) * _ROUNDED
    order = chosen.argsort(stable=True)
    rank = torch.empty_like(order)  # an assignment's number among those of its expert
    rank[order] = torch.arange(len(order)) - (loads.cumsum(0) - loads)[chosen[order]]
    fits = rank < capacity
    places = torch.where(fits, chosen * capacity + rank, number * capacity)
    sources = torch.full((number * capacity + 1,), tokens)
    sources[places] = torch.arange(tokens).repeat_interleave(top_k)
    module.load.dropped.append(1 - float(fits.float().mean()))
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
    weights = [
        each.to(dtype).contiguous()
        for each in (
            module.gate_up_proj[..., ::2], module.gate_up_proj[..., 1::2], module.down_proj,
            module.gate_up_proj_bias[..., ::2], module.gate_up_proj_bias[..., 1::2], module.down_proj_bias,
        )
    ]  # fmt: skip
    return _Experts.apply(
        hidden, routing_weights, places.view(tokens, top_k), sources[:-1], (number, capacity), *weights,
        module.alpha, module.limit,
    )  # fmt: skip


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the smoothed cross entropies; the gradients are computed with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        weights, words = table.to(dtype), len(table)
        d_hidden, d_table = torch.empty_like(hidden), torch.zeros_like(table)
        smoothed, plain = 0.0, 0.0
        for start in range(0, len(hidden), _CHUNK):
            here = slice(start, start + _CHUNK)
            part, target = hidden[here].to(dtype), labels[here, None]
            logits = (part @ weights.T).float()
            total = logits.logsumexp(-1, keepdim=True)
            losses = total - logits.gather(1, target)
            plain += float(losses.sum())
            smoothed += float((1 - smoothing) * losses.sum() + smoothing * (total - logits.mean(-1, keepdim=True)).sum())
            grad = logits.sub_(total).exp_().sub_(smoothing / words)
            grad.scatter_add_(1, target, torch.full_like(total, smoothing - 1))
            grad = grad.to(dtype)
            d_hidden[here] = grad @ weights
            d_table += grad.T @ part
        ctx.save_for_backward(d_hidden, d_table)
        return torch.tensor(smoothed), torch.tensor(plain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * grad, d_table * grad, None, None


def losses(hidden: Tensor, table: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the sums of the cross entropies, with label smoothing (differentiable) and without, in nats.

    Args:
        hidden: [tokens, hidden].
        table: Output embeddings [vocabulary, hidden].
        labels: [tokens]; `IGNORED` is left out.
        smoothing: Label smoothing.
    """
    at = (labels != IGNORED).nonzero().squeeze(1)
    smoothed, plain = _ChunkedLoss.apply(hidden[at], table, labels[at], smoothing)
    return smoothed, plain


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
