"""The step that fine-tunes a real model on few texts: all of its parameters, or low-rank adapters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.study import step
from overparam.models import anatomy
from overparam.record import stats
from overparam.studies.anatomy.study import Study

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BEFORE, LORA, EVERYWHERE, FULL = "before", "LoRA", "LoRA, experts too", "full"
OWN, OTHER = "verses (learned before)", "interface texts (tuned on)"
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")  # that get adapters
_ROWS = 16  # pairs of a step
_VALIDATION = 40  # pairs on which rate and epoch are chosen
_COLUMNS = ["method", "trained", "rate", "epoch", "test", "train", "gap", "own", "state_bytes", "seconds"]


@step
def tune(study: Study) -> pd.DataFrame:
    """Fine-tune the translator on few texts of a kind that it does not know, with LoRA and in full, and compare.

    Learning rate and epoch are chosen on validation texts. Adapters are on the matrices of the attention, or on those
    of every expert, too, where most parameters of a mixture are.

    Returns:
        A row a method: parameters `trained`; loss a token on the test texts, the training texts and held-out verses,
        which it knew before; the `gap`, test minus training; bytes of gradients and optimizer states; seconds a step;
        and `gained`, how much lower the loss on test texts is than before, paired by text, and `forgot`, how much
        higher on verses. Without this part, no rows.
    """
    from overparam.data.parallel import interface_pairs, verse_pairs

    params = study.params
    if not params.tuned:
        return pd.DataFrame(columns=_COLUMNS)
    sizes = (params.tuning_pairs, _VALIDATION, params.tuning_items)
    pairs = interface_pairs("fr", n=sum(sizes), seed=params.seeds[0])
    ends = np.cumsum(sizes)
    train, validation, test = (pairs[end - size : end] for end, size in zip(ends, sizes, strict=True))
    verses = verse_pairs("en", "fr", "test", n=params.tuning_items, seed=params.seeds[0])
    score = _scorer(study)
    model, _ = study.routed
    own = {OTHER: score(model, test), OWN: score(model, verses)}
    items: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        BEFORE: {OTHER: [own[OTHER]], OWN: [own[OWN]], "train": [score(model, train)]}
    }
    facts: dict[str, dict[str, Any]] = {BEFORE: {"trained": 0, "rate": np.nan, "epoch": 0, "state_bytes": 0}}
    for method in (LORA, EVERYWHERE, FULL):
        rates = params.tuning_rates if method != FULL else tuple(rate / 10 for rate in params.tuning_rates)
        tried = [_Run(study, method, rate, params.seeds[0], train, validation, score) for rate in rates]
        first = min(tried, key=lambda run: run.loss)
        runs = [first] + [
            _Run(study, method, first.rate, seed, train, validation, score) for seed in params.seeds[1:]
        ]
        for number, run in enumerate(runs):
            found = items.setdefault(method, {OTHER: [], OWN: [], "train": []})
            for name, texts in ((OTHER, test), (OWN, verses), ("train", train)):
                found[name].append(score(run.best, texts))
                study.recorder.keep(
                    found[name][-1], system=method, part=f"{name}, seed {params.seeds[number]}"
                )
        facts[method] = {"trained": first.trained, "rate": first.rate, "epoch": first.epoch,
                         "state_bytes": first.state_bytes, "seconds": first.seconds}  # fmt: skip
    table = pd.DataFrame(_row(method, facts[method], items) for method in items)
    for method in (LORA, EVERYWHERE):
        worse = stats.difference(items[FULL][OTHER], items[method][OTHER], statistic="nll_per_token")
        more = stats.difference(items[method][OWN], items[FULL][OWN], statistic="nll_per_token")
        for column, value in (worse.columns("worse_than_full") | more.columns("full_forgot_more")).items():
            table.loc[table["method"] == method, column] = value
    table["texts"], table["seeds"] = len(test), len(params.seeds)
    study.recorder.table("tuning", table)
    return table


def _row(method: str, facts: dict[str, Any], items: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    mean = {name: stats.bootstrap(each, statistic="nll_per_token") for name, each in items[method].items()}
    gained = stats.difference(items[method][OTHER], items[BEFORE][OTHER], statistic="nll_per_token")
    forgot = stats.difference(items[BEFORE][OWN], items[method][OWN], statistic="nll_per_token")
    return {
        "method": method, **facts, **mean[OTHER].columns("test"), "train": mean["train"].value,
        "gap": mean[OTHER].value - mean["train"].value, **mean[OWN].columns("own"), **gained.columns("gained"),
        **forgot.columns("forgot"),
    }  # fmt: skip


def _scorer(study: Study) -> Callable[[Any, Any], NDArray[np.float64]]:
    """A function of a model and pairs: negative log-likelihood and tokens of each translation."""
    from overparam.evaluate import likelihood, prompts

    _, tokenizer = study.routed

    def score(model: Any, pairs: Any) -> NDArray[np.float64]:
        asked = prompts.tagged()([pair.source for pair in pairs], "en", "fr")
        return likelihood.negative_log_likelihood(model, tokenizer, asked, [pair.target for pair in pairs])

    return score


class _Run:
    """One fine-tuning, with the model of its best epoch.

    Attributes:
        best: The model of that epoch.
        loss: Its loss a token on validation texts.
        epoch: Its number, 0 for the model as it was.
        trained: Parameters that were trained.
        state_bytes: Of their gradients and optimizer states.
        seconds: A step, median.
        rate: Learning rate.
    """

    def __init__(
        self, study: Study, method: str, rate: float, seed: int, train: Any, validation: Any, score: Any
    ) -> None:
        import torch

        params, (model, tokenizer) = study.params, study.routed
        self.rate, self.best, self.epoch = rate, model, 0
        self.loss = _per_token(score(model, validation))
        tuned: Any = copy.deepcopy(model).requires_grad_(True)
        if method != FULL:
            tuned = adapted(tuned, params.tuning_rank, seed, experts=method == EVERYWHERE)
        weights = [each for each in tuned.parameters() if each.requires_grad]
        self.trained = sum(int(each.numel()) for each in weights)
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        times = []
        for epoch in range(1, params.tuning_epochs + 1):
            tuned.train()
            for ids, labels in _batches(tokenizer, train, seed, epoch):
                started = time.perf_counter()
                tuned(
                    input_ids=ids, attention_mask=(ids != 0).long(), labels=labels, use_cache=False
                ).loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                self.state_bytes = state_bytes(weights, optimizer)
                optimizer.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - started)
            tuned.eval()
            plain = _merged(tuned) if method != FULL else tuned
            loss = _per_token(score(plain, validation))
            if loss < self.loss:
                self.loss, self.epoch = loss, epoch
                self.best = plain if method != FULL else copy.deepcopy(plain)
        self.seconds = float(np.median(times))


def adapted(model: PreTrainedModel, rank: int, seed: int, *, experts: bool) -> Any:
    """Return a model with adapters on the matrices of its attention; only they are trained.

    Args:
        model: A mixture whose experts are fused tensors.
        rank: Of the adapters.
        seed: Of the adapters' weights.
        experts: Adapt every expert, too, with adapters of its own.

    Raises:
        RuntimeError: peft made another number of parameters than the formula says.
    """
    from peft import LoraConfig, get_peft_model

    from overparam.models.seeding import seeded

    expected, fused = anatomy.lora(model, rank, _MATRICES), []
    for name, each in model.named_parameters():
        if experts and ".experts." in name and each.ndim == 3:
            fused.append(name)
            expected += rank * each.shape[0] * sum(each.shape[1:])
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(_MATRICES), target_parameters=fused or None
    )
    with seeded(seed):
        tuned = get_peft_model(model, config)
    made = sum(int(each.numel()) for each in tuned.parameters() if each.requires_grad)
    if made != expected:
        raise RuntimeError(f"peft made {made:,} parameters of adapters, the formula says {expected:,}")
    return tuned


def _merged(tuned: Any) -> Any:
    return copy.deepcopy(tuned).merge_and_unload().eval()


def state_bytes(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of gradients and of the optimizer's tensors, a step's count aside."""
    import torch

    moments = [
        each for state in optimizer.state.values() for each in state.values()
        if isinstance(each, torch.Tensor) and each.ndim
    ]  # fmt: skip
    gradients = [each.grad for each in weights if each.grad is not None]
    return sum(int(each.nbytes) for each in [*gradients, *moments])


def _batches(
    tokenizer: Any, pairs: Any, seed: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of prompts and translations, padded on the right; only translations are predicted."""
    import torch

    from overparam.evaluate import prompts

    order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
    asked = tokenizer(prompts.tagged()([pair.source for pair in pairs], "en", "fr")).input_ids
    answers = tokenizer([pair.target for pair in pairs], add_special_tokens=False).input_ids
    for at in range(0, len(order), _ROWS):
        chosen = order[at : at + _ROWS].tolist()
        rows = [[*asked[each], *answers[each], tokenizer.eos_token_id] for each in chosen]
        ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for number, (row, each) in enumerate(zip(rows, chosen, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            start = len(asked[each])
            labels[number, start : len(row)] = ids[number, start : len(row)]
        yield ids, labels


def _per_token(items: NDArray[np.float64]) -> float:
    return float(items[:, 0].sum() / items[:, 1].sum())
