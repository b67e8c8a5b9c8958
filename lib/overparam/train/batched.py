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
from numpy.typing import NDArray
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overparam.data.packing import IGNORED, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "overparam_batched"  # under which transformers finds the attention and the experts of this module
_ROUNDED = 64  # capacities are multiples of it: buffers of few sizes, which the allocator can use again
_TREES = 8  # trees whose attention is computed together
_CHUNK = 1024  # targets whose logits are in memory at once


@dataclass(frozen=True)
class Group:
    """Trees of about one length, padded to the longest: where they are among the padded tokens, and their mask."""

    start: int
    mask: Tensor  # [trees, 1, length, length]: 0 or minus infinity

    @property
    def shape(self) -> tuple[int, int]:
        """Trees and tokens."""
        return self.mask.shape[0], self.mask.shape[-1]


@dataclass(frozen=True)
class Trees:
    """The trees of a batch, sorted by length into groups for attention.

    Attributes:
        padded: For each token of the groups, in a row, which token of the batch it is; 0 for padding. [padded]
        places: For each token of the batch, where it is among those. [tokens]
        groups: The groups, in order.
    """

    padded: Tensor
    places: Tensor
    groups: list[Group]


@dataclass(frozen=True)
class Flat:
    """The tokens of a packed batch in one row, without padding.

    Attributes:
        input_ids: [1, tokens].
        positions: [1, tokens].
        labels: [tokens]; `IGNORED` where nothing is predicted.
        trees: Which tokens attend to each other.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    trees: Trees


def flat(batch: Packed) -> Flat:
    """Put the trees of a batch in one row."""
    real = batch.tree > 0
    key = (np.arange(len(real))[:, None] * (batch.tree.max() + 1) + batch.tree)[real]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    branch = batch.branch[real]
    return Flat(
        torch.from_numpy(batch.input_ids[real])[None],
        torch.from_numpy(batch.positions[real])[None],
        torch.from_numpy(batch.labels[real]),
        _grouped(starts, np.diff(starts, append=len(key)), branch),
    )


def _grouped(starts: NDArray[np.int64], lengths: NDArray[np.int64], branch: NDArray[np.int64]) -> Trees:
    order = np.argsort(-lengths, kind="stable")
    groups, index, at = [], [], 0
    for chosen in (order[i : i + _TREES] for i in range(0, len(order), _TREES)):
        longest = int(lengths[chosen[0]])
        inside = np.arange(longest) < lengths[chosen, None]  # [trees, length]
        tokens = np.where(inside, starts[chosen, None] + np.arange(longest), 0)
        here = np.where(inside, branch[tokens], -1)  # padding is a branch of its own, which only padding sees
        seen = ((here[:, None] == 0) | (here[:, :, None] == here[:, None])) & np.tri(longest, dtype=bool)
        mask = torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), -torch.inf)
        groups.append(Group(at, mask[:, None]))
        index.append(np.where(inside, tokens, -1).ravel())
        at += inside.size
    padded = np.concatenate(index)
    places = np.empty(len(branch), np.int64)
    places[padded[padded >= 0]] = np.flatnonzero(padded >= 0)
    return Trees(torch.from_numpy(padded.clip(0)), torch.from_numpy(places), groups)


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


def hidden_states(
    decoder: Any, tokens: Flat, *, router_logits: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return hidden states [tokens, hidden], and router logits [tokens, experts] by layer where they are asked for."""
    nothing = {"full_attention": None, "sliding_attention": None}  # the trees say what is seen
    out = decoder(
        input_ids=tokens.input_ids,
        attention_mask=nothing,
        position_ids=tokens.positions,
        use_cache=False,
        trees=tokens.trees,
        **({"output_router_logits": True} if router_logits else {}),
    )
    return out.last_hidden_state[0], out.router_logits if router_logits else ()


