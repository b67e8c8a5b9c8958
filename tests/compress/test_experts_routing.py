import copy
import dataclasses
import functools
import operator

import numpy as np
import pytest
import torch

from overparam import models
from overparam.compress import experts

LENGTHS = (7, 12, 3, 9)


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (length,), generator=generator) for length in LENGTHS]


def padded(texts, side="right"):
    width = max(len(text) for text in texts)
    ids, mask = (
        torch.zeros(len(texts), width, dtype=torch.long),
        torch.zeros(len(texts), width, dtype=torch.long),
    )
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(a, b, **tolerance):
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, **tolerance)


@pytest.fixture(params=models.MOE_TWINS)
def twin(request):
    return models.tiny_twin(request.param, causal=True)


def record(inputs, index, _, args):
    inputs[index] = args[0]


def naive(model, texts):
    """Router and expert computation of every layer, token by token, from the inputs of the blocks."""
    found = experts.layers(model)
    mass, routed, norms, own, top1, gate = (np.zeros((len(found), 8)) for _ in range(6))
    for text in texts:
        inputs = {}
        hooks = [
            layer.block.register_forward_pre_hook(functools.partial(record, inputs, i))
            for i, layer in enumerate(found)
        ]
        with torch.no_grad():
            model(input_ids=text[None])
            for hook in hooks:
                hook.remove()
            for i, layer in enumerate(found):
                hidden = inputs[i].reshape(-1, inputs[i].shape[-1])
                for token in hidden:
                    logits, weights, indices = layer.router(token[None])
                    shares = (weights[0] / weights[0].sum()).double().numpy()
                    for share, weight, expert in zip(shares, weights[0], indices[0].tolist(), strict=True):
                        one = torch.tensor([[expert]]), torch.ones(1, 1)
                        output = layer.experts(token[None], *one)
                        mass[i, expert] += share / len(text) / len(texts)
                        routed[i, expert] += 1
                        norms[i, expert] += share * output.norm().item()
                        own[i, expert] += (weight * output).norm().item()
                    first = indices[0, shares.argmax()].item()
                    top1[i, first] += 1
                    gate[i, first] += logits[0].softmax(dim=0)[first].item()
    return mass, routed, norms, own, top1, gate


