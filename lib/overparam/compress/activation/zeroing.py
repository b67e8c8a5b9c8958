"""Which inputs of which matrices become zeros, by thresholds from a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overparam.models.hooks import hooks

Choose = Callable[[str, Tensor], Tensor]  # (matrix, input) -> which values stay
_SAMPLE = 8192  # values of a text that a quantile is estimated from at most, a matrix


@dataclass
class Zeros:
    """How many inputs of matrices became zeros."""

    zeros: int = 0
    values: int = 0

    @property
    def share(self) -> float:
        """Zeros among all values."""
        return self.zeros / self.values if self.values else 0.0


def matrices(model: PreTrainedModel, ending: str = "") -> dict[str, nn.Linear]:
    """Return the matrices of the decoder's layers by name, without the head.

    Args:
        model: A decoder.
        ending: End of their names, such as "down_proj"; by default all.

    Raises:
        ValueError: There are none, as in mixtures whose experts are one tensor.
    """
    found = {
        name: module
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ending)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no matrix {ending or 'in its layers'}: use a dense decoder"
        )
    return found


def quantiles(
    model: PreTrainedModel, texts: Sequence[Tensor], shares: Sequence[float], *, seed: int = 0
) -> dict[str, dict[float, float]]:
    """Return the size below which a share of each matrix's inputs lies.

    Args:
        model: A decoder.
        texts: Token ids [1, tokens] of calibration texts, without padding.
        shares: Of the inputs, between 0 and 1.
        seed: Seed of the values that a text's quantiles are estimated from.

    Returns:
        By matrix and share.

    Raises:
        ValueError: A share outside of 0 to 1, or no text.
    """
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"shares must be between 0 and 1, got {wrong[0]}")
    if not texts:
        raise ValueError("there is no text to calibrate on")
    random = torch.Generator().manual_seed(seed)
    sizes: dict[str, list[Tensor]] = {name: [] for name in matrices(model)}

    def watch(name: str) -> Any:
        def before(_: Any, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().flatten().abs().float().cpu()
            if len(values) > _SAMPLE:
                values = values[torch.randint(len(values), (_SAMPLE,), generator=random)]
            sizes[name].append(values)

        return before

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in matrices(model).items()]
    with hooks(handles), torch.inference_mode():
        for ids in texts:
            model.get_decoder()(input_ids=ids, use_cache=False)
    at = torch.tensor(list(shares))
    return {
        name: dict(zip(shares, torch.cat(parts).quantile(at).tolist(), strict=True))
        for name, parts in sizes.items()
    }


def smallest(thresholds: Mapping[str, Mapping[float, float]], share: float) -> Choose:
    """TEAL: the smallest values become zeros. `thresholds` are those of `quantiles`, which has the share."""
    return lambda name, x: x.abs() > thresholds[name][share]


def largest(thresholds: Mapping[str, Mapping[float, float]], below: float) -> Choose:
    """The inverted choice: values above the quantile `below`, one of those of `quantiles`, become zeros."""
    return lambda name, x: x.abs() <= thresholds[name][below]


def at_random(share: float, seed: int) -> Choose:
    """Values become zeros at random."""
    random = torch.Generator().manual_seed(seed)
    return lambda _, x: torch.rand(x.shape, generator=random).to(x.device) >= share


@contextmanager
def zeroed(modules: Mapping[str, nn.Linear], stays: Choose) -> Iterator[Zeros]:
    """Set inputs of matrices to zero inside of the block; the weights stay as they are.

    Args:
        modules: From `matrices`.
        stays: Which values stay: `smallest`, `largest` or `at_random`.
    """
    counted = Zeros()

    def zero(name: str) -> Any:
        def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept = stays(name, args[0])
            counted.zeros += int((~kept).sum())
            counted.values += kept.numel()
            return (args[0] * kept, *args[1:])

        return before

    with hooks([module.register_forward_pre_hook(zero(name)) for name, module in modules.items()]):
        yield counted
