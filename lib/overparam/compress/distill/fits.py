"""Whether a student fits its tokenizer: every possible id has a row in its table, and the padding ids agree."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from overparam.models.tables import usable_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_IDS = re.compile(r"(^|_)token_ids?$")
_TEXTS = ("", " ", "a", "Two words, 3 signs.", "Ünïcode 神 🙂\n\t")
_SHOWN = 4


def check_fits(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
) -> None:
    """Raise ValueError if a student can get an id that it has no row for, or a text longer than its positions.

    Checked are all ids in its configuration and generation configuration, all tokens of the tokenizer, and the tokens
    that the tokenizer adds to texts and pairs of texts.

    Args:
        student: An encoder or a decoder.
        tokenizer: The student's tokenizer.
        max_length: Maximum tokens per text, special tokens included.
    """
    from torch import nn

    table = student.get_input_embeddings()
    rows = int(table.weight.shape[0])
    if tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the student's table {rows} rows; "
            "train the tokenizer with the student's vocabulary size"
        )
    configs = [student.config, student.config.get_text_config(), getattr(student, "generation_config", None)]
    _refuse(
        {name: ids for config in configs if config is not None for name, ids in _configured(config)},
        rows,
        "its configuration names",
        "build it with new_student(config, tokenizer=…), or correct its configuration",
    )
    if tokenizer is not None:
        _refuse(
            emitted(tokenizer),
            rows,
            "its tokenizer gives",
            "train the tokenizer again with retrained_tokenizer",
        )
        padding = table.padding_idx if isinstance(table, nn.Embedding) else None
        if padding is not None and tokenizer.pad_token_id is not None and padding != tokenizer.pad_token_id:
            raise ValueError(
                f"the student's padding is token {padding}, which is never trained, but its tokenizer's is "
                f"{tokenizer.pad_token_id}; build it with new_student(config, tokenizer=…)"
            )
    positions = usable_positions(student)
    if max_length is not None and positions is not None and positions < max_length:
        raise ValueError(
            f"max_length must be at most {positions}, the positions of the student, got {max_length}"
        )


def emitted(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return the ids that a tokenizer can produce, by their source."""
    ids = {repr(token): [index] for token, index in tokenizer.get_vocab().items()}
    named = {name: getattr(tokenizer, f"{name}_id", None) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    ids |= {name: [index] for name, index in named.items() if isinstance(index, int)}
    special = [str(token) for token in tokenizer.all_special_tokens]
    for text in (*_TEXTS, *special):
        ids[f"the text {text!r}"] = _encoded(tokenizer, text)
        ids[f"a pair of texts with {text!r}"] = _encoded(tokenizer, "a", text)
    return ids


def _encoded(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[int]:
    ids: list[int] = tokenizer(*texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return ids


def _configured(config: PreTrainedConfig) -> Iterable[tuple[str, list[int]]]:
    """Token ids in a configuration, by field; negative ones mean none."""
    for name, value in vars(config).items():
        if _IDS.search(name):
            several = value if isinstance(value, list | tuple) else [value]
            yield name, [each for each in several if isinstance(each, int) and each >= 0]


def _refuse(ids: dict[str, list[int]], rows: int, what: str, advice: str) -> None:
    outside = {name: max(values) for name, values in ids.items() if values and max(values) >= rows}
    if outside:
        shown = ", ".join(f"{name}: {index}" for name, index in list(outside.items())[:_SHOWN])
        more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
        raise ValueError(
            f"the student has {rows} tokens, but {what} ids from {min(outside.values())} on ({shown}{more}); {advice}"
        )
