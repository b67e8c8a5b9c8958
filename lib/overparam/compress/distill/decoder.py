"""Distillation of a decoder by next-token probabilities, on given texts or on texts that the student samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from overparam.compress.distill import losses
from overparam.compress.distill.fits import check_fits
from overparam.models.generating import end_tokens, generation_config
from overparam.support import progress
from overparam.train import causal, loop

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Objective = Literal["forward_kl", "reverse_kl", "jsd"]
Ids = Sequence[int]
_OBJECTIVES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.generalized_jsd,
}


class _Batch(NamedTuple):
    """Prompts padded on the left and targets padded on the right, so that all targets begin in the same column."""

    input_ids: Tensor  # [rows, prompt + target]
    mask: Tensor  # [rows, prompt + target]
    scored: Tensor  # [rows, target], true at tokens of the target


def distill_decoder(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    recipe: causal.Recipe,
    *,
    objective: Objective = "forward_kl",
    on_policy_share: float = 0.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
    label: str = "distilling",
) -> list[float]:
    """Train `student` in place to predict the next tokens of targets with the probabilities of `teacher`.

    Generalised knowledge distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm 1): a batch has the
    given targets or, with probability `on_policy_share`, targets that the student samples for the same prompts at
    temperature 1; no gradient flows through the sampling. The loss is the mean over the target tokens of a step. The
    pairs are shuffled again for each pass. The learning rate falls linearly to zero if the recipe's `decay` equals
    its `steps`. Parameters that require a gradient are trained; in bfloat16, small steps are lost to rounding.

    Memory per batch: about 30 bytes (45 for "jsd") times its target tokens, padding included, times the vocabulary:
    4 GB for 1,024 tokens and a vocabulary of 128,000. A copy of the trained parameters is kept as well.

    Args:
        student: A decoder with its language-modelling head; in evaluation mode afterwards.
        teacher: Another decoder with the same tokens; not changed, but put into evaluation mode.
        prompts: Token ids before each target, special tokens included; at least one each.
        targets: Token ids of each target, at least one each; the end token is learned where a target has it.
        recipe: See `causal.Recipe`, without label smoothing and load balance. A step has `accumulate` batches.
        objective: The loss, see `losses`: "forward_kl", "reverse_kl" or "jsd" (`generalized_jsd`).
        on_policy_share: Share of batches with targets sampled by the student, 0..1.
        beta: Parameter of "jsd"; the other objectives ignore it.
        temperature: Divides the logits of both models in the loss.
        batch_size: Pairs per batch.
        max_new_tokens: Length of sampled targets; by default that of the longest target in the batch.
        tokenizers: Tokenizers of student and teacher, to be compared; without them only vocabulary sizes are.
        checkpoint: Folder for the training state; a run that finds a state there resumes from it.
        every: Steps between checkpoints.
        label: Name shown in the progress display.

    Returns:
        The loss of every step, before its update.

    Raises:
        ValueError: Vocabularies differ; the student uses ids outside its own vocabulary; prompts and targets differ in
            number, are empty or have unknown ids; an argument is out of range; the student is to sample but has no end
            token; or the checkpoint is of another recipe or model.
        FloatingPointError: The loss or its gradient is not finite; the message names the step. The student then has
            the last weights for which both were finite.
    """
    import torch

    _check_arguments(recipe, objective, on_policy_share, batch_size, max_new_tokens)
    _check_vocabularies(student, teacher, tokenizers)
    check_fits(student, tokenizers[0] if tokenizers else None)
    _check_pairs(prompts, targets, _vocabulary(student))
    ends = end_tokens(student)
    if on_policy_share and not ends:
        raise ValueError("on_policy_share needs a student with an end token (generation_config.eos_token_id)")
    compare = partial(_OBJECTIVES[objective], temperature=temperature)
    if objective == "jsd":
        compare = partial(compare, beta=beta)
    optimizers = causal.optimizers_of(student, recipe)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    settings = {
        "objective": objective,
        "on_policy_share": on_policy_share,
        "beta": beta,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    good: list[Tensor] = []  # weights before the last update

    def gradients(_: int, drawn: list[tuple[NDArray[np.int64], bool]]) -> float:
        batches = []
        for rows, on_policy in drawn:
            before, after = [prompts[row] for row in rows], [targets[row] for row in rows]
            if on_policy:
                limit = max_new_tokens or max(len(target) for target in after)
                after = _sample(student, before, limit, ends)
            batches.append(_batch(before, after, student.device))
        student.train()
        return _gradients(student, teacher, batches, compare)

    optimizers[0].register_step_pre_hook(lambda *_: _copy(trained, good))
    teacher.eval()
    try:
        return loop.run(
            student,
            optimizers,
            _drawn(len(prompts), batch_size, on_policy_share, recipe),
            gradients,
            recipe,
            loop.Log(),
            settings=settings,
            checkpoint=checkpoint,
            every=every,
            label=label,
        ).loss
    except FloatingPointError:
        with torch.no_grad():
            for parameter, value in zip(trained, good, strict=False):  # there is none before the first update
                parameter.copy_(value)
        raise


def token_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    *,
    batch_size: int = 8,
    label: str = "comparing decoders",
) -> NDArray[np.float64]:
    """Measure how far the student's next-token probabilities are from the teacher's: KL in both directions.

    Args:
        student: A decoder with its language-modelling head.
        teacher: Another decoder with the same tokens.
        prompts: As in `distill_decoder`.
        targets: As in `distill_decoder`.
        batch_size: Pairs per batch.
        label: Name shown in the progress display.

    Returns:
        float64 [pairs, 3]: KL(teacher ‖ student) and KL(student ‖ teacher) in nats, summed over the target's tokens,
        and the number of those tokens.

    Raises:
        ValueError: As for `distill_decoder`, for vocabularies and pairs.
    """
    import torch

    _check_vocabularies(student, teacher, None)
    _check_pairs(prompts, targets, _vocabulary(student))
    items = np.zeros((len(prompts), 3))
    starts = range(0, len(prompts), batch_size)
    with torch.inference_mode():
        for at in progress.track(starts, label):
            after = targets[at : at + batch_size]
            batch = _batch(prompts[at : at + batch_size], after, student.device)
            theirs, mine = (
                _target_logits(model, batch).float().log_softmax(-1).to(student.device)
                for model in (teacher, student)
            )  # [tokens, vocabulary]
            counts = [len(target) for target in after]
            sums = [
                [float(part.double().sum()) for part in torch.split((p.exp() * (p - q)).sum(-1), counts)]
                for p, q in ((theirs, mine), (mine, theirs))
            ]
            items[at : at + batch_size] = np.stack([*sums, counts], axis=1)
    return items


def _gradients(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: list[_Batch], compare: partial[Tensor]
) -> float:
    """Accumulate the gradients of a step; return its loss, the mean over target tokens."""
    import torch

    tokens = sum(int(batch.scored.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            wanted = _target_logits(teacher, batch).to(student.device)
        share = int(batch.scored.sum()) / tokens
        loss = share * compare(_target_logits(student, batch), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _target_logits(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """Logits that predict the targets' tokens, [tokens, vocabulary], computed by the model's own code."""
    mask = batch.mask.to(model.device)
    logits = model(
        input_ids=batch.input_ids.to(model.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=batch.scored.shape[1]
        + 1,  # the last token of the prompt predicts the first of the target
    ).logits[:, :-1]  # [rows, target, vocabulary]
    selected: Tensor = logits[batch.scored.to(model.device)]
    return selected


def _batch(prompts: Sequence[Ids], targets: Sequence[Ids], device: torch.device) -> _Batch:
    import torch

    before, after = max(map(len, prompts)), max(map(len, targets))
    input_ids = torch.zeros((len(prompts), before + after), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        place = slice(before - len(prompt), before + len(target))
        input_ids[row, place] = torch.tensor([*prompt, *target])
        mask[row, place] = 1
    return _Batch(input_ids.to(device), mask.to(device), mask[:, before:].bool().to(device))


def _sample(
    student: PreTrainedModel, prompts: Sequence[Ids], max_new_tokens: int, ends: list[int]
) -> list[Ids]:
    """Sample a target for each prompt from the student, up to and including the first end token."""
    batch = _batch(prompts, [()] * len(prompts), student.device)
    config = generation_config(max_new_tokens, ends, ends[0], sample=True)
    student.eval()
    output = student.generate(
        input_ids=batch.input_ids, attention_mask=batch.mask, generation_config=config
    ).sequences  # [rows, prompt + new]
    written: list[Ids] = []
    for tokens in output[:, batch.mask.shape[1] :].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        written.append(tokens[: end + 1])
    return written


def _drawn(
    pairs: int, batch_size: int, on_policy_share: float, recipe: causal.Recipe
) -> Iterator[list[tuple[NDArray[np.int64], bool]]]:
    """Yield the batches of each step: the indices of their pairs, and whether the student samples their targets.

    The last batch of a pass is filled from the next pass.
    """
    # two generators, so that the order of pairs does not depend on the share
    order, choices = (np.random.default_rng([recipe.seed, number]) for number in (0, 1))
    waiting = np.empty(0, dtype=np.int64)
    while True:
        step = []
        for _ in range(recipe.accumulate):
            while len(waiting) < batch_size:
                waiting = np.concatenate([waiting, order.permutation(pairs)])
            step.append((waiting[:batch_size], choices.random() < on_policy_share))
            waiting = waiting[batch_size:]
        yield step


def _copy(parameters: list[torch.nn.Parameter], into: list[Tensor]) -> None:
    """Copy parameters into a list of tensors; an empty list is filled."""
    if not into:
        into += [parameter.detach().clone() for parameter in parameters]
    for parameter, old in zip(parameters, into, strict=True):
        old.copy_(parameter.detach())


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _check_arguments(
    recipe: causal.Recipe,
    objective: str,
    on_policy_share: float,
    batch_size: int,
    max_new_tokens: int | None,
) -> None:
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}, got {objective!r}")
    if not 0 <= on_policy_share <= 1:
        raise ValueError(f"on_policy_share must be in 0..1, got {on_policy_share}")
    if recipe.steps < 1 or recipe.accumulate < 1 or batch_size < 1:
        raise ValueError(
            "steps, accumulate and batch_size must be at least 1, "
            f"got {recipe.steps}, {recipe.accumulate} and {batch_size}"
        )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if recipe.label_smoothing or recipe.balance:
        raise ValueError("distillation has no label_smoothing and no balance: set both to 0 in the recipe")


def _check_vocabularies(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None,
) -> None:
    sizes = _vocabulary(student), _vocabulary(teacher)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} tokens, the teacher's {sizes[1]}: next tokens can be "
            "compared only between models that share a tokenizer"
        )
    if tokenizers is None:
        return
    first, second = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if first != second:
        token = min(set(first.items()) ^ set(second.items()))[0]
        raise ValueError(
            f"the tokenizers of student and teacher differ: {token!r} is {first.get(token, 'missing')} in the "
            f"student's, {second.get(token, 'missing')} in the teacher's"
        )


def _check_pairs(prompts: Sequence[Ids], targets: Sequence[Ids], vocabulary: int) -> None:
    if len(prompts) != len(targets) or not len(prompts):
        raise ValueError(
            f"prompts and targets must be equal in number, at least 1, got {len(prompts)} and {len(targets)}"
        )
    for what, rows in (("prompt", prompts), ("target", targets)):
        for index, ids in enumerate(rows):
            if not len(ids):
                raise ValueError(f"{what} {index} has no token")
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(
                    f"{what} {index} has token {max(ids) if max(ids) >= vocabulary else min(ids)}, "
                    f"ids must be in 0..{vocabulary - 1}"
                )
