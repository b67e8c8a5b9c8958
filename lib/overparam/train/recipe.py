"""How a model is trained: what the recipes of all kinds of training share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has. A recipe's fields are part of the name of a cached training: see `version`.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate, which is reached by a linear warm-up.
        warmup: Warm-up steps.
        seed: Seed of the order of texts, dropout, sampling and adapters.
        version: Raised by the author of the training's module when its results change, so that older cached results
            are not reused.
    """

    steps: int
    learning_rate: float
    warmup: int = 50
    seed: int = 42
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class LoopRecipe(Recipe):
    """What the recipes of `loop.run` have.

    Attributes:
        weight_decay: Decoupled weight decay, on matrices.
        clip: Maximum gradient norm.
        extendable: Whether a longer training can continue a finished one, which then keeps its optimizers' moments.
    """

    extendable: ClassVar[bool] = False
    weight_decay: float = 0.0
    clip: float = 1.0

    @property
    def decay(self) -> int:
        """Steps of the linear decay to zero at the end: all after the warm-up."""
        return max(1, self.steps - self.warmup)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        up = (step + 1) / max(1, self.warmup)
        down = (self.steps - step) / self.decay if self.decay else 1.0
        return self.learning_rate * min(1.0, up, down)
