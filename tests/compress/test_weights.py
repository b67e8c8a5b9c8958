import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from overparam import models
from overparam.compress import weights

ENCODERS, DECODERS = ("bert", "mpnet"), ("llama", "gemma3_text", "gpt2", "qwen3_moe", "gpt_oss")


def tiny(name):
    torch.manual_seed(0)
    return models.tiny_twin(name, causal=name in DECODERS).float().eval()


def batch_of(model, rows=3, length=12, padding=0):
    config = model.config.get_text_config()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(10, min(200, config.vocab_size), (rows, length), generator=random)
    mask = torch.ones_like(ids)
    if padding:
        ids = functional.pad(ids, (0, padding))
        mask = functional.pad(mask, (0, padding))
    return {"input_ids": ids, "attention_mask": mask}


def correlated(rows=256, columns=128, tokens=1024, outputs=64):
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=random) / math.sqrt(columns)
    scale = torch.exp(torch.randn(columns, generator=random))
    x = (torch.randn(tokens, columns, generator=random) @ mixed + torch.randn(tokens, 8, generator=random)
         @ torch.randn(8, columns, generator=random)) * scale  # fmt: skip
    return torch.randn(outputs, columns, generator=random), x


def relative_error(w, pruned, x):
    return float((x @ (pruned - w).T).square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_every_matrix_of_the_layers_is_found_and_no_other(name):
    model = tiny(name)
    found = weights.matrices(model)
    names = [matrix.name for matrix in found]
    assert len(set(names)) == len(names)
    chosen = {id(getattr(matrix.owner, matrix.attribute)) for matrix in found}
    apart = ("embed", "pooler", "router", ".gate.", "lm_head", "norm", "bias", "wte", "wpe", "ln_", "sinks")
    for parameter_name, parameter in model.named_parameters():
        left = parameter.ndim < 2 or any(part in f"{parameter_name}." for part in apart)
        assert (id(parameter) in chosen) != left, parameter_name
    counts = weights.count_zeros(model)
    assert counts.layers == sum(matrix.weight.numel() for matrix in found)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_statistics_are_those_of_what_matrices_read(name):
    model = tiny(name)
    batch = batch_of(model)
    found = weights.collect(model, [batch, batch], weights.matrices(model), gram=True)
    first = weights.matrices(model)[0]
    read = []
    handle = first.owner.register_forward_pre_hook(
        lambda _, args: read.append(args[0].detach().flatten(0, 1))
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    statistics = found[first.name]
    assert statistics.tokens == 2 * len(read[0])
    torch.testing.assert_close(statistics.gram, 2 * read[0].T @ read[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.norms, read[0].square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_each_expert_has_the_statistics_of_the_tokens_that_it_was_sent(name):
    model = tiny(name)
    batch = batch_of(model, padding=4)
    seen = {}

    def before(module, args):
        seen[id(module)] = args

    from overparam.compress import experts

    layer = experts.layers(model)[1]
    handle = layer.experts.register_forward_pre_hook(before)
    with torch.no_grad():
        plain = model(**batch).logits
    handle.remove()
    found = weights.collect(model, [batch], weights.matrices(model), gram=True)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)  # nothing is left behind
    hidden, indices, _ = seen[id(layer.experts)]
    real = batch["attention_mask"].bool().flatten()
    for matrix in weights.matrices(model):
        if matrix.owner is layer.experts and matrix.attribute == "gate_up_proj":
            x = hidden[(indices == matrix.expert).any(1) & real]
            assert found[matrix.name].tokens == len(x)
            torch.testing.assert_close(found[matrix.name].gram, x.T @ x, rtol=1e-3, atol=1e-4)
            down = found[matrix.name.replace("gate_up", "down")]
            assert down.tokens == len(x)


def test_padding_is_not_counted():
    model = tiny("llama")
    some = weights.matrices(model)
    plain = weights.collect(model, [batch_of(model)], some)
    padded = weights.collect(model, [batch_of(model, padding=7)], some)
    for name, statistics in plain.items():
        assert padded[name].tokens == statistics.tokens
        torch.testing.assert_close(padded[name].squares, statistics.squares, rtol=1e-4, atol=1e-5)


def test_a_text_of_padding_alone_and_no_text_are_refused():
    model = tiny("llama")
    batch = batch_of(model)
    for batches in ([], [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}]):
        with pytest.raises(ValueError, match="no token"):
            weights.collect(model, batches, weights.matrices(model))


def test_wanda_ranks_inside_of_each_row_by_size_times_norm():
    w, x = correlated()
    statistics = weights.Statistics(len(x), x.square().sum(0))
    keep = weights.masks({"w": weights.scores(w, "wanda", statistics=statistics)}, 0.5)["w"]
    for row in range(len(w)):
        rated = [abs(float(w[row, j])) * float(np.linalg.norm(x[:, j].numpy())) for j in range(w.shape[1])]
        expected = set(np.argsort(rated)[len(rated) // 2 :])
        assert set(keep[row].nonzero().flatten().tolist()) == expected


def reference_sparsegpt(w, gram, sparsity, block):
    """Optimal brain surgeon in float64, with the inverse of what is left computed anew for every column."""
    w, h = w.double().clone(), gram.double().clone()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    columns = w.shape[1]
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]
    for start in range(0, columns, block):
        end = min(columns, start + block)
        saliency = torch.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in range(start, end)], 1)
        lowest = saliency.flatten().argsort()[: int(sparsity * saliency.numel())]
        zero = torch.zeros(saliency.numel(), dtype=torch.bool)
        zero[lowest] = True
        zero = zero.view_as(saliency)
        for i in range(start, end):
            error = torch.where(zero[:, i - start], w[:, i], torch.zeros(len(w)).double()) / inverses[i][0, 0]
            w[:, i:] -= error[:, None] * inverses[i][0]
    return w


@pytest.mark.parametrize("block", [16, 64])
def test_sparsegpt_equals_brute_force(block):
    w, x = (each.double() for each in correlated(columns=64, outputs=24))
    gram = x.T @ x / len(x)
    found = weights.sparsegpt(w, gram, 0.5, block=block)
    expected = reference_sparsegpt(w, gram, 0.5, block)
    assert int((found == 0).sum()) == w.numel() // 2
    assert torch.equal(found == 0, expected.abs() < 1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    rounded = weights.sparsegpt(w.float(), gram.float(), 0.5, block=block)
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_refit_row_is_the_least_squares_solution():
    w, x = (each.double() for each in correlated(columns=48, outputs=6, tokens=200))
    gram = x.T @ x
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[0], keep[1] = True, False
    found = weights.refit(w, keep, gram)
    damped = torch.cat(
        [x, math.sqrt(0.01 * float(gram.diagonal().mean())) * torch.eye(48, dtype=torch.float64)]
    )
    for row in range(len(w)):
        columns = keep[row].nonzero().flatten()
        expected = torch.zeros(48, dtype=torch.float64)
        if len(columns):
            solved = np.linalg.lstsq(damped[:, columns].numpy(), (damped @ w[row]).numpy(), rcond=None)
            expected[columns] = torch.from_numpy(solved[0])
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found != 0, keep)


def test_the_published_order_of_methods_on_correlated_inputs():
    w, x = correlated()
    gram = x.T @ x
    statistics = weights.Statistics(len(x), x.square().sum(0), gram)
    random = torch.Generator().manual_seed(0)
    for sparsity in (0.3, 0.5, 0.7):
        error = {}
        for method in ("random", "magnitude", "wanda", "inverted"):
            rated = weights.scores(w, method, statistics=statistics, generator=random)
            keep = weights.masks({"w": rated}, sparsity)["w"]
            error[method] = relative_error(w, w * keep, x)
            if method == "wanda":
                error["refit"] = relative_error(w, weights.refit(w, keep, gram), x)
        error["sparsegpt"] = relative_error(w, weights.sparsegpt(w, gram, sparsity), x)
        assert error["inverted"] > error["random"] > error["magnitude"] > error["wanda"] >= error["sparsegpt"]
        assert error["refit"] < error["wanda"]


def test_counts_are_exact_where_scores_are_equal():
    same = torch.ones(4, 100)
    for group in ("row", "matrix", "model"):
        keep = weights.masks({"a": same, "b": same}, 0.29, group=group)
        assert sum(int((~each).sum()) for each in keep.values()) == 4 * 2 * 29
    keep = weights.masks({"a": same}, 0.0, pattern=(2, 4))["a"]
    assert (keep.view(4, -1, 4).sum(-1) == 2).all()


def test_the_group_says_what_competes():
    small, large = torch.full((2, 10), 0.1), torch.arange(20.0).view(2, 10) + 1
    by_model = weights.masks({"small": small, "large": large}, 0.5, group="model")
    assert not by_model["small"].any()
    assert by_model["large"].all()
    by_matrix = weights.masks({"large": large}, 0.5, group="matrix")["large"]
    assert by_matrix.sum(1).tolist() == [0, 10]
    assert weights.masks({"large": large}, 0.5, group="row")["large"].sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("name", ["bert", "gemma3_text", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", weights.METHODS)
def test_every_method_leaves_an_ordinary_model_with_the_zeros_asked_for(name, method, tmp_path):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batch_of(model, rows=4, length=24)
    weights.prune(model, method, 0.5, batches=[batch])
    every = weights.matrices(model)
    chosen = {id(getattr(matrix.owner, matrix.attribute)) for matrix in every}
    for key, parameter in model.named_parameters():
        if id(parameter) not in chosen:
            assert torch.equal(parameter, before[key])
    for matrix in every:
        share = float((matrix.weight == 0).float().mean())
        assert share == pytest.approx(0.5, abs=1 / min(matrix.weight.shape))
    with torch.no_grad():
        expected = model(**batch)[0]
        assert torch.isfinite(expected).all()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(**batch)[0], expected)
    assert weights.count_zeros(again) == weights.count_zeros(model)


def test_two_of_four_stays_in_every_group_of_inputs():
    for method in ("magnitude", "wanda", "sparsegpt", "wanda_refit"):
        model = tiny("llama")
        weights.prune(model, method, 0.5, batches=[batch_of(model)], pattern=(2, 4))
        for matrix in weights.matrices(model):
            groups = (matrix.weight == 0).view(len(matrix.weight), -1, 4).sum(-1)
            assert (groups == 2).all(), (method, matrix.name)


def test_layer_by_layer_reads_the_pruned_layers_before_and_one_pass_the_unpruned():
    first, second = tiny("llama"), tiny("llama")
    batch = batch_of(first)
    weights.prune(first, "wanda", 0.5, batches=[batch])
    weights.prune(second, "wanda", 0.5, batches=[batch], one_pass=True)
    a, b = weights.matrices(first), weights.matrices(second)
    same = [torch.equal(x.weight, y.weight) for x, y in zip(a, b, strict=True)]
    assert all(
        each
        for each, matrix in zip(same, a, strict=True)
        if matrix.layer == 0 and "self_attn.q" in matrix.name
    )
    assert not all(same)


def test_an_expert_without_tokens_is_pruned_by_magnitude():
    model = tiny("qwen3_moe")
    batch = batch_of(model, rows=1, length=2)
    statistics = weights.collect(model, [batch], weights.matrices(model), gram=True)
    idle = [matrix for matrix in weights.matrices(model) if not statistics[matrix.name].tokens]
    assert idle
    other = tiny("qwen3_moe")
    weights.prune(model, "sparsegpt", 0.5, batches=[batch], one_pass=True)
    weights.prune(other, "magnitude", 0.5)
    now = {matrix.name: matrix.weight for matrix in weights.matrices(model)}
    by_size = {matrix.name: matrix.weight for matrix in weights.matrices(other)}
    for matrix in idle:
        assert torch.equal(now[matrix.name], by_size[matrix.name])


def test_few_and_dependent_tokens_are_damped_and_said(capsys):
    w, x = correlated(columns=32, tokens=3, outputs=8)
    x[:, 5] = 0
    pruned = weights.sparsegpt(w, x.T @ x, 0.5, name="layers.3.q_proj")
    assert torch.isfinite(pruned).all()
    assert not pruned[:, 5].any()
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: all of its inputs are zero"):
        weights.sparsegpt(w, torch.zeros(32, 32), 0.5, name="layers.3.q_proj")
    steep = torch.eye(32) * 0.5 - torch.full((32, 32), 5.0)  # no sum of products
    steep += torch.diag(torch.full((32,), 5.5))
    with pytest.raises(ValueError, match="cannot be inverted even with damping"):
        weights.sparsegpt(w, steep, 0.5, name="layers.3.q_proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wandas", 0.5), "unknown method 'wandas'"),
        (("magnitude", 0.0), "sparsity must be above 0 and below 1"),
        (("magnitude", 1.0), "sparsity must be above 0 and below 1"),
        (("magnitude", -0.5), "sparsity must be above 0 and below 1"),
        (("wanda", 0.5), "needs a calibration text"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = tiny("llama")
    before = [matrix.weight.clone() for matrix in weights.matrices(model)]
    with pytest.raises(ValueError, match=message):
        weights.prune(model, *arguments)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, weights.matrices(model), strict=True))


def test_models_that_cannot_be_pruned_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="2 of every 7 does not divide the"):
        weights.prune(model, "magnitude", 0.5, pattern=(2, 7))
    first = weights.matrices(model)[0]
    first.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        weights.prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match="encoder and a decoder"):
        weights.matrices(models.tiny_twin("t5"))


def test_zeros_stay_in_training_against_momentum():
    def trained(keep):
        model = tiny("llama")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        batch = batch_of(model)

        def step():
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # momentum of weights that will go
        weights.prune(model, "magnitude", 0.5)
        before = weights.count_zeros(model)
        if keep:
            with weights.keeping_zeros(model, [optimizer]):
                for _ in range(3):
                    step()
        else:
            step()
        return before.zeros, weights.count_zeros(model).zeros

    before, after = trained(keep=True)
    assert before == after
    before, after = trained(keep=False)
    assert after < before


def test_an_optimizer_that_was_not_named_is_found_out():
    model = tiny("llama")
    weights.prune(model, "magnitude", 0.5)
    with pytest.raises(RuntimeError, match=r"zeros were lost"), weights.keeping_zeros(model, []):
        weights.matrices(model)[0].weight.fill_(1.0)
