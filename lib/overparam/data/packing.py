"""Packing token sequences into rows of one length, several continuations of one prefix side by side.

A decoder that translates a sentence into three languages reads the sentence three times if each pair is a
sequence of its own. Here a `Tree` holds the prefix once and its continuations behind it; the attention mask keeps
each continuation from seeing the others, and its positions go on where the prefix ends, so that every token gets
exactly what it would get in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # label of a position that predicts nothing, as in torch


@dataclass(frozen=True)
class Tree:
    """A prefix and its continuations, as token ids.

    Attributes:
        prefix: Tokens that every continuation reads and that nothing predicts.
        branches: Continuations; the first token of each (such as a language tag) is given, the others are
            predicted.
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Packed:
    """A batch of rows, every array [rows, length].

    Attributes:
        input_ids: Token ids; 0 where a row has nothing.
        positions: Position of each token in its own sequence (prefix and continuation).
        tree: Which tree of the row a token belongs to, from 1; 0 where a row has nothing.
        branch: Which continuation, from 1; 0 for the prefix.
        labels: The token that follows, or `IGNORED`.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    tree: NDArray[np.int64]
    branch: NDArray[np.int64]
    labels: NDArray[np.int64]

    def attends(self) -> NDArray[np.bool_]:
        """Return [rows, length (query), length (key)]: which tokens each token may look at."""
        tree, branch = self.tree, self.branch
        length = tree.shape[1]
        earlier = np.tri(length, dtype=bool)
        same_tree = tree[:, :, None] == tree[:, None, :]
        visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
        allowed: NDArray[np.bool_] = same_tree & visible & earlier
        return allowed


def pack(trees: Iterable[Tree], *, rows: int, length: int, waiting: int = 32) -> Iterator[Packed]:
    """Yield batches of `rows` rows of `length` tokens; each tree goes whole into the fullest row that takes it.

    Args:
        trees: In the order of training; one that is longer than a row is an error.
        rows: Rows of a batch.
        length: Tokens of a row.
        waiting: A batch is full when so many trees found no place in it; they begin the next one.

    Raises:
        ValueError: A tree that no row can hold.
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
