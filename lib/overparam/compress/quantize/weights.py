"""The role of each weight of a model, observed on a small batch: looked up, multiplied, or neither.

Quantization concerns the weights that are multiplied, whatever class of module holds them: linear layers, the
transposed ones of GPT-2, stacks of experts in one tensor, convolutions.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from overparam.models import proof

Role = Literal["matrix", "table", "other"]
UNKNOWN = 0.15  # share of all weights that may be neither multiplied nor looked up, such as experts' biases
_LENGTHS = (8, 3)  # tokens per text of the batch
_STACKED = 3  # dimensions of a tensor that stacks experts


@dataclass(frozen=True)
class Weight:
    """A weight with two or more dimensions.

    Attributes:
        name: As in `named_parameters`; for tied weights the first name.
        parameter: The weight.
        role: "matrix" if inputs are multiplied with it, "table" if it is looked up by token or position (also when
            tied to a head), "other" if it is added, scales something, or is not used.
        columns: The dimensions that the product sums over: those of a matrix's inputs.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    columns: tuple[int, ...]


def weights(model: nn.Module) -> list[Weight]:
    """List the weights of a model that have two or more dimensions, tied ones once.

    A transformers model is observed on a small batch, once per architecture and process. In other modules, and for
    weights that the batch does not use, linear layers and embedding tables are recognised by their class.
    """
    watched = _seen(model) if isinstance(model, PreTrainedModel) else {}
    known = _by_class(model)
    listed = []
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            role, columns = watched.get(name) or known.get(name) or ("other", (parameter.ndim - 1,))
            listed.append(Weight(name, parameter, role, columns))
    return listed


def routers(model: nn.Module) -> set[str]:
    """Return the names of routers: matrices with as many outputs as there are experts in a stack.

    Routers have few weights, and libraries leave those that are not linear layers in full precision.
    """
    config = getattr(model, "config", None)
    fields = vars(config.get_text_config()) if config is not None else {}
    listed = [weight for weight in weights(model) if weight.role == "matrix"]
    experts = {
        value
        for name, value in fields.items()
        if name.endswith("experts") and "shared" not in name and isinstance(value, int)
    }
    experts |= {
        weight.parameter.shape[0]
        for weight in listed
        if weight.parameter.ndim == _STACKED and len(weight.columns) == 1
    }
    flat = [weight for weight in listed if weight.parameter.ndim == 2]
    return {weight.name for weight in flat if weight.parameter.shape[0] in experts and weight.columns == (1,)}


Use = tuple[Role, tuple[int, ...]]
_uses: dict[str, dict[str, Use]] = {}


def _by_class(model: nn.Module) -> dict[str, Use]:
    uses: dict[str, Use] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            uses[f"{name}.weight" if name else "weight"] = (
                "table" if isinstance(module, nn.Embedding) else "matrix",
                (1,),
            )
    return uses


def _seen(model: PreTrainedModel) -> dict[str, Use]:
    key = proof.signature(model)
    if key not in _uses:
        _uses[key] = _watched(model)
    return _uses[key]


@proof.timed()
def _watched(model: PreTrainedModel) -> dict[str, Use]:
    watch = _Watch(model)
    batch = proof.probe(model, _LENGTHS)
    try:
        with torch.no_grad(), proof.evaluating(model), _experts_one_by_one(model), watch:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError, IndexError):
        pass  # the model does not read plain text, or a library cannot be watched: use what was observed
    return watch.uses


@contextlib.contextmanager
def _experts_one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Make experts multiply with views of their stacks, not with copies."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._experts_implementation_internal) for config in configs.values()
              if hasattr(config, "_experts_implementation_internal")]  # fmt: skip
    try:
        for config, _ in before:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, given in before:
            config._experts_implementation_internal = given


# operation -> operand -> the dimensions that are summed over
_aten = torch.ops.aten
_PRODUCTS: dict[Any, dict[int, Callable[[int], tuple[int, ...]]]] = {
    _aten.mm: {0: lambda _: (1,), 1: lambda _: (0,)},
    _aten.addmm: {1: lambda _: (1,), 2: lambda _: (0,)},
    _aten.bmm: {0: lambda _: (2,), 1: lambda _: (1,)},
    _aten.baddbmm: {1: lambda _: (2,), 2: lambda _: (1,)},
    _aten.mv: {0: lambda _: (1,)},
    _aten.addmv: {1: lambda _: (1,)},
    _aten.linear: {1: lambda _: (1,)},
    _aten.matmul: {0: lambda dims: (dims - 1,), 1: lambda dims: (max(dims - 2, 0),)},
    _aten._grouped_mm: {0: lambda dims: (dims - 1,), 1: lambda dims: (dims - 2,)},
    _aten.convolution: {1: lambda dims: tuple(range(1, dims))},
}
_COPIES = (_aten._to_copy, _aten.clone)  # operations that keep the order of dimensions


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which weights are multiplied or looked up, by the memory that operands view."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[str, Use] = {}
        self._kept: list[torch.Tensor] = []  # keeps copies alive, so that no other tensor reuses their memory
        self._starts: list[int] = []
        self._owners: list[tuple[str, torch.Tensor]] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                self._own(name, parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            for place, summed in _PRODUCTS[packet].items():
                operand = args[place]
                if (owner := self._owner(operand)) and self.uses.get(owner[0], ("other",))[0] == "other":
                    self.uses[owner[0]] = ("matrix", _matching(operand, summed(operand.ndim), owner[1]))
        elif packet is _aten.embedding and (owner := self._owner(args[0])):
            self.uses[owner[0]] = ("table", (1,))
        elif packet in _COPIES and (owner := self._owner(args[0])) and out.shape == owner[1].shape:
            self._kept.append(out)
            self._own(owner[0], out)
        return out

    def _own(self, name: str, tensor: torch.Tensor) -> None:
        place = bisect.bisect(self._starts, tensor.data_ptr())
        self._starts.insert(place, tensor.data_ptr())
        self._owners.insert(place, (name, tensor))

    def _owner(self, tensor: Any) -> tuple[str, torch.Tensor] | None:
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            return None
        place = bisect.bisect(self._starts, tensor.data_ptr()) - 1
        if place < 0:
            return None
        name, owner = self._owners[place]
        inside = tensor.data_ptr() < owner.data_ptr() + owner.numel() * owner.element_size()
        return (name, owner) if inside and tensor.device == owner.device else None


def _matching(view: torch.Tensor, dims: tuple[int, ...], owner: torch.Tensor) -> tuple[int, ...]:
    """Map dimensions of a view to those of its weight, by their strides."""
    matching = []
    for dim in dims:
        same = [d for d in range(owner.ndim) if owner.stride(d) == view.stride(dim)]
        exact = [d for d in same if owner.shape[d] == view.shape[dim]]
        matching.append((exact or same or [owner.ndim - 1])[-1])
    return tuple(dict.fromkeys(matching))
