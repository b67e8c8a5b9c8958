"""The load of every expert, on the training mix and by task, and what the model is without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.compress import experts
from overparam.data.kinds import KINDS
from overparam.data.packing import Packed, Tree, pack
from overparam.data.parallel import verse_pairs
from overparam.evaluate import likelihood, prompts
from overparam.experiment.study import step
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.moe_pretraining import Params, corpus, training
from overparam.studies.moe_pretraining.quality import DIRECTIONS, TARGETS, arrow
from overparam.studies.moe_pretraining.study import Study, Translator
from overparam.support import progress
from overparam.train import causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIX = "training mix"


@step
def expert_load(study: Study, translator: Translator) -> pd.DataFrame:
    """Measure the load of every expert, in units of the uniform load, on held-out text.

    Returns:
        Columns `task` ("training mix", a direction, or a kind of plain text), `layer`, `expert`, `routing_mass` (mean
        over tokens of the normalised top-k weight) and `assignments` (share of the tokens' choices), both over their
        value in a layer that treats its experts alike, and `tokens`.
    """
    params, tokenizer = study.params, translator.tokenizer
    held_out = training.batches(params, tokenizer, split="validation", seed=training.VALIDATION_SEED)
    tasks: dict[str, Iterable[Packed]] = {MIX: islice(held_out, params.validation_batches)}
    for source, target in DIRECTIONS:
        tasks[arrow(source, target)] = _packed(params, _pairs(translator, params, source, target))
    for kind in KINDS:
        tasks[kind] = _packed(params, _plain(translator, params, kind))
    table = pd.concat(
        [_load(translator.model, batches).assign(task=task) for task, batches in tasks.items()],
        ignore_index=True,
    )
    table = table[["task", "layer", "expert", "routing_mass", "assignments", "tokens"]]
    study.recorder.table("expert_load", table)
    of_mix = least(table)
    study.recorder.metric("least_expert_load", float(of_mix.min()), "uniform loads")
    study.recorder.metric("busy_experts", float((of_mix >= params.minimum_load).mean()), "share")
    return table


@step
def removals(study: Study, translator: Translator) -> pd.DataFrame:
    """Remove each expert alone, and measure the loss of held-out verses from English into each language.

    An expert that many heads of attention lean on, since it serves the first token alone, shows here however rarely it
    is used (arXiv 2507.23279).

    Returns:
        One row an expert: rise of the negative log-likelihood a token, with its interval. Empty if not asked for.
    """
    params, model = study.params, translator.model
    n, rows = params.removed_verses, []
    if n:
        pairs = {t: verse_pairs("en", t, "validation", n=n, seed=params.seed) for t in TARGETS}
        asked = {t: prompts.tagged()([pair.source for pair in each], "en", t) for t, each in pairs.items()}

        def losses(pruned: PreTrainedModel) -> dict[str, Any]:
            return {
                target: likelihood.negative_log_likelihood(
                    pruned,
                    translator.tokenizer,
                    asked[target],
                    [pair.target for pair in each],
                    label=f"likelihood of {arrow('en', target)}",
                )
                for target, each in pairs.items()
            }

        before = losses(model)
        counts = [layer.n_experts for layer in experts.layers(model)]
        every = [(layer, expert) for layer, count in enumerate(counts) for expert in range(count)]
        for layer, expert in progress.track(every, "removing one expert"):
            keep = [
                [each for each in range(count) if (at, each) != (layer, expert)]
                for at, count in enumerate(counts)
            ]
            after = losses(experts.prune(models.sharing_copy(model), keep))
            change = stats.suite_difference(
                {target: (before[target], after[target], "nll_per_token") for target in TARGETS},
                n_resamples=CURVE_RESAMPLES,
                shared_items=True,
            )
            rows.append({"layer": layer, "expert": expert, **change.columns("loss_change")})
    names = ["layer", "expert", "loss_change", "loss_change_low", "loss_change_high"]
    table = pd.DataFrame(rows, columns=names)
    study.recorder.table("removals", table)
    return table


def least(table: pd.DataFrame) -> pd.Series:
    """Load of every expert on the training mix: the smaller of routing mass and assignments."""
    return table.loc[table["task"] == MIX, ["routing_mass", "assignments"]].min(axis=1)


def by_task(table: pd.DataFrame) -> pd.DataFrame:
    """For each task: least and most routing mass, the share of experts with little of it, and its entropy.

    The entropy is in percent of that of equal loads, mean over layers.
    """
    groups = table.groupby("task", sort=False)["routing_mass"]
    shares = {"below 0.25": groups.apply(lambda mass: float((mass < 0.25).mean()))}
    layers = table.groupby(["task", "layer"], sort=False)["routing_mass"].apply(_entropy)
    entropy = {"entropy (%)": 100 * layers.groupby("task", sort=False).mean()}
    return pd.DataFrame({"least": groups.min(), "most": groups.max(), **shares, **entropy})


def _entropy(mass: pd.Series) -> float:
    shares = mass[mass > 0] / mass.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(mass)))


def _load(model: PreTrainedModel, batches: Iterable[Packed]) -> pd.DataFrame:
    import torch

    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    top_k = model.config.num_experts_per_tok
    mass, chosen_by = torch.zeros(2, layers, experts, dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            _, router_logits = causal.hidden_states(model, batch, router_logits=True)
            real = torch.from_numpy(batch.tree > 0).flatten()
            tokens += int(real.sum())
            for layer, logits in enumerate(router_logits):
                weights, chosen = logits[real].float().softmax(-1).topk(top_k)  # [tokens, top_k]
                weights = (weights / weights.sum(-1, keepdim=True)).double()
                mass[layer].index_add_(0, chosen.flatten(), weights.flatten())
                chosen_by[layer] += torch.bincount(chosen.flatten(), minlength=experts)
    layer, expert = np.indices((layers, experts))
    return pd.DataFrame(
        {
            "layer": layer.flatten(),
            "expert": expert.flatten(),
            "routing_mass": (mass / tokens * experts).flatten().numpy(),
            "assignments": (chosen_by / tokens / top_k * experts).flatten().numpy(),
            "tokens": tokens,
        }
    )


def _packed(params: Params, trees: Iterable[Tree]) -> Iterator[Packed]:
    fitting = (tree for tree in trees if len(tree) <= params.row_length)
    return pack(fitting, rows=params.rows, length=params.row_length)


def _pairs(translator: Translator, params: Params, source: str, target: str) -> Iterator[Tree]:
    tokenizer = translator.tokenizer
    tag = tokenizer.convert_tokens_to_ids(f"<2{target}>")
    for pair in verse_pairs(source, target, "validation", n=params.test_verses, seed=params.seed):
        first, second = tokenizer([pair.source, pair.target], add_special_tokens=False).input_ids
        yield Tree([tokenizer.bos_token_id, *first], [[tag, *second, tokenizer.eos_token_id]])


def _plain(translator: Translator, params: Params, kind: str) -> Iterator[Tree]:
    pieces = corpus.of_kind(
        kind, translator.tokenizer, corpus.Mix(), params.seed, "validation", params.row_length
    )
    return islice(pieces, params.test_verses)
