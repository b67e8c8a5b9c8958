"""Models at their published size, with random weights: for costs that depend on shapes, not on values.

Sizes are those of the published configurations; nothing is downloaded. Weights are made where they will live, in their
final dtype, and every page of them is written: memory that nobody has touched is not resident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from overparam.models.published_shapes import EXPERTS, shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_BLOCK = 2**20 - 3  # random values that are repeated: a prime, so that no two rows of a matrix are alike
ROOM = 1.15  # memory for activations and libraries, in multiples of the weights


def config(name: str, *, layers: int | None = None, experts: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a shape, with fewer layers or experts if asked for.

    Raises:
        ValueError: An unknown name, more layers or experts than there are, or experts of a model without.
    """
    found = shape(name)
    fields = dict(found.fields)
    if layers is not None:
        if not 1 <= layers <= found.layers:
            raise ValueError(f"layers of {name} must be in 1..{found.layers}, got {layers}")
        fields["num_hidden_layers"] = layers
    if experts is not None:
        names = [each for each in EXPERTS if each in fields]
        if not names:
            raise ValueError(f"{name} has no experts")
        most, least = fields[names[0]], fields["num_experts_per_tok"]
        if not least <= experts <= most:
            raise ValueError(f"experts of {name} must be in {least}..{most}, got {experts}")
        fields[names[0]] = experts
    made: PreTrainedConfig = AutoConfig.for_model(found.model_type, **fields)
    return made


def experts_of(name: str) -> int:
    """Return the experts of a layer of a shape, 0 without."""
    return next((int(value) for key, value in shape(name).fields.items() if key in EXPERTS), 0)


def parameters(name: str, *, causal: bool = True, **kept: int | None) -> int:
    """Return the number of parameters of a shape, counted on a model without weights; `kept` as for `config`."""
    with torch.device("meta"):
        made = _class(causal).from_config(config(name, **kept))
    return sum(each.numel() for each in made.parameters())


def needed_bytes(name: str, dtype: torch.dtype, *, causal: bool = True, **kept: int | None) -> int:
    """Return the memory that a shape needs: its weights, and some for what it computes."""
    return int(ROOM * dtype.itemsize * parameters(name, causal=causal, **kept))


def free_bytes(device: str = "cpu") -> int:
    """Return the free memory of a device."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info()[0])


def reason_against(
    name: str, dtype: torch.dtype, device: str = "cpu", *, causal: bool = True, **kept: int | None
) -> str:
    """Return why a shape cannot be built here, with the memory that it needs; empty if it can."""
    needed, free = needed_bytes(name, dtype, causal=causal, **kept), free_bytes(device)
    if needed <= free:
        return ""
    kind = str(dtype).removeprefix("torch.")
    return f"needs {needed / 2**30:.1f} GiB in {kind}, {free / 2**30:.1f} GiB are free"


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    causal: bool = True,
    **kept: int | None,
) -> PreTrainedModel:
    """Build a shape with random weights.

    Args:
        name: One of `SHAPES`, or ``tiny-`` and such a name.
        dtype: Of all weights.
        device: Where they are made.
        causal: With the language-modelling head.
        kept: `layers` and `experts`, as for `config`.

    Raises:
        MemoryError: It does not fit into the free memory; the message says how much it needs.
        ValueError: As `config`.
    """
    if reason := reason_against(name, dtype, device, causal=causal, **kept):
        raise MemoryError(f"{name} {reason}: keep fewer layers or experts, or use a larger machine")
    with torch.device("meta"):
        model = _class(causal).from_config(config(name, **kept), dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    noise = 0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    noise = noise.to(device=device, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            flat = parameter.data.view(-1)
            if "norm" in key:
                flat.fill_(1.0)
                continue
            for start in range(0, len(flat), _BLOCK):
                flat[start : start + _BLOCK] = noise[: len(flat) - start]
        _restore_buffers(model, device)
    made: PreTrainedModel = model.eval()
    return made


def _restore_buffers(model: Any, device: str) -> None:
    """Compute tables of rotary embeddings anew: `to_empty` leaves nothing in them."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            for key, value in fresh.named_buffers():
                setattr(module, key, value.to(device))
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = module.inv_freq


def _class(causal: bool) -> Any:
    return AutoModelForCausalLM if causal else AutoModel
