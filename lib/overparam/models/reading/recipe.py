"""How a text is put to a model and which of its tokens count: as L3Prune's code does it, or plainly."""

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
    """What stands around a text, which tokens are pooled, and how the initial loss is drawn and scaled.

    Attributes:
        name: "plain", "published", or a name of your own.
        instructions: Whether the instructions that triplets carry (`query_instruction`, `document_instruction`) are
            put before their texts, in the initial loss and in training.
        separator: Between an instruction and its text. The published code uses "; " for the loss and for training,
            and a space when it embeds.
        template: Put around instruction and text: "own" is the chat template of the tokenizer where it has one, with
            the text as a message of the user and no answer begun; None is nothing; else a text with one ``{text}``.
        pool_bos: Whether special tokens before the text, such as ``<bos>``, are pooled; they never are where an
            instruction or a template precedes the text. If False, the tokens of the text are found as in the published
            code: as many from the end as the text has on its own.
        weights_from: Where the weights 1, 2, 3, … of ``weighted_mean`` begin. No weight is given to what is not pooled.
        scale: Factor on the cosine in the initial loss (1 / temperature).
        draw: How training triplets are drawn from published data sets: as many from each, or in proportion to size.
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
    """Return what a template puts before and after a text; two empty strings where there is none.

    A ``<bos>`` that the tokenizer adds by itself is left out of a template of its own.

    Args:
        tokenizer: Its chat template is used for "own".
        template: See `TextRecipe`.

    Raises:
        ValueError: If the template does not hold the text exactly once, or refuses a message of the user alone.
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
            f"a template must hold the text exactly once, as {_PLACE}; it is there {len(parts) - 1} times in {whole!r}"
        )
    head, tail = parts
    bos = tokenizer.bos_token
    if template == "own" and bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(bos)
    return head, tail


class _FixedDay(datetime):
    """What templates take for today: those that name the day would otherwise give other numbers tomorrow."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _FixedDay:
        return cls(2024, 7, 26, tzinfo=tz)


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template around a sentinel, on a fixed day, however the template asks for it."""
    from transformers.utils import chat_template_utils

    message = {"role": "user", "content": _SENTINEL}
    day = _FixedDay.now().strftime("%d %b %Y")
    try:
        with patch.object(chat_template_utils, "datetime", _FixedDay):  # of its strftime_now
            return str(tokenizer.apply_chat_template([message], tokenize=False, date_string=day))
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template takes no message of the user alone: {error}; give a template with "
            f"{_PLACE}, or None"
        ) from error


def instructions_of(
    triplet: Triplet, recipe: TextRecipe, instruction: str | None = None
) -> tuple[str | None, str | None]:
    """Return what stands before the query, and before both documents, of a triplet.

    Args:
        triplet: Says it itself where it has the attributes ``query_instruction`` and ``document_instruction``.
        recipe: Whether what the triplet says is used.
        instruction: Put before the query instead of it.
    """
    if instruction is not None or not recipe.instructions:
        return instruction, None
    return getattr(triplet, "query_instruction", None), getattr(triplet, "document_instruction", None)
