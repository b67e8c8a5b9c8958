"""An encoder in OpenVINO, one compiled model a block, so that it can be stopped after any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from overparam.compress.depth.proof import reading
from overparam.compress.depth.truncation import cut
from overparam.compress.exits.running import Visit
from overparam.compress.quantize import tracing
from overparam.compress.quantize.openvino import Encoder
from overparam.models import blocks, proof, sharing_copy
from overparam.models.proof import NotExactError
from overparam.models.reading.weights import pooling_weights

_TOLERANCE = 1e-3  # kernels of OpenVINO approximate exponentials


class Segments:
    """The blocks of an encoder as models of OpenVINO; the first reads token ids, the others hidden states.

    Attributes:
        source: The encoder that they were made of.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Export every block, and compare the chain with the model.

        Raises:
            NotExactError: The encoder cannot be taken apart in this way.
        """
        self.source, name = model, type(model).__name__
        layers = len(blocks(model).layers)
        if reading(model).tail or not hasattr(model, "embeddings"):
            raise NotExactError(
                f"{name} has more than embeddings before its blocks, or something after them: run it in PyTorch"
            )
        self._blocks = []
        with proof.evaluating(model):
            for number in range(layers):
                part = cut(sharing_copy(model), [number])
                if number:
                    part.set_submodule("embeddings", _Given())
                converted = (
                    tracing.traced_block(part, model.config.hidden_size)
                    if number
                    else tracing.traced_encoder(part)
                )
                self._blocks.append(Encoder(converted))
        batch = proof.probe(model)
        found = [batch.input_ids]
        for block in self._blocks:
            found.append(block(found[-1], batch.attention_mask))
        with torch.inference_mode(), proof.evaluating(model):
            expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        if (apart := proof.difference(found[-1], expected, batch.attention_mask)) > _TOLERANCE:
            raise NotExactError(
                f"{name}: its blocks, one after the other, differ from the whole by {apart:.1g}"
            )

    def early(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        visit: Visit,
        *,
        pooling: str = "mean",
        exits: range | None = None,
        regroup: bool = True,
    ) -> None:
        """Do what `running.early` does."""
        there, inside = torch.arange(len(input_ids)), torch.ones(len(input_ids), dtype=torch.bool)
        hidden, mask = input_ids, attention_mask
        for exit, block in enumerate(self._blocks):
            hidden = block(hidden, mask)
            last = exit == len(self._blocks) - 1
            if not last and exits is not None and exit not in exits:
                continue
            states = torch.bmm(pooling_weights(pooling, mask, mask), hidden).squeeze(1)
            gone = visit(exit, there[inside], states[inside])
            if last or gone is None or bool(gone.all()):
                return
            inside = inside.clone()
            inside[inside.clone()] = ~gone
            if regroup and bool(gone.any()):
                there, hidden, mask = there[inside], hidden[inside], mask[inside]
                inside = torch.ones(len(there), dtype=torch.bool)


class _Given(nn.Module):
    """In place of embeddings: hidden states that are there already."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return what is given."""
        return inputs_embeds
