"""Export of a model to OpenVINO, with the proof that it computes the same as in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from overparam.compress.quantize import tracing
from overparam.compress.quantize.openvino import Decoder, Encoder
from overparam.models import proof

_ORDINARY = 24  # tokens of the longest text, unless a window is longer
_OTHERS = (9, 16)  # tokens of the other texts in a batch
_BEYOND = 8  # tokens by which the longest text exceeds a window
_WORK = (
    5e10  # limit of weights × tokens for the longest text; wider windows are narrowed and tested in PyTorch
)
_COLUMNS = 4096  # columns of the logits that are compared
_NARROW = 16  # tokens of a narrowed window
_SWITCHING = ("dynamic", "longrope")  # rotary embeddings that depend on the length of the text
_TOLERANCE = 1e-3  # kernels of OpenVINO approximate exponentials
_proved: set[str] = set()


def export(model: PreTrainedModel, *, decoder: bool) -> Any:
    """Return a model as `openvino.Model`, compared with PyTorch once per architecture and process.

    The comparison uses a padded batch of unequal lengths, whose longest text exceeds the attention window. A decoder
    is compared with padding on either side, and reading the longest text in steps. If that text would be too long,
    the window is narrowed temporarily, and the traced modules are compared with the model in PyTorch.

    Args:
        model: An encoder, or a decoder with its head. If it is not in float32, a float32 copy is exported.
        decoder: Whether the model is to give logits.

    Raises:
        NotExactError: It cannot be exported, or does not compute the same; the message says why.
    """
    name = type(model).__name__
    try:
        _refuse_switching(model)
        with proof.evaluating(model):
            converted = tracing.traced_decoder(model) if decoder else tracing.traced_encoder(model)
            key = f"{decoder} {proof.signature(model)}"
            if key not in _proved:
                _prove(tracing.in_float32(model), converted, decoder)
                _proved.add(key)
    except proof.NotExactError as error:
        raise proof.NotExactError(f"{name} is not exported to OpenVINO: {error}") from error
    except Exception as error:
        raise proof.NotExactError(f"{name} cannot be exported to OpenVINO: {_said(error)}") from error
    return converted


@proof.timed()
def _prove(model: PreTrainedModel, converted: Any, decoder: bool) -> None:
    windows = proof.spans(model.config.get_text_config(), *model.modules())
    size = sum(parameter.numel() for parameter in model.parameters())
    wide = {window for window in windows if (window + _BEYOND) * size > _WORK}
    longest = max([_ORDINARY, *(window + _BEYOND for window in windows - wide)])
    longest = proof.within_positions(model.config.get_text_config(), longest)
    with torch.inference_mode():
        if decoder:
            _prove_decoder(model, converted, longest)
        else:
            _prove_encoder(model, converted, longest)
        if wide:
            with _narrowed(model, wide):
                _prove_step(model, decoder)


def _prove_encoder(model: PreTrainedModel, converted: Any, longest: int) -> None:
    batch = proof.probe(model, (longest, *_OTHERS))
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    states = Encoder(converted)(batch.input_ids, batch.attention_mask)
    _agree("of a padded batch", states, expected, batch.attention_mask)


def _prove_decoder(model: PreTrainedModel, converted: Any, longest: int) -> None:
    run = Decoder(converted)
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
    """Logits of a part of the vocabulary, evenly spread: comparing all of a large one would take too long."""
    return logits[..., :: -(-logits.shape[-1] // _COLUMNS)]


def _prove_step(model: PreTrainedModel, decoder: bool) -> None:
    """Compare the traced modules with the model, in PyTorch, on a text that exceeds its window."""
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


def _agree(what: str, actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    apart = proof.difference(actual, expected, mask)
    if not apart <= _TOLERANCE:
        raise proof.NotExactError(
            f"its outputs {what} differ from PyTorch's by {apart:.2g} of their size, and rounding explains "
            f"only {_TOLERANCE:g}"
        )


@contextmanager
def _narrowed(model: PreTrainedModel, windows: set[int]) -> Iterator[None]:
    """Give a model a narrow attention window within the block."""
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


def _refuse_switching(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    for each in kinds:
        if each.get("rope_type") in _SWITCHING:
            raise proof.NotExactError(
                f"its rotary embeddings ({each['rope_type']}) depend on the length of the text, and a traced model "
                "keeps those of one length"
            )


def _said(error: Exception) -> str:
    """The first informative line of an error, without places in OpenVINO's source."""
    noise = ("Exception from", "Check '", "While ", "FrontEnd API", "Model wasn't", "Summary")
    lines = [line.strip(" -") for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(noise)]
    return f"{type(error).__name__}: {(telling or lines or [''])[0][:200]}"
