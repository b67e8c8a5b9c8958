"""How many bits the weights of a quantized model have, and whether they match the scheme."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from overparam.compress.quantize.schemes import Scheme
from overparam.compress.quantize.weights import UNKNOWN, Weight, routers, weights
from overparam.models.proof import NotExactError

_TOLERATED = (
    0.01  # share of the matrices' weights that may stay unquantized, such as a gate that a library skips
)
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
_BETWEEN = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "FakeQuantize", "Unsqueeze", "Squeeze")
_NAMED = 3  # weights named in an error


@dataclass(frozen=True)
class Held:
    """One weight in a quantized model.

    Attributes:
        name: Name of the weight.
        numbers: How many numbers it has.
        bits: Bits per number.
        role: "matrix", "head" (the output layer), "router", "table" or "other".
    """

    name: str
    numbers: int
    bits: int
    role: str


@dataclass(frozen=True)
class Coverage:
    """Weights by precision; norms and biases (of one dimension) are not counted.

    Attributes:
        shares: {bits: share of all weights}, fewest bits first.
        quantized: Share of all weights with at most the scheme's bits.
        left: Share of all weights with more bits, by role.
    """

    shares: Mapping[int, float]
    quantized: float
    left: Mapping[str, float]

    def described(self) -> str:
        """The shares in words, such as "8 bits: 43 %, 32 bits: 57 %"."""
        return ", ".join(f"{bits} bits: {100 * share:.3g} %" for bits, share in self.shares.items())


def checked(held: Iterable[Held], scheme: Scheme, model: PreTrainedModel) -> Coverage:
    """Measure the coverage of a quantized model.

    Args:
        held: Weights of the quantized model.
        scheme: The requested scheme.
        model: The original model; errors name its class.

    Raises:
        NotExactError: More than 1 % of the weights that the scheme should quantize have more bits; many weights are of
            an unknown kind; or no weight has fewer bits than before.
    """
    listed = list(held)
    total = sum(each.numbers for each in listed)
    if not total:
        raise NotExactError(f"{type(model).__name__} has no weights that {scheme.name} could quantize")
    goals = {"matrix": scheme.weights, "head": scheme.tables, "table": scheme.tables}
    for role, goal in goals.items():
        of_role = [each for each in listed if each.role == role]
        missed = [each for each in of_role if each.bits > goal]
        share = sum(each.numbers for each in missed) / max(sum(each.numbers for each in of_role), 1)
        if share > _TOLERATED:
            kind = {"matrix": "matrices", "head": "output layer", "table": "embedding tables"}[role]
            raise NotExactError(
                f"{scheme.name} leaves {100 * share:.0f} % of the {kind} of {type(model).__name__} in more than "
                f"{goal} bits: {_names(missed)}"
            )
    unknown = [each for each in listed if each.role == "other" and each.bits > scheme.weights]
    share = sum(each.numbers for each in unknown) / total
    if share > UNKNOWN:
        raise NotExactError(
            f"{100 * share:.0f} % of the weights of {type(model).__name__} are in {_names(unknown)}, which "
            f"{scheme.name} does not reach"
        )
    coverage = _coverage(listed, scheme.weights)
    if scheme.weights < torch.finfo(model.dtype).bits and coverage.quantized == 0:
        raise NotExactError(f"{scheme.name} changed no weight of {type(model).__name__}")
    return coverage


def unreached(model: nn.Module, library: str) -> str | None:
    """Return which weights a library that only quantizes linear layers would miss; None if they are few.

    Args:
        model: A model, or a part of one.
        library: Name of the library, for the message.
    """
    linear = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear)}
    roles = _roles(model)
    missed = [w for w in weights(model) if roles[w.name] == "matrix" and id(w.parameter) not in linear]
    missed += [w for w in weights(model) if roles[w.name] == "other"]
    total = sum(w.parameter.numel() for w in weights(model) if roles[w.name] in ("matrix", "other"))
    many = sum(w.parameter.numel() for w in missed)
    limit = _TOLERATED if any(roles[w.name] == "matrix" for w in missed) else UNKNOWN
    if not total:
        return f"{type(model).__name__} has no linear layers, and {library} quantizes nothing else"
    if many <= limit * total:
        return None
    largest = max(missed, key=lambda weight: weight.parameter.numel())
    owner = type(model.get_submodule(largest.name.rpartition(".")[0])).__name__
    return (
        f"{100 * many / total:.3g} % of the weights between the embedding tables of {type(model).__name__} are not in "
        f"linear layers but in {owner} ({largest.name}), which {library} does not reach"
    )


def failing(model: nn.Module, config: Any) -> str | None:
    """Return which linear layers multiply in a way that torchao's weights do not support; None if all work.

    For each class with its own forward method, such as Falcon's, one layer is quantized and run.

    Args:
        model: A model, or a part of one.
        config: A torchao configuration.
    """
    from torchao.quantization import quantize_

    kinds = {
        type(module): module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and not type(module).__module__.startswith("torchao.")
    }
    for kind, module in kinds.items():
        layer = nn.Sequential(copy.deepcopy(module))
        try:
            quantize_(layer, config)
            with torch.no_grad():
                layer(
                    torch.zeros(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
                )
        except Exception as error:
            said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            return f"{kind.__name__} multiplies in a special way, which torchao does not support: {said}"
    return None


def of_module(quantized: nn.Module, model: PreTrainedModel) -> list[Held]:
    """List the weights of a module that was quantized in PyTorch.

    Args:
        quantized: The quantized module, with the original names of weights.
        model: The original model.
    """
    now = dict(quantized.named_parameters(remove_duplicate=False))
    roles = _roles(model)
    return [Held(w.name, w.parameter.numel(), bits_of(now[w.name]), roles[w.name]) for w in weights(model)]


def bits_of(parameter: torch.Tensor) -> int:
    """Bits per number of a weight, packed or not."""
    if type(parameter).__name__ == "Params4bit":  # of bitsandbytes: two in a byte
        return 4
    target = getattr(parameter, "target_dtype", None)
    if isinstance(target, torch.dtype):  # of torchao: few bits in a wider integer
        return int("".join(each for each in str(target) if each.isdigit()))
    inside = getattr(parameter, "qdata", parameter)
    return int(8 * inside.element_size())


def of_openvino(quantized: Any, model: PreTrainedModel) -> list[Held]:
    """List the weights of an `openvino.Model`: constants that are multiplied or looked up, compressed or not.

    NNCF treats the last product of any model as its output layer; without a head, that is a matrix of the last block.
    """
    head = _name_of_head(model)
    choosing = routers(model)
    listed: list[tuple[Held, str]] = []
    for node in quantized.get_ops():
        shape = [size for size in node.get_output_shape(0) if size > 1] if _constant(node) else []
        role, product = _use(node) if len(shape) >= 2 else (None, "")
        if role is not None:
            name = node.get_friendly_name()
            if role == "matrix" and any(name.endswith(f".{router}") for router in choosing):
                role = "router"
            if role == "matrix" and head is not None and name.endswith(f".{head}"):
                role = "head"
            listed.append((Held(name, prod(shape), node.get_element_type().bitwidth, role), product))
    if head is None and any(held.role == "matrix" for held, _ in listed):
        order = {node.get_friendly_name(): place for place, node in enumerate(quantized.get_ordered_ops())}
        last = max(
            (product for held, product in listed if held.role == "matrix"), key=lambda each: order[each]
        )
        listed = [
            (replace(held, role="head") if held.role == "matrix" and product == last else held, product)
            for held, product in listed
        ]
    return [held for held, _ in listed]


def _constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")


def _use(constant: Any) -> tuple[str | None, str]:
    """The role of a constant, by the operation that reads it, and that operation's name; None for scales and masks."""
    compressed = constant.get_element_type().get_type_name() in (
        "i8",
        "u8",
        "i4",
        "u4",
        "u2",
        "nf4",
        "f8e4m3",
    )
    uses: dict[str, str] = {}
    fresh = [constant]
    while fresh:
        for target in fresh.pop().output(0).get_target_inputs():
            node, place = target.get_node(), target.get_index()
            kind = node.get_type_name()
            if kind in _PRODUCTS:
                uses["matrix"] = node.get_friendly_name()
            elif kind == "Gather" and place == 0:
                looked_up = len(constant.get_output_shape(0)) == 2
                uses["table" if looked_up else "matrix"] = node.get_friendly_name()
            elif kind in _BETWEEN and place == 0 and (kind not in ("Subtract", "Multiply") or compressed):
                fresh.append(node)
    role = "table" if "table" in uses else next(iter(uses), None)
    return role, uses.get(role or "", "")


def _roles(model: nn.Module) -> dict[str, str]:
    head, choosing = _name_of_head(model), routers(model)

    def role(weight: Weight) -> str:
        if weight.role == "matrix" and weight.name == head:
            return "head"
        return "router" if weight.name in choosing else weight.role

    return {weight.name: role(weight) for weight in weights(model)}


def _name_of_head(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    return next((name for name, parameter in model.named_parameters() if parameter is weight), None)


def _coverage(held: list[Held], bits: int) -> Coverage:
    total = sum(each.numbers for each in held)
    shares: dict[int, float] = {}
    left: dict[str, float] = {}
    for each in sorted(held, key=lambda each: each.bits):
        shares[each.bits] = shares.get(each.bits, 0) + each.numbers / total
        if each.bits > bits:
            left[each.role] = left.get(each.role, 0) + each.numbers / total
    return Coverage(shares, sum(share for b, share in shares.items() if b <= bits), left)


def _names(held: list[Held]) -> str:
    largest = sorted(held, key=lambda each: -each.numbers)
    more = f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else ""
    return ", ".join(each.name for each in largest[:_NAMED]) + more
