"""Schemes quantize what they say, exports compute what PyTorch computes, quality is that of every processor."""

import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from overparam import models
from overparam.compress import quantize
from overparam.compress.quantize import coverage, exporting, openvino, qat, rounding, tracing, weights
from overparam.models.proof import NotExactError, difference

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(model_type, auto=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **{**SMALL, **fields})).eval()


def gpt2(auto=AutoModelForCausalLM):
    return built("gpt2", auto)


def padded(model, lengths=(40, 9)):
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(2, max(lengths))
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, 250, (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask.long()


def in_steps(run, ids):
    run.reset()
    return torch.cat([run(part) for part in (ids[:, :24], *ids[:, 24:].split(1, dim=1))], dim=1)


class Machine:
    """OpenVINO on a machine that prefers other numbers, and what models are compiled with there."""

    def __init__(self, **preferred):
        self.preferred, self.asked = preferred, []
        self.library = openvino.library()

    def Core(self):  # noqa: N802
        core = self.library.Core()
        core.set_property("CPU", self.preferred)

        def compile_model(model, device, settings):
            self.asked.append(settings)
            return core.compile_model(model, device, settings)

        return types.SimpleNamespace(compile_model=compile_model, read_model=core.read_model)


@pytest.mark.parametrize("scheme", ["openvino-fp32", "openvino-int8-weights"])
def test_quality_does_not_move_with_what_a_machine_prefers(tmp_path, monkeypatch, scheme):
    model = models.tiny_twin("llama", num_hidden_layers=2, causal=True)
    ids = padded(model)[0][:1]
    found = quantize.quantize(model, scheme, decoder=True)
    expected = in_steps(found.run, ids)
    found.save(tmp_path / "model")
    machine = Machine(
        INFERENCE_PRECISION_HINT="bf16", KV_CACHE_PRECISION="u8", DYNAMIC_QUANTIZATION_GROUP_SIZE="32"
    )
    monkeypatch.setattr(openvino, "library", lambda: types.SimpleNamespace(Core=machine.Core))
    again = quantize.load(tmp_path / "model", type(model), decoder=True)
    assert difference(in_steps(again.run, ids), expected) < 1e-5
    assert openvino.EXACT.items() <= machine.asked[-1].items()
    assert again.precision == found.precision == openvino.Precision("float32", "float32")
    fast = again.fastest()
    assert fast.precision.cache_in == "8 bits"
    assert difference(in_steps(fast.run, ids), expected) > 1e-4  # keys and values in 8 bits show


def test_precisions_of_torch_are_those_of_the_weights():
    model = models.tiny_twin("llama", num_hidden_layers=2, causal=True)
    assert quantize.quantize(model, "fp32", decoder=True).precision == openvino.Precision(
        "float32", "float32"
    )
    halved = quantize.quantize(model, "bf16", decoder=True)
    assert halved.precision == openvino.Precision("bfloat16", "bfloat16")
    assert halved.fastest() is halved


def test_weights_are_known_by_what_they_do():
    def columns(model):
        return {w.name: w.columns for w in weights.weights(model) if w.role == "matrix"}

    mixtral, gpt_oss = (
        models.tiny_twin(each, num_hidden_layers=1, causal=True) for each in ("mixtral", "gpt_oss")
    )
    assert columns(mixtral)["model.layers.0.mlp.experts.gate_up_proj"] == (2,)
    assert columns(gpt_oss)["model.layers.0.mlp.experts.gate_up_proj"] == (1,)
    assert columns(gpt_oss)["model.layers.0.self_attn.q_proj.weight"] == (1,)
    assert columns(gpt2())["transformer.h.0.mlp.c_fc.weight"] == (0,)
    tables = [w.name for w in weights.weights(gpt2()) if w.role == "table"]
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert weights.routers(mixtral) == {"model.layers.0.mlp.gate.weight"}
    shared = models.tiny_twin("qwen2_moe", num_hidden_layers=1, mlp_only_layers=[], causal=True)
    assert weights.routers(shared) == {"model.layers.0.mlp.gate.weight"}


def test_stacks_of_experts_and_transposed_layers_are_rounded_along_their_inputs():
    for model, name, transposed in (
        (
            models.tiny_twin("mixtral", num_hidden_layers=1, causal=True),
            "model.layers.0.mlp.experts.down_proj",
            False,
        ),
        (
            models.tiny_twin("gpt_oss", num_hidden_layers=1, causal=True),
            "model.layers.0.mlp.experts.down_proj",
            True,
        ),
        (gpt2(), "transformer.h.0.mlp.c_proj.weight", True),
    ):
        before = dict(model.named_parameters())[name].detach().clone()
        size = rounding.sizes(model, 2, group_size=16)[name]
        stored = quantize.stored_bytes(model, 2, group_size=16)
        quantize.round_weights(model, 2, group_size=16)
        after = dict(model.named_parameters())[name].detach()
        stack = before if before.ndim == 3 else before[None]
        for number, matrix in enumerate(stack):
            rows = matrix.T if transposed else matrix
            expected = quantize.round_to_nearest(rows, 2, group_size=16)
            found = after[number] if after.ndim == 3 else after
            torch.testing.assert_close(found, expected.T if transposed else expected, rtol=0, atol=0)
        groups = before.numel() // 16
        assert size == before.numel() * 2 + groups * 32
        every = sum(w.parameter.numel() for w in weights.weights(model))
        assert (
            sum(each.numel() for each in quantize.matrices(model).values()) > 0.97 * every
        )  # biases are not
        assert stored < 0.2 * sum(4 * each.numel() for each in model.parameters())


@pytest.mark.parametrize("scheme", ["torchao-int8", "torchao-int8-dynamic"])
@pytest.mark.parametrize(
    ("make", "where"),
    [
        (
            lambda: models.tiny_twin("mixtral", causal=True),
            r"MixtralExperts \(model\.layers\.\d\.mlp\.experts",
        ),
        (lambda: models.tiny_twin("gpt_oss", causal=True), "GptOssExperts"),
        (gpt2, r"Conv1D \(transformer\.h\.0"),
    ],
)
def test_a_scheme_that_does_not_reach_the_weights_is_refused(make, where, scheme):
    model = make()
    reason = quantize.reason_against(scheme, model, decoder=True)
    assert type(model).__name__ in reason
    with pytest.raises(ValueError, match=where):
        quantize.quantize(model, scheme, decoder=True)
    with pytest.raises(NotExactError, match=where):
        qat.prepare(model, 4, group_size=16)
    blocks = next(each for each in model.modules() if isinstance(each, nn.ModuleList))
    with pytest.raises(NotExactError, match=r"% of the weights .* of ModuleList are not in linear layers"):
        qat.post_training(blocks, 4, group_size=16)


def test_weights_in_a_class_nobody_has_heard_of_are_refused():
    class Odd(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.kernel = nn.Parameter(layer.weight.detach().T.clone())

        def forward(self, states):
            return torch.einsum("bti,io->bto", states, self.kernel)

    model = models.tiny_twin("bert", num_hidden_layers=3)
    for layer in model.encoder.layer:
        layer.intermediate.dense = Odd(layer.intermediate.dense)
    reason = quantize.reason_against("torchao-int8", model, decoder=False)
    assert "% of the weights between the embedding tables of BertModel are not in linear layers" in reason
    assert "Odd (encoder.layer.0.intermediate.dense.kernel)" in reason
    with pytest.raises(NotExactError, match="Odd"):
        qat.post_training(model, 8, group_size=16)
    assert "encoder.layer.0.intermediate.dense.kernel" in quantize.matrices(model)


def test_coverage_is_measured_and_saved(tmp_path):
    model = models.tiny_twin("llama", num_hidden_layers=2, causal=True)
    total = sum(w.parameter.numel() for w in weights.weights(model))
    tables = 2 * model.get_input_embeddings().weight.numel()
    found = quantize.quantize(model, "torchao-int8", decoder=True)
    assert found.coverage.quantized == pytest.approx(1 - tables / total)
    assert found.coverage.shares == pytest.approx({8: 1 - tables / total, 32: tables / total})
    assert found.coverage.left == pytest.approx({"table": tables / 2 / total, "head": tables / 2 / total})
    found.save(tmp_path / "model")
    again = quantize.load(tmp_path / "model", type(model), decoder=True)
    assert again.coverage == found.coverage
    everything = quantize.quantize(model, "openvino-int8-weights", decoder=True)
    assert everything.coverage.shares == {8: pytest.approx(1)}
    with pytest.raises(ValueError, match="no matrices and no embedding tables"):
        quantize.round_weights(nn.LayerNorm(4), 4)


def test_weights_that_are_left_are_an_error_that_names_them():
    model = models.tiny_twin("llama", num_hidden_layers=2, causal=True)
    held = [coverage.Held("a", 90, 8, "matrix"), coverage.Held("b", 10, 32, "matrix")]
    with pytest.raises(
        NotExactError, match=r"leaves 10 % of the matrices of LlamaForCausalLM in more than 8 bits: b"
    ):
        coverage.checked(held, quantize.SCHEMES["torchao-int8"], model)
    same = [coverage.Held("a", 90, 32, "table"), coverage.Held("gate", 10, 32, "router")]
    with pytest.raises(NotExactError, match="changed no weight of LlamaForCausalLM"):
        coverage.checked(same, quantize.SCHEMES["torchao-int8"], model)
    odd = [coverage.Held("a", 60, 8, "matrix"), coverage.Held("odd", 40, 32, "other")]
    with pytest.raises(NotExactError, match="40 % of the weights of LlamaForCausalLM are in odd"):
        coverage.checked(odd, quantize.SCHEMES["torchao-int8"], model)
    halved = model.to(torch.bfloat16)
    assert "in bfloat16 already" in quantize.reason_against("bf16", halved, decoder=True)


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "starcoder2", "gpt2"])
def test_exported_decoders_keep_their_window(model_type):
    fields = {} if model_type == "gpt2" else {"sliding_window": 16, "num_key_value_heads": 2}
    model = built(model_type, **fields)
    ids, mask = padded(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
    found = quantize.quantize(model, "openvino-fp32", decoder=True)
    torch.testing.assert_close(in_steps(found.run, ids[:1]), expected[:1], rtol=1e-3, atol=1e-5)
    read = found.run.batch(ids, mask)
    torch.testing.assert_close(read[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "qwen3", "gpt2"])
def test_exported_encoders_give_the_states_of_padded_texts(model_type):
    model = gpt2(AutoModel) if model_type == "gpt2" else models.tiny_twin(model_type)
    ids, mask = padded(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = quantize.quantize(model, "openvino-fp32").run(ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-5)
    assert found.isfinite().all()


def test_a_model_in_bfloat16_is_exported_as_it_is():
    model = models.tiny_twin("bert").to(torch.bfloat16)
    ids, mask = padded(model)
    found = quantize.quantize(model, "openvino-fp32").run(ids, mask)
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = model.float()(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-5)


def test_models_that_cannot_be_exported_are_refused_by_name():
    mixtral = models.tiny_twin("mixtral", causal=True)
    reason = quantize.reason_against("openvino-int8-weights", mixtral, decoder=True)
    assert reason.startswith("MixtralForCausalLM cannot be exported to OpenVINO: ")
    assert "aten::histc" in reason
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    long = built("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    reason = quantize.reason_against("openvino-fp32", long, decoder=True)
    assert "Phi3ForCausalLM is not exported" in reason
    assert "longrope" in reason


@pytest.mark.parametrize("window", [16, 4096])
def test_a_lost_window_is_refused(monkeypatch, window):
    model = built("mistral", sliding_window=window, num_key_value_heads=2, num_hidden_layers=1)
    monkeypatch.setattr(exporting, "_proved", set())
    name = "create_sliding_window_causal_mask"
    monkeypatch.setitem(tracing._MASKS, name, tracing._MASKS["create_causal_mask"])
    with pytest.raises(NotExactError, match="MistralForCausalLM is not exported to OpenVINO: its outputs"):
        quantize.export(model, decoder=True)
    assert model.config.sliding_window == window


def test_an_export_is_proved_once(monkeypatch):
    model = models.tiny_twin("bert", num_hidden_layers=1)
    monkeypatch.setattr(exporting, "_proved", set())
    quantize.export(model, decoder=False)
    monkeypatch.setattr(exporting, "_prove", lambda *_: pytest.fail("proved again"))
    quantize.export(model, decoder=False)


def test_a_model_in_training_is_quantized_without_dropout_and_stays_in_training():
    model = models.tiny_twin("bert")
    ids, mask = padded(model)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    model.train()
    for scheme in ("fp32", "bf16", "openvino-fp32"):
        assert quantize.reason_against(scheme, model, decoder=False) is None
        found = quantize.quantize(model, scheme).run(ids, mask)
        assert difference(found.float(), expected, mask) < (5e-2 if scheme == "bf16" else 1e-4)
    assert all(module.training for module in model.modules())


def test_a_quantized_model_is_not_quantized_or_rounded_again():
    model = quantize.quantize(models.tiny_twin("bert"), "torchao-int8").model
    for scheme in ("fp32", "torchao-int8", "openvino-fp32"):
        reason = quantize.reason_against(scheme, model, decoder=False)
        assert reason is not None
        assert "is quantized already (torchao)" in reason
    for tried in (
        quantize.matrices,
        lambda m: quantize.round_weights(m, 4),
        lambda m: quantize.stored_bytes(m, 4),
    ):
        with pytest.raises(ValueError, match="is quantized already"):
            tried(model)


def test_bits_that_cannot_be_are_refused_before_any_matrix_is_rounded():
    model = models.tiny_twin("bert")
    first, second, *_ = quantize.matrices(model)
    before = quantize.matrices(model)[first].detach().clone()
    with pytest.raises(ValueError, match="got 17"):
        quantize.round_weights(model, {first: 3, second: 17})
    assert torch.equal(quantize.matrices(model)[first], before)


def test_layers_that_multiply_in_a_way_of_their_own_are_tried_before_long_work():
    model = models.tiny_twin("falcon", causal=True)
    reason = quantize.reason_against("torchao-int8", model, decoder=True)
    assert reason is not None
    assert reason.startswith("FalconLinear multiplies in a special way, which torchao does not support")
    assert (
        quantize.reason_against("torchao-int8", models.tiny_twin("llama", causal=True), decoder=True) is None
    )


def test_weights_that_are_not_seen_to_be_multiplied_are_not_passed_over():
    model = models.tiny_twin("zamba", causal=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        NotExactError, match="20 % of the weights of ZambaForCausalLM are not seen to be multiplied"
    ):
        quantize.round_weights(model, 2)
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
