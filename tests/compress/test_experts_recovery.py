import dataclasses
import itertools

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from torch.nn import functional

from overparam import models
from overparam.compress import experts
from overparam.data.packing import Packed, Tree, pack
from overparam.train import causal

COUNTS = [3, 7, 2, 8]
RECIPE = causal.Recipe(steps=8, learning_rate=1e-2, warmup=1, balance=0.01)


def twin(name, counts=None, **overrides):
    groups = {"n_group": 1, "topk_group": 1} if name == "deepseek_v3" else {}
    model = models.tiny_twin(name, causal=True, **{**groups, **overrides})
    if counts:
        found = experts.layers(model)
        experts.prune(model, [list(range(8 - count, 8)) for count, _ in zip(counts, found, strict=False)])
    return model


def trees(number=10, seed=0):
    """A prefix with one to three continuations each; most are longer than the sliding window of the twins."""
    rng = np.random.default_rng(seed)
    return [
        Tree(
            [1, *rng.integers(3, 260, rng.integers(2, 20))],
            [rng.integers(3, 260, rng.integers(2, 14)).tolist() for _ in range(rng.integers(1, 4))],
        )
        for _ in range(number)
    ]


def batches():
    return itertools.cycle(pack(trees(), rows=2, length=96))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain_losses(model, sequences):
    """Summed loss of each (prefix, continuation) as a sequence of its own, without mask."""
    total, count = 0.0, 0
    for tree in sequences:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prefix, *branch]])
            with torch.no_grad():
                found = model(input_ids=ids, use_cache=False).logits[0, len(tree.prefix) : -1]
            total += float(functional.cross_entropy(found, torch.tensor(branch[1:]), reduction="sum"))
            count += len(branch) - 1
    return total / count


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, {}) for name in models.MOE_TWINS),
        ("mixtral", {"sliding_window": 8}),  # one window for all layers
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),  # for some
        ("granitemoe", {"logits_scaling": 4.0}),
        ("mistral", {}),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
