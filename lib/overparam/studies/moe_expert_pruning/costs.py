"""What a pruned translator costs: parameters, bytes, resident memory, speed and energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from overparam import models
from overparam.compress import experts
from overparam.experiment import costs as measuring
from overparam.experiment.study import step
from overparam.measure import disk, memory
from overparam.studies.moe_expert_pruning.study import Study
from overparam.studies.moe_expert_pruning.sweep import PUBLISHED, Sweep

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

_LOAD = "overparam.compress.experts:load_pruned"


@step
def measure(study: Study, found: Sweep) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the unpruned model and the published cut at every share; see `costs`."""
    params, language = study.params, study.params.languages[0]
    pairs = study.pairs("en", language, "test", params.cost_texts)
    table, raw = costs(
        {
            0.0: study.model,
            **{share: study.pruned(found.keep[PUBLISHED[0], share]) for share in params.shares},
        },
        study.tokenizer,
        study.ask([pair.source for pair in pairs], "en", language),
        new_tokens=params.cost_new_tokens,
        repeats=params.cost_repeats,
        add_special_tokens=study.prompter.add_special_tokens,
    )
    study.recorder.table("costs", table)
    study.recorder.table("latencies", raw)
    return table, raw


def costs(
    models_by_share: Mapping[float, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    new_tokens: int,
    repeats: int,
    add_special_tokens: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure mixtures of experts of which different shares were pruned, 0 among them.

    Models take turns while they are timed, so that a drift of the machine meets all alike. Resident memory is that of
    the loaded model in a fresh process, libraries and freed memory excluded. Generation is greedy and writes
    exactly `new_tokens` tokens after each prompt; its speed includes reading the prompt.

    Args:
        models_by_share: Share of experts pruned -> the model, with its language-modelling head.
        tokenizer: Of all of them.
        texts: Prompts; they make one batch, padded on the left. The first is also translated alone.
        new_tokens: Tokens generated after each.
        repeats: Timed rounds, after one that is not counted.
        add_special_tokens: Whether the tokenizer adds its own special tokens to prompts.

    Returns:
        A row a share. ``parameters``, ``expert_parameters``, ``active_parameters`` (embeddings excluded),
        ``flops_per_token`` (two for each active parameter, so that pruning leaves it as it is),
        ``folder_bytes``, ``resident_bytes``, for each of the steps ``prompt`` (all prompts read), ``generate_one``
        and ``generate_all`` the median ``_seconds`` with its 95 % interval (``_low``, ``_high``) and the
        ``_tokens_per_second`` (read by the first step, written by the others), and the energy of ``generate_all``
        as ``kwh_per_million_tokens``.
        Raw times: ``share_pruned``, ``step``, ``texts``, ``seconds``.

    Raises:
        ValueError: If there is no model or no text, or a number is below 1.
    """
    if not models_by_share or not texts or new_tokens < 1 or repeats < 1:
        raise ValueError(
            "costs needs at least one model, one text, one new token and one repeat, got "
            f"{len(models_by_share)}, {len(texts)}, {new_tokens} and {repeats}"
        )
    options = {"add_special_tokens": add_special_tokens, "return_tensors": "pt"}
    batch = tokenizer(texts, padding=True, padding_side="left", **options)
    single = tokenizer(texts[:1], **options)
    each = models_by_share.items()
    steps = {
        "prompt": measuring.Step({share: _reading(model, batch) for share, model in each}, len(texts)),
        "generate_one": measuring.Step(
            {share: _writing(model, tokenizer, single, new_tokens) for share, model in each}
        ),
        "generate_all": measuring.Step(
            {share: _writing(model, tokenizer, batch, new_tokens) for share, model in each}, len(texts)
        ),
    }
    sizes = measuring.sizes(models_by_share, _save, _LOAD, memory.resident_memories)
    own: dict[float, dict[str, Any]] = {}
    for share, model in each:
        counts = models.count_parameters(model)
        own[share] = {
            "parameters": counts.total,
            "expert_parameters": counts.expert,
            "active_parameters": counts.active,
            "flops_per_token": 2 * counts.active,
            "folder_bytes": sizes[share][0],
            "resident_bytes": sizes[share][1],
        }
    written = new_tokens * len(texts)
    found = measuring.measure(
        "share_pruned",
        own,
        steps,
        repeats=repeats,
        warmup=1,
        energy_step="generate_all",
        energy_repeats=repeats,
        unit="tokens",
        units=written,
    )
    tokens = {
        "prompt": int(batch["attention_mask"].sum()),
        "generate_one": new_tokens,
        "generate_all": written,
    }
    throughput = {
        f"{step}_tokens_per_second": number / found.table[f"{step}_seconds"]
        for step, number in tokens.items()
    }
    return found.table.assign(**throughput), found.latencies


def _reading(model: PreTrainedModel, batch: BatchEncoding) -> Callable[[], None]:
    """Reads the prompts, as far as the first new token."""
    import torch

    inputs = _inputs(model, batch)

    def read() -> None:
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)

    return read


def _writing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: BatchEncoding, new_tokens: int
) -> Callable[[], torch.Tensor]:
    """Writes exactly `new_tokens` tokens after each prompt."""
    import torch
    from transformers import GenerationConfig

    inputs = _inputs(model, batch)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
    )

    def write() -> torch.Tensor:
        with torch.inference_mode():
            written: torch.Tensor = model.generate(**inputs, generation_config=config)
        return written

    return write


def _inputs(model: PreTrainedModel, batch: BatchEncoding) -> dict[str, torch.Tensor]:
    return {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _save(model: PreTrainedModel, folder: Path) -> tuple[int, dict[str, Any]]:
    path = experts.save_pruned(model, folder / "model")
    return disk.disk_bytes(path), {"path": str(path)}
