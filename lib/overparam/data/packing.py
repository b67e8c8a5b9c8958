"""Packing token sequences into rows of one length, with several continuations of a shared prefix.

A decoder that translates a sentence into three languages reads the sentence three times if each pair is a separate
sequence. Here a `Tree` holds the prefix once, followed by its continuations. The attention mask hides the other
continuations, and positions continue from the end of the prefix, so every token is computed exactly as in a separate
sequence.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # label of a position that predicts nothing, as in torch


@dataclass(frozen=True)
class Tree:
    """A prefix and its continuations, as token ids.

    Attributes:
        prefix: Tokens that every continuation reads; they are not predicted.
        branches: Continuations; the first token of each (such as a language tag) is given, the others are predicted.
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


def balanced(streams: Mapping[str, Iterator[Tree]], shares: Mapping[str, float]) -> Iterator[Tree]:
    """Yield from endless streams in turns: next comes the one that lacks most of its share of the tokens so far."""
    tokens = dict.fromkeys(shares, 0)
    while True:
        name = min(shares, key=lambda each: tokens[each] / shares[each])
        tree = next(streams[name])
        tokens[name] += len(tree)
        yield tree


def endless(pieces: Sequence[Sequence[int]], *, first: int, head: int, seed: str) -> Iterator[Tree]:
    """Yield pieces of text for ever, each epoch in another order: the same ones for the same seed.

    Args:
        pieces: Token ids.
        first: Token that begins a sequence.
        head: Token before each piece, which is given as it is.
        seed: Of the orders.
    """
    epoch = 0
    while True:
        for piece in random.Random(f"{seed} {epoch}").sample(pieces, len(pieces)):
            yield Tree([first], [[head, *piece]])
        epoch += 1


@dataclass(frozen=True)
class Packed:
    """A batch of rows, every array [rows, length].

    Attributes:
        input_ids: Token ids; 0 for padding.
        positions: Position of each token in its own sequence (prefix and continuation).
        tree: Number of the tree in its row, from 1; 0 for padding.
        branch: Number of the continuation, from 1; 0 for the prefix.
        labels: The next token, or `IGNORED`.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    tree: NDArray[np.int64]
    branch: NDArray[np.int64]
    labels: NDArray[np.int64]

    def attends(self) -> NDArray[np.bool_]:
        """Return which tokens each token may attend to. [rows, length (query), length (key)]."""
        tree, branch = self.tree, self.branch
        length = tree.shape[1]
        earlier = np.tri(length, dtype=bool)
        same_tree = tree[:, :, None] == tree[:, None, :]
        visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
        return np.asarray(same_tree & visible & earlier)


def pack(trees: Iterable[Tree], *, rows: int, length: int, waiting: int = 32) -> Iterator[Packed]:
    """Yield batches of `rows` rows of `length` tokens; each tree is put into the fullest row that has room for it.

    Args:
        trees: Trees in the order of training.
        rows: Rows per batch.
        length: Tokens per row.
        waiting: A batch is complete when this many trees did not fit; they are the first of the next batch.

    Raises:
        ValueError: A tree is longer than a row.
    """
    contents: list[list[Tree]] = [[] for _ in range(rows)]
    space = [length] * rows
    left: list[Tree] = []

    def place(tree: Tree) -> bool:
        fitting = [row for row in range(rows) if space[row] >= len(tree)]
        if not fitting:
            return False
        row = min(fitting, key=lambda index: space[index])
        contents[row].append(tree)
        space[row] -= len(tree)
        return True

    for tree in trees:
        if len(tree) > length:
            raise ValueError(f"a tree of {len(tree)} tokens does not fit a row of {length}")
        if not place(tree):
            left.append(tree)
        if len(left) >= waiting:
            yield _fill(contents, length)
            contents, space, again, left = [[] for _ in range(rows)], [length] * rows, left, []
            left = [tree for tree in again if not place(tree)]
    for rest in ([], left) if left else ([],):
        for tree in rest:
            if not place(tree):
                yield _fill(contents, length)
                contents, space = [[] for _ in range(rows)], [length] * rows
                place(tree)
    if any(contents):
        yield _fill(contents, length)


def _fill(contents: Sequence[Sequence[Tree]], length: int) -> Packed:
    shape = (len(contents), length)
    arrays = {name: np.zeros(shape, np.int64) for name in ("input_ids", "positions", "tree", "branch")}
    labels = np.full(shape, IGNORED, np.int64)
    for row, trees in enumerate(contents):
        at = 0
        for number, tree in enumerate(trees, start=1):
            start = len(tree.prefix)
            for branch, tokens in enumerate((tree.prefix, *tree.branches)):
                here = slice(at, at + len(tokens))
                arrays["input_ids"][row, here] = tokens
                arrays["positions"][row, here] = np.arange(len(tokens)) + (start if branch else 0)
                arrays["tree"][row, here] = number
                arrays["branch"][row, here] = branch
                if branch and len(tokens) > 1:
                    labels[row, at : at + len(tokens) - 1] = tokens[1:]
                at += len(tokens)
    return Packed(**arrays, labels=labels)
