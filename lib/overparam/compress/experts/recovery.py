"""A short fine-tuning that recovers quality after pruning.

arXiv 2605.28042 trains all parameters, on references or, with better results, on translations by the unpruned parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from overparam.compress.experts.layout import layers
from overparam.data.packing import Packed
from overparam.train import causal


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear projections of the attention and on every expert.

    Attributes:
        rank: Rank r of the adapters.
        alpha: Scaling α of the adapters: their output is multiplied by α / r.
    """

    rank: int = 16
    alpha: int = 32


def recover(
    model: PreTrainedModel,
    batches: Iterable[Packed],
    recipe: causal.Recipe,
    *,
    lora: Lora | None = None,
    checkpoint: Path | None = None,
    every: int = 200,
    label: str = "recovering",
) -> causal.Log:
    """Fine-tune a mixture of experts, pruned or not, in place. Its layers may differ in experts and in top-k.

    All parameters that require a gradient are trained, or with `lora` only adapters, which are merged at the end.
    Either way the result is an ordinary model that `save_pruned` accepts. In bfloat16, small steps of full training
    are lost to rounding; adapters are float32 until they are merged. Adapters do not change routers, norms, biases,
    shared experts or embeddings. Each expert has adapters of its own, of ``rank`` rows and columns per matrix. If the
    training fails, the model has no adapters and its original weights.

    Args:
        model: A mixture of experts of a known layout, with its language-modelling head.
        batches: As for `causal.train`: packed prompts and targets.
        recipe: See `causal.Recipe`; its load balance is computed per layer.
        lora: Train adapters instead of the parameters themselves.
        checkpoint: Folder for the training state; a run that finds a state there resumes from it.
        every: Steps between checkpoints.
        label: Name shown in the progress display.

    Returns:
        Losses and counts, one value per step.

    Raises:
        ValueError: If the model is dense or its layout is unknown; if peft has no adapter for a layer; and as for
            `causal.train`.
        FloatingPointError: If the loss is not finite.
    """
    layers(model)
    with _adapted(model, lora, recipe.seed) if lora else nullcontext():
        return causal.train(model, batches, recipe, checkpoint=checkpoint, every=every, label=label)


@contextmanager
def _adapted(model: PreTrainedModel, lora: Lora, seed: int) -> Iterator[None]:
    """Add adapters to `model`; merge them at the end of the block, or remove them if the block fails."""
    from peft import LoraConfig, get_peft_model

    names = {module: name for name, module in model.named_modules()}
    moe_layers = layers(model)
    alone = [
        each.index
        for each in moe_layers
        if each.n_experts == 1 and getattr(each.experts, "is_transposed", False)
    ]
    if alone:
        raise ValueError(
            f"peft has no adapter for the single expert left in decoder layer {alone[0]}, because "
            f"{type(model).__name__} stores experts transposed; train without lora"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[
            name for module, name in names.items() if isinstance(module, nn.Linear) and ".self_attn." in name
        ],
        target_parameters=[
            f"{names[tensor.owner]}.{tensor.name}"
            for layer in moe_layers
            for tensor in layer.tensors
            if tensor.owner is layer.experts and tensor.value.ndim == 3  # biases are not adapted
        ],
    )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    try:
        yield
        adapted.merge_and_unload()
    except BaseException:
        adapted.unload()
        raise
    finally:
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
