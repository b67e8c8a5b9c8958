"""Scores, masks, and the pruning of a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overparam.compress.weights.layout import Matrix, by_layer, count_zeros, matrices
from overparam.compress.weights.reconstruction import count_of, refit, sparsegpt
from overparam.compress.weights.statistics import Statistics, collect
from overparam.models.hooks import hooks
from overparam.support import progress

METHODS = ("magnitude", "wanda", "sparsegpt", "wanda_refit", "random", "inverted")
Group = Literal["row", "matrix", "model"]
_READ = ("wanda", "sparsegpt", "wanda_refit")  # methods that need a calibration text
_PRODUCTS = ("sparsegpt", "wanda_refit")  # and products of its inputs


def scores(
    weight: Tensor,
    method: str,
    *,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score every weight of a matrix; those with the lowest scores go.

    - ``magnitude``: the size of the weight. ``inverted``: minus that, a control.
    - ``wanda``: its size × the norm of the input that it multiplies (arXiv 2306.11695).
    - ``random``: random numbers, a control.

    Args:
        weight: [outputs, inputs].
        method: One of these.
        statistics: For ``wanda``. An expert that read nothing is scored by magnitude.
        generator: For ``random``.

    Returns:
        float32 [outputs, inputs].
    """
    size = weight.float().abs()
    if method == "random":
        return torch.rand(weight.shape, generator=generator)
    if method == "inverted":
        return -size
    if method == "magnitude":
        return size
    if method in ("wanda", "wanda_refit"):
        if statistics is None:
            raise ValueError("wanda needs statistics of a calibration text, from collect")
        return size * statistics.norms if statistics.tokens else size
    raise ValueError(f"unknown score {method!r}: use magnitude, wanda, random or inverted")


