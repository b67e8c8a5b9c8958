"""Finding the experts of a mixture of experts from its modules.

No architecture is known by name. A layer is found by its module ``experts`` and the router next to it, and their
tensors by a dimension of the number of experts; `prove` then checks that nothing was missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
_ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor with a slice for each expert.

    Attributes:
        owner: The module that has the tensor.
        name: Name of the attribute.
        dim: The dimension of experts.
    """

    owner: nn.Module
    name: str
    dim: int

    @property
    def value(self) -> torch.Tensor:
        """The current tensor."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, torch.Tensor)
        return tensor


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer of a model.

    Attributes:
        index: Position among all decoder layers, dense ones included.
        block: The module that contains router and experts.
        router: The module that rates the experts for each token.
        experts: The module with the fused experts.
        tensors: All tensors of these three modules with a slice for each expert.
        n_experts: Number of experts.
        top_k: Experts per token.
        groups: Groups of consecutive experts among which the router chooses; 1 for none.
        top_groups: Groups that a token may use.
        group_top: Experts by which the router rates a group: no group may keep fewer.
    """

    index: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    tensors: tuple[ExpertTensor, ...]
    n_experts: int
    top_k: int
    groups: int
    top_groups: int
    group_top: int


def layers(model: PreTrainedModel) -> list[MoeLayer]:
    """List the mixture-of-experts layers of `model`, pruned or not, first to last.

    Args:
        model: A decoder with or without its head, or a model of images or sound and text whose language model is a
            mixture of experts.

    Raises:
        ValueError: If the model is dense; its experts are stored in a way that cannot be sliced (the message says what
            was found) or in native MXFP4; it has adapters of peft; or it has more than one stack of layers.
    """
    moe_layers = []
    for index, decoder_layer in enumerate(_stack(model)[1]):
        blocks = list(_blocks(decoder_layer))
        if len(blocks) > 1:
            raise _unknown(model, f"layer {index} has {len(blocks)} mixtures of experts")
        if blocks:
            moe_layers.append(_describe(model, index, blocks[0]))
    return moe_layers


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of `model` that turns tokens into hidden states through the mixture-of-experts layers.

    Raises:
        ValueError: As for `layers`.
    """
    return _stack(model)[0]


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return all configuration objects that describe the decoder; a model may hold equal copies."""
    kind = type(decoder_of(model).config)
    held = [getattr(module, "config", None) for module in model.modules()]
    held.append(model.config.get_text_config())
    return list({id(config): config for config in held if type(config) is kind}.values())


