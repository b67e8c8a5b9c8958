"""Where a mixture of experts keeps its experts, found from its modules.

Nothing here knows an architecture by name. A layer is found by its module ``experts`` and the router beside it, and
their tensors by the dimension that is as long as there are experts; whether that is all of it, `prove` decides.
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
        owner: The module that holds it.
        name: Its name there.
        dim: The dimension that counts experts.
    """

    owner: nn.Module
    name: str
    dim: int

    @property
    def value(self) -> torch.Tensor:
        """The tensor as it is now."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, torch.Tensor)
        return tensor


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer of a model.

    Attributes:
        index: Position among all decoder layers, dense ones included.
        block: The module that holds router and experts.
        router: Rates the experts for each token.
        experts: The fused experts.
        tensors: All tensors of the three with a slice for each expert.
        n_experts: How many experts the layer has now.
        top_k: How many of them a token uses.
        groups: Groups of consecutive experts that the router limits its choice to; 1 for none.
        top_groups: How many of these groups a token may use.
        group_top: Experts that the router looks at to rate a group: no group may keep fewer.
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
    """List the mixture-of-experts layers of `model`, first to last, as they are now (pruned or not).

    Args:
        model: A decoder with or without its head, or a model of images or sound and text whose language model is a
            mixture of experts.

    Raises:
        ValueError: If the model is dense, or its experts are kept in a way that cannot be sliced (the message says
            what was found), or in native MXFP4, or it has adapters of peft, or more than one stack of layers.
    """
    found = []
    for index, decoder_layer in enumerate(_stack(model)[1]):
        blocks = list(_blocks(decoder_layer))
        if len(blocks) > 1:
            raise _unknown(model, f"layer {index} has {len(blocks)} mixtures of experts")
        if blocks:
            found.append(_describe(model, index, blocks[0]))
    return found


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that turns tokens into hidden states through the mixture-of-experts layers.

    Raises:
        ValueError: As `layers` does.
    """
    return _stack(model)[0]


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every configuration object that describes the decoder; transformers may hold equal copies."""
    kind = type(decoder_of(model).config)
    held = [getattr(module, "config", None) for module in model.modules()]
    held.append(model.config.get_text_config())
    return list({id(config): config for config in held if type(config) is kind}.values())


def fields_of(config: PretrainedConfig, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that `config` has, as they are stored: each once, aliases resolved."""
    aliases = config.attribute_map
    stored = dict.fromkeys(aliases.get(name, name) for name in names)
    return [name for name in stored if isinstance(getattr(config, name, None), int | list)]


def _stack(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The decoder and its list of layers."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters of peft: merge them first, with model.merge_and_unload()")
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # the outer list comes before those inside of it
        inside = any(name.startswith(f"{path}.") for path in found)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in _blocks(module)):
            found[name] = module
    if not found:
        raise _unknown(model, "no module `experts` in any list of layers")
    for block in (block for stack in found.values() for block in _blocks(stack)):
        if any("mxfp4" in type(module).__name__.lower() for module in (block, block.experts)):
            raise ValueError(
                "the experts are in native MXFP4: their router cannot be watched and their packed tensors cannot be "
                "sliced here. Load the model with quantization_config=Mxfp4Config(dequantize=True)"
            )
        if not _fused(block):
            raise _unknown(model, "its experts are modules of their own, or rows of one matrix")
    if len(found) > 1:
        names = ", ".join(f"model.{name}" for name in found)
        raise ValueError(
            f"{_kind(model)} has several stacks with mixtures of experts: {names}. Pass a model that holds one of them"
        )
    ((path, stack),) = found.items()
    owner = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(owner, PreTrainedModel):
        raise _unknown(model, f"model.{path} belongs to no model of its own")
    return owner, stack


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(getattr(part, "experts", None), nn.Module))


def _fused(block: nn.Module) -> set[int]:
    """The numbers of experts that the tensors of a block stack."""
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
        raise _unknown(model, f"layer {index} has no router beside its experts ({' or '.join(_ROUTERS)})")
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
            model, f"the router of layer {index} looks experts up in a table ({', '.join(tables)})"
        )
    groups = int(getattr(gate, "num_group", None) or 1)
    if getattr(gate, "topk_method", None) == "greedy":  # DeepSeek-V2-Lite: the groups play no part
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
    """The tensors of `module` that count experts first, or count nothing else."""
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
    """The error for a model that is dense, or whose experts are kept in a way that cannot be sliced."""
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
        "tensors stack all experts along their first dimension, beside a router with a row for each. "
        f"Tensors that seem to belong to experts: {', '.join(seen[:8]) or 'none'}{more}; the configuration says "
        f"{', '.join(said) or 'nothing'}"
    )
