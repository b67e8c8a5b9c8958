"""What mteb sees of a model: vectors that are known already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from numpy.typing import NDArray

Lookup = Callable[[list[str], str | None, int, str], NDArray[np.float32]]
"""(texts, instruction, view, task) -> float32 [texts, dim]."""


class View(AbsEncoder):  # type: ignore[misc]
    """An encoder for mteb whose vectors are one view of those looked up."""

    def __init__(self, lookup: Lookup, view: int, instructions: bool) -> None:
        self.lookup, self.view, self.instructions = lookup, view, instructions
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": "overparam/embed",
                "similarity_fn_name": ScoringFunction.COSINE,
                "experiment_kwargs": {"view": view},
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: Any = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Look the vectors of mteb's batches up."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = None if prompt_type is None else prompt_type.value
        instruction = instruction_of(task_metadata, side) if self.instructions else None
        return self.lookup(texts, instruction, self.view, task_metadata.name)


def instruction_of(metadata: TaskMetadata, side: str | None) -> str | None:
    """The task's own prompt, or mteb's for its type; documents have one only where the task names it."""
    prompt = metadata.prompt or get_abstask_prompt(metadata.name)
    if isinstance(prompt, dict):
        return prompt.get(side) if side else None
    return None if side == "document" else prompt
