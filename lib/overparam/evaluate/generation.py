"""Batched generation whose greedy output does not depend on which prompts share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overparam.evaluate.prompts import Prompter
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_ROUND = 16  # tokens after which rows that are done leave a batch

Limit = int | Callable[[int], int]
"""New tokens at most: a number, or a function of the number of source (or prompt) tokens."""


def default_limit(tokens: int) -> int:
    """Twice the source's tokens and 20 more: room for any translation, not for an endless loop."""
    return 2 * tokens + 20


@dataclass(frozen=True)
class Generation:
    """What a model wrote for one prompt.

    Attributes:
        text: Without special tokens, cut at the stop text, stripped.
        ids: New token ids, without the end token and padding; one that holds the stop text is in.
        ended: Whether it came to an end (end token or stop text) within its limit.
        n_tokens: Tokens that were generated, the end token included.
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
    """Translate texts: the prompter's prompts, `generate`, and the prompter's idea of an answer.

    A function as `max_new_tokens` is given the number of tokens of the *source*, so that examples in the prompt
    do not raise the limit; for models that reason first, give a number with room for that. `target_language` is
    that of all, or one for each source: one call for several languages makes larger batches. Other arguments,
    order and errors are those of `generate`.
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
    """Continue prompts by greedy or beam search; never sampled, whatever the model's own settings say.

    Prompts of similar length share a batch, padded on the left. In float32 greedy output is that of each prompt
    alone, up to ties within rounding. With several beams a prompt that comes near its limit may end otherwise
    in another batch, since the batch goes on to its largest limit.

    Args:
        model: A decoder with its language-modelling head (``models.load(…, causal=True)``).
        tokenizer: Its tokenizer.
        prompts: Non-empty texts.
        max_new_tokens: New tokens at most: one number, one a prompt, or a function of a prompt's token count.
        num_beams: Width of the beam search; 1 is greedy.
        batch_tokens: Tokens of a batch, new ones and padding included, over all beams.
        stop: A text that ends the answer; the model's end tokens always do.
        answer_after: A marker; the text is what follows its last occurrence, and empty where it is missing.
        add_special_tokens: Whether the tokenizer adds its own special tokens to prompts.
        label: What the progress bar says.

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
    ends = _end_tokens(model, tokenizer)
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
    """New token ids of each row, up to its limit and beyond; end token and padding are still there.

    A greedy search goes in rounds, and rows that are done leave the batch: a few that never end would else keep
    all others in it, up to the longest limit.
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
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,  # [rows, width and what was written]
                attention_mask=mask,
                past_key_values=cache,
                generation_config=_config(
                    min(left, _ROUND) if num_beams == 1 else left, num_beams, ends, padding
                ),
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


def _config(new_tokens: int, num_beams: int, ends: list[int], padding: int) -> GenerationConfig:
    """Settings given one by one, so that those of a checkpoint (sampling, penalties) do not apply."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=num_beams,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=ends,
        pad_token_id=padding,
        return_dict_in_generate=True,
    )


def _read(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    limit: int,
    ends: list[int],
    stop: str | None,
    marker: list[int],
) -> Generation:
    """Cut what `model.generate` returned for one row at its end token, its stop text or its limit."""
    tokens = tokens[:limit]
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[:end]
    stopped = stop is not None and stop in tokenizer.decode(kept, skip_special_tokens=True)
    if stopped and stop is not None:  # the shortest beginning that holds the stop text
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


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's end tokens, or else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise ValueError("neither the model nor its tokenizer has an end token (eos_token_id)")
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]


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
    """Rows by length, longest first, so that memory runs out at once or not at all."""
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
