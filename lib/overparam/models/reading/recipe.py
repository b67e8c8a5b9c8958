"""What surrounds a text in a model's input, and which tokens are pooled: plainly, or as in L3Prune's code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Literal
from unittest.mock import patch

from jinja2 import TemplateError

from overparam.data.triplets import Triplet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACE = "{text}"
_SENTINEL = "PLACEOFTHETEXT"


@dataclass(frozen=True)
class TextRecipe:
    """What surrounds a text, which tokens are pooled, and how the initial loss is drawn and scaled.

    Attributes:
        name: "plain", "published", or another name.
        instructions: Whether the triplets' own instructions (`query_instruction`, `document_instruction`) are put
            before their texts, in the initial loss and in training.
        separator: Text between an instruction and its text. The published code uses "; " for the loss and for
            training, and a space for embedding.
        template: Text around instruction and text: "own" for the tokenizer's chat template if it has one, with the
            text as a user message and no answer begun; None for nothing; or a text with one ``{text}``.
        pool_bos: Whether special tokens before the text, such as ``<bos>``, are pooled; they never are after an
            instruction or template. If False, the text's tokens are located as in the published code: as many from the
            end as the text has by itself.
        weights_from: Where the weights 1, 2, 3, … of ``weighted_mean`` begin. Tokens that are not pooled have none.
        scale: Factor on the cosine in the initial loss (1 / temperature).
        draw: How training triplets are drawn from published data sets: equally from each, or in proportion to size.
    """

    name: str
    instructions: bool
    separator: str
    template: str | None
    pool_bos: bool
    weights_from: Literal["first token", "first pooled token"]
    scale: float
    draw: Literal["balanced", "proportional"]


PLAIN = TextRecipe("plain", False, " ", None, True, "first token", 20.0, "balanced")
PUBLISHED = TextRecipe("published", True, "; ", "own", False, "first pooled token", 50.0, "proportional")
RECIPES = {recipe.name: recipe for recipe in (PLAIN, PUBLISHED)}


def frame(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str]:
    """Return what a template puts before and after a text; two empty strings without a template.

    A ``<bos>`` that the tokenizer adds by itself is removed from its chat template.

    Args:
        tokenizer: Its chat template is used for "own".
        template: See `TextRecipe`.

    Raises:
        ValueError: If the template does not contain the text exactly once, or refuses a single user message.
    """
    if template is None or (template == "own" and not tokenizer.chat_template):
        return "", ""
    if template == "own":
        whole, place = _rendered(tokenizer), _SENTINEL
    else:
        whole, place = template, _PLACE
    parts = whole.split(place)
    if len(parts) != 2:
        raise ValueError(
            f"a template must contain the text exactly once, as {_PLACE}, got {len(parts) - 1} times in {whole!r}"
        )
    head, tail = parts
    bos = tokenizer.bos_token
    if template == "own" and bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(bos)
    return head, tail


class _FixedDay(datetime):
    """A fixed date for chat templates that include today's date: results must not depend on the day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _FixedDay:
        return cls(2024, 7, 26, tzinfo=tz)


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template around a sentinel, with a fixed date, however the template obtains it."""
    from transformers.utils import chat_template_utils

    message = {"role": "user", "content": _SENTINEL}
    day = _FixedDay.now().strftime("%d %b %Y")
    try:
        with patch.object(chat_template_utils, "datetime", _FixedDay):  # used by its strftime_now
            return str(tokenizer.apply_chat_template([message], tokenize=False, date_string=day))
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template does not accept a single user message: {error}; give a template with "
            f"{_PLACE}, or None"
        ) from error


def instructions_of(
    triplet: Triplet, recipe: TextRecipe, instruction: str | None = None
) -> tuple[str | None, str | None]:
    """Return the instructions before the query and before both documents of a triplet.

    Args:
        triplet: May have attributes ``query_instruction`` and ``document_instruction``.
        recipe: Says whether these are used.
        instruction: Put before the query instead.
    """
    if instruction is not None or not recipe.instructions:
        return instruction, None
    return getattr(triplet, "query_instruction", None), getattr(triplet, "document_instruction", None)
