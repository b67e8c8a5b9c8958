"""The fast layers against transformers' own, on a tiny gpt_oss: outputs, losses and every gradient."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from overparam.data.packing import IGNORED, Tree, pack
from overparam.models import translator
from overparam.train import batched, causal


@pytest.fixture
def model():
    torch.manual_seed(3)
    built = translator.build(
        architecture="gpt_oss", vocabulary=300, hidden=32, layers=3, experts=8, top_k=3, expert_width=16, heads=4,
        key_value_heads=2, seed=1,
    )  # fmt: skip
    with torch.no_grad():  # so that clamps, sinks and biases matter
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "sinks" in name else 0.3))
    return built


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    words = lambda n: rng.integers(4, 300, n).tolist()  # noqa: E731
    trees = [Tree(words(6), [words(5), words(9)]), Tree(words(3), [words(12)]), Tree([1], [words(17)])]
    (packed,) = pack(trees, rows=2, length=40)
    return packed


def by_transformers(model, batch):
    hidden, routers = causal.hidden_states(model, batch, router_logits=True)
    real = torch.from_numpy(batch.tree > 0)
    labels = torch.from_numpy(batch.labels)[real]
    at = labels != IGNORED
    logits = model.lm_head(hidden[real][at])
    loss = functional.cross_entropy(logits, labels[at], label_smoothing=0.1, reduction="sum")
    return hidden[real], [each[real.flatten()] for each in routers], loss


def by_batches(model, batch, capacity=None):
    tokens = batched.flat(batch)
    with batched.batched(model, capacity) as load:
        hidden, routers = batched.hidden_states(model.get_decoder(), tokens, router_logits=True)
        loss, _ = batched.losses(hidden, model.lm_head.weight, tokens.labels, 0.1)
    return hidden, list(routers), loss, load


def gradients(model, loss, routers):
    model.zero_grad()
    (loss + sum(each.square().mean() for each in routers)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_outputs_and_gradients_are_those_of_transformers(model, batch):
    hidden, routers, loss = by_transformers(model, batch)
    expected = gradients(model, loss, routers)
    again, again_routers, again_loss, load = by_batches(model, batch)
    assert load.dropped == [0, 0, 0]
    torch.testing.assert_close(again, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again_routers, routers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again_loss, loss, rtol=1e-5, atol=1e-3)
    actual = gradients(model, again_loss, again_routers)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6, msg=name
        )


def test_a_full_expert_drops_the_last_tokens_and_only_these_change(model, batch, monkeypatch):
    monkeypatch.setattr(batched, "_ROUNDED", 1)
    one, *_ = model.get_decoder().layers
    hidden = torch.randn(40, 32)
    with batched.batched(model, None), torch.no_grad():
        expected, _ = one.mlp(hidden[None])
    with batched.batched(model, 1.0) as load, torch.no_grad():
        bounded, _ = one.mlp(hidden[None])
    assert 0 < load.dropped[0] < 0.5
    same = torch.isclose(bounded, expected, atol=1e-6).all(-1)[0]
    assert same[:10].all()
    assert not same.all()


def test_a_model_without_sinks_attends_as_if_there_were_none(model, batch):
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.sinks.fill_(-30_000.0)
    hidden, _, _ = by_transformers(model, batch)
    again, *_ = by_batches(model, batch)
    torch.testing.assert_close(again, hidden, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_loss_and_its_gradients_are_nearly_the_same(model, batch):
    _, routers, loss, _ = by_batches(model, batch)
    expected = gradients(model, loss, routers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routers, again, _ = by_batches(model, batch)
    actual = gradients(model, again, routers)
    assert float(again) == pytest.approx(float(loss), rel=0.02)
    for name, gradient in expected.items():
        if gradient.norm() > 0:
            assert functional.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0) > 0.9, name


def test_the_model_is_as_before_after_the_block(model, batch):
    before = by_transformers(model, batch)[0]
    by_batches(model, batch)
    assert torch.equal(by_transformers(model, batch)[0], before)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(model, batch, tmp_path):
    recipe = causal.Recipe(steps=4, warmup=1, decay=2, balance=0.1, optimizer="muon", learning_rate=1e-2)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def train(folder, steps):
        return causal.train(
            model, [batch] * steps, recipe, capacity=1.5, checkpoint=tmp_path / folder, every=2
        )

    whole = train("a", 4)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    with pytest.raises(ValueError, match="the batches ended at step 4"):
        train("b", 3)
    model.load_state_dict(start)
    again = train("b", 4)
    assert again.resumed == 2
    assert (again.loss, again.dropped) == (whole.loss, whole.dropped)
    assert again.loss[-1] < again.loss[0]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="capacity"):
        causal.train(model, [batch] * 4, recipe, capacity=2.0, checkpoint=tmp_path / "b")


def test_biases_of_experts_are_no_matrices_and_gate_and_up_are_two(model):
    muon, adamw = causal.optimizers_of(model, causal.Recipe(steps=1, optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(each)].rpartition(".")[2] for each in group["params"]] for group in muon.param_groups]
    assert set(groups[1]) == {"gate_up_proj"}
    assert set(groups[0]) == {"down_proj", "weight"}
    rest = [names[id(each)] for each in adamw.param_groups[0]["params"]]
    assert {"down_proj_bias", "gate_up_proj_bias", "sinks"} <= {name.rpartition(".")[2] for name in rest}
    assert sum(".router." in name for name in rest) == 6