def masks(
    by_name: Mapping[str, Tensor],
    sparsity: float,
    *,
    pattern: tuple[int, int] | None = None,
    group: Group = "row",
) -> dict[str, Tensor]:
    """Choose the weights that stay: exactly so many by rank, since thresholds cannot tell equal scores apart.

    Args:
        by_name: Scores of matrices, [outputs, inputs] each.
        sparsity: Share of the weights that go, rounded down in each group.
        pattern: (zeros, of), such as (2, 4), instead of `sparsity`.
        group: What competes: weights of a "row" (of one output), of a "matrix", or of the whole "model".

    Returns:
        True where a weight stays, by name. Of equal scores the later weight stays.

    Raises:
        ValueError: A sparsity outside of 0 to below 1, a pattern that does not divide a row, scores that are NaN.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    for name, score in by_name.items():
        if bool(score.isnan().any()):
            raise ValueError(f"scores of {name} are NaN")
    if pattern is not None:
        check_pattern({name: each.shape[1] for name, each in by_name.items()}, pattern)
        groups = {name: each.view(len(each), -1, pattern[1]) for name, each in by_name.items()}
        return {name: ~_lowest(each, pattern[0]).view_as(by_name[name]) for name, each in groups.items()}
    if group == "row":
        return {name: ~_lowest(each, count_of(sparsity, each.shape[1])) for name, each in by_name.items()}
    if group == "matrix":
        flat = {
            name: _lowest(each.flatten(), count_of(sparsity, each.numel())) for name, each in by_name.items()
        }
        return {name: ~gone.view_as(by_name[name]) for name, gone in flat.items()}
    joined = torch.cat([each.flatten() for each in by_name.values()])
    gone, at, found = _lowest(joined, count_of(sparsity, joined.numel())), 0, {}
    for name, each in by_name.items():
        found[name] = ~gone[at : at + each.numel()].view_as(each)
        at += each.numel()
    return found


def check_pattern(inputs: Mapping[str, int], pattern: tuple[int, int]) -> None:
    """Refuse a pattern that does not divide the inputs of a matrix, given by name.

    Raises:
        ValueError: The message names the matrix.
    """
    for name, number in inputs.items():
        if number % pattern[1]:
            raise ValueError(
                f"{pattern[0]} of every {pattern[1]} does not divide the {number} inputs of {name}"
            )


def prune(
    model: PreTrainedModel,
    method: str,
    sparsity: float,
    *,
    batches: Sequence[Mapping[str, Tensor]] = (),
    pattern: tuple[int, int] | None = None,
    group: Group | None = None,
    one_pass: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Set weights of a model's layers to zero, in place; it is an ordinary model of the same shape afterwards.

    Layer after layer, so that each is chosen by what it reads from the layers before it, already pruned.

    Args:
        model: Any model that `matrices` can read.
        method: One of `METHODS`.
        sparsity: Share of the weights of the layers' matrices that go; embeddings, head, routers and norms stay.
        batches: Calibration text, see `collect`; for Wanda and SparseGPT.
        pattern: (zeros, of), such as (2, 4), instead of `sparsity`.
        group: See `masks`; by default "row" for Wanda, as published, and "matrix" for others.
        one_pass: Collect what all layers of the unpruned model read at once, which is faster and less exact.
        seed: Of the method "random".

    Returns:
        The same model.

    Raises:
        ValueError: An unknown method, no calibration text where one is needed, or as for `matrices`, `collect`,
            `masks`. The model is unchanged, unless the error is of a later layer's text.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if not 0 < sparsity < 1 and pattern is None:
        raise ValueError(f"sparsity must be above 0 and below 1, got {sparsity}")
    if method in _READ and not batches:
        raise ValueError(f"{method} needs a calibration text: give batches")
    group = group or ("row" if method in ("wanda", "wanda_refit") else "matrix")
    if group == "model" and method in _READ:
        raise ValueError(f"{method} goes layer by layer: use group 'row' or 'matrix'")
    every = matrices(model)
    if pattern is not None:
        check_pattern({each.name: each.weight.shape[1] for each in every}, pattern)
    generator = torch.Generator().manual_seed(seed)
    if group == "model":
        _zero(every, method, sparsity, pattern, group, {}, generator)
        return model
    read: dict[str, Statistics] = {}
    if method in _READ and one_pass:
        read = collect(model, batches, every, gram=method in _PRODUCTS)
    for some in progress.track(list(by_layer(every).values()), f"pruning by {method}"):
        if method in _READ and not one_pass:
            read = collect(model, batches, some, gram=method in _PRODUCTS)
        _zero(some, method, sparsity, pattern, group, read, generator)
    return model


def _zero(
    some: Sequence[Matrix],
    method: str,
    sparsity: float,
    pattern: tuple[int, int] | None,
    group: Group,
    read: Mapping[str, Statistics],
    generator: torch.Generator,
) -> None:
    if method == "sparsegpt":
        for matrix in some:
            statistics = read[matrix.name]
            if statistics.tokens:
                assert statistics.gram is not None
                pruned = sparsegpt(
                    matrix.weight, statistics.gram, sparsity, pattern=pattern, name=matrix.name
                )
                matrix.weight.copy_(pruned)
            else:  # an expert that no token was sent to
                _zero([matrix], "magnitude", sparsity, pattern, group, {}, generator)
        return
    rated = {
        matrix.name: scores(matrix.weight, method, statistics=read.get(matrix.name), generator=generator)
        for matrix in some
    }
    keep = masks(rated, sparsity, pattern=pattern, group=group)
    for matrix in some:
        statistics = read.get(matrix.name, Statistics(0, torch.zeros(0)))
        if method == "wanda_refit" and statistics.tokens:
            assert statistics.gram is not None
            matrix.weight.copy_(refit(matrix.weight, keep[matrix.name], statistics.gram, name=matrix.name))
        matrix.weight.masked_fill_(~keep[matrix.name], 0)


@contextmanager
def keeping_zeros(model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Keep the zeros of the layers' matrices while a model is trained inside of the block.

    After every step of an optimizer the zeros are set anew: without it, momentum would fill them even where the
    gradient is masked.

    Args:
        model: A pruned model.
        optimizers: Those that train it.

    Raises:
        RuntimeError: At the end of the block, if a zero was lost all the same.
    """
    every = matrices(model)
    zeros = {matrix.name: matrix.weight == 0 for matrix in every}
    before = count_zeros(model, every).zeros

    def clear(*_: Any) -> None:
        for matrix in every:
            matrix.weight.masked_fill_(zeros[matrix.name], 0)

    with hooks([optimizer.register_step_post_hook(clear) for optimizer in optimizers]):
        yield
    lost = sum(int((matrix.weight.masked_select(zeros[matrix.name]) != 0).sum()) for matrix in every)
    if lost:
        raise RuntimeError(
            f"{lost} of {before} zeros were lost: an optimizer that was not named trains the model"
        )


def _lowest(values: Tensor, count: int) -> Tensor:
    """Mark the lowest `count` values along the last dimension; of equal ones, the earlier."""
    order = values.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(-1, order, True)
