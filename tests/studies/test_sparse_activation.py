import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from overparam import models
from overparam.compress import activation
from overparam.compress.experts import controls, layers
from overparam.compress.experts.upcycling import upcycle
from overparam.data import kinds
from overparam.evaluate import equal_loss
from overparam.measure import flops
from overparam.record import record
from overparam.studies.sparse_activation import (
    ACTIVE,
    ARMS,
    KINDS,
    MIXTURE,
    TOTAL,
    UPCYCLED,
    Params,
    inference,
    plots,
    study,
    training,
    verdicts,
)
from overparam.train import causal

TINY = Params(
    vocabulary=300,
    hidden=16,
    layers=2,
    heads=2,
    key_value_heads=1,
    experts=4,
    expert_width=8,
    kinds=("news", "code"),
    max_texts=20,
    steps=6,
    rows=2,
    row_length=48,
    warmup=1,
    learning_rates=(1e-3, 3e-3),
    tuning_steps=2,
    precision="float32",
    seeds=(1, 2),
    checkpoint_every=2,
    validation_batches=1,
    routed_model="tiny-qwen3_moe",
    routed_verses=4,
    control_seeds=(0, 1),
    model="tiny-gemma3",
    shares=(0.3, 0.5),
    calibration_texts=2,
    test_texts=3,
    text_length=24,
    time_repeats=3,
)
IDS = torch.arange(3, 43).reshape(2, 20)
WORDS = "when all were there each had said what other people made over time and what they may use"
FOLDER = training.cache.folder


def checkpoints_in(monkeypatch, path):
    monkeypatch.setattr(training.cache, "folder", lambda kind: path if kind == "training" else FOLDER(kind))