def test_statistics_equal_a_naive_computation(twin):
    texts = sequences()
    statistics = experts.collect(twin, [padded(texts[:2]), padded(texts[2:])], reap=True)
    mass, routed, norms, own, top1, gate = naive(twin, texts)
    assert statistics.tokens == sum(LENGTHS)
    assert statistics.sequences == len(LENGTHS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(statistics.routing_mass, mass)
    np.testing.assert_array_equal(statistics.routed, routed)
    np.testing.assert_array_equal(statistics.top1, top1)
    seen = np.maximum(routed, 1)
    close(experts.scores(statistics, "reap"), own / seen)
    close(experts.scores(statistics, "reap_renormalised"), norms / seen)
    close(experts.scores(statistics, "frequency"), routed / sum(LENGTHS))
    close(experts.scores(statistics, "koishekenov"), top1 / sum(LENGTHS) * np.exp(gate / np.maximum(top1, 1)))
    np.testing.assert_allclose(statistics.routing_mass.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(statistics.frequency.sum(axis=1), 2, rtol=1e-12)


def softmax(values):
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss"])
def test_scores_of_the_routing_equal_those_of_the_router_logits_of_transformers(name):
    """Routing mass, frequency and Koishekenov's score once more, in NumPy, without our code for them."""
    model = models.tiny_twin(name, causal=True)
    batch = padded(sequences())
    with torch.no_grad():
        found = model(**batch, output_router_logits=True).router_logits
    mask = batch["attention_mask"].bool().numpy()
    logits = np.stack([each.double().numpy().reshape(*mask.shape, 8) for each in found])
    order = np.argsort(-logits, axis=-1)
    mass, frequency, koishekenov = (np.zeros((len(found), 8)) for _ in range(3))
    for layer, rated in enumerate(logits):
        sentences = []
        firsts = []
        for row, length in enumerate(LENGTHS):
            chosen = order[layer, row, :length, :2]
            weights = np.zeros((length, 8))
            np.put_along_axis(
                weights, chosen, softmax(np.take_along_axis(rated[row, :length], chosen, -1)), -1
            )
            sentences.append(weights.mean(axis=0))
            frequency[layer] += (weights > 0).sum(axis=0) / sum(LENGTHS)
            firsts += [
                (first, softmax(token)[first]) for first, token in zip(chosen[:, 0], rated[row], strict=False)
            ]
        mass[layer] = np.mean(sentences, axis=0)
        for expert in range(8):
            gates = [gate for first, gate in firsts if first == expert]
            koishekenov[layer, expert] = len(gates) / len(firsts) * np.exp(np.mean(gates)) if gates else 0
    statistics = experts.collect(model, [batch])
    np.testing.assert_allclose(experts.scores(statistics, "routing_mass"), mass, atol=1e-6)
    np.testing.assert_allclose(experts.scores(statistics, "frequency"), frequency, atol=1e-12)
    np.testing.assert_allclose(experts.scores(statistics, "koishekenov"), koishekenov, atol=1e-6)


def test_scores_of_sigmoid_routers_equal_those_of_their_logits():
    """The same for DeepSeek-V3, whose router adds a bias to the sigmoid to choose, and weighs without it."""
    model = models.tiny_twin("deepseek_v3", causal=True, n_group=1, topk_group=1)
    batch = {"input_ids": torch.stack([torch.arange(5, 30), torch.arange(60, 85)])}
    found = experts.layers(model)
    seen = [[] for _ in found]
    for layer, into in zip(found, seen, strict=True):
        layer.router.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].clone()))
    statistics = experts.collect(model, [batch])
    for index, layer in enumerate(found):
        hidden = seen[index][-1].reshape(-1, 32).double().numpy()
        logits = hidden @ layer.router.weight.detach().double().numpy().T
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + layer.router.e_score_correction_bias.double().numpy()), axis=-1)[:, :2]
        gates = np.take_along_axis(scores, chosen, -1)
        mass, top1, gate = np.zeros(8), np.zeros(8), np.zeros(8)
        for token, (experts_of, weights) in enumerate(zip(chosen, gates, strict=True)):
            mass[experts_of] += weights / weights.sum() / len(hidden)
            first = experts_of[weights.argmax()]
            top1[first] += 1
            gate[first] += softmax(logits[token])[first]
        np.testing.assert_allclose(statistics.routing_mass[index], mass, atol=1e-6)
        expected = np.where(top1 > 0, top1 / len(hidden) * np.exp(gate / np.maximum(top1, 1)), 0)
        np.testing.assert_allclose(experts.scores(statistics, "koishekenov")[index], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "alike"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}, True),  # as the bundled moe-translator
        ("mixtral", {}, True),
        ("gpt_oss", {}, True),
        ("granitemoe", {}, True),
        ("qwen3_moe", {"norm_topk_prob": False}, False),
        ("olmoe", {}, False),
        ("qwen2_moe", {}, False),
        ("deepseek_v2", {}, False),
    ],
)
def test_both_scores_of_reap_are_one_where_the_model_normalises_its_gates(name, options, alike):
    statistics = experts.collect(models.tiny_twin(name, **options), [padded(sequences())], reap=True)
    own, renormalised = (experts.scores(statistics, method) for method in ("reap", "reap_renormalised"))
    assert np.allclose(own, renormalised, rtol=1e-6, atol=0) == alike
    assert np.array_equal(own.argsort(axis=1), renormalised.argsort(axis=1)) or not alike