def fields_of(config: PretrainedConfig, names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that `config` has, by their stored names: each once, aliases resolved."""
    aliases = config.attribute_map
    stored = dict.fromkeys(aliases.get(name, name) for name in names)
    return [name for name in stored if isinstance(getattr(config, name, None), int | list)]


def _stack(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The decoder and its list of layers."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters of peft: merge them first, with model.merge_and_unload()")
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # an outer list comes before the lists inside it
        inside = any(name.startswith(f"{path}.") for path in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in _blocks(module)):
            stacks[name] = module
    if not stacks:
        raise _unknown(model, "no module `experts` in any list of layers")
    for block in (block for stack in stacks.values() for block in _blocks(stack)):
        if any("mxfp4" in type(module).__name__.lower() for module in (block, block.experts)):
            raise ValueError(
                "the experts are in native MXFP4: their router cannot be watched and their packed tensors cannot be "
                "sliced here. Load the model with quantization_config=Mxfp4Config(dequantize=True)"
            )
        if not _fused(block):
            raise _unknown(model, "its experts are separate modules, or rows of one matrix")
    if len(stacks) > 1:
        names = ", ".join(f"model.{name}" for name in stacks)
        raise ValueError(
            f"{_kind(model)} has several stacks with mixtures of experts: {names}. Pass a model with only one of them"
        )
    ((path, stack),) = stacks.items()
    owner = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(owner, PreTrainedModel):
        raise _unknown(model, f"model.{path} is not part of a separate model")
    return owner, stack


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(getattr(part, "experts", None), nn.Module))


def _fused(block: nn.Module) -> set[int]:
    """The numbers of experts in the stacked tensors of a block."""
    return {
        len(parameter) for parameter in block.get_submodule("experts").parameters() if parameter.ndim == 3
    }


def _describe(model: PreTrainedModel, index: int, block: nn.Module) -> MoeLayer:
    experts = block.get_submodule("experts")
    sizes = _fused(block)
    if len(sizes) > 1:
        raise _unknown(model, f"layer {index} has tensors for {sorted(sizes)} experts")
    (count,) = sizes
    gate: Any = next((part for name, part in block.named_children() if name in _ROUTERS), None)
    if gate is None:
        raise _unknown(model, f"layer {index} has no router next to its experts ({' or '.join(_ROUTERS)})")
    routed = list(_tensors(gate, count))
    if not any(tensor.value.ndim == 2 and len(tensor.value) == count for tensor in routed):
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in _named(gate)]
        raise _unknown(
            model,
            f"the router of layer {index} has no matrix of {count} rows, one for each expert: {', '.join(shapes)}",
        )
    tables = [name for name, tensor in _named(gate) if tensor.ndim > 1 and not tensor.is_floating_point()]
    if tables:
        raise _unknown(
            model, f"the router of layer {index} looks up experts in a table ({', '.join(tables)})"
        )
    groups = int(getattr(gate, "num_group", None) or 1)
    if getattr(gate, "topk_method", None) == "greedy":  # DeepSeek-V2-Lite: groups are not used
        groups = 1
    by_two_best = hasattr(gate, "num_group") and not hasattr(gate, "topk_method")
    return MoeLayer(
        index=index,
        block=block,
        router=gate,
        experts=experts,
        tensors=(*routed, *_tensors(experts, count), *_tensors(block, count, recurse=False)),
        n_experts=count,
        top_k=_top_k(model, block, gate),
        groups=groups,
        top_groups=int(gate.topk_group) if groups > 1 else 1,
        group_top=2 if by_two_best else 1,
    )


def _tensors(module: nn.Module, count: int, *, recurse: bool = True) -> Iterator[ExpertTensor]:
    """The tensors of `module` whose first dimension is the number of experts, or whose shape is [1, experts]."""
    for owner in module.modules() if recurse else (module,):
        for name, tensor in _named(owner, recurse=False):
            if tensor.ndim and len(tensor) == count:
                yield ExpertTensor(owner, name, 0)
            elif tensor.shape == (1, count):
                yield ExpertTensor(owner, name, 1)


def _named(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _top_k(model: PreTrainedModel, block: nn.Module, router: nn.Module) -> int:
    for module in (router, block):
        if isinstance(value := getattr(module, "top_k", None), int):
            return value
    config = decoder_of(model).config
    for field in fields_of(config, TOP_K_FIELDS):
        if isinstance(value := getattr(config, field), int):
            return value
    raise _unknown(model, "neither router nor configuration says how many experts a token uses")


def _kind(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


def _unknown(model: PreTrainedModel, why: str) -> ValueError:
    """The error for a model that is dense, or whose experts are stored in a way that cannot be sliced."""
    seen = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in _named(model)
        if any(part in name for part in (".experts.", "router", "e_score_correction_bias", "input_linear"))
    ]
    config = model.config.get_text_config()
    said = [f"{field} = {getattr(config, field)}" for field in fields_of(config, COUNT_FIELDS)]
    if not seen and not any(
        getattr(config, field) not in (0, 1) for field in fields_of(config, COUNT_FIELDS)
    ):
        return ValueError(f"{_kind(model)} is dense: it has no mixture-of-experts layers to prune")
    more = f" and {len(seen) - 8} more" if len(seen) > 8 else ""
    return ValueError(
        f"{_kind(model)} has an unknown layout of experts: {why}. Known are layers with a module `experts`, whose "
        "tensors stack all experts along their first dimension, next to a router with one row per expert. "
        f"Tensors that seem to belong to experts: {', '.join(seen[:8]) or 'none'}{more}; the configuration says "
        f"{', '.join(said) or 'nothing'}"
    )