@pytest.fixture(autouse=True)
def made_up_text(monkeypatch, tmp_path):
    """Words in random order, instead of texts whose reading takes a minute; checkpoints in a folder of their own."""
    checkpoints_in(monkeypatch, tmp_path / "states")
    words = WORDS.split()

    def made(kind, split, max_texts=None):
        draw = random.Random(f"{kind} {split}")
        return [" ".join(draw.choices(words, k=40)) for _ in range(max_texts or 20)]

    monkeypatch.setattr(kinds, "texts", made)
    monkeypatch.setattr(kinds, "provenance", lambda *_: {"texts": "made up"})
    monkeypatch.setattr(study.models, "provenance", lambda name: {name: "random"})


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 8}, "top_k must be below experts = 8"),
        ({"shares": (0.5, 1.0)}, "less than 1"),
        ({"shares": (0.0,)}, "greater than 0"),
        ({"arms": (ACTIVE, MIXTURE)}, "dense, total size"),
        ({"arms": (*ARMS, "dense")}, "'dense' is not"),
        ({"experts": 9}, "multiple of top_k"),
        ({"hidden": 100, "heads": 3}, "multiple of heads"),
        ({"tuning_steps": 900}, "tuning_steps <= steps"),
        ({"kinds": ("news", "poems")}, "'poems' is not"),
        ({"precision": "int8"}, "float32"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_kinds_of_text_are_those_that_there_are():
    assert KINDS == kinds.KINDS


@pytest.mark.parametrize("arm", [ACTIVE, TOTAL])
def test_a_dense_arm_is_exactly_a_gated_layer_of_the_same_width(arm):
    model = training.build(TINY, arm, 0)
    width = {ACTIVE: 16, TOTAL: 32}[arm]
    layer = model.model.layers[0].mlp
    for parameter in layer.parameters():  # as after a training: biases and router are not zero
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 7, 16)
    gate_up = x @ layer.experts.gate_up_proj[0] + layer.experts.gate_up_proj_bias[0]
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    expected = inner @ layer.experts.down_proj[0] + layer.experts.down_proj_bias[0]
    found, weights = layer(x)
    assert inner.shape[-1] == width
    assert torch.equal(weights, torch.ones(21, 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("arm", [ACTIVE, MIXTURE, TOTAL])
def test_parameters_are_counted_without_the_model(arm):
    model = training.build(TINY, arm, 0)
    assert training.parameters(TINY, arm) == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("arm", [ACTIVE, MIXTURE, TOTAL])
def test_counted_operations_are_those_of_the_closed_form(arm):
    model = training.build(TINY, arm, 0).eval()
    form = flops.per_token(model.config, 20)
    of_matrices = [p.shape for name, p in model.named_parameters() if ".self_attn." in name and p.ndim == 2]
    top_k = model.config.num_experts_per_tok
    by_hand = sum(2 * rows * columns for rows, columns in of_matrices) + 2 * (4 * 16 * 20)
    by_hand += 2 * (top_k * 6 * 16 * model.config.intermediate_size + 2 * 16 * model.config.num_local_experts)
    assert form.blocks == by_hand
    assert form.total == by_hand + 2 * 16 * 300
    assert flops.counted(model, 20) == pytest.approx(form.total, rel=0.01)
    assert flops.counted(model, 20, experts="grouped_mm") < 0.9 * form.total


def test_an_upcycled_mixture_computes_what_the_dense_model_does():
    dense, mixture = training.build(TINY, ACTIVE, 0), training.build(TINY, MIXTURE, 1)
    for layer in layers(dense):
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(logits(mixture), logits(dense), atol=1e-3)
    torch.testing.assert_close(logits(upcycle(dense, mixture)), logits(dense), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gate_up_proj has shape"):
        upcycle(training.build(TINY, TOTAL, 0), mixture)


def test_a_training_that_is_killed_goes_on_to_the_same_losses(monkeypatch, tmp_path):
    whole = training.train(TINY, MIXTURE, seed=1, learning_rate=3e-3, steps=6)
    checkpoints_in(monkeypatch, tmp_path / "other")
    step = causal._gradients

    def killed(*args):
        if args[-2] == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(causal, "_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train(TINY, MIXTURE, seed=1, learning_rate=3e-3, steps=6)
    monkeypatch.setattr(causal, "_gradients", step)
    again = training.train(TINY, MIXTURE, seed=1, learning_rate=3e-3, steps=6)
    assert again.log.loss == whole.log.loss
    assert again.points == whole.points
    assert sorted(whole.points) == [2, 4, 6]


def test_arms_of_a_seed_read_the_same_batches_and_kinds_have_equal_shares():
    first, second = (next(training.batches(TINY, seed)) for seed in (1, 1))
    assert np.array_equal(first.input_ids, second.input_ids)
    assert not np.array_equal(first.input_ids, next(training.batches(TINY, 2)).input_ids)


def test_an_upcycled_training_is_one_training(tmp_path):
    found = training.train(TINY, UPCYCLED, seed=1, learning_rate=3e-3, steps=6)
    dense = training.train(TINY, ACTIVE, seed=1, learning_rate=3e-3, steps=6)
    assert found.log.tokens == dense.log.tokens  # the second half reads the batches after the first
    assert found.log.loss[:3] == dense.log.loss[:3]
    assert sorted(found.points) == [2, 3, 5, 6]


def test_a_loss_that_is_not_finite_names_the_model_the_step_and_the_checkpoint(monkeypatch):
    step = causal._gradients

    def broken(*args):
        return step(*args) if args[-2] < 3 else float("nan")

    monkeypatch.setattr(causal, "_gradients", broken)
    with pytest.raises(
        FloatingPointError, match=r"mixture, seed 1, learning rate 0.003.*at step 4.*checkpoint"
    ):
        training.train(TINY, MIXTURE, seed=1, learning_rate=3e-3, steps=6)
    folder = training.state_folder(TINY, MIXTURE, 1, 3e-3, 6)
    assert len(json.loads((folder / "log.json").read_text())["log"]["loss"]) == 2


def test_a_model_that_does_not_fit_is_refused_before_any_training():
    large = TINY.model_copy(update={"expert_width": 10**9})
    with pytest.raises(MemoryError, match=r"'dense, active size' of .* parameters needs about"):
        training.check_memory(large)
    training.check_memory(TINY)


def test_more_experts_than_there_are_is_an_error():
    model = models.tiny_twin("qwen3_moe", causal=True)
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.8"), controls.using_top_k(model, 9):
        pass
    with pytest.raises(ValueError, match="top_ks must be at most 8, the experts of tiny-qwen3_moe"):
        study.start(TINY.model_copy(update={"top_ks": (1, 16)}))


def test_controls_change_the_model_for_a_block_only():
    model = models.tiny_twin("gpt_oss", causal=True)
    before, weights = logits(model), [each.clone() for each in model.parameters()]
    for state in (
        controls.using_top_k(model, 1),
        controls.shuffled_experts(model, 0),
        controls.random_routers(model, 0),
    ):
        with state:
            assert not torch.allclose(logits(model), before, atol=1e-6)
        assert torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_shuffled_experts_that_routers_follow_change_nothing():
    model = models.tiny_twin("gpt_oss", causal=True)
    before = logits(model)
    kept = [layer.experts.down_proj.clone() for layer in layers(model)]
    with controls.shuffled_experts(model, 3):
        for layer, old in zip(layers(model), kept, strict=True):
            now = layer.experts.down_proj
            of = [next(i for i in range(len(old)) if torch.equal(old[i], each)) for each in now]
            assert sorted(of) == list(range(len(old)))
            assert all(i != place for i, place in enumerate(of))
            for parameter in layer.router.parameters():
                parameter.data = parameter.data[of]
        torch.testing.assert_close(logits(model), before)


def test_thresholds_are_quantiles_of_what_matrices_read():
    model = models.tiny_twin("llama", causal=True).eval()
    found = activation.quantiles(model, [IDS[:1], IDS[1:]], [0.25, 0.5])
    name, module = next(iter(activation.matrices(model, "down_proj").items()))
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten()))
    for ids in (IDS[:1], IDS[1:]):
        logits(model, ids)
    handle.remove()
    expected = np.quantile(torch.cat(seen).numpy(), [0.25, 0.5])
    np.testing.assert_allclose([found[name][0.25], found[name][0.5]], expected, rtol=1e-5)
    for share in (0.25, 0.5):
        with activation.zeroed(activation.matrices(model), activation.smallest(found, share)) as zeros:
            logits(model, IDS)
        assert zeros.share == pytest.approx(share, abs=0.05)
    for share in (0.0, 1.0, 1.2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            activation.quantiles(model, [IDS], [share])


def test_zeros_are_those_of_masked_inputs_and_leave_no_trace():
    model = models.tiny_twin("llama", causal=True).eval()
    before = logits(model)
    modules = activation.matrices(model, "layers.0.mlp.down_proj")
    (module,) = modules.values()
    columns = torch.zeros(module.in_features, dtype=torch.bool)
    columns[::3] = True
    with activation.zeroed(modules, lambda _, x: columns.expand_as(x)):
        found = logits(model)
    weight = module.weight.detach().clone()
    module.weight.data[:, ~columns] = 0
    torch.testing.assert_close(found, logits(model))
    module.weight.data = weight
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="has no matrix"):
        activation.matrices(model, "experts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_product_is_the_dense_one(dtype):
    weight, x = torch.randn(5, 9, dtype=dtype), torch.randn(9, dtype=dtype)
    x[[0, 3, 8]] = 0
    rows = activation.stored(weight)
    torch.testing.assert_close(activation.sparse_product(x, rows), weight @ x, rtol=2e-2, atol=2e-2)
    assert torch.equal(
        activation.sparse_product(torch.zeros(9, dtype=dtype), rows), torch.zeros(5, dtype=dtype)
    )


def test_the_cost_of_a_loss_is_interpolated_and_censored():
    costs, losses = np.array([1e3, 1e4, 1e5]), np.array([4.0, 3.0, 2.0])
    for cost in (2e3, 3e4, 9.9e4):  # the curve is loss = 4 - log10(cost / 1000)
        loss = 4 - np.log10(cost / 1e3)
        assert equal_loss.reached(costs, losses, loss).cost == pytest.approx(cost)
    assert equal_loss.reached(costs, losses, 5.0) == equal_loss.Reached(1e3, -1)
    assert equal_loss.reached(costs, losses, 1.9) == equal_loss.Reached(1e5, 1)
    assert equal_loss.reached(costs, [4.0, 2.5, 2.7], 2.5).cost == 1e4  # a curve that rises again
    with pytest.raises(ValueError, match="increase"):
        equal_loss.reached([1.0, 1.0], [2.0, 1.0], 1.5)


def test_saved_cost_has_an_interval_over_seeds_that_censoring_opens():
    reached = equal_loss.Reached
    base, other = (
        [reached(100.0), reached(120.0), reached(90.0)],
        [reached(50.0), reached(66.0), reached(40.0)],
    )
    found = equal_loss.saved(base, other)
    ratios = np.log([0.5, 0.55, 4 / 9])
    half = 4.302653 * ratios.std(ddof=1) / 3**0.5
    assert found.value == pytest.approx(100 * (1 - np.exp(ratios.mean())))
    assert found.low == pytest.approx(100 * (1 - np.exp(ratios.mean() + half)))
    assert found.high == pytest.approx(100 * (1 - np.exp(ratios.mean() - half)))
    later = equal_loss.saved([*base[:2], reached(90.0, 1)], other)
    assert (later.low, later.high) == (found.low, 100.0)
    never = equal_loss.saved(base, [*other[:2], reached(40.0, 1)])
    assert (never.low, never.high) == (-np.inf, found.high)
    one = equal_loss.saved(base[:1], other[:1])
    assert (one.value, one.low, one.high) == (50.0, -np.inf, 100.0)


def test_the_compute_saved_is_that_of_the_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    run = study.start(TINY)
    parts = []
    for arm, (factor, price) in {ACTIVE: (1.0, 1.0), MIXTURE: (3.0, 1.2), TOTAL: (4.0, 4.0)}.items():
        for seed in (1, 2, 3):
            tokens = np.geomspace(1e4, 1e6, 9)
            loss = 6 - np.log10(factor * tokens) / 2 + 0.01 * seed
            costs = {"flops": price * tokens, "flops_blocks": price * tokens, "seconds": tokens}
            parts.append(
                pd.DataFrame(
                    {"step": range(9), "tokens": tokens, "loss": loss, **costs, "arm": arm, "seed": seed}
                )
            )
    table = study.savings(run, pd.concat(parts, ignore_index=True))
    lowest = table[table["lowest"]].set_index(["base", "cost"])
    saved = {key: lowest.loc[key, "saved"] for key in lowest.index}
    assert saved[ACTIVE, "tokens"] == pytest.approx(100 * (1 - 1 / 3), abs=1.5)
    assert saved[ACTIVE, "flops"] == pytest.approx(100 * (1 - 1.2 / 3), abs=1.5)
    assert saved[TOTAL, "flops"] == pytest.approx(100 * (1 - 1.2 / 3), abs=1.5)
    assert saved[TOTAL, "tokens"] == pytest.approx(100 * (1 - 4 / 3), abs=1.5)
    of = pd.DataFrame({"arm": [ACTIVE, MIXTURE, TOTAL], "total": [1.0, 1.2, 4.0], "blocks": [1.0, 1.2, 4.0]})
    found = study.dense_equivalent(
        run, pd.concat(parts, ignore_index=True), of.assign(bytes=[1.0, 4.0, 4.0])
    ).set_index("cost")
    between = 4 ** (np.log(3) / np.log(4))
    assert found.loc["total", "dense"] == pytest.approx(between)
    assert found.loc["total", "saved"] == pytest.approx(100 * (1 - 1.2 / between))
    assert found.loc["bytes", "saved"] == pytest.approx(100 * (1 - 4 / between))


def test_committed_curves_that_are_missing_are_said_before(monkeypatch, tmp_path):
    monkeypatch.setattr(study.trained, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="--profile reference --only sparse_activation"):
        study.start(TINY.model_copy(update={"committed_curves": True}))


def test_the_whole_study_leaves_a_complete_record(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    run = study.start(TINY)
    operations = study.count(run)
    tuned = study.tune(run)
    assert tuned.groupby("arm")["chosen"].sum().tolist() == [1, 1, 1]
    speeds = study.speed(run)
    assert (speeds["seconds_low"] <= speeds["seconds"]).all()
    live = study.train(run, operations, speeds, tuned)
    cost = live[live["arm"] == MIXTURE]
    pace = speeds.set_index("arm").loc[MIXTURE, "tokens_per_second"]
    assert np.allclose(cost["tokens"] / cost["seconds"], pace)
    assert live.groupby(["arm", "seed"]).ngroups == 10
    tokens = live.groupby(["seed", "step"])["tokens"].nunique()
    assert (tokens == 1).all()  # every arm has seen the same text
    curves = study.judged_curves(run, live)
    final = study.final_losses(run, curves)
    saved = study.savings(run, curves)
    equal = study.dense_equivalent(run, curves, operations)
    routed = inference.routing(run)
    assert routed.set_index("system").loc["as trained", "lost"] == 0
    assert routed.set_index("system").loc["top-2", "lost"] == 0  # as the tiny model is
    zeros = inference.activations(run)
    meant = zeros[zeros["choice"] != inference.LARGEST]  # without the largest, what follows is smaller
    assert np.allclose(meant["found"], meant["share"], atol=0.1)
    decoded = inference.decoding(run)
    for figure in (
        plots.plot_curves(run, curves, live),
        plots.plot_savings(run, saved),
        plots.plot_kinds(run, final),
        plots.plot_routing(run, routed),
        plots.plot_activations(run, zeros, decoded),
    ):
        assert figure is not None
    claims = verdicts.verdicts(run, operations, final, saved, equal, routed, zeros, decoded)
    assert len({claim.id for claim in claims}) == len(claims) == 15
    assert claims[0].verdict == "reproduced"
    run.finish()
    assert record.problems(record.load(tmp_path / "job")) == []
    # the same curves, committed, are what another run is judged by
    reference = tmp_path / "reference" / run.params.study / f"{run.params.slug()}-12345678"
    reference.parent.mkdir(parents=True)
    (tmp_path / "job").rename(reference)
    monkeypatch.setattr(study.trained, "RESULTS", tmp_path / "reference")
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "again"))
    short = TINY.model_copy(update={"committed_curves": True, "steps": 4, "seeds": (1,)})
    again = study.start(short)
    assert len(again.params.key_inputs()) == 1
    few = study.train(again, operations, speeds, tuned)
    read = study.judged_curves(again, few)
    pd.testing.assert_frame_equal(read, curves, check_dtype=False)
    plots.plot_curves(again, read, few)


def test_without_a_model_the_part_about_zeros_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    run = study.start(TINY.model_copy(update={"model": None}))
    zeros, decoded = inference.activations(run), inference.decoding(run)
    assert zeros.empty
    assert decoded.empty
    assert plots.plot_activations(run, zeros, decoded) is None
    found = verdicts._zeros(run, zeros, decoded)
    assert {claim.verdict for claim in found} == {"not testable at this scale"}