def test_factors_of_the_router_are_part_of_the_gate():
    plain, scaled = (
        experts.collect(
            models.tiny_twin("deepseek_v3", routed_scaling_factor=factor, num_hidden_layers=2),
            [padded(sequences())],
            reap=True,
        )
        for factor in (1.0, 2.5)
    )
    np.testing.assert_allclose(scaled.gated_norm_sum, 2.5 * plain.gated_norm_sum, rtol=1e-5)
    np.testing.assert_allclose(scaled.renormalised_norm_sum, plain.renormalised_norm_sum, rtol=1e-5)


def test_statistics_add_up_over_batches(twin):
    texts = sequences()
    whole = experts.collect(twin, [padded(texts)], reap=True)
    parts = [experts.collect(twin, [padded([text])], reap=True) for text in texts]
    assert_same(functools.reduce(operator.add, parts), whole, rtol=1e-5, atol=1e-7)
    assert_same(
        experts.collect(twin, (padded([text]) for text in texts), reap=True), whole, rtol=1e-5, atol=1e-7
    )


def test_padding_does_not_matter(twin):
    texts = sequences()
    right = experts.collect(twin, [padded(texts)], reap=True)
    assert_same(experts.collect(twin, [padded(texts, "left")], reap=True), right, rtol=1e-5, atol=1e-7)


def test_collecting_norms_does_not_change_the_routing(twin):
    batches = [padded(sequences())]
    plain, reap = experts.collect(twin, batches), experts.collect(twin, batches, reap=True)
    assert plain.gated_norm_sum is None
    np.testing.assert_array_equal(plain.mass_sum, reap.mass_sum)


def test_norms_are_collected_with_every_implementation():
    model = models.tiny_twin("gpt_oss")
    batches = [padded(sequences())]
    expected = experts.collect(model, batches, reap=True)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert_same(experts.collect(model, batches, reap=True), expected, rtol=1e-4, atol=1e-7)


def test_counted_tokens_are_those_of_the_mask():
    model = models.tiny_twin("qwen3_moe")
    texts = sequences()
    batch = padded(texts)
    count = batch["attention_mask"].clone()
    count[:, :2] = 0
    count[2] = 0
    statistics = experts.collect(model, [{**batch, "count_mask": count}], reap=True)
    assert statistics.tokens == int(count.sum())
    assert statistics.sequences == 3
    np.testing.assert_allclose(statistics.routing_mass.sum(axis=1), 1, rtol=1e-12)
    padding_too = {**batch, "count_mask": torch.ones_like(count)}
    assert_same(experts.collect(model, [padding_too]), experts.collect(model, [batch]))


def test_works_on_pruned_models_whose_layers_differ():
    model = models.tiny_twin("mixtral", causal=True)
    experts.prune(model, [[0, 1], [1, 2, 3], [0, 1, 2, 3, 4], [5, 6]])
    statistics = experts.collect(model, [padded(sequences())], reap=True)
    assert statistics.routing_mass.shape == (4, 5)
    np.testing.assert_allclose(statistics.routing_mass.sum(axis=1), 1, rtol=1e-12)
    for method in experts.METHODS:
        values = experts.scores(statistics, method)
        assert np.isneginf(values).sum() == 3 + 2 + 0 + 3
        assert experts.select(values, [2, 3, 3, 2])[3] == [0, 1]


def test_model_is_left_as_it_was(twin):
    twin.train()
    experts.layers(twin)[0].router.eval()
    before = copy.deepcopy(twin.state_dict())
    modes = [module.training for module in twin.modules()]
    experts.collect(twin, [padded(sequences())], reap=True)

    def broken():
        yield padded(sequences())
        raise RuntimeError("no more text")

    with pytest.raises(RuntimeError, match="no more text"):
        experts.collect(twin, broken(), reap=True)
    assert [module.training for module in twin.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert all(parameter.requires_grad for parameter in twin.parameters())


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [{**padded(sequences()), "count_mask": torch.zeros(4, 12)}],
        [{"input_ids": torch.zeros(2, 0).long()}],
    ],
)
def test_calibration_without_tokens_is_refused(batches):
    with pytest.raises(ValueError, match="no tokens"):
        experts.routing_mass(models.tiny_twin("mixtral"), batches)


