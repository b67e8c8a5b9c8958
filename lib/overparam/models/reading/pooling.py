"""Modules for a SentenceTransformer that reads and pools by a `TextRecipe`, for training; imported when first needed.

The modules of sentence-transformers pool special tokens before the text and count weights from the first token, so
training by the published recipe needs these. They are not for saving: others could not load them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.models import Pooling, Transformer

from overparam.data.triplets import Triplet
from overparam.models.reading.recipe import TextRecipe, instructions_of
from overparam.models.reading.tokens import pad, read
from overparam.models.reading.weights import pooling_weights

_MARK = "\x1f"  # separates an instruction from its text in training texts


@dataclass(frozen=True)
class Marked:
    """A triplet whose texts begin with their instructions, separated by a mark."""

    query: str
    positive: str
    negative: str
    source: str


def marked(triplet: Triplet, recipe: TextRecipe, instruction: str | None = None) -> Marked:
    """Put a triplet's instructions before its texts, as the recipe says, so that `Reader` can separate them."""
    asked, given = instructions_of(triplet, recipe, instruction)
    before_query, before_document = (f"{each}{_MARK}" if each else "" for each in (asked, given))
    return Marked(
        before_query + triplet.query,
        before_document + triplet.positive,
        before_document + triplet.negative,
        triplet.source,
    )


class Reader(Transformer):  # type: ignore[misc]
    """Tokenizes as `depth.layer_embeddings` does; a prompt is used unchanged, without an added separator."""

    text_recipe: TextRecipe

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return ids, attention mask and pooling mask, each [texts, tokens], padded on the right."""
        recipe = self.text_recipe
        split = [text.split(_MARK, 1) for text in inputs]
        instructions = [parts[0] if len(parts) == 2 else None for parts in split]
        if prompt:
            recipe = dataclasses.replace(recipe, separator="")
            instructions = [prompt] * len(split)
        texts = [parts[-1] for parts in split]
        ids, keep = read(
            self.tokenizer, texts, instruction=instructions, recipe=recipe, max_length=self.max_seq_length
        )
        batch = pad(self.tokenizer, list(range(len(ids))), ids, keep)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pooled_mask": batch.pooled_mask,
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the model, without passing it the pooling mask."""
        pooled = features.pop("pooled_mask")
        outputs: dict[str, Any] = super().forward(features, **kwargs)
        return {**outputs, "pooled_mask": pooled}


class TextPooling(Pooling):  # type: ignore[misc]
    """Pools with the weights that `depth.layer_embeddings` uses."""

    pooling: str
    text_recipe: TextRecipe

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add the pooled embedding, [texts, hidden]."""
        weights = pooling_weights(
            self.pooling, features["attention_mask"], features["pooled_mask"], self.text_recipe
        )
        tokens = features["token_embeddings"]  # [texts, tokens, hidden]
        weighted = weights.transpose(1, 2) * tokens  # in float32, also under autocast
        features["sentence_embedding"] = weighted.sum(1)
        return features
