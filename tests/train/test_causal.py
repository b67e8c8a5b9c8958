import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from overparam import models
from overparam.data.packing import Tree, pack
from overparam.models.proof import NotExactError
from overparam.support import files
from overparam.train import causal
from overparam.train.causal import Recipe, load_balance, train


def batches(number, predicts=True):
    """Sequences that count upwards, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        starts = rng.integers(4, 200, size=8)
        branches = [[list(range(start, start + 12))] if predicts else [[start]] for start in starts]
        yield from pack([Tree([1], each) for each in branches], rows=4, length=32)


def twin(seed=0, **fields):
    return models.tiny_twin("qwen3_moe", causal=True, num_hidden_layers=2, seed=seed, **fields)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


RECIPE = Recipe(steps=6, warmup=2, decay=2, balance=0.01, label_smoothing=0.1, learning_rate=1e-2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls(optimizer):
    log = train(twin(), batches(25), Recipe(steps=25, optimizer=optimizer, warmup=2, learning_rate=1e-2))
    assert log.loss[0] == pytest.approx(np.log(260), abs=0.3)
    assert np.mean(log.loss[-3:]) < 0.8 * log.loss[0]
    assert log.tokens == np.cumsum([8 * 13] * 25).tolist()
    assert log.predicted == np.cumsum([8 * 11] * 25).tolist()
    assert log.balance == [0.0] * 25
    assert np.all(np.diff(log.seconds) > 0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, accumulate=2)
    drops = {"attention_dropout": 0.1}  # drawn anew in each step
    whole, seen = twin(**drops), []
    expected = train(
        whole, batches(12), recipe, checkpoint=tmp_path / "a", every=4, at_checkpoint=seen.append
    )
    assert seen == [4, 6]

    class StoppedError(Exception):
        pass

    def stop(step):
        raise StoppedError

    with pytest.raises(StoppedError):
        train(twin(**drops), batches(12), recipe, checkpoint=tmp_path / "b", every=4, at_checkpoint=stop)
    resumed = twin(seed=1, **drops)
    log = train(resumed, batches(12), recipe, checkpoint=tmp_path / "b", every=4)
    assert torch.equal(weights(resumed), weights(whole))
    assert (log.loss, log.balance, log.tokens) == (expected.loss, expected.balance, expected.tokens)
    assert log.seconds == sorted(log.seconds)
    again = twin(seed=2, **drops)
    assert train(again, iter(()), recipe, checkpoint=tmp_path / "b") == log  # nothing is trained again
    assert torch.equal(weights(again), weights(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_run_killed_while_it_stores_goes_on_from_the_state_before(tmp_path):
    train(twin(), batches(6), RECIPE, checkpoint=tmp_path / "a", every=3)
    (tmp_path / "a").rename(files.set_aside(tmp_path / "a"))
    (tmp_path / "a.partial").mkdir()
    log = train(twin(), batches(8), replace(RECIPE, steps=8), checkpoint=tmp_path / "a")
    assert len(log.loss) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_longer_run_goes_on_and_another_recipe_does_not(tmp_path):
    train(twin(), batches(6), RECIPE, checkpoint=tmp_path / "a")
    assert len(train(twin(), batches(8), replace(RECIPE, steps=8), checkpoint=tmp_path / "a").loss) == 8
    with pytest.raises(ValueError, match="holds 8 steps, more than steps = 6"):
        train(twin(), batches(8), RECIPE, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match="another recipe: balance, seed differ"):
        train(twin(), batches(8), replace(RECIPE, steps=8, balance=0.1, seed=1), checkpoint=tmp_path / "a")
    assert json.loads((tmp_path / "a" / "log.json").read_text())["recipe"]["steps"] == 8


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step():
    model = twin()

    def poisoned():
        yield from batches(2)
        with torch.no_grad():
            model.get_input_embeddings().weight[:] = torch.nan
        yield from batches(2)

    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        train(model, poisoned(), RECIPE)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_that_do_not_suffice_are_named():
    with pytest.raises(ValueError, match="the batches ended at step 3 of 6"):
        train(twin(), batches(5), replace(RECIPE, accumulate=2))
    with pytest.raises(ValueError, match="step 1 have nothing to predict"):
        train(twin(), batches(6, predicts=False), RECIPE)


def test_accumulated_batches_count_by_their_predicted_tokens():
    trees = [Tree([1], [list(range(5, 5 + n))]) for n in (3, 14, 8, 4)]
    recipe = Recipe(steps=1, warmup=1, learning_rate=1e-3)
    together, apart = twin(), twin()
    one = train(together, pack(trees, rows=4, length=16), recipe)
    halves = [*pack(trees[:2], rows=4, length=16), *pack(trees[2:], rows=4, length=16)]
    two = train(apart, halves, replace(recipe, accumulate=2))
    assert one.loss == pytest.approx(two.loss)
    torch.testing.assert_close(weights(together), weights(apart), atol=1e-5, rtol=1e-3)


def test_balance_is_one_where_all_experts_carry_the_same():
    logits = torch.eye(4).repeat(3, 1) * 5  # each expert is the first choice of as many tokens
    real = torch.ones(12, dtype=torch.bool)
    assert float(load_balance(logits, 1, real)) == pytest.approx(1)
    collapsed = torch.zeros(12, 4)
    collapsed[:, 2] = 5
    assert float(load_balance(collapsed, 1, real)) == pytest.approx(4 * float(collapsed[0].softmax(0)[2]))
    mixed = torch.cat([logits, collapsed])
    only_first = torch.arange(24) < 12
    assert float(load_balance(mixed, 1, only_first)) == pytest.approx(1)


def test_balance_is_that_of_the_switch_transformer():
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    probabilities = logits.double().softmax(-1).numpy()
    chosen = np.argsort(-probabilities, axis=1)[:, :2]
    share = np.bincount(chosen.ravel(), minlength=8) / 100
    expected = 8 * (share * probabilities.mean(0)).sum()
    assert float(load_balance(logits, 2, torch.ones(50, dtype=torch.bool))) == pytest.approx(
        expected, rel=1e-5
    )


def test_each_layer_is_balanced_by_itself():
    model = twin()
    with torch.no_grad():  # the two layers collapse onto different experts, which a pooled loss would not see
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.weight.zero_()
            block.mlp.gate.weight[layer] = 1.0
    log = train(model, batches(1), replace(RECIPE, steps=1, warmup=0, decay=0, learning_rate=1e-9))
    (batch,) = batches(1)
    with torch.no_grad():
        _, router_logits = causal.hidden_states(model, batch, router_logits=True)
    real = torch.from_numpy(batch.tree > 0).flatten()
    each = [float(load_balance(logits, 2, real)) for logits in router_logits]
    assert log.balance[0] == pytest.approx(np.mean(each), rel=1e-4)


def test_rate_warms_up_stays_and_falls_to_zero():
    recipe = Recipe(steps=10, learning_rate=2.0, warmup=4, decay=3)
    assert [recipe.rate(step) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 4 / 3, 2 / 3]
    )
    assert Recipe(steps=5, learning_rate=2.0, warmup=0).rate(0) == 2.0


@pytest.mark.parametrize(
    ("name", "fields"),
    [("gemma2", {"final_logit_softcapping": 0.05}), ("cohere", {"logit_scale": 0.5}), ("granite", {})],
)
def test_logits_are_scaled_and_capped_as_the_model_does(name, fields):
    model = models.tiny_twin(name, causal=True, **fields)
    tree = Tree([1, 7, 9], [[20, 30, 40, 50]])
    (batch,) = pack([tree], rows=1, length=16)
    ids = torch.tensor([[*tree.prefix, *tree.branches[0]]])
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits[0, len(tree.prefix) : -1]
    expected = float(torch.nn.functional.cross_entropy(found, ids[0, len(tree.prefix) + 1 :]))
    log = causal.train(model, [batch], causal.Recipe(steps=1, warmup=1))
    assert log.loss == pytest.approx([expected], abs=1e-6)


def test_a_model_that_makes_its_logits_otherwise_is_refused_before_it_is_trained():
    model = models.tiny_twin("llama", causal=True, rms_norm_eps=1.3e-5)
    forward = model.forward

    def doubled(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found

    model.forward = doubled
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = pack([Tree([1, 7], [[20, 30, 40]])], rows=1, length=16)
    with pytest.raises(NotExactError, match="LlamaForCausalLM cannot be trained here"):
        causal.train(model, batches, causal.Recipe(steps=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_decoder_that_takes_no_mask_of_its_own_is_refused_by_name():
    batches = pack([Tree([1, 7], [[20, 30, 40]])], rows=1, length=16)
    with pytest.raises(NotExactError, match="BloomForCausalLM cannot read packed rows"):
        causal.train(models.tiny_twin("bloom", causal=True), batches, causal.Recipe(steps=1))
