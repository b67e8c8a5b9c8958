"""The matrices of a model's layers, fused experts one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overparam.compress.quantize import refuse_quantized
from overparam.compress.quantize.weights import routers, weights
from overparam.models import blocks


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

    Not among them are embeddings, the head, poolers, routers, and all that inputs are not multiplied with.

    Raises:
        ValueError: If the model has no single stack of layers, is quantized or has adapters, or has weights that are
            not finite.
    """
    refuse_quantized(model)
    apart = routers(model)
    multiplied = {
        id(weight.parameter): weight
        for weight in weights(model)
        if weight.role == "matrix" and len(weight.columns) == 1 and weight.name not in apart
    }
    found: list[Matrix] = []
    for index, layer in enumerate(blocks(model.base_model).layers):
        for path, parameter in layer.named_parameters():
            weight = multiplied.pop(id(parameter), None)  # a tensor that layers share is listed once
            if weight is None:
                continue
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"{weight.name} has weights that are not finite (NaN or infinite)")
            below, _, attribute = path.rpartition(".")
            owner, turned = layer.get_submodule(below), weight.columns[0] != parameter.ndim - 1
            if parameter.ndim == 2:
                found.append(Matrix(weight.name, owner, attribute, index, None, turned))
            else:
                found += [
                    Matrix(f"{weight.name}[{expert}]", owner, attribute, index, expert, turned)
                    for expert in range(len(parameter))
                ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no matrices in its layers")
    return found


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
