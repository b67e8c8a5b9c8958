"""Prompts that ask a model for a translation, for each kind of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overparam.data.corpora import known
from overparam.data.parallel import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE_NAMES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "it": "Italian",
    "ja": "Japanese",
    "arz": "Egyptian Arabic",
    "bn": "Bengali",
    "ru": "Russian",
    "zh": "Chinese",
}
_HARMONY_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True)
class Prompter:
    """How to ask for a translation, and how to find the answer in the model's output.

    Attributes:
        build: (source, source language, target language) -> prompt.
        stop: Text that ends the answer, if it does not end with the model's end token.
        add_special_tokens: Whether the tokenizer adds its special tokens (<bos>); chat templates contain theirs.
        answer_after: Marker; the answer follows its last occurrence, and is missing without it.
        answer_prefix: Text between the prompt and a given answer, such as a space.
    """

    build: Callable[[str, str, str], str]
    stop: str | None = None
    add_special_tokens: bool = True
    answer_after: str | None = None
    answer_prefix: str = ""

    def __call__(self, sources: Sequence[str], source_language: str, target_language: str) -> list[str]:
        """Return one prompt per source. Languages are codes such as "en" and "fr"."""
        return [self.build(source, source_language, target_language) for source in sources]

    def given(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return prompts and answers as they would read if the model had given these answers, to score or train it.

        Without a `stop`, the end token is to follow.
        """
        heads = [prompt + (self.answer_after or "") for prompt in prompts]
        return heads, [f"{self.answer_prefix}{answer}{self.stop or ''}" for answer in answers]


def tagged() -> Prompter:
    """``source<2fr>``, for translators trained from scratch with one tag token per target language."""

    def build(source: str, _: str, target_language: str) -> str:
        return f"{source}<2{known(target_language, LANGUAGE_NAMES, 'language')}>"

    return Prompter(build)


def few_shot(examples: Sequence[Pair]) -> Prompter:
    """Blocks of ``English: …`` and ``French: …``, for base models; the answer ends at the end of its line.

    Args:
        examples: Pairs in the two languages that will be translated, in the order of the prompt.

    Raises:
        ValueError: No example (a base model needs to see the task), or a language without a name here.
    """
    if not examples:
        raise ValueError("few_shot needs at least one example, got none")

    def build(source: str, source_language: str, target_language: str) -> str:
        first, second = _name(source_language), _name(target_language)
        blocks = [f"{first}: {_line(pair.source)}\n{second}: {_line(pair.target)}\n\n" for pair in examples]
        return f"{''.join(blocks)}{first}: {_line(source)}\n{second}:"

    return Prompter(build, stop="\n", answer_prefix=" ")


def chat(tokenizer: PreTrainedTokenizerBase) -> Prompter:
    """One request through the tokenizer's chat template, for instruction models.

    Reasoning is kept short if the template has a switch for it: low effort (GPT-OSS), no thinking (Qwen3). In
    GPT-OSS's harmony format the answer is the text of the final channel.

    Raises:
        ValueError: The tokenizer has no chat template, or a language without a name here.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: it is a base model's, use few_shot")

    def build(source: str, source_language: str, target_language: str) -> str:
        languages = f"from {_name(source_language)} into {_name(target_language)}"
        request = f"Translate the following text {languages}. Give only the translation.\n\n{source}"
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                tokenize=False,
                add_generation_prompt=True,
                reasoning_effort="low",
                enable_thinking=False,
            )
        )

    harmony = "<|channel|>" in tokenizer.get_vocab()
    return Prompter(build, add_special_tokens=False, answer_after=_HARMONY_FINAL if harmony else None)


def _name(language: str) -> str:
    return LANGUAGE_NAMES[known(language, LANGUAGE_NAMES, "language")]


def _line(text: str) -> str:
    return " ".join(text.split())
