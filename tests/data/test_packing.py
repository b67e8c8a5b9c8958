import random

import numpy as np
import pytest
import torch

from overparam import models
from overparam.data.packing import IGNORED, Tree, pack
from overparam.train import causal


@pytest.fixture
def trees():
    rng = random.Random(0)

    def ids(least, most):
        return [rng.randrange(4, 250) for _ in range(rng.randint(least, most))]

    return [Tree(ids(1, 8), [ids(1, 6) for _ in range(rng.randint(1, 3))]) for _ in range(60)]


def contents(batches):
    """Every tree that was packed, read back from the arrays."""
    for batch in batches:
        for row in range(len(batch.tree)):
            for number in range(1, batch.tree[row].max() + 1):
                here = batch.tree[row] == number
                ids, branch = batch.input_ids[row][here], batch.branch[row][here]
                branches = tuple(tuple(ids[branch == each]) for each in range(1, branch.max() + 1))
                yield tuple(ids[branch == 0]), branches


@pytest.mark.parametrize("waiting", [1, 4, 1000])
def test_every_tree_is_packed_once(trees, waiting):
    batches = list(pack(trees, rows=3, length=40, waiting=waiting))
    assert {batch.input_ids.shape for batch in batches} == {(3, 40)}
    expected = sorted((tuple(tree.prefix), tuple(map(tuple, tree.branches))) for tree in trees)
    assert sorted(contents(batches)) == expected


def test_rows_are_nearly_full():
    rng = random.Random(1)
    trees = [Tree([1] * 2, [[5] * rng.randint(3, 30)]) for _ in range(400)]
    *full, _ = pack(trees, rows=4, length=64)
    assert np.mean([batch.tree > 0 for batch in full]) > 0.95


def test_labels_are_the_next_tokens_of_continuations():
    (batch,) = pack([Tree([7, 8], [[10, 11, 12], [20]]), Tree([9], [[30, 31]])], rows=1, length=12)
    assert batch.input_ids[0].tolist() == [7, 8, 10, 11, 12, 20, 9, 30, 31, 0, 0, 0]
    no = IGNORED
    assert batch.labels[0].tolist() == [no, no, 11, 12, no, no, no, 31, no, no, no, no]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_token_gets_what_its_own_sequence_gives_it(trees, attention):
    model = models.tiny_twin("qwen3_moe", causal=True, num_hidden_layers=2)
    model.set_attn_implementation(attention)
    batch = next(iter(pack(trees, rows=3, length=40)))
    with torch.no_grad():
        hidden, _ = causal.hidden_states(model, batch)
        packed = model.get_output_embeddings()(hidden)  # [rows, length, vocabulary]
        seen = 0
        for row in range(3):
            for number in range(1, batch.tree[row].max() + 1):
                mine = batch.tree[row] == number
                for branch in range(1, batch.branch[row][mine].max() + 1):
                    here = mine & np.isin(batch.branch[row], (0, branch))
                    alone = model(input_ids=torch.from_numpy(batch.input_ids[row][here])[None]).logits[0]
                    torch.testing.assert_close(packed[row][here], alone, atol=1e-5, rtol=1e-5)
                    seen += 1
    assert seen > 10


def test_a_tree_that_no_row_holds_is_refused():
    with pytest.raises(ValueError, match="a tree of 9 tokens does not fit a row of 8"):
        list(pack([Tree([1] * 4, [[2] * 5])], rows=2, length=8))
