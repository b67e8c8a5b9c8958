"""Where generation ends: at a text that the model writes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopText(StoppingCriteria):  # type: ignore[misc]
    """Stops rows whose new text holds `stop`; only the last tokens are decoded, each step adds one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.tail = len(stop.encode()) + 1  # a token holds at least one byte

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Say of each row whether it is at its end."""
        new = input_ids[:, self.start :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)
