import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from overparam.models import packed, published_shapes, shape_costs, shapes

IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize("name", published_shapes.SHAPES)
def test_shapes_have_as_many_parameters_as_published(name):
    assert shapes.parameters(name) / 1e9 == pytest.approx(published_shapes.SHAPES[name].billions, rel=0.01)


def test_a_shape_cut_to_some_layers_says_how_many_there_are():
    cut = published_shapes.shape("Llama-3-70B, 16 layers")
    whole = {**cut.fields, "num_hidden_layers": 80}
    a_layer = (
        shapes.parameters("Llama-3-70B, 16 layers") - shapes.parameters("Llama-3-70B, 16 layers", layers=8)
    ) / 8
    total = shapes.parameters("Llama-3-70B, 16 layers") + 64 * a_layer
    assert cut.published_layers == whole["num_hidden_layers"]
    assert total / 1e9 == pytest.approx(70.55, rel=0.001)


@pytest.mark.parametrize("name", published_shapes.SHAPES)
def test_random_weights_are_written_everywhere_and_compute(name):
    model = shapes.build(f"tiny-{name}", dtype=torch.float32)
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter.abs().sum() > 0, key
        if parameter.ndim > 1 and min(parameter.shape) > 1 and "norm" not in key:
            rows = parameter.flatten(0, -2)
            assert len(torch.unique(rows, dim=0)) == len(rows), key
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_built_model_computes_what_one_with_its_weights_computes():
    model = shapes.build("tiny-Llama-3-8B", dtype=torch.float32)
    other = type(model)(model.config).eval()  # buffers as transformers makes them
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_tied_tables_are_one():
    model = shapes.build("tiny-Qwen3-0.6B")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers": 17}, "layers of OLMoE-1B-7B must be in 1..16, got 17"),
        ({"layers": 0}, "in 1..16, got 0"),
        ({"experts": 7}, "experts of OLMoE-1B-7B must be in 8..64, got 7"),
    ],
)
def test_layers_and_experts_that_are_not_there_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        shapes.config("OLMoE-1B-7B", **kept)


def test_unknown_shapes_and_experts_of_a_dense_model_are_refused():
    with pytest.raises(ValueError, match="did you mean 'Llama-3-8B'"):
        shapes.config("Llama-3-8")
    with pytest.raises(ValueError, match="has no experts"):
        shapes.config("Llama-3-8B", experts=4)


def test_fewer_experts_are_fewer_parameters():
    whole, quarter = (shapes.parameters("OLMoE-1B-7B", experts=n) for n in (64, 16))
    assert whole - quarter == 16 * 48 * (3 * 2048 * 1024 + 2048)  # gate, up, down, and a row of the router


def test_what_does_not_fit_is_refused_with_the_memory_that_it_needs(monkeypatch):
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2**30)
    assert (
        shapes.reason_against("Llama-3-8B", torch.bfloat16) == "needs 17.2 GiB in bfloat16, 1.0 GiB are free"
    )
    with pytest.raises(MemoryError, match=r"Llama-3-8B needs 17.2 GiB"):
        shapes.build("Llama-3-8B")
    with pytest.raises(MemoryError, match=r"GPT-OSS-20B needs"):
        shape_costs.resident("GPT-OSS-20B", [8, 32], by="experts", dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_packed_layers_multiply_with_their_rounded_weights(bits, rows):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).to(torch.bfloat16)
    x = torch.randn(rows, 64).to(torch.bfloat16)
    weight = linear.weight.detach().double()
    if bits == 8:
        scale = (weight.abs().amax(1) / 127)[:, None]
        rounded = (weight / scale).round() * scale
    else:
        groups = weight.view(96, -1, packed.GROUP)
        low, step = (
            groups.amin(-1, keepdim=True),
            (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15,
        )
        rounded = (((groups - low) / step).round() * step + low).view(96, 64)
    expected = x.double() @ rounded.T + linear.bias.detach().double()
    with torch.no_grad():
        found = packed.PackedLinear(linear, bits)(x).double()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_packing_counts_the_bytes_that_a_token_reads():
    model = shapes.build("tiny-Llama-3-8B")
    count = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    rows = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert packed.pack(model, 8) == count + 2 * rows
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


def test_bits_without_a_kernel_are_refused():
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        packed.PackedLinear(nn.Linear(64, 64), 3)
    with pytest.raises(ValueError, match="do not divide 40 columns"):
        packed.PackedLinear(nn.Linear(40, 64), 4)


def times(seconds_of):
    return pd.DataFrame(
        [{"layers": n, "round": r, "seconds": seconds_of(n)} for n in (4, 8, 16) for r in range(5)]
    )


def test_slope_is_one_in_proportion_and_less_with_a_constant():
    assert shape_costs.slope(times(lambda n: 0.2 * n)) == pytest.approx([1.0] * 5)
    assert shape_costs.slope(times(lambda n: 0.2 * n + 1.6)) == pytest.approx([3.2 / 4.8] * 5)
    assert shape_costs.extrapolated(times(lambda n: 0.2 * n + 1.6), 80) == pytest.approx(17.6)


def test_kept_layers_end_with_all():
    assert shape_costs.kept_layers("Llama-3.2-1B", (0.25, 0.5)) == [4, 8, 16]


def test_time_by_layers_and_bits_has_a_row_a_round():
    found = shape_costs.time_by_layers("tiny-Mistral-7B", [1, 4], dtype=torch.float32, tokens=8, repeats=3)
    assert found.groupby("layers").size().to_dict() == {1: 3, 4: 3}
    assert (np.diff(found.groupby("layers")["weight_bytes"].first()) > 0).all()
    speeds = shape_costs.speed_by_bits("tiny-Llama-3.2-1B", (8, 4), prompt=6, repeats=2)
    ran = speeds[speeds["reason"] == ""]
    assert {16, 8} <= set(ran["bits"])
    assert set(ran["phase"]) == {"prompt", "token"}
