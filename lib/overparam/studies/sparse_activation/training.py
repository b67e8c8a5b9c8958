"""The trainings that are compared: the same text in the same order, one model each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache as remember
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil

from overparam.data.packing import Packed, Tree, balanced, endless, pack
from overparam.measure.speed import Timing, interleaved
from overparam.models.translator import PLAIN
from overparam.studies.sparse_activation import ACTIVE, MIXTURE, RANDOM, TOTAL, UPCYCLED, Params
from overparam.support import cache, files
from overparam.support.allocator import keep_freed_memory
from overparam.train.causal import Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALIDATION_SEED = 1
_TOKENIZER_CHARACTERS = 1_000_000  # of each kind of text that the tokenizer is trained on
_STATE = 16  # bytes a parameter in training: weights, gradients, and two moments
_KEPT = 40  # hidden states and gradients of a token and layer that are in memory at once, about
_PLAN = ("vocabulary", "hidden", "layers", "heads", "key_value_heads", "experts", "top_k", "expert_width", "kinds",
         "max_texts", "rows", "row_length", "warmup", "balance", "capacity", "precision", "version")  # fmt: skip


@dataclass
class Training:
    """A model, the log of its training, and losses by kind of held-out text after some steps."""

    model: PreTrainedModel
    log: Log = field(default_factory=Log)
    points: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Texts:
    """Tokenizer, and what is held out, by kind."""

    tokenizer: PreTrainedTokenizerBase
    held_out: dict[str, list[Packed]]


def shape(params: Params, arm: str) -> dict[str, Any]:
    """Return the experts of an arm: a dense model is a mixture of one expert, which every token uses in full."""
    if arm in (ACTIVE, TOTAL):
        times = params.top_k if arm == ACTIVE else params.experts
        return {"experts": 1, "top_k": 1, "expert_width": times * params.expert_width}
    return {"experts": params.experts, "top_k": params.top_k, "expert_width": params.expert_width}


def build(params: Params, arm: str, seed: int) -> PreTrainedModel:
    """Return the untrained model of an arm."""
    from overparam.models import translator

    same: dict[str, Any] = {
        name: getattr(params, name) for name in ("vocabulary", "hidden", "layers", "heads", "key_value_heads")
    }
    return translator.build(architecture="gpt_oss", **same, **shape(params, arm), seed=seed)


def parameters(params: Params, arm: str) -> int:
    """Count the parameters of an arm without building it."""
    of = shape(params, arm)
    hidden, width = params.hidden, params.hidden // params.heads
    keys = 2 * params.heads * width + 2 * params.key_value_heads * width
    attention = hidden * keys + (keys - params.heads * width) + hidden + params.heads  # biases, sinks
    experts = of["experts"] * (
        (hidden + 1) * 2 * of["expert_width"] + (of["expert_width"] + 1) * hidden + hidden + 1
    )
    return int(params.vocabulary * hidden + params.layers * (attention + experts + 2 * hidden) + hidden)


def check_memory(params: Params) -> None:
    """Refuse trainings that do not fit into memory, before the first one begins.

    Raises:
        MemoryError: The message names the model.
    """
    tokens, free = params.rows * params.row_length, psutil.virtual_memory().available
    for arm in params.arms:
        of = shape(params, arm)
        a_token = _KEPT * params.hidden + 8 * of["top_k"] * of["expert_width"]
        needed = _STATE * parameters(params, arm) + 4 * tokens * params.layers * a_token
        if needed > free:
            raise MemoryError(
                f"training the model '{arm}' of {parameters(params, arm):,} parameters needs about "
                f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free: lower experts, expert_width, "
                "layers or rows"
            )


@remember
def texts(params: Params) -> Texts:
    """Train the tokenizer, and pack what is held out."""
    from overparam.data import kinds
    from overparam.models import translator

    some = []
    for kind in params.kinds:
        characters = 0
        for text in kinds.texts(kind, "train", params.max_texts):
            some.append(text[: _TOKENIZER_CHARACTERS - characters])
            if (characters := characters + len(text)) >= _TOKENIZER_CHARACTERS:
                break
    tokenizer = translator.tokenizer(some, vocabulary=params.vocabulary)
    held_out = {}
    for kind in params.kinds:
        trees = _trees(params, tokenizer, kind, "validation", VALIDATION_SEED)
        batches = pack(trees, rows=params.rows, length=params.row_length)
        held_out[kind] = list(islice(batches, params.validation_batches))
    return Texts(tokenizer, held_out)


def batches(params: Params, seed: int) -> Iterator[Packed]:
    """Yield training batches for ever, with equal shares of the kinds: the same ones for every arm of a seed."""
    tokenizer = texts(params).tokenizer
    streams = {kind: _trees(params, tokenizer, kind, "train", seed) for kind in params.kinds}

    trees = balanced(streams, dict.fromkeys(streams, 1.0))
    return pack(trees, rows=params.rows, length=params.row_length)


def _trees(
    params: Params, tokenizer: PreTrainedTokenizerBase, kind: str, split: str, seed: int
) -> Iterator[Tree]:
    """Pieces of text of one kind for ever, each epoch in another order."""
    return endless(
        _pieces(tokenizer, kind, split, params.max_texts, params.row_length - 2),
        first=tokenizer.bos_token_id,
        head=tokenizer.convert_tokens_to_ids(PLAIN),
        seed=f"{seed} {kind}",
    )


@remember
def _pieces(
    tokenizer: PreTrainedTokenizerBase, kind: str, split: str, max_texts: int | None, length: int
) -> list[list[int]]:
    from overparam.data import kinds

    found = tokenizer(kinds.texts(kind, split, max_texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return [ids[at : at + length] for ids in found for at in range(0, len(ids), length)]


def train(params: Params, arm: str, *, seed: int, learning_rate: float, steps: int) -> Training:
    """Train an arm, or go on from its last checkpoint in the user's cache.

    The mixture that is upcycled is a dense model of its active size for the first half of the steps.

    Raises:
        FloatingPointError: The loss is not finite; the message names the model, the step and the last good checkpoint.
    """
    first = Training(build(params, arm, seed))
    if arm == UPCYCLED:
        from overparam.compress.experts.upcycling import upcycle

        dense = Training(build(params, ACTIVE, seed))
        _train(params, dense, f"{ACTIVE}, to be upcycled", ACTIVE, seed, learning_rate, steps // 2)
        first = Training(upcycle(dense.model, first.model), dense.log, dense.points)
    _train(params, first, arm, arm, seed, learning_rate, steps - len(first.log.loss))
    return first


def state_folder(params: Params, name: str, seed: int, learning_rate: float, steps: int) -> Path:
    """Return the folder of a training's checkpoints; a shorter training has another one."""
    own = {"name": name, "seed": seed, "learning_rate": learning_rate, "steps": steps}
    named = params.model_dump(mode="json", include=set(_PLAN)) | own
    return cache.folder("training") / files.digest(named)[:16]


