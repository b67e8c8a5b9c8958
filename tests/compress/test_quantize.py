import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from overparam import models
from overparam.compress import quantize
from overparam.compress.quantize import openvino, qat, rounding, systems
from overparam.studies import quantization_accuracy

TEXTS = ["In the beginning", "oil prices rose by two per cent on friday", "x", "And there was light."]


@pytest.fixture(scope="module")
def encoder():
    return models.load("tiny-bert")


@pytest.fixture(scope="module")
def decoder():
    return models.load("tiny-gemma3", causal=True)


def calibration(tokenizer):
    return [batch for _, batch in quantize.batches(tokenizer, TEXTS, batch_size=2, max_length=32)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 24, 100])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits, group_size):
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)) ** 3
    found = quantize.round_to_nearest(weight, bits, group_size=group_size)
    for start in range(0, 48, group_size):
        group, rounded = weight[:, start : start + group_size], found[:, start : start + group_size]
        step = (group.amax(1) - group.amin(1)) / (2**bits - 1)
        assert ((group - rounded).abs().amax(1) <= step / 2 + 1e-5).all()
        assert max(len(row.unique()) for row in rounded) <= 2**bits
        torch.testing.assert_close(rounded.amax(1), group.amax(1))
        torch.testing.assert_close(rounded.amin(1), group.amin(1))


def test_rounding_leaves_what_needs_no_rounding():
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(quantize.round_to_nearest(levels, 2, group_size=4), levels, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weight", "bits", "group_size"), [((4, 4), 0, 2), ((4, 4), 17, 2), ((4, 4), 4, 0), ((4,), 4, 2)]
)
def test_rounding_refuses(weight, bits, group_size):
    with pytest.raises(ValueError, match=r"1\.\.16 bits in groups of at least 1"):
        quantize.round_to_nearest(torch.zeros(weight), bits, group_size=group_size)


def test_more_bits_mean_less_error_on_random_weights(encoder):
    model = copy.deepcopy(encoder[0])
    before = {name: weight.detach().clone() for name, weight in quantize.matrices(model).items()}
    errors = []
    for bits in (2, 3, 4, 6, 8):
        with quantize.rounded(model, bits):
            weights = quantize.matrices(model)
            errors.append(
                sum((weights[name].detach() - before[name]).square().sum().item() for name in weights)
            )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]
    for name, weight in quantize.matrices(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_only_named_matrices_are_rounded(encoder):
    model = copy.deepcopy(encoder[0])
    name, *others = quantize.matrices(model)
    before = {each: quantize.matrices(model)[each].detach().clone() for each in (name, *others)}
    quantize.round_weights(model, {name: 2})
    after = quantize.matrices(model)
    assert not torch.equal(after[name], before[name])
    assert all(torch.equal(after[each], before[each]) for each in others)
    with pytest.raises(ValueError, match="'nothing' is not a matrix of the model"):
        quantize.round_weights(model, {"nothing": 4})


def test_tied_matrices_count_once(decoder):
    model = decoder[0]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names = list(quantize.matrices(model))
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1


def test_sizes_are_right_to_the_byte():
    model = nn.Sequential(nn.Linear(48, 10, bias=True), nn.LayerNorm(10))
    groups = 10 * 3  # of 48 columns in groups of 16
    assert quantize.stored_bytes(model, 4, group_size=16) == 480 * 4 // 8 + groups * 4 + (10 + 10 + 10) * 4
    assert quantize.stored_bytes(model, {}, group_size=16) == (480 + 30) * 4
    assert rounding.matrix_bits(model[0].weight, 3, 32) == 480 * 3 + 10 * 2 * 32


def test_outliers_are_the_largest_over_the_root_mean_square():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0, 1.0, -3.0]])
    assert quantize.outliers(nn.Sequential(layer))["0.weight"] == pytest.approx(3 / np.sqrt(3))


def test_bits_go_where_rounding_harms_most():
    harm = {"a": {2: 1.0, 4: 0.1, 8: 0.0}, "b": {2: 0.02, 4: 0.01, 8: 0.0}}
    size = {part: {bits: 100 * bits for bits in (2, 4, 8)} for part in "ab"}
    assert quantize.allocate_bits(harm, size, 800) == {"a": 4, "b": 4}
    assert quantize.allocate_bits(harm, size, 600) == {"a": 4, "b": 2}
    assert quantize.allocate_bits(harm, size, 1600) == {"a": 8, "b": 8}


def test_small_parts_do_not_use_up_the_room_of_a_large_one():
    harm = {"large": {3: 10.0, 4: 1.0}} | {f"small {n}": {3: 0.2, 4: 0.1, 8: 0.0} for n in range(4)}
    size = {part: {b: b * (1000 if part == "large" else 20) for b in harm[part]} for part in harm}
    chosen = quantize.allocate_bits(harm, size, 4 * 1080)
    assert chosen == {"large": 4} | {f"small {n}": 4 for n in range(4)}