def test_masks_of_another_shape_are_refused():
    batch = {**padded(sequences()), "count_mask": torch.ones(4, 3)}
    with pytest.raises(
        ValueError, match=r"count_mask must have the shape of input_ids, \[4, 12\], got \[4, 3\]"
    ):
        experts.routing_mass(models.tiny_twin("mixtral"), [batch])


def test_nan_in_the_routing_names_the_layer():
    model = models.tiny_twin("deepseek_v2")
    with torch.no_grad():
        experts.layers(model)[1].router.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*from layer 2 on"):
        experts.routing_mass(model, [padded(sequences())])


def test_bypassed_routers_are_noticed():
    model = models.tiny_twin("gpt_oss")
    block = experts.layers(model)[1].block
    block.forward = lambda hidden_states: (hidden_states, None)
    with pytest.raises(RuntimeError, match="router of layer 1 was not called"):
        experts.routing_mass(model, [padded(sequences())])


def test_dense_models_are_refused():
    with pytest.raises(ValueError, match="is dense"):
        experts.routing_mass(models.tiny_twin("qwen3"), [padded(sequences())])


def test_statistics_of_different_models_do_not_add_up():
    batches = [padded(sequences())]
    model = models.tiny_twin("mixtral")
    whole, with_norms = experts.collect(model, batches), experts.collect(model, batches, reap=True)
    with pytest.raises(ValueError, match="only one of the two"):
        whole + with_norms
    experts.prune(model, [[0, 1, 2]] * 4)
    with pytest.raises(ValueError, match="different models"):
        whole + experts.collect(model, batches)


def test_super_experts_are_kept_before_all_others():
    rng = np.random.default_rng(0)
    routed = np.full((2, 6), 10.0)
    norms = rng.uniform(20, 60, (2, 6))
    norms[1, 3], routed[1, 3] = 9000.0, 1.0  # one token, a huge output
    mass = rng.dirichlet(np.ones(6), 2)
    mass[1, 3] = 1e-4
    statistics = experts.RoutingStatistics(
        np.array([6, 6]), 1, 60, mass, routed, routed, routed, gated_norm_sum=norms
    )
    assert experts.super_experts(statistics) == [[], [3]]
    values = experts.scores(statistics, "routing_mass_super")
    assert values[1].argmax() == 3
    others = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(values[0], mass[0])
    np.testing.assert_array_equal(values[1, others], mass[1, others])
    without = experts.RoutingStatistics(np.array([6, 6]), 1, 60, mass, routed, routed, routed)
    with pytest.raises(ValueError, match="reap=True"):
        experts.super_experts(without)


def test_scores():
    statistics = experts.collect(models.tiny_twin("mixtral"), [padded(sequences())])
    np.testing.assert_array_equal(experts.scores(statistics, "inverted"), -statistics.routing_mass)
    first, again, other = (experts.scores(statistics, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match="reap=True"):
        experts.scores(statistics, "reap")
    with pytest.raises(ValueError, match="method must be one of routing_mass"):
        experts.scores(statistics, "magnitude")


def test_experts_without_tokens_score_zero():
    statistics = experts.collect(models.tiny_twin("mixtral"), [{"input_ids": torch.tensor([[5]])}], reap=True)
    for method in ("routing_mass", "frequency", "koishekenov", "reap"):
        values = experts.scores(statistics, method)
        assert (values >= 0).all()
        assert ((values > 0).sum(axis=1) == (1 if method == "koishekenov" else 2)).all()


def test_half_precision_and_training_after_a_prune(twin):
    found = experts.layers(twin)
    counts = [4, 6, 4, 8][: len(found)]
    values = experts.scores(experts.collect(twin.bfloat16(), [padded(sequences())], reap=True), "reap")
    assert np.isfinite(values).all()
    experts.prune(twin.float(), experts.select(values, counts, groups=found[0].groups))
    batch = padded(sequences())
    twin.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for layer in experts.layers(twin):
        assert layer.experts.down_proj.grad.shape[0] == layer.n_experts
