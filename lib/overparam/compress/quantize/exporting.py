"""Exporting a model to OpenVINO, with the proof that it still computes what PyTorch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.quantize import tracing
from overparam.compress.quantize.openvino import Decoder, Encoder
from overparam.models import proof

_ORDINARY = 24  # tokens of the longest text, where no window is longer
_OTHERS = (9, 16)  # of the other texts of a batch
_BEYOND = 8  # tokens that the longest text has more than a window
_WORK = 5e10  # weights times tokens: what the longest text may take; a wider window is narrowed in PyTorch
_COLUMNS = 4096  # of logits that are compared
_NARROW = 16
_SWITCHING = ("dynamic", "longrope")  # rotary embeddings that change with the length of the text
_TOLERANCE = 1e-3  # kernels of OpenVINO approximate exponentials
_proved: set[str] = set()


def exported(model: PreTrainedModel, *, decoder: bool) -> Any:
    """Return a model as `openvino.Model`, compared with PyTorch once for each architecture in a process.

    Compared is a padded batch of unequal lengths, whose longest text exceeds the window of attention; for a decoder,
    padded on either side, and that text read in steps. Where the text would be too long for that, the window is
    narrowed for a while, and what is traced is compared with the model in PyTorch.

    Args:
        model: An encoder, or a decoder with its head. One in other than float32 is exported as a float32 copy.
        decoder: Whether it is to give logits.

    Raises:
        NotExactError: It cannot be exported, or does not compute the same; says why.
    """
    name = type(model).__name__
    try:
        _refuse_switching(model)
        with proof.evaluating(model):
            found = tracing.traced_decoder(model) if decoder else tracing.traced_encoder(model)
            key = f"{decoder} {proof.signature(model)}"
            if key not in _proved:
                _prove(tracing.in_float32(model), found, decoder)
                _proved.add(key)
    except proof.NotExactError as error:
        raise proof.NotExactError(f"{name} is not exported to OpenVINO: {error}") from error
    except Exception as error:
        raise proof.NotExactError(f"{name} cannot be exported to OpenVINO: {_said(error)}") from error
    return found


@proof.timed()
def _prove(model: PreTrainedModel, found: Any, decoder: bool) -> None:
    windows = _windows(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    wide = {window for window in windows if (window + _BEYOND) * size > _WORK}
    longest = _within_positions(model, max([_ORDINARY, *(window + _BEYOND for window in windows - wide)]))
    with torch.inference_mode():
        if decoder:
            _prove_decoder(model, found, longest)
        else:
            _prove_encoder(model, found, longest)
        if wide:
            with _narrowed(model, wide):
                _prove_step(model, decoder)


def _prove_encoder(model: PreTrainedModel, found: Any, longest: int) -> None:
    batch = proof.probe(model, (longest, *_OTHERS))
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    states = Encoder(found)(batch.input_ids, batch.attention_mask)
    _agree("of a padded batch", states, expected, batch.attention_mask)


def _prove_decoder(model: PreTrainedModel, found: Any, longest: int) -> None:
    run = Decoder(found)
    batch = proof.probe(model, (longest, *_OTHERS))
    ids, mask = batch.input_ids, batch.attention_mask
    expected = _some(model(input_ids=ids, attention_mask=mask).logits)
    _agree("of a padded batch", _some(run.batch(ids, mask)), expected, mask)
    lengths = mask.sum(dim=1).tolist()

    def on_the_left(each: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(longest - n, 0) for row, n in zip(each, lengths, strict=True)])

    left = on_the_left(mask)
    _agree(
        "of a batch padded on the left", _some(run.batch(on_the_left(ids), left)), on_the_left(expected), left
    )
    run.reset()
    steps = [*torch.split(ids[:1, :-3], longest // 2, dim=1), *torch.split(ids[:1, -3:], 1, dim=1)]
    read = torch.cat([_some(run(step)) for step in steps], dim=1)
    _agree(f"of {longest} tokens, read in steps", read, expected[:1])


def _some(logits: torch.Tensor) -> torch.Tensor:
    """Logits of a part of the vocabulary, evenly spread: a large one would take longer to compare than to compute."""
    return logits[..., :: -(-logits.shape[-1] // _COLUMNS)]


def _prove_step(model: PreTrainedModel, decoder: bool) -> None:
    """Compare what is traced with the model, in PyTorch, on a text that exceeds its window."""
    batch = proof.probe(model, (3 * _NARROW, *_OTHERS))
    ids, mask = batch.input_ids, batch.attention_mask
    plain = model(input_ids=ids, attention_mask=mask)
    if not decoder:
        step = tracing.EncoderStep(model)(ids, mask)
        return _agree("beyond its window", step, plain.last_hidden_state, mask)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    empty = tuple(
        tuple(torch.zeros(len(ids), heads, 0, width) for heads, width in layer)
        for layer in tracing.kept_shapes(model)
    )
    logits = tracing.DecoderStep(model)(ids, mask, positions, empty)[0]
    return _agree("beyond its window", logits, plain.logits, mask)


def _agree(what: str, found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    apart = proof.difference(found, expected, mask)
    if not apart <= _TOLERANCE:
        raise proof.NotExactError(
            f"its outputs {what} differ from PyTorch's by {apart:.2g} of their size, and rounding explains "
            f"{_TOLERANCE:g}"
        )


def _windows(model: PreTrainedModel) -> set[int]:
    """Numbers in the configuration and the modules that look like windows of attention, in tokens."""
    places = [vars(model.config.get_text_config()), *(vars(module) for module in model.modules())]
    return {
        value
        for place in places
        for name, value in place.items()
        if ("window" in name or name in ("local_attention", "attention_chunk_size"))
        and isinstance(value, int)
        and value > 1
    }


@contextmanager
def _narrowed(model: PreTrainedModel, windows: set[int]) -> Iterator[None]:
    """Give a model a narrow window of attention for a while."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    places = [*configs.values(), *model.modules()]
    changed = [
        (place, name, value)
        for place in places
        for name, value in vars(place).items()
        if "window" in name and isinstance(value, int) and value in windows
    ]
    try:
        for place, name, _ in changed:
            setattr(place, name, _NARROW)
        yield
    finally:
        for place, name, value in changed:
            setattr(place, name, value)


def _within_positions(model: PreTrainedModel, longest: int) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(longest, most - 4) if isinstance(most, int) and most > 16 else longest


def _refuse_switching(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    for each in kinds:
        if each.get("rope_type") in _SWITCHING:
            raise proof.NotExactError(
                f"its rotary embeddings ({each['rope_type']}) change with the length of a text, and a traced model "
                "keeps those of one length"
            )


def _said(error: Exception) -> str:
    """What an error says first, less the places in OpenVINO's own source."""
    noise = ("Exception from", "Check '", "While ", "FrontEnd API", "Model wasn't", "Summary")
    lines = [line.strip(" -") for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(noise)]
    return f"{type(error).__name__}: {(telling or lines or [''])[0][:200]}"
