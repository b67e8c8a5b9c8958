"""Whether a checkpoint is an encoder or a decoder, by its configuration."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from overparam.assets.catalogue import TINY
from overparam.models import source
from overparam.models.folder_recipe import recipe

Kind = Literal["auto", "encoder", "decoder"]
_WRITES_TEXT = (  # about pictures or sounds
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


def is_decoder(name: str, *, kind: Kind = "auto") -> bool:
    """Return whether `name` is a decoder: a model that predicts the next token.

    A sentence-transformers folder is an encoder, whatever its architecture. Otherwise the configuration decides: what
    it says about attention, then which heads transformers has for its architecture (see `decodes`).

    Args:
        name: As for `load`.
        kind: "encoder" or "decoder" to decide by hand.
    """
    if kind != "auto":
        return kind == "decoder"
    if not name.startswith(TINY) and recipe(name) is not None:
        return False
    return decodes(source.config(name))


def decodes(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is a decoder's.

    The first rule that applies decides. An encoder-decoder is not. ``is_causal`` and ``use_bidirectional_attention``
    decide if they are set. An architecture with only a next-token head is a decoder, one with only a masked-token head
    is not; one with both (such as BERT) is if ``is_decoder`` or ``causal`` is set. An architecture with neither head is
    a decoder if it is the text part of a model that writes text about pictures or sounds.
    """
    text = _text(config)
    if config.is_encoder_decoder or text.is_encoder_decoder or has_encoder_of_its_own(config):
        return False
    if getattr(text, "is_causal", None) is False:
        return False
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return False
    types = (config.model_type, text.model_type)
    causal = any(each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for each in types)
    masked = any(each in MODEL_FOR_MASKED_LM_MAPPING_NAMES for each in types)
    if not causal and not masked:
        return any(each.removesuffix("_text") in _WRITES_TEXT for each in types)
    if not causal:
        return False
    if masked or str(MODEL_MAPPING_NAMES.get(config.model_type)).endswith("Encoder"):
        return bool(getattr(text, "is_decoder", False) or getattr(text, "causal", False))
    return getattr(text, "attn_type", "uni") == "uni"  # XLNet reads both ways by default


def has_encoder_of_its_own(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a class for only the encoder of an encoder-decoder, such as T5EncoderModel."""
    return str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)).endswith("EncoderModel")


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        text: PreTrainedConfig = config.get_text_config()
    except ValueError:  # it has several: an encoder and a decoder
        return config
    return text