def _train(
    params: Params, training: Training, name: str, arm: str, seed: int, learning_rate: float, steps: int
) -> None:
    """Train a model for some more steps."""
    from overparam.train import causal

    keep_freed_memory()
    model, after = training.model, len(training.log.loss)
    if arm == RANDOM:
        for layer in model.model.layers:
            layer.mlp.router.requires_grad_(False)
    recipe = causal.Recipe(
        steps=steps,
        learning_rate=learning_rate,
        warmup=params.warmup,
        balance=params.balance if arm in (MIXTURE, UPCYCLED) else 0.0,
        seed=seed,
    )
    folder = state_folder(params, name, seed, learning_rate, steps)
    file = folder.with_name(f"{folder.name}.points.json")
    points: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}

    def measure(step: int) -> None:
        points[str(step)] = validation_losses(model, texts(params))
        files.write_atomic(file, json.dumps(points).encode())

    with cache.using(folder):
        try:
            log = causal.train(
                model,
                islice(batches(params, seed), after, None),
                recipe,
                capacity=params.capacity,
                checkpoint=folder,
                every=params.checkpoint_every,
                at_checkpoint=measure,
                bf16=params.precision == "bfloat16",
                label=f"training {name}",
            )
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{name}, seed {seed}, learning rate {learning_rate:g}: {error}. Its last good checkpoint is in "
                f"{folder}; use a lower learning rate"
            ) from error
        if str(steps) not in points:  # the run was killed between its last checkpoint and this
            measure(steps)
    training.points |= {after + int(step): losses for step, losses in points.items()}
    whole = training.log
    tokens = sum(whole.tokens[-1:])
    whole.tokens += [tokens + each for each in log.tokens]
    whole.loss += log.loss
    whole.dropped += log.dropped


