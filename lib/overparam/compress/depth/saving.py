"""Saving of models that are read back and compared before their folder appears."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth.states import no_cache
from overparam.models import proof, quiet
from overparam.models.proof import NotExactError
from overparam.support.files import new_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TEXTS = (
    "A short text.",
    "In the beginning God created the heavens and the earth, and the earth was without form.",
)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
) -> Path:
    """Save `model` and `tokenizer` to a new folder that ``AutoModel`` loads as the same model, or leave nothing.

    The folder is loaded again: all weights must be bit-identical, and the hidden states of a small padded batch equal
    up to rounding (products may be summed in another order if a matrix has another place in memory).

    Args:
        model: A text encoder or a decoder without its head, truncated or not.
        tokenizer: The model's tokenizer.
        path: A folder that does not exist yet, or is empty.
        replace: Replace an existing folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced.
        NotExactError: If the reloaded model differs; nothing is left on disk.
    """
    if hasattr(model, "peft_config"):
        raise NotExactError(
            f"{type(model).__name__} has adapters, which no AutoModel loads: merge them with merge_and_unload() first"
        )
    with new_folder(path, replace=replace) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_reload(model, folder)
    return Path(path)


def save_encoder(
    encoder: SentenceTransformer, path: str | os.PathLike[str], *, card: str = "", replace: bool = False
) -> Path:
    """Save a sentence-transformers encoder to a new folder that gives the same embeddings, or leave nothing.

    Args:
        encoder: The encoder, with its pooling and all modules after it.
        path: A folder that does not exist yet, or is empty.
        card: Text of its README.
        replace: Replace an existing folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced.
        NotExactError: If the reloaded encoder gives other embeddings; nothing is left on disk.
    """
    from sentence_transformers import SentenceTransformer

    dtype = next(encoder.parameters()).dtype
    with new_folder(path, replace=replace) as folder:
        encoder.save(str(folder), create_model_card=False)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        again = SentenceTransformer(
            str(folder), device=str(encoder.device), model_kwargs={"dtype": dtype}, local_files_only=True
        )
        _lend_unsaved(encoder, again)
        actual, expected = (one.encode(list(_TEXTS), convert_to_tensor=True) for one in (again, encoder))
        _check_same("the encoder", (encoder, again), (actual, expected))
    return Path(path)


@proof.timed()
def _check_reload(model: PreTrainedModel, folder: Path) -> None:
    name = type(model).__name__
    try:
        with quiet():
            again = _loader(model).from_pretrained(
                folder, dtype=model.dtype, use_safetensors=True, local_files_only=True
            )
        again = again.to(model.device).eval()
    except Exception as error:
        raise NotExactError(f"{name} cannot be loaded again from what it saves: {error}") from error
    _lend_unsaved(model, again)
    batch = proof.probe(model)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} | no_cache(model)
    with torch.inference_mode(), proof.evaluating(model):
        expected, actual = model(**arguments)[0], again(**arguments)[0]
    _check_same(name, (model, again), (actual, expected), batch.attention_mask)


def _loader(model: PreTrainedModel) -> Any:
    """AutoModel if it loads the class of `model`, else that class, such as T5EncoderModel."""
    if AutoModel._model_mapping.get(type(model.config), None) is type(model):
        return AutoModel
    return type(model)


def _lend_unsaved(model: nn.Module, again: nn.Module) -> None:
    """Copy unsaved buffers of `model`, such as position frequencies, to `again` where they differ only by rounding.

    A model that was cast after being built has rounded them.
    """
    ours = dict(model.named_buffers())
    for path, module in again.named_modules():
        for name in module._non_persistent_buffers_set:
            theirs, own = module._buffers[name], ours.get(f"{path}.{name}".lstrip("."))
            if theirs is None or own is None or not theirs.is_floating_point():
                continue
            if proof.difference(own, theirs) <= proof.tolerance(torch.bfloat16):
                module._buffers[name] = own


def _check_same(
    name: str,
    pair: tuple[nn.Module, nn.Module],
    outputs: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None = None,
) -> None:
    """Compare a model with its reloaded copy: all common weights, and the outputs.

    A part that only one of them has, such as an unused pooler, does not affect the outputs.
    """
    ours, theirs = (module.state_dict() for module in pair)
    unequal = [key for key in ours if key in theirs and not _identical(ours[key], theirs[key])]
    if unequal:
        raise NotExactError(
            f"{name} is not the same after saving and loading: {len(unequal)} of its {len(ours)} tensors differ, "
            f"such as {unequal[0]}"
        )
    actual, expected = (torch.nan_to_num(output) for output in outputs)  # a broken model may be saved, too
    if proof.is_rounding(actual, expected, mask):
        return
    missing = sorted(ours.keys() ^ theirs.keys())
    reason = (
        f"its configuration does not describe {missing[0]} and {len(missing) - 1} more tensors"
        if missing
        else "something set on the model is not part of its configuration"
    )
    raise NotExactError(
        f"{name} is not the same after saving and loading: its outputs differ by "
        f"{proof.difference(actual, expected, mask):.1g} of their size; {reason}"
    )


def _identical(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    if ours.dtype != theirs.dtype:  # some models keep a few weights in float32 in any dtype
        if not (ours.is_floating_point() and theirs.is_floating_point()):
            return False
        ours, theirs = ours.double(), theirs.double()
    return torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
