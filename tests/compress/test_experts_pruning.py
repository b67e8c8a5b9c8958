import copy
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from overparam import models
from overparam.compress import experts

# 32 tokens: a sigmoid rounds the last few numbers of a tensor that does not fill the processor's vectors another way
# than the rest, so that other numbers of tokens can differ in the last bit between widths.
IDS = torch.arange(3, 35).reshape(2, 16)


def twin(name, **overrides):
    """A twin with its head, whose routers may choose any experts."""
    groups = {"n_group": 1, "topk_group": 1} if name == "deepseek_v3" else {}
    return models.tiny_twin(name, causal=True, **{**groups, **overrides})


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def keep_lists(model, *, uniform, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = [5] * 9 if uniform else [3, 7, 2, 8, 5]
    return [
        sorted(torch.randperm(layer.n_experts, generator=generator)[:count].tolist())
        for layer, count in zip(experts.layers(model), counts, strict=False)
    ]


@contextmanager
def masked(model, keep):
    """The whole model with the router logits of all experts that are not kept at minus infinity."""
    linear = torch.nn.functional.linear

    def masking(router, dropped):
        original = router.forward

        def without(*args, **kwargs):
            return linear(*args, **kwargs).index_fill(-1, dropped, float("-inf"))

        def forward(*args, **kwargs):
            with mock.patch.object(torch.nn.functional, "linear", without):
                return original(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for layer, kept in zip(experts.layers(model), keep, strict=True):
            dropped = torch.tensor(sorted(set(range(layer.n_experts)) - set(kept)), dtype=torch.long)
            stack.enter_context(mock.patch.object(layer.router, "forward", masking(layer.router, dropped)))
            bias = getattr(layer.router, "e_score_correction_bias", None)
            if bias is not None:  # added after the sigmoid, so that it would bring a dropped expert back
                lowered = bias.detach().index_fill(0, dropped, float("-inf"))
                kind = type(bias)
                layer.router.e_score_correction_bias = (
                    kind(lowered) if kind is torch.nn.Parameter else lowered
                )
                stack.callback(setattr, layer.router, "e_score_correction_bias", bias)
        yield model


def same_but_for_rounding(found, expected):
    """Equal to the bit on some processors; on others, products of fewer experts are blocked and rounded otherwise."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_slicing_equals_masking_the_dropped_experts(name, uniform):
    model = twin(name)
    keep = keep_lists(model, uniform=uniform)
    before = logits(model)
    with masked(model, keep):
        expected = logits(model)
    assert not torch.equal(before, expected)
    small = experts.prune(model, keep)
    assert small is model
    same_but_for_rounding(logits(small), expected)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_pruned_models_run_with_every_implementation_and_generate(name, implementation, uniform):
    model = twin(name)
    experts.prune(model, keep_lists(model, uniform=uniform))
    expected = logits(model)
    grouped = model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False), grouped)


@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_every_tensor_and_count_shrinks(name):
    model = twin(name)
    before = models.count_parameters(model)
    keep = keep_lists(model, uniform=False)
    total = sum(layer.n_experts for layer in experts.layers(model))
    experts.prune(model, keep)
    counts = [len(kept) for kept in keep]
    assert [layer.n_experts for layer in experts.layers(model)] == counts
    for layer, count in zip(experts.layers(model), counts, strict=True):
        owned = [
            *layer.router.named_parameters(),
            *layer.router.named_buffers(),
            *layer.experts.named_parameters(),
        ]
        assert {tensor.shape[0] for _, tensor in owned} == {count}
        assert layer.router.num_experts == layer.experts.num_experts == count
    after = models.count_parameters(model)
    assert after.expert * total == before.expert * sum(counts)
    assert after.active - after.block == before.active - before.block
    assert model.config.num_local_experts_per_layer == counts


@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_uniform_prune_sets_the_plain_field(name, tmp_path):
    model = twin(name)
    experts.prune(model, keep_lists(model, uniform=True))
    assert not hasattr(model.config, "num_local_experts_per_layer")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_kept_order_is_the_order_given():
    model, other = twin("mixtral"), twin("mixtral")
    experts.prune(model, [[1, 4, 6]] * 4)
    experts.prune(other, [[6, 1, 4]] * 4)
    first, second = experts.layers(model)[0].experts, experts.layers(other)[0].experts
    assert torch.equal(first.down_proj[[2, 0, 1]], second.down_proj)
    torch.testing.assert_close(logits(model), logits(other))


def test_pruning_twice_equals_pruning_once():
    once, twice = twin("gpt_oss"), twin("gpt_oss")
    experts.prune(once, [[1, 5], [0, 2, 6], [3, 4], [1, 2, 3]])
    experts.prune(twice, [[1, 5, 7], [0, 2, 4, 6], [3, 4], [1, 2, 3, 7]])
    experts.prune(twice, [[0, 1], [0, 1, 3], [0, 1], [0, 1, 2]])
    assert torch.equal(logits(once), logits(twice))
    assert once.config.to_dict() == twice.config.to_dict()


def test_a_model_that_shares_the_weights_is_left_alone():
    model = twin("olmoe")
    expected = logits(model)
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    experts.prune(shared, [[0, 1]] * 4)
    assert torch.equal(logits(model), expected)


def test_requires_grad_is_kept():
    model = twin("gpt_oss")
    experts.layers(model)[0].router.weight.requires_grad_(False)
    experts.prune(model, [[0, 1, 2]] * 4)
    assert not experts.layers(model)[0].router.weight.requires_grad
    assert experts.layers(model)[1].router.weight.requires_grad


def test_router_loss_is_off_for_layers_that_differ():
    model = twin("mixtral", output_router_logits=True)
    uniform = experts.prune(model, [[0, 1, 2, 3, 4]] * 4)
    assert uniform.config.output_router_logits
    assert uniform(input_ids=IDS, labels=IDS).aux_loss.isfinite()
    experts.prune(model, [[0, 1], [0, 1, 2], [1, 2, 3], [0, 1, 2, 3]])
    assert not model.config.output_router_logits
    assert model(input_ids=IDS, labels=IDS).loss.isfinite()


def test_top_k_is_lowered_only_on_demand_and_only_where_needed(tmp_path):
    keep = [[0], [1, 2, 3], [4, 5], [6]]
    model = twin("qwen3_moe")
    before = logits(model)
    with pytest.raises(ValueError, match=r"keep\[0\].*fewer than the 2 \(top-k\).*lower_top_k=True"):
        experts.prune(model, keep)
    assert torch.equal(logits(model), before)
    experts.prune(model, keep, lower_top_k=True)
    assert [layer.top_k for layer in experts.layers(model)] == [1, 2, 2, 1]
    assert model.config.num_experts_per_tok_per_layer == [1, 2, 2, 1]
    counts = models.count_parameters(model)
    assert counts.active - counts.block == counts.expert * 6 // 7
    experts.save_pruned(model, tmp_path / "pruned")
    again = experts.load_pruned(tmp_path / "pruned")
    assert torch.equal(logits(again), logits(model))
    assert [layer.top_k for layer in experts.layers(again)] == [1, 2, 2, 1]


def test_top_k_lowered_everywhere_is_an_ordinary_checkpoint(tmp_path):
    model = experts.prune(twin("mixtral"), [[3]] * 4, lower_top_k=True)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (1, 1)
    again = AutoModelForCausalLM.from_pretrained(experts.save_pruned(model, tmp_path / "pruned")).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"topk_group": 2}])
def test_deepseek_groups_stay_equal(options):
    model = models.tiny_twin("deepseek_v3", causal=True, **options)
    found = experts.layers(model)
    assert [layer.groups for layer in found] == [2] * 3
    with pytest.raises(ValueError, match=r"every group must keep the same number.*groups=2"):
        experts.prune(model, [[0, 1, 2, 4]] * 3)
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))
    keep = experts.select(scores, [4, 6, 4], groups=2)
    with masked(model, keep):
        expected = logits(model)
    same_but_for_rounding(logits(experts.prune(model, keep)), expected)


def test_deepseek_groups_keep_what_the_router_looks_at():
    model = models.tiny_twin("deepseek_v3", causal=True)
    with pytest.raises(ValueError, match="at least 2 experts per group, got 1"):
        experts.prune(model, [[0, 4]] * 3)
    wide = models.tiny_twin("deepseek_v3", causal=True, num_experts_per_tok=4)
    keep = [[0, 1, 4, 5]] * 3
    with pytest.raises(ValueError, match="leaves 2 experts within the 1 of 2 groups"):
        experts.prune(wide, keep)
    assert experts.layers(experts.prune(wide, keep, lower_top_k=True))[0].top_k == 2
    assert logits(wide).isfinite().all()


def test_group_limited_deepseek_v2_is_sliced_by_group():
    options = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    model = models.tiny_twin("deepseek_v2", causal=True, **options)
    keep = [[0, 3, 4, 7]] * 3
    with masked(model, keep):
        expected = logits(model)
    same_but_for_rounding(logits(experts.prune(model, keep)), expected)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[0, 1]] * 3, "one list of experts for each of the 4"),
        ([[0, 1]] * 3 + [[0, 8]], r"keep\[3\] \(decoder layer 3\) must hold ids in 0\.\.7, got 8"),
        ([[-1, 1]] + [[0, 1]] * 3, r"0\.\.7, got -1"),
        ([[0, 1]] * 3 + [[2, 5, 2]], "expert 2 more than once"),
        ([[0, 1]] * 3 + [[2]], r"leaves 1 experts, fewer than the 2 \(top-k\)"),
        ([[0, 1]] * 3 + [[]], "at least 1 experts, got 0"),
    ],
)
def test_wrong_keep_lists_change_nothing(keep, message):
    model = twin("mixtral")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        experts.prune(model, keep)
    assert torch.equal(logits(model), before)
    assert [layer.n_experts for layer in experts.layers(model)] == [8] * 4
    assert model.config.num_local_experts == 8


def test_dense_models_are_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*is dense"):
        experts.layers(models.tiny_twin("llama", causal=True))


@pytest.mark.parametrize("wrapped", [True, False])
def test_models_with_adapters_are_refused_with_advice(wrapped):
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(twin("mixtral"), config)
    with pytest.raises(ValueError, match=r"merge them first, with model\.merge_and_unload\(\)"):
        experts.layers(model if wrapped else model.get_base_model())
    assert len(experts.layers(model.merge_and_unload())) == 4


def test_layers_whose_tensors_disagree_are_refused():
    model = twin("mixtral")
    layer = experts.layers(model)[2]
    layer.experts.down_proj = torch.nn.Parameter(layer.experts.down_proj[:7].detach())
    with pytest.raises(
        ValueError, match=r"layer 2 has tensors for \[7, 8\] experts.*gate_up_proj \[8, 96, 32\]"
    ):
        experts.prune(model, [[0, 1]] * 4)


def test_more_tensors_with_a_slice_for_each_expert_are_sliced_too():
    model = twin("mixtral")
    layer = experts.layers(model)[2]
    layer.experts.scales = torch.nn.Parameter(torch.arange(8.0))
    layer.experts.shared = torch.nn.Parameter(torch.ones(3))
    experts.prune(model, [[1, 5]] * 4)
    assert layer.experts.scales.tolist() == [1, 5]
    assert layer.experts.shared.tolist() == [1, 1, 1]


def test_native_mxfp4_is_refused_with_advice():
    model = twin("gpt_oss")
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(ValueError, match=r"Mxfp4Config\(dequantize=True\)"):
        experts.prune(model, [[0, 1]] * 4)


def test_base_models_are_pruned_too():
    model = models.tiny_twin("qwen2_moe")
    assert [layer.index for layer in experts.layers(model)] == [0, 2, 3]  # layer 1 of the twin is dense
    experts.prune(model, [[0, 1, 2]] * 3)
    assert model.config.num_experts == 3