def speeds(params: Params) -> tuple[dict[str, Timing], int]:
    """Time one step of each kind of model, in turns and untouched by what else the machine did during the trainings.

    Returns:
        Seconds by arm, and the tokens of a step.
    """
    from overparam.train import causal

    keep_freed_memory()
    batch = next(batches(params, params.seeds[0]))

    def call(arm: str) -> Callable[[], Any]:
        model = build(params, arm, params.seeds[0])
        recipe = causal.Recipe(steps=1, learning_rate=0.0, balance=params.balance if arm == MIXTURE else 0.0)
        bf16 = params.precision == "bfloat16"
        return lambda: causal.train(model, [batch], recipe, capacity=params.capacity, bf16=bf16, label=arm)

    calls = {arm: call(arm) for arm in (ACTIVE, MIXTURE, TOTAL)}
    return interleaved(calls, repeats=params.time_repeats), int((batch.tree > 0).sum())


def validation_losses(model: PreTrainedModel, text: Texts) -> dict[str, float]:
    """Return the cross entropy per token in nats, by kind of held-out text; no token is dropped, in float32."""
    import torch

    from overparam.train import batched

    found = {}
    with torch.no_grad(), batched.batched(model, None):
        for kind, held_out in text.held_out.items():
            total, count = 0.0, 0
            for batch in held_out:
                tokens = batched.flat(batch)
                hidden, _ = batched.hidden_states(model.get_decoder(), tokens)
                _, plain = batched.losses(hidden, model.get_output_embeddings().weight, tokens.labels)
                total, count = total + float(plain), count + int((tokens.labels >= 0).sum())
            found[kind] = total / count
    return found


def expert_use(model: PreTrainedModel, text: Texts) -> tuple[float, float]:
    """Return the least share of assignments of any expert, in uniform shares, and the entropy over its maximum."""
    import torch

    from overparam.train import batched

    experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    counts = torch.zeros(model.config.num_hidden_layers, experts)
    with torch.no_grad(), batched.batched(model, None):
        for held_out in text.held_out.values():
            for batch in held_out:
                _, routed = batched.hidden_states(
                    model.get_decoder(), batched.flat(batch), router_logits=True
                )
                for layer, logits in enumerate(routed):
                    counts[layer] += torch.bincount(logits.topk(top_k).indices.flatten(), minlength=experts)
    share = counts / counts.sum(1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(1) / np.log(experts)
    return float(share.min() * experts), float(entropy.mean())


def curve(training: Training) -> pd.DataFrame:
    """A row a point: step, tokens, and losses by kind of text; `loss` is their mean."""
    log = training.log
    return pd.DataFrame(
        {
            "step": step,
            "tokens": log.tokens[step - 1],
            "loss": float(np.mean(list(losses.values()))),
            **{f"loss_{kind}": loss for kind, loss in losses.items()},
        }
        for step, losses in sorted(training.points.items())
    )
