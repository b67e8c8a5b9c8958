"""Batched generation whose greedy output does not depend on which prompts share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overparam.evaluate.prompts import Prompter
from overparam.models.generating import end_tokens, generation_config
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROUND = 16  # tokens after which finished rows are removed from a batch

Limit = int | Callable[[int], int]
"""Maximum new tokens: a number, or a function of the number of source (or prompt) tokens."""


def default_limit(tokens: int) -> int:
    """Twice the source's tokens plus 20: enough for any translation, but ends loops."""
    return 2 * tokens + 20


@dataclass(frozen=True)
class Generation:
    """What a model wrote for one prompt.

    Attributes:
        text: The text without special tokens, cut at the stop text, stripped.
        ids: New token ids, without end token and padding, but with the token that completes the stop text.
        ended: Whether generation ended (by end token or stop text) within its limit.
        n_tokens: Number of generated tokens, the end token included.
    """

    text: str
    ids: list[int]
    ended: bool
    n_tokens: int


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    source_language: str,
    target_language: str | Sequence[str],
    prompter: Prompter,
    max_new_tokens: Limit = default_limit,
    num_beams: int = 1,
    batch_tokens: int = 4096,
    label: str = "translating",
) -> list[Generation]:
    """Translate texts with the prompts and answer format of a prompter; see `generate`.

    If `max_new_tokens` is a function, its argument is the number of tokens of the *source*, so that examples in the
    prompt do not raise the limit; for models that reason first, pass a number with room for that. `target_language`
    is one for all sources, or a list with one for each: a single call for several languages makes larger batches.
    Other arguments, order and errors are those of `generate`.
    """
    _check_texts(sources, "sources")
    targets = [target_language] * len(sources) if isinstance(target_language, str) else target_language
    limits: Limit | list[int] = max_new_tokens
    if callable(max_new_tokens):
        ids = tokenizer(list(sources), add_special_tokens=False).input_ids
        limits = [max_new_tokens(len(row)) for row in ids]
    return generate(
        model,
        tokenizer,
        [
            prompter([source], source_language, target)[0]
            for source, target in zip(sources, targets, strict=True)
        ],
        max_new_tokens=limits,
        num_beams=num_beams,
        batch_tokens=batch_tokens,
        stop=prompter.stop,
        answer_after=prompter.answer_after,
        add_special_tokens=prompter.add_special_tokens,
        label=label,
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: Limit | Sequence[int] = default_limit,
    num_beams: int = 1,
    batch_tokens: int = 4096,
    stop: str | None = None,
    answer_after: str | None = None,
    add_special_tokens: bool = True,
    label: str = "generating",
) -> list[Generation]:
    """Continue prompts by greedy or beam search, never by sampling, whatever the model's own settings are.

    Prompts of similar length share a batch, padded on the left. In float32, greedy output equals that of each prompt
    alone, up to ties within rounding. With several beams, a prompt that comes near its limit may end differently in
    another batch, because a batch continues to its largest limit.

    Args:
        model: A decoder with its language-modelling head (``models.load(…, causal=True)``).
        tokenizer: The model's tokenizer.
        prompts: Non-empty texts.
        max_new_tokens: Maximum new tokens: a number, one per prompt, or a function of a prompt's number of tokens.
        num_beams: Number of beams; 1 is greedy search.
        batch_tokens: Maximum tokens per batch, new tokens and padding included, over all beams.
        stop: A text that ends the answer, besides the model's end tokens.
        answer_after: A marker; the answer is the text after its last occurrence, or empty without it.
        add_special_tokens: Whether the tokenizer adds its own special tokens to prompts.
        label: Text of the progress bar.

    Returns:
        Generations in the order of `prompts`.

    Raises:
        ValueError: No prompts, an empty one, or a limit or size below 1.
    """
    _check_texts(prompts, "prompts")
    if num_beams < 1 or batch_tokens < 1:
        raise ValueError(f"num_beams and batch_tokens must be at least 1, got {num_beams} and {batch_tokens}")
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=add_special_tokens).input_ids
    limits = _limits(max_new_tokens, [len(row) for row in ids])
    ends = end_tokens(model, tokenizer.eos_token_id)
    if not ends:
        raise ValueError("neither the model nor its tokenizer has an end token (eos_token_id)")
    marker = tokenizer(answer_after, add_special_tokens=False).input_ids if answer_after else []
    groups = list(_groups(ids, limits, batch_tokens // num_beams))
    generations: dict[int, Generation] = {}
    for rows in progress.track(groups, label):
        batch, allowed = [ids[row] for row in rows], [limits[row] for row in rows]
        new = _continue(model, tokenizer, batch, allowed, ends, num_beams, stop)
        for row, tokens in zip(rows, new, strict=True):
            generations[row] = _read(tokenizer, tokens, limits[row], ends, stop, marker)
    return [generations[row] for row in range(len(ids))]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    limits: list[int],
    ends: list[int],
    num_beams: int,
    stop: str | None,
) -> list[list[int]]:
    """Return the new token ids of each row; they may exceed its limit, and include end token and padding.

    Greedy search works in rounds, after which finished rows are removed from the batch: otherwise a few rows that
    never end would keep all others in it up to the longest limit.
    """
    import torch
    from transformers import StoppingCriteriaList

    from overparam.evaluate.stopping import StopText

    width = max(len(row) for row in ids)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in ids]).to(model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]).to(model.device)
    criteria = StoppingCriteriaList([StopText(tokenizer, stop, width)] if stop else [])
    written: list[list[int]] = [[] for _ in ids]
    rows, cache = list(range(len(ids))), None
    while rows:
        left = max(limits[row] - len(written[row]) for row in rows)
        left = min(left, _ROUND) if num_beams == 1 else left
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,  # [rows, width and what was written]
                attention_mask=mask,
                past_key_values=cache,
                generation_config=generation_config(left, ends, padding, num_beams=num_beams),
                stopping_criteria=criteria,
            )
        for row, sequence in zip(rows, output.sequences.tolist(), strict=True):
            written[row] = sequence[width:]
        if num_beams > 1:
            break
        done = [
            len(written[row]) >= limits[row]
            or any(token in ends for token in written[row])
            or (stop is not None and stop in tokenizer.decode(written[row], skip_special_tokens=True))
            for row in rows
        ]
        staying = [place for place, over in enumerate(done) if not over]
        rows = [rows[place] for place in staying]
        if rows:
            cache = output.past_key_values
            if len(staying) < len(done):
                cache.batch_select_indices(torch.tensor(staying, device=model.device))
            input_ids = output.sequences[staying]
            mask = torch.nn.functional.pad(mask[staying], (0, input_ids.shape[1] - mask.shape[1]), value=1)
    return written