class _TreeAttention(torch.autograd.Function):
    """Attention with learned sinks inside of each tree."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, trees: Trees, scaling: float
    ) -> Tensor:
        # query [heads, tokens, width]; key and value [key heads, tokens, width]
        heads, each = query.shape[0], query.shape[0] // key.shape[0]
        q, k, v = (x[:, trees.padded] for x in (query, key, value))
        k, v = k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)
        out = torch.empty_like(q)
        sink = sinks.detach().float()[None, :, None, None]
        kept = []
        for group in trees.groups:
            scores = torch.matmul(_part(q, group), _part(k, group).mT).float()  # [trees, heads, n, n]
            scores.mul_(scaling).add_(group.mask)
            top = torch.maximum(scores.amax(-1, keepdim=True), sink)
            scores.sub_(top).exp_()
            scores.div_(scores.sum(-1, keepdim=True).add_((sink - top).exp_()))
            kept.append(scores.to(q.dtype))
            _part(out, group).copy_(torch.matmul(kept[-1], _part(v, group)))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.constants = trees, scaling, sinks.dtype, (heads // each, each)
        return out[:, trees.places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        trees, scaling, sinks_dtype, (key_heads, each) = ctx.constants
        padding = torch.ones(len(trees.padded), dtype=torch.bool)
        padding[trees.places] = False
        g = grad[:, trees.padded].masked_fill_(padding[:, None], 0)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_sinks = torch.zeros(len(q))
        for group, p in zip(trees.groups, kept, strict=True):
            here = _part(g, group)
            _part(d_v, group).copy_(torch.matmul(p.mT, here))
            d_scores = torch.matmul(here, _part(v, group).mT).float()
            weights = p.float()
            mean = (d_scores * weights).sum(-1, keepdim=True)
            d_sinks -= ((1 - weights.sum(-1)) * mean[..., 0]).sum((0, 2))
            d_scores = d_scores.sub_(mean).mul_(weights).mul_(scaling).to(q.dtype)
            _part(d_q, group).copy_(torch.matmul(d_scores, _part(k, group)))
            _part(d_k, group).copy_(torch.matmul(d_scores.mT, _part(q, group)))
        d_q, d_k, d_v = (x[:, trees.places] for x in (d_q, d_k, d_v))
        d_k, d_v = (x.view(key_heads, each, *x.shape[1:]).sum(1) for x in (d_k, d_v))
        return d_q, d_k, d_v, d_sinks.to(sinks_dtype), None, None


def _part(padded: Tensor, group: Group) -> Tensor:
    """What belongs to a group: [heads, padded, width] -> a view [trees, heads, length, width]."""
    trees, length = group.shape
    here = padded[:, group.start : group.start + trees * length]
    return here.view(len(padded), trees, length, -1).transpose(0, 1)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,  # noqa: ARG001
    *, scaling: float, s_aux: Tensor, trees: Trees, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key = query[0].to(value.dtype), key[0].to(value.dtype)  # rotary positions are float32
    # [heads, tokens, width]
    out = _TreeAttention.apply(query, key, value[0], s_aux, trees, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None


class _Experts(torch.autograd.Function):
    """All experts of a layer on the tokens that they are sent, weighted and summed for each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, slots: Tensor, sources: Tensor, shape: tuple[int, int],
        gate_up: Tensor, gate_up_bias: Tensor, down: Tensor, down_bias: Tensor, alpha: float, limit: float,
    ) -> Tensor:  # fmt: skip
        # slots [tokens, top_k]: an assignment's place in the buffer, or the buffer's length if it is dropped;
        # sources [experts * capacity]: a place's token, or the number of tokens if it is empty
        dtype, width = gate_up.dtype, hidden.shape[-1]
        buffer = _with_zeros(hidden.to(dtype))[sources].view(*shape, width)  # [experts, capacity, hidden]
        both = torch.baddbmm(gate_up_bias[:, None], buffer, gate_up)
        inner = _glu(both, alpha, limit)
        out = both.new_empty(len(sources) + 1, width)
        out[-1] = 0
        torch.baddbmm(down_bias[:, None], inner, down, out=out[:-1].view(*shape, width))
        total = torch.zeros(hidden.shape, dtype=torch.float32)
        for k in range(slots.shape[1]):
            total.addcmul_(out[slots[:, k]].float(), weights[:, k, None].float())
        ctx.save_for_backward(weights, slots, sources, buffer, both, inner, out, gate_up, down)
        ctx.constants = alpha, limit, hidden.dtype
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, slots, sources, buffer, both, inner, out, gate_up, down = ctx.saved_tensors
        alpha, limit, hidden_dtype = ctx.constants
        width, choices = grad.shape[1], range(slots.shape[1])
        d_weights = torch.stack([(out[slots[:, k]].float() * grad).sum(-1) for k in choices], 1)
        of_slots = torch.zeros(len(sources) + 1)
        of_slots[slots.flatten()] = weights.flatten().float()  # the last place is of those that are dropped
        d_out = _with_zeros(grad.float())[sources].mul_(of_slots[:-1, None]).to(both.dtype).view_as(buffer)
        d_both = _glu_backward(torch.bmm(d_out, down.mT.contiguous()), both, alpha, limit)
        d_buffer = both.new_empty(len(sources) + 1, width)
        d_buffer[-1] = 0
        torch.bmm(d_both, gate_up.mT.contiguous(), out=d_buffer[:-1].view_as(buffer))
        d_hidden = d_buffer[slots[:, 0]].float()
        for k in choices[1:]:
            d_hidden += d_buffer[slots[:, k]]
        return (
            d_hidden.to(hidden_dtype), d_weights.to(weights.dtype), None, None, None,
            torch.bmm(buffer.mT, d_both), d_both.sum(1), torch.bmm(inner.mT, d_out), d_out.sum(1), None, None,
        )  # fmt: skip