def test_packed_rows_lose_what_plain_sequences_lose(name, overrides, attention):
    if (name, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("attention sinks are eager")
    model = twin(name, **overrides)
    model.set_attn_implementation(attention)
    sequences = trees()
    packed = list(pack(sequences, rows=2, length=96))
    assert max(batch.positions.max() for batch in packed) >= 16
    expected = plain_losses(model, sequences)
    recipe = causal.Recipe(steps=1, accumulate=len(packed))
    assert causal.train(model, packed, recipe).loss == pytest.approx([expected], abs=2e-6)


def test_attention_that_cannot_be_told_who_sees_whom_is_refused():
    model = twin("qwen3_moe")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'eager' or 'sdpa'.*'flash_attention_2'"):
        experts.recover(model, batches(), RECIPE)
    model = twin("gpt_oss")
    model.config.layer_types = ["linear_attention", *model.config.layer_types[1:]]
    with pytest.raises(ValueError, match="this model has linear_attention"):
        experts.recover(model, batches(), RECIPE)


@pytest.mark.parametrize("lora", [None, experts.Lora()], ids=["full", "lora"])
@pytest.mark.parametrize("counts", [[4] * 4, COUNTS], ids=["uniform", "differing"])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_training_lowers_the_loss_and_leaves_an_ordinary_model(name, counts, lora, tmp_path):
    model = twin(name, counts)
    before, modules = tensors(model), [type(module) for module in model.modules()]
    log = experts.recover(model, batches(), RECIPE, lora=lora)
    assert len(log.loss) == len(log.balance) == 8
    assert log.loss[-1] < log.loss[0] - 0.02
    assert min(log.balance) > 0.9
    after = tensors(model)
    assert not model.training
    assert [type(module) for module in model.modules()] == modules
    assert after.keys() == before.keys()
    again = experts.load_pruned(experts.save_pruned(model, tmp_path / "pruned"))
    assert torch.equal(logits(again), logits(model))
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    if lora:
        owned = {f"{part}_proj" for part in ("gate_up", "down")}
        expected = {key for key in after if "experts." in key and key.rsplit(".", 1)[-1] in owned}
        expected |= {
            f"{path}.weight"
            for path, module in model.named_modules()
            if "self_attn." in path and isinstance(module, torch.nn.Linear)
        }
        assert changed == expected
    else:
        assert {".".join(key.split(".")[3:5]) for key in changed} >= {
            "self_attn.o_proj",
            "input_layernorm.weight",
        }
        assert any("gate.weight" in key or "router.weight" in key for key in changed)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_merging_adapters_changes_nothing(name, monkeypatch):
    model, seen = twin(name, COUNTS), []
    merge = LoraModel.merge_and_unload

    def recorded(self):
        seen.append(logits(self.model))
        return merge(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", recorded)
    before = logits(model)
    experts.recover(model, batches(), RECIPE, lora=experts.Lora())
    assert not torch.allclose(seen[0], before, atol=1e-3)
    torch.testing.assert_close(logits(model), seen[0], atol=1e-5, rtol=1e-5)


def test_adapters_keep_what_requires_a_gradient_and_the_random_state():
    model = twin("gpt_oss", COUNTS)
    frozen = experts.layers(model)[1].experts.down_proj
    frozen.requires_grad_(False)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    experts.recover(model, batches(), RECIPE, lora=experts.Lora(rank=2, alpha=4))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert torch.equal(torch.get_rng_state(), state)


def test_failed_training_takes_the_adapters_out():
    model = twin("olmoe", COUNTS)
    before = tensors(model)

    def broken():
        yield from itertools.islice(batches(), 3)
        raise OSError("no more text")

    with pytest.raises(OSError, match="no more text"):
        experts.recover(model, broken(), RECIPE, lora=experts.Lora())
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_single_transposed_experts_have_no_adapter():
    model = experts.prune(twin("gpt_oss"), [[0, 1], [3], [0, 1], [2, 3]], lower_top_k=True)
    with pytest.raises(ValueError, match="single expert left in decoder layer 1"):
        experts.recover(model, batches(), RECIPE, lora=experts.Lora())
    assert experts.recover(model, batches(), RECIPE).loss


def test_balance_is_that_of_each_layer_by_hand():
    model = experts.prune(
        twin("qwen2_moe"), [[0, 1, 2], [5], [1, 2, 3, 4, 5, 6]], lower_top_k=True
    )  # three layers: one is dense
    batch = next(pack(trees(), rows=2, length=96))
    seen = []
    handles = [layer.router.register_forward_hook(lambda _, __, output: seen.append(output))
               for layer in experts.layers(model)]  # fmt: skip
    with torch.no_grad():
        causal.hidden_states(model, batch)
    for handle in handles:
        handle.remove()
    real = batch.tree.flatten() > 0
    expected = []
    for (router_logits, _, indices), n_experts, top_k in zip(seen, (3, 1, 6), (2, 1, 2), strict=True):
        assert indices.shape[1] == top_k
        probabilities = router_logits[real].softmax(-1).mean(0).numpy()
        loads = np.bincount(indices[real].flatten().numpy(), minlength=n_experts) / (real.sum() * top_k)
        expected.append(n_experts * (loads * probabilities).sum())
    log = experts.recover(model, [batch], dataclasses.replace(RECIPE, steps=1))
    assert log.balance == pytest.approx([np.mean(expected)], abs=1e-6)
    assert expected[1] == pytest.approx(1)


def test_balance_needs_experts():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no such router; train it with balance 0"):
        causal.train(models.tiny_twin("llama", causal=True), batches(), RECIPE)
    with pytest.raises(ValueError, match="is dense"):
        experts.recover(models.tiny_twin("llama", causal=True), batches(), RECIPE)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [None, experts.Lora(rank=4, alpha=8)], ids=["full", "lora"])
def test_interrupted_runs_go_on_where_they_stopped(lora, optimizer, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=6, optimizer=optimizer)
    whole, resumed, other = (twin("gpt_oss", COUNTS) for _ in range(3))
    expected = experts.recover(whole, batches(), recipe, lora=lora)

    def interrupted():
        yield from itertools.islice(batches(), 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experts.recover(other, interrupted(), recipe, lora=lora, checkpoint=tmp_path / "state", every=2)
    log = experts.recover(resumed, batches(), recipe, lora=lora, checkpoint=tmp_path / "state", every=2)
    assert log.loss == expected.loss
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(ValueError, match="model that has other tensors"):
        experts.recover(twin("gpt_oss", [4] * 4), batches(), recipe, lora=lora, checkpoint=tmp_path / "state")


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="ended at step 2 of 8"):
        experts.recover(twin("mixtral"), itertools.islice(batches(), 1), RECIPE)
    nothing = Packed(*(np.zeros((1, 4), np.int64) for _ in range(4)), np.full((1, 4), causal.IGNORED))
    with pytest.raises(ValueError, match="step 1 have nothing to predict"):
        experts.recover(twin("mixtral"), itertools.repeat(nothing), RECIPE)