def _read(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    limit: int,
    ends: list[int],
    stop: str | None,
    marker: list[int],
) -> Generation:
    """Cut the output of `model.generate` for one row at its end token, stop text or limit."""
    tokens = tokens[:limit]
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[:end]
    stopped = stop is not None and stop in tokenizer.decode(kept, skip_special_tokens=True)
    if stopped and stop is not None:  # find the shortest beginning that contains the stop text
        low, high = 1, len(kept)
        while low < high:
            middle = (low + high) // 2
            if stop in tokenizer.decode(kept[:middle], skip_special_tokens=True):
                high = middle
            else:
                low = middle + 1
        kept = kept[:low]
    text = tokenizer.decode(_after(kept, marker), skip_special_tokens=True)
    text = text.split(stop)[0] if stop else text
    n_tokens = len(kept) + (end is not None and not stopped)
    return Generation(text.strip(), kept, end is not None or stopped, n_tokens)


def _after(tokens: list[int], marker: list[int]) -> list[int]:
    size = len(marker)
    if not size:
        return tokens
    places = [at for at in range(len(tokens) - size + 1) if tokens[at : at + size] == marker]
    return tokens[places[-1] + size :] if places else []


def _limits(max_new_tokens: Limit | Sequence[int], lengths: list[int]) -> list[int]:
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * len(lengths)
    elif callable(max_new_tokens):
        limits = [max_new_tokens(length) for length in lengths]
    else:
        limits = list(max_new_tokens)
    if len(limits) != len(lengths) or min(limits) < 1:
        raise ValueError(
            f"max_new_tokens must be at least 1 for each of {len(lengths)} prompts, got {max_new_tokens!r}"
        )
    return limits


def _groups(ids: list[list[int]], limits: list[int], budget: int) -> Iterator[list[int]]:
    """Groups of rows by length, longest first, so that memory runs out at once or not at all."""
    group: list[int] = []
    longest = 0
    for row in sorted(range(len(ids)), key=lambda row: (-len(ids[row]), -limits[row])):
        longest = max([longest, limits[row]])
        if group and (len(ids[group[0]]) + longest) * (len(group) + 1) > budget:
            yield group
            group, longest = [], limits[row]
        group.append(row)
    yield group


def _check_texts(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{what} must be a list of texts, got one text")
    if not texts:
        raise ValueError(f"there are no {what}")
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"{len(empty)} of {len(texts)} {what} are empty, the first at index {empty[0]}")