@pytest.mark.parametrize("seed", range(5))
def test_allocation_equals_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    bits = (2, 3, 4, 6, 8)
    harm = {part: {b: float(rng.random() * 4.0**-b) for b in bits} for part in "abcd"}
    weights = dict(zip("abcd", rng.integers(1, 50, 4).tolist(), strict=True))
    size = {part: {b: each * b for b in bits} for part, each in weights.items()}
    budget = sum(size[part][4] for part in "abcd")
    every = [dict(zip("abcd", each, strict=True)) for each in itertools.product(bits, repeat=4)]
    able = [each for each in every if sum(size[p][b] for p, b in each.items()) <= budget]
    best = min(sum(harm[p][b] for p, b in each.items()) for each in able)
    chosen = quantize.allocate_bits(harm, size, budget)
    assert chosen in able
    assert sum(harm[p][b] for p, b in chosen.items()) == pytest.approx(best)


def test_allocation_refuses():
    with pytest.raises(ValueError, match="take 400, more than the budget of 300"):
        quantize.allocate_bits({"a": {4: 0.1}}, {"a": {4: 400}}, 300)
    with pytest.raises(ValueError, match="the same parts"):
        quantize.allocate_bits({"a": {4: 0.1}}, {"b": {4: 400}}, 300)


def test_every_scheme_of_the_parameters_is_known():
    assert {quantize.BASELINE, *quantization_accuracy.SCHEMES} == set(quantize.SCHEMES)


def test_schemes_that_cannot_run_say_why(encoder, decoder):
    def reason(name, model, decoder=False):
        return quantize.reason_against(name, model, decoder=decoder)

    assert "CUDA device" in reason("bitsandbytes-nf4", encoder[0])
    assert "compute capability 8.9" in reason("torchao-fp8", encoder[0])
    assert "groups of 128 do not divide" in reason("torchao-int4-g128", encoder[0])
    assert "weight compression" in reason("openvino-int8", decoder[0], decoder=True)
    assert "finds none in a text encoder" in reason("openvino-int4-awq", encoder[0])
    assert "compile for each length" in reason("fp32-compiled", decoder[0], decoder=True)
    assert reason("openvino-int8", encoder[0]) is None
    assert reason("torchao-int8", decoder[0], decoder=True) is None


@pytest.mark.parametrize(
    ("name", "furthest"),
    [
        ("fp32", 0.0),
        ("bf16", 0.02),
        ("fp32-compiled", 1e-5),
        ("torchao-int8", 0.02),
        ("torchao-int8-dynamic", 0.04),
        ("openvino-fp32", 1e-5),
        ("openvino-int8", 0.1),
        ("openvino-int8-weights", 0.02),
    ],
)
def test_quantized_encoders_reload_with_the_same_outputs(encoder, tmp_path, monkeypatch, name, furthest):
    compiled = torch.compile  # traced as ever, but not compiled, which takes long
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compiled(*args, **kw, backend="eager"))
    model, tokenizer = encoder
    ids, mask = (torch.from_numpy(each) for each in calibration(tokenizer)[1])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = quantize.quantize(model, name, calibration=calibration(tokenizer))
    states = found.run(ids, mask).float()
    seen = mask.bool()
    assert (states - expected)[seen].abs().mean() <= furthest
    found.save(tmp_path / "model")
    again = quantize.load(tmp_path / "model", type(model))
    torch.testing.assert_close(again.run(ids, mask).float(), states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "furthest"),
    [
        ("fp32", 1e-5),
        ("torchao-int8", 0.05),
        ("openvino-fp32", 1e-4),
        ("openvino-int8-weights", 0.05),
    ],
)
def test_quantized_decoders_read_in_steps_and_reload(decoder, tmp_path, name, furthest):
    model, _ = decoder  # its window is 16 tokens, of which 40 are read
    ids = torch.randint(4, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    found = quantize.quantize(model, name, decoder=True)

    def read(run):
        run.reset()
        return torch.cat([run(part).float() for part in (ids[:, :24], *ids[:, 24:].split(1, dim=1))], dim=1)

    logits = read(found.run)
    assert (logits - expected).abs().max() <= furthest
    torch.testing.assert_close(read(found.run), logits)
    found.save(tmp_path / "model")
    torch.testing.assert_close(read(quantize.load(tmp_path / "model", type(model), decoder=True).run), logits)


@pytest.mark.parametrize(
    ("name", "is_decoder"),
    [("openvino-int4-awq", True), ("openvino-int4-gptq", True), ("openvino-int4-gptq", False)],
)
def test_four_bits_are_chosen_by_calibration(encoder, tmp_path, name, is_decoder):
    family = "llama" if is_decoder else "bert"
    model = models.tiny_twin(
        family, num_hidden_layers=2, causal=is_decoder, hidden_size=64, intermediate_size=96
    )
    texts = calibration(encoder[1])
    ids, mask = (torch.from_numpy(each) for each in texts[1])

    def outputs(found):
        if is_decoder:
            found.run.reset()
        return found.run(ids[:1]) if is_decoder else found.run(ids, mask)

    full, plain, chosen = (
        quantize.quantize(model.eval(), each, decoder=is_decoder, calibration=texts)
        for each in ("openvino-fp32", "openvino-int4-weights", name)
    )
    expected = outputs(chosen)
    assert not torch.equal(expected, outputs(plain))
    assert (expected - outputs(full)).abs().mean() < 0.5 * outputs(full).abs().mean()
    chosen.save(tmp_path / "model")
    again = quantize.load(tmp_path / "model", type(model), decoder=is_decoder)
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-5)


