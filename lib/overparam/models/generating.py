"""Settings of text generation that do not depend on a checkpoint's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def generation_config(
    new_tokens: int, ends: list[int], padding: int, *, sample: bool = False, num_beams: int = 1
) -> GenerationConfig:
    """Return a complete configuration, so that settings of a checkpoint (sampling, penalties) do not apply.

    Args:
        new_tokens: Maximum new tokens.
        ends: Ids of end tokens.
        padding: Id of the padding token.
        sample: Whether to sample at temperature 1 from all tokens; otherwise greedy or beam search.
        num_beams: Number of beams.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sample,
        num_beams=num_beams,
        temperature=1.0,
        top_p=1.0,
        top_k=0 if sample else 50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=ends,
        pad_token_id=padding,
        return_dict_in_generate=True,
    )


def end_tokens(model: PreTrainedModel, default: int | None = None) -> list[int]:
    """Return the ids of a model's end tokens, or `default` if it has none; empty without either."""
    ends = model.generation_config.eos_token_id
    ends = default if ends is None else ends
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]