def _with_zeros(rows: Tensor) -> Tensor:
    """Add a row of zeros, for places without a token."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _glu(both: Tensor, alpha: float, limit: float) -> Tensor:
    """The clamped SwiGLU of gpt_oss."""
    gate, up = both.chunk(2, -1)
    gate = gate.clamp(max=limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))


def _glu_backward(grad: Tensor, both: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = both.chunk(2, -1)
    clamped = gate.clamp(max=limit)
    sigmoid = torch.sigmoid(clamped * alpha)
    d_both = torch.empty_like(both)
    d_gate, d_up = d_both.chunk(2, -1)
    torch.mul(grad, clamped, out=d_up).mul_(sigmoid).mul_(up.abs() <= limit)
    torch.addcmul(sigmoid, clamped.mul_(sigmoid), 1 - sigmoid, value=alpha, out=d_gate)
    d_gate.mul_(up.clamp(-limit, limit).add_(1)).mul_(grad).mul_(gate <= limit)
    return d_both


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
    gate_up, gate_up_bias, down, down_bias = (
        each.to(dtype)
        for each in (
            _halves(module.gate_up_proj), _halves(module.gate_up_proj_bias), module.down_proj, module.down_proj_bias
        )
    )  # fmt: skip
    total: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden, routing_weights, places.view(tokens, top_k), sources[:-1], (number, capacity),
        gate_up, gate_up_bias, down, down_bias, module.alpha, module.limit,
    )  # fmt: skip
    return total


def _halves(interleaved: Tensor) -> Tensor:
    """Put the columns of gate and up, which gpt_oss stores in turns, one after the other."""
    return interleaved.view(*interleaved.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the smoothed cross entropies; the gradients are computed with the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
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
            smoothed += float(
                (1 - smoothing) * losses.sum() + smoothing * (total - logits.mean(-1, keepdim=True)).sum()
            )
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
    smoothed, plain = _ChunkedLoss.apply(hidden[at], table, labels[at], smoothing)  # type: ignore[no-untyped-call]
    return smoothed, plain


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