def test_saved_models_appear_whole_or_not_at_all(encoder, tmp_path, monkeypatch):
    found = quantize.quantize(encoder[0], "openvino-int8-weights")

    def full(model, folder):
        (folder / "model.xml").write_text("half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(openvino, "save", full)
        with pytest.raises(OSError, match="no space"):
            found.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    found.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists already"):
        found.save(tmp_path / "model")


def test_unreadable_models_say_which_version_wrote_them(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no quantization\.json"):
        quantize.load(tmp_path, type(encoder[0]))
    for name in ("torchao-int8", "openvino-int8-weights"):
        folder = tmp_path / name
        quantize.quantize(encoder[0], name).save(folder)
        note = json.loads((folder / "quantization.json").read_text())
        (folder / "quantization.json").write_text(json.dumps(note | {"version": "0.1"}))
        for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"cannot read .*, which {note['library']} 0\.1 wrote"):
            quantize.load(folder, type(encoder[0]))


def test_what_is_quantized_already_is_refused(encoder):
    again = quantize.quantize(encoder[0], "torchao-int8").model
    with pytest.raises(ValueError, match=r"is quantized already \(torchao\): start from its full precision"):
        quantize.quantize(again, "openvino-int8-weights")


def test_exported_decoders_take_several_texts():
    model = models.tiny_twin("llama", num_hidden_layers=2, causal=True).eval()
    exported = quantize.export(model, decoder=True)
    names = {name for port in exported.inputs for name in port.get_names()}
    assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    request = openvino._compiled(exported, True).create_infer_request()
    ids = torch.randint(4, 250, (3, 5), generator=torch.Generator().manual_seed(0))
    request.infer(
        {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((3, 5), dtype=np.int64),
            "position_ids": np.tile(np.arange(5), (3, 1)),
            "beam_idx": np.arange(3, dtype=np.int32),
        }
    )
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        torch.from_numpy(request.get_tensor("logits").data.copy()), expected, rtol=1e-4, atol=1e-5
    )


def test_calibration_is_needed_for_activations(encoder):
    with pytest.raises(ValueError, match="openvino-int8 needs calibration texts"):
        quantize.quantize(encoder[0], "openvino-int8")


def test_embeddings_are_sentence_transformers(encoder):
    from overparam.compress.distill import encoders

    model, tokenizer = encoder
    reference = encoders.as_encoder(model, tokenizer, width=model.config.hidden_size, max_length=32)
    found = quantize.embed(systems.states_of(model), tokenizer, TEXTS, batch_size=2, max_length=32)
    np.testing.assert_allclose(found, encoders.outputs(reference, TEXTS), atol=1e-5)


def test_training_sees_the_weights_that_conversion_makes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    values = torch.randn(5, 32)
    aware = qat.prepare(model, 4, group_size=16).eval()
    whole = qat.convert(aware, 4, group_size=16)
    plain = qat.post_training(model, 4, group_size=16)
    torch.testing.assert_close(aware(values), whole(values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(values), whole(values), rtol=1e-4, atol=1e-5)  # nothing was trained
    assert not torch.allclose(model(values), whole(values), atol=1e-4)
    loss = aware.train()(values).square().sum()
    loss.backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in aware.parameters())


def test_training_refuses():
    with pytest.raises(ValueError, match="groups of 32 do not divide the 48 columns of 0"):
        qat.prepare(nn.Sequential(nn.Linear(48, 4)), 4)
    with pytest.raises(ValueError, match=r"bits must be in 2\.\.8, got 9"):
        qat.prepare(nn.Sequential(nn.Linear(32, 4)), 9)
