"""The matrices of a model's layers, fused experts one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROUTERS = ("gate", "router", "shared_expert_gate")
_EXPERTS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")  # tensors of fused experts


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of a layer; it multiplies inputs from the left: ``weight @ x``.

    Attributes:
        name: Name of its parameter, with the expert in brackets where it is one of several.
        owner: The module that has the parameter.
        attribute: Its name there.
        layer: The layer that it is in, counted from 0.
        expert: Which expert; None for an ordinary matrix.
        transposed: Whether the parameter is stored the other way round.
    """

    name: str
    owner: nn.Module
    attribute: str
    layer: int
    expert: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """A view of the parameter, [outputs, inputs]: what is written into it is written into the model."""
        parameter: Tensor = getattr(self.owner, self.attribute).detach()
        part = parameter if self.expert is None else parameter[self.expert]
        return part.mT if self.transposed else part


@dataclass(frozen=True)
class Counts:
    """How many weights there are, and how many are zero.

    Attributes:
        zeros: Zeros in the matrices of the layers.
        layers: Weights in these matrices.
        total: All parameters of the model, tied ones once.
    """

    zeros: int
    layers: int
    total: int

    @property
    def of_layers(self) -> float:
        """Share of zeros among the weights that can be pruned."""
        return self.zeros / self.layers

    @property
    def of_model(self) -> float:
        """The same zeros as a share of all parameters: embeddings and norms stay."""
        return self.zeros / self.total


def matrices(model: PreTrainedModel) -> list[Matrix]:
    """List the matrices of a model's layers, first to last: of attention and MLP, or of each expert.

    Not among them are embeddings, the head, poolers, routers, and all that is no matrix.

    Raises:
        ValueError: If no stack of layers is found, or a matrix is quantized.
    """
    found: list[Matrix] = []
    for index, (name, layer) in enumerate(layers(model)):
        for below, module in layer.named_modules():
            path = f"{name}.{below}"
            if below.rpartition(".")[2] in _ROUTERS:
                continue
            if (
                isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            ):  # GPT-2's, stored transposed
                _check(path, module.weight)
                found.append(
                    Matrix(
                        f"{path}.weight",
                        module,
                        "weight",
                        index,
                        transposed=not isinstance(module, nn.Linear),
                    )
                )
            for attribute in _EXPERTS:
                tensor = getattr(module, attribute, None)
                if isinstance(tensor, nn.Parameter) and tensor.ndim == 3:
                    _check(path, tensor)
                    turned = bool(getattr(module, "is_transposed", False))
                    found += [
                        Matrix(f"{path}.{attribute}[{expert}]", module, attribute, index, expert, turned)
                        for expert in range(len(tensor))
                    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no matrices in its layers")
    return found


def layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the layers of a model's longest stack, with their names.

    Raises:
        ValueError: If there is none.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    blocks = [(name, stack) for name, stack in stacks if any(True for _ in stack[0].children())]
    outer = [
        (name, stack)
        for name, stack in blocks
        if not any(name.startswith(f"{other}.") for other, _ in blocks)
    ]
    if not outer:
        raise ValueError(f"{type(model).__name__} has no stack of layers: it cannot be pruned here")
    name, longest = max(outer, key=lambda each: sum(p.numel() for p in each[1].parameters()))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(longest)]


def count_zeros(model: PreTrainedModel, of: Iterable[Matrix] | None = None) -> Counts:
    """Count zeros exactly."""
    chosen = matrices(model) if of is None else list(of)
    weights = [matrix.weight for matrix in chosen]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return Counts(
        zeros, sum(weight.numel() for weight in weights), sum(p.numel() for p in model.parameters())
    )


def by_layer(chosen: Iterable[Matrix]) -> Mapping[int, list[Matrix]]:
    """Group matrices by the layer that they are in."""
    groups: dict[int, list[Matrix]] = {}
    for matrix in chosen:
        groups.setdefault(matrix.layer, []).append(matrix)
    return groups


def _check(path: str, weight: Tensor) -> None:
    if (
        not isinstance(weight, Tensor)
        or type(weight) not in (Tensor, nn.Parameter)
        or not weight.is_floating_point()
    ):
        raise ValueError(f"{path} is quantized ({type(weight).__name__}): prune first, then quantize")
    if weight.is_meta:
        raise ValueError(f"{path} is on the meta device: load the weights first")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{path} has weights that are not finite (NaN or infinite)")
