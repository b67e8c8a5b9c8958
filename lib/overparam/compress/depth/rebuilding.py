"""Check that a configuration builds exactly the layers of a truncated model, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from overparam.models import blocks, proof
from overparam.models.proof import NotExactError
from overparam.models.structure import COUNTS

# attributes that hold a layer's own index
PLACES = frozenset(
    (
        "layer_idx",
        "layer_id",
        "layer_index",
        "layer_number",
        "layer_num",
        "block_idx",
        "block_id",
        "block_index",
    )
)


class Difference(NamedTuple):
    """An attribute that differs between a model and the model built from a configuration."""

    layer: int | None  # index in the whole model; None for parts around the layers
    name: str
    ours: object
    theirs: object


def rebuilt(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of the same class from `config`, without memory for its parameters.

    Raises:
        NotExactError: If the class cannot be built from it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return type(model)(copy.deepcopy(config))
    except Exception as error:
        raise NotExactError(
            f"{type(model).__name__} cannot be built from its configuration: {error}"
        ) from error


def lend_weights(model: PreTrainedModel, built: PreTrainedModel) -> PreTrainedModel:
    """Let `built` use the tensors of `model`, an equal model, so that it needs no memory of its own."""
    built.load_state_dict(model.state_dict(), assign=True)
    ours = dict(model.named_buffers())
    for path, module in built.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            own = ours.get(f"{path}.{name}".lstrip("."), buffer)
            module._buffers[name] = own if own.shape == buffer.shape else buffer.to(model.device)
    return built


def check_rebuilt(model: PreTrainedModel, built: PreTrainedModel, kept: Sequence[int]) -> bool:
    """Compare the layers `kept` of `model`, and the parts around them, with those of the model built for them.

    Compared are names, shapes and classes of all parts, plain attributes of the layers (kind of attention, window,
    scale) and their buffers that are not saved. Differences that exist before the cut as well, such as an attribute
    set by hand, are not counted.

    Returns:
        Whether there are no differences at all, also before the cut.

    Raises:
        NotExactError: If the cut makes a difference; the message names the first.
    """
    unequal = differences(model, built, kept)
    equal = not unequal
    if unequal:
        every = range(len(blocks(model).layers))
        known = {(item.layer, item.name) for item in differences(model, rebuilt(model, model.config), every)}
        unequal = [item for item in unequal if (item.layer, item.name) not in known]
    if unequal:
        layer, name, ours, theirs = unequal[0]
        where = "around the layers" if layer is None else f"layer {layer}"
        raise NotExactError(
            f"{type(model).__name__}: layers {list(kept)} of {len(blocks(model).layers)} cannot be saved: reloaded "
            f"from a configuration of this architecture, {name} ({where}) would be {theirs} instead of {ours}. "
            f"Keep {'other layers, such as leading ones' if list(kept) != list(range(len(kept))) else 'another number'}"
        )
    return equal


def differences(model: PreTrainedModel, built: PreTrainedModel, kept: Sequence[int]) -> list[Difference]:
    """List the differences between `built` and `model` with only the layers `kept`."""
    ours, theirs, total = blocks(model), blocks(built), len(blocks(model).layers)
    if len(theirs.layers) != len(kept):
        return [Difference(None, "the number of layers", len(kept), len(theirs.layers))]
    unequal = [
        Difference(index, name, left, right)
        for index, layer in zip(kept, theirs.layers, strict=True)
        for name, left, right in _unequal(_facts(ours.layers[index]), _facts(layer))
        if not _follows(name, left, right, kept, total)
    ]
    around = _unequal(_around(model, ours.path), _around(built, theirs.path))
    unequal += [Difference(None, name, left, right) for name, left, right in around]
    places = {index: position for position, index in enumerate(kept)}
    left_ties = {frozenset(_moved(name, ours.path, places) for name in tie) - {""} for tie in _ties(model)}
    if {tie for tie in left_ties if len(tie) > 1} != set(_ties(built)):
        unequal.append(Difference(None, "what shares weights", _ties(model), _ties(built)))
    return unequal


def _follows(name: str, left: Any, right: Any, kept: Sequence[int], total: int) -> bool:
    """Whether an attribute only repeats the configuration: the number of layers, or a list with an entry per layer."""
    if name.rpartition(".")[2] in COUNTS:
        return bool((left, right) == (total, len(kept)))
    listed = isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == total
    return listed and [left[index] for index in kept] == list(right)


def _unequal(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in ours | theirs:
        left, right = ours.get(name, "absent"), theirs.get(name, "absent")
        if not _agree(left, right):
            yield name, _shown(left), _shown(right)


def _shown(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return value.__name__ if isinstance(value, type) else value


def _agree(left: Any, right: Any) -> bool:
    if isinstance(left, type) and isinstance(right, type):
        return issubclass(left, right)  # quantized layers are subclasses of plain ones
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.is_meta or right.is_meta or not left.is_floating_point():
            return left.shape == right.shape
        return left.shape == right.shape and proof.difference(left, right) <= proof.tolerance(torch.bfloat16)
    return bool(_tuples(left) == _tuples(right))


def _facts(layer: nn.Module) -> dict[str, Any]:
    """Properties of a layer: classes and plain attributes of its modules, shapes of weights, unsaved buffers."""
    facts: dict[str, Any] = {}
    for path, module in layer.named_modules():
        facts[path or "the layer"] = type(module)
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in PLACES | {"training"} and _is_plain(value):
                facts[prefix + name] = value
        for name, tensor in module.named_parameters(recurse=False):
            facts[prefix + name] = _shape(tensor)
        for name, tensor in module.named_buffers(recurse=False):
            unsaved = name in module._non_persistent_buffers_set
            facts[prefix + name] = tensor if unsaved else _shape(tensor)
    return facts


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _tuples(value: Any) -> Any:
    """Convert lists to tuples: a configuration that was read again has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _shape(tensor: torch.Tensor) -> Any:
    return tuple(tensor.shape) if tensor.is_floating_point() else "whole numbers"


def _around(model: PreTrainedModel, path: str) -> dict[str, Any]:
    """Shapes of a model's saved tensors, except those of its layers."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.startswith(f"{path}.")
    }


def _ties(model: PreTrainedModel) -> set[frozenset[str]]:
    """Names of the parameters that are the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(tied) for tied in names.values() if len(tied) > 1}


def _moved(name: str, path: str, places: dict[int, int]) -> str:
    """The name of a parameter after the cut; empty if its layer is removed."""
    if not name.startswith(f"{path}."):
        return name
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{places[int(index)]}.{rest}" if int(index) in places else ""
