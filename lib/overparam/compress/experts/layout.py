"""Where each mixture-of-experts architecture keeps its experts: one small description a layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Which tensors of an architecture carry the expert dimension (always their first), and what counts them.

    Attributes:
        block: Attribute of a decoder layer that holds router and experts.
        router: Attribute of the block that holds the router.
        count_field: Field of the configuration with the number of experts.
        router_tensors: Parameters and buffers of the router that have a row an expert.
        expert_tensors: Parameters of the experts module that have a slice an expert.
        group_top: Experts that the router looks at to rate a group: no group may keep fewer.
    """

    block: str = "mlp"
    router: str = "gate"
    count_field: str = "num_local_experts"
    router_tensors: tuple[str, ...] = ("weight",)
    expert_tensors: tuple[str, ...] = ("gate_up_proj", "down_proj")
    group_top: int = 1


TOP_K_FIELD = "num_experts_per_tok"
LAYOUTS: dict[str, Layout] = {  # model_type of transformers -> layout
    "mixtral": Layout(),
    "olmoe": Layout(count_field="num_experts"),
    "qwen2_moe": Layout(count_field="num_experts"),
    "qwen3_moe": Layout(),
    "gpt_oss": Layout(
        router="router",
        router_tensors=("weight", "bias"),
        expert_tensors=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ),
    "deepseek_v2": Layout(count_field="n_routed_experts"),
    "deepseek_v3": Layout(
        count_field="n_routed_experts", router_tensors=("weight", "e_score_correction_bias"), group_top=2
    ),
    "granitemoe": Layout(block="block_sparse_moe", router="router"),
}


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer of a model.

    Attributes:
        index: Position among all decoder layers, dense ones included.
        block: The module that holds router and experts.
        router: Returns logits [tokens, experts], weights [tokens, top_k], indices [tokens, top_k].
        experts: The fused experts.
        n_experts: How many experts the layer has now.
        top_k: How many of them a token uses.
        groups: Groups of consecutive experts that the router limits its choice to; 1 for none.
        top_groups: How many of these groups a token may use.
    """

    index: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    n_experts: int
    top_k: int
    groups: int
    top_groups: int


def layers(model: PreTrainedModel) -> list[MoeLayer]:
    """List the mixture-of-experts layers of `model`, first to last, as they are now (pruned or not).

    Args:
        model: A decoder with or without its language-modelling head.

    Raises:
        ValueError: If the model is dense, or its layout is unknown (the message names the tensors that seem to
            have an expert dimension), or its experts are in native MXFP4, or it has adapters of peft.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters of peft: merge them first, with model.merge_and_unload()")
    layout = layout_of(model)
    found = []
    for index, decoder_layer in enumerate(getattr(model.base_model, "layers", ())):
        block = getattr(decoder_layer, layout.block, None)
        router, experts = getattr(block, layout.router, None), getattr(block, "experts", None)
        if not (isinstance(block, nn.Module) and isinstance(experts, nn.Module)):
            continue  # a dense layer
        _refuse_mxfp4(block, experts)
        if not (isinstance(router, nn.Module) and _fits(layout, router, experts)):
            raise _unknown(model)
        found.append(_describe(index, block, router, experts))
    if not found:
        raise _unknown(model)
    return found


def layout_of(model: PreTrainedModel) -> Layout:
    """Return the layout of `model`.

    Raises:
        ValueError: If the model is dense, or its layout is unknown.
    """
    try:
        return LAYOUTS[config_of(model).model_type]
    except KeyError:
        raise _unknown(model) from None


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the decoder."""
    return model.config.get_text_config()


def tensors(layout: Layout, layer: MoeLayer) -> list[tuple[nn.Module, str]]:
    """The owner and the name of each tensor of `layer` whose first dimension is the experts."""
    return [
        *((layer.router, name) for name in layout.router_tensors),
        *((layer.experts, name) for name in layout.expert_tensors),
    ]


def _describe(index: int, block: nn.Module, router: nn.Module, experts: nn.Module) -> MoeLayer:
    gate: Any = router  # its counts are plain attributes
    groups = int(getattr(gate, "num_group", None) or 1)
    if getattr(gate, "topk_method", None) == "greedy":  # DeepSeek-V2-Lite: the groups play no part
        groups = 1
    top_groups = int(gate.topk_group) if groups > 1 else 1
    return MoeLayer(
        index, block, router, experts, int(gate.weight.shape[0]), int(gate.top_k), groups, top_groups
    )


def _fits(layout: Layout, router: nn.Module, experts: nn.Module) -> bool:
    """Whether the modules hold the tensors of `layout`, with one number of experts, and no others."""
    owned = {name for name, _ in (*experts.named_parameters(), *experts.named_buffers())}
    routed = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
    if owned != set(layout.expert_tensors) or routed != set(layout.router_tensors):
        return False
    sizes = {_tensor(router, name).shape[0] for name in layout.router_tensors}
    sizes |= {_tensor(experts, name).shape[0] for name in layout.expert_tensors}
    return len(sizes) == 1


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _refuse_mxfp4(block: nn.Module, experts: nn.Module) -> None:
    if any("mxfp4" in type(module).__name__.lower() for module in (block, experts)):
        raise ValueError(
            "the experts are in native MXFP4: their router cannot be watched and their packed tensors cannot be "
            "sliced here. Load the model with quantization_config=Mxfp4Config(dequantize=True)"
        )


def _unknown(model: PreTrainedModel) -> ValueError:
    """The error for a model that has no layout: dense, or of an unknown architecture."""
    kind = f"{type(model).__name__} ({config_of(model).model_type})"
    seen = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if ".experts." in name or "router" in name or name.endswith("e_score_correction_bias")
    ]
    if not seen:
        return ValueError(f"{kind} is dense: it has no mixture-of-experts layers to prune")
    more = f" and {len(seen) - 8} more" if len(seen) > 8 else ""
    return ValueError(
        f"{kind} has an unknown layout of experts; known are {', '.join(LAYOUTS)}. "
        f"Tensors that seem to have an expert dimension: {', '.join(seen[:8])}{more}"
    )
