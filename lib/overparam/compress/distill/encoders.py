"""Students and teachers as sentence-transformers models: how they are built, and their outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overparam import models
from overparam.compress.distill.fits import check_fits
from overparam.train import contrastive

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overparam.models.folder_recipe import Dense


_PROMPT = "default"  # name of a recipe's default prompt


def as_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int | None = None,
    max_length: int,
    seed: int = 0,
) -> SentenceTransformer:
    """Wrap a text encoder as its recipe says; without a recipe, with mean pooling and unit length.

    A model from a sentence-transformers folder (`models.load`) keeps its pooling, dense layers, prompt and maximum
    length, so that its embeddings are those its authors published (`models.recipe`).

    Args:
        model: A text encoder; it is copied.
        tokenizer: The encoder's tokenizer.
        width: Dimensions of the embeddings, such as the teacher's. A model without a recipe gets a projection if its
            own width differs; by default there is none.
        max_length: Maximum tokens per text, unless the recipe has a lower maximum.
        seed: Seed of the projection.

    Raises:
        ValueError: If the recipe's embeddings have another width, the recipe has unknown parts, or a student does not
            fit its tokenizer.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling

    from overparam.models.folder_recipe import POOLINGS, Dense, check

    recipe, hidden = models.recipe(model), int(model.config.get_text_config().hidden_size)
    if recipe is None:
        if not model.config._name_or_path:  # the model was built here, not loaded
            check_fits(model, tokenizer, max_length=max_length)
        body = contrastive.as_sentence_transformer(model, tokenizer, pooling="mean", max_length=max_length)
        head = [] if width in (None, hidden) else [_linear(hidden, width, bias=False, seed=seed)]
        return SentenceTransformer(modules=[*body, *head, Normalize()], device=str(model.device)).eval()
    check(recipe)
    if width not in (None, recipe.outputs(hidden)):
        raise ValueError(
            f"embeddings of {recipe.where} have {recipe.outputs(hidden)} dimensions by its modules.json, "
            f"not {width}: leave out width"
        )
    (transformer, _) = contrastive.as_sentence_transformer(
        model, tokenizer, max_length=recipe.length(max_length)
    )
    modes = tuple(POOLINGS[each] for each in recipe.pooling)
    after = [_dense(recipe, step) if isinstance(step, Dense) else Normalize() for step in recipe.after]
    return SentenceTransformer(
        modules=[transformer, Pooling(hidden, modes, include_prompt=recipe.include_prompt), *after],
        device=str(model.device),
        prompts={_PROMPT: recipe.prompt} if recipe.prompt else None,
        default_prompt_name=_PROMPT if recipe.prompt else None,
        truncate_dim=recipe.width,
    ).eval()


def as_classifier(encoder: SentenceTransformer, classes: int, *, seed: int = 0) -> SentenceTransformer:
    """Return a copy of an encoder's transformer and pooling with a new linear layer that gives class logits.

    Args:
        encoder: Its first two modules are the transformer and the pooling.
        classes: Number of classes.
        seed: Seed of the new layer.

    Raises:
        ValueError: Fewer than two classes.
    """
    from sentence_transformers import SentenceTransformer

    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {classes}")
    body = [copy.deepcopy(encoder[0]), copy.deepcopy(encoder[1])]
    hidden = encoder[1].get_embedding_dimension()
    modules = [*body, _linear(hidden, classes, bias=True, seed=seed)]
    return SentenceTransformer(modules=modules, device=str(encoder.device)).eval()


def outputs(model: SentenceTransformer, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
    """Return the output of the last module for each text: embeddings or class logits. float32 [texts, width]."""
    vectors = model.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


def pooled(model: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the pooled hidden states of each text, before any projection. float32 [texts, hidden]."""
    from sentence_transformers import SentenceTransformer

    return outputs(SentenceTransformer(modules=[model[0], model[1]], device=str(model.device)), texts)


def token_ids(model: SentenceTransformer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, special tokens included, cut to the model's maximum length."""
    encoded = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length, padding=False)
    return [list(row) for row in encoded["input_ids"]]


def forward(model: SentenceTransformer, ids: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch; return the pooled hidden states [batch, hidden] and the last module's output [batch, width]."""
    features: dict[str, Any] = dict(model.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt"))
    features = {name: tensor.to(model.device) for name, tensor in features.items()}
    features = model[1](model[0](features))
    hidden = features["sentence_embedding"]
    for module in list(model)[2:]:
        features = module(features)
    return hidden, features["sentence_embedding"]


def transformer(model: SentenceTransformer) -> PreTrainedModel:
    """The transformer inside."""
    inner: PreTrainedModel = model[0].model
    return inner


def _dense(recipe: models.Recipe, dense: Dense) -> nn.Module:
    """A dense layer of a recipe, with its weights."""
    from sentence_transformers.models import Dense as Layer
    from torch import nn

    from overparam.models.folder_recipe import dense_weights

    made: Callable[..., nn.Module] = Layer
    layer = made(
        dense.inputs,
        dense.outputs,
        bias=dense.bias,
        activation_function=getattr(nn, dense.activation)(),
        use_residual=dense.residual,
    )
    layer.load_state_dict(dense_weights(recipe, dense))
    return layer


def _linear(inputs: int, outputs: int, *, bias: bool, seed: int) -> nn.Module:
    from sentence_transformers.models import Dense as Layer
    from torch import nn

    made: Callable[..., nn.Module] = Layer
    from overparam.models.seeding import seeded

    with seeded(seed):
        return made(inputs, outputs, bias=bias, activation_function=nn.Identity())
