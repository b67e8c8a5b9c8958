"""What the matrices of a model read on a calibration text: norms of their inputs, and products of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from overparam.compress.weights.layout import Matrix
from overparam.models import blocks
from overparam.models.hooks import hooks
from overparam.models.proof import evaluating

_WATCHING = "overparam_watching"  # under which transformers finds the experts function of this module


@dataclass
class Statistics:
    """Sums over the calibration tokens that a matrix read.

    Attributes:
        tokens: How many.
        squares: Sum of the squares of each input. [inputs]
        gram: Sum of the products of every two inputs, if collected. [inputs, inputs]
    """

    tokens: int
    squares: Tensor
    gram: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """Root of the mean square of each input, [inputs]."""
        return (self.squares / max(1, self.tokens)).sqrt()


@dataclass
class _Collector:
    wanted: Mapping[tuple[int, str, int | None], str]  # (module, attribute, expert) -> name of the matrix
    gram: bool
    found: dict[str, Statistics] = field(default_factory=dict)
    mask: Tensor | None = None  # of the batch that is read, [rows, length]
    last: tuple[Tensor, Statistics] | None = None  # matrices that read the same tensor share its sums

    def read(self, key: tuple[int, str, int | None], inputs: Tensor) -> None:
        if (name := self.wanted.get(key)) is None:
            return
        if self.last is not None and self.last[0] is inputs:
            added = self.last[1]
        else:
            x = inputs.detach().reshape(-1, inputs.shape[-1])
            if self.mask is not None and len(x) == self.mask.numel():
                x = x[self.mask.flatten()]
            x = x.float()
            gram = x.T @ x if self.gram else None
            added = Statistics(len(x), x.square().sum(0) if gram is None else gram.diagonal().clone(), gram)
            self.last = (inputs, added)
        if (old := self.found.get(name)) is None:
            self.found[name] = Statistics(added.tokens, added.squares.clone(), _copied(added.gram))
            return
        old.tokens += added.tokens
        old.squares += added.squares
        if old.gram is not None and added.gram is not None:
            old.gram += added.gram


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


class _Enough(Exception):  # noqa: N818 - no error: the layers that are asked for have been read
    pass


def collect(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    of: Sequence[Matrix],
    *,
    gram: bool = False,
) -> dict[str, Statistics]:
    """Run a model over a calibration text, and sum up what matrices read. The model stops after the last of them.

    Args:
        model: The model.
        batches: Token ids and attention mask, [rows, length] each, as `input_ids` and `attention_mask`; padding is
            left out. A text should begin as the model expects it, with ``<bos>`` where it has one.
        of: The matrices.
        gram: Whether products of inputs are summed up too, which SparseGPT and the refit need.

    Returns:
        By the matrices' names. An expert that no token was sent to has no tokens and sums of zero.

    Raises:
        ValueError: No text, or nothing but padding; inputs that are not finite; matrices that were never read.
    """
    keys = {(id(matrix.owner), matrix.attribute, matrix.expert): matrix.name for matrix in of}
    collector = _Collector(keys, gram)
    seen = 0
    with evaluating(model), _watching(model, of, collector), torch.inference_mode():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            seen += int(mask.sum())
            collector.mask, collector.last = mask, None
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            with suppress(_Enough):
                model.base_model(**{name: each.to(model.device) for name, each in inputs.items()})
    if not seen:
        raise ValueError("the calibration text has no token: give at least one text that is not empty")
    for matrix in of:
        if matrix.name not in collector.found:
            if matrix.expert is None:
                raise ValueError(f"{matrix.name} was never read: the model computes it in an unknown way")
            width = matrix.weight.shape[1]
            empty = torch.zeros(width, width) if gram else None
            collector.found[matrix.name] = Statistics(0, torch.zeros(width), empty)
        if not bool(torch.isfinite(collector.found[matrix.name].squares).all()):
            raise ValueError(f"what {matrix.name} reads is not finite: load the model in float32 or bfloat16")
    return collector.found


@contextmanager
def _watching(model: PreTrainedModel, of: Sequence[Matrix], collector: _Collector) -> Iterator[None]:
    linear = {id(matrix.owner): matrix for matrix in of if matrix.expert is None}
    experts = {id(matrix.owner): matrix.owner for matrix in of if matrix.expert is not None}

    def before(key: tuple[int, str, int | None]) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            collector.read(key, args[0])

        return hook

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [
        matrix.owner.register_forward_pre_hook(before((key, matrix.attribute, None)))
        for key, matrix in linear.items()
    ]
    last = blocks(model.base_model).layers[max(matrix.layer for matrix in of)]
    handles.append(last.register_forward_hook(stop))
    config = model.config
    original = config._experts_implementation_internal if experts else None
    try:
        if experts:
            config._experts_implementation_internal = _WATCHING
            for owner in experts.values():
                owner.overparam_collector = collector  # type: ignore[assignment]
        with hooks(handles):
            yield
    finally:
        if experts:
            config._experts_implementation_internal = original
            for owner in experts.values():
                del owner.overparam_collector


def _experts(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Compute fused experts one by one, and hand over what each reads."""
    collector = getattr(module, "overparam_collector", None)
    real = None if collector is None or collector.mask is None else collector.mask.flatten().to(hidden.device)
    total = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        tokens, slots = (indices == expert).nonzero(as_tuple=True)
        x = hidden[tokens]
        stays = slice(None) if real is None else real[tokens]
        first = "gate_up_proj" if module.has_gate else "up_proj"
        if collector is not None and len(tokens):
            collector.read((id(module), first, expert), x[stays])
        both = _linear(module, first, expert, x)
        inner = module._apply_gate(both) if module.has_gate else module.act_fn(both)
        if collector is not None and len(tokens):
            collector.read((id(module), "down_proj", expert), inner[stays])
        out = _linear(module, "down_proj", expert, inner) * weights[tokens, slots, None]
        total.index_add_(0, tokens, out.to(total.dtype))
    return total


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(x, weight.mT if module.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(_WATCHING, _experts)
