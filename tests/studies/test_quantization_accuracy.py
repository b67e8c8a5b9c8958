import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from overparam import models
from overparam.compress import quantize
from overparam.experiment.subjects.decoder import Decoder
from overparam.record import stats
from overparam.studies.quantization_accuracy import Params, bits, costs, plots, quality, training, verdicts
from overparam.studies.quantization_accuracy import study as steps

SMALL = {
    "model": "tiny-bert",
    "schemes": ["torchao-int8", "torchao-int4-g32", "openvino-int8"],
    "max_length": 32,
    "calibration_texts": 8,
    "suite": ["LeeSTS", "VersePairs"],
    "suite_items": 20,
    "bits": [8, 4, 2],
    "group_size": 16,
    "probe_texts": 8,
    "mixed_bits": [4],
    "labelled": 64,
    "test_items": 20,
    "characters": 64,
    "train_steps": 2,
    "qat_steps": 2,
    "train_batch_size": 8,
    "qat_bits": [4, 2],
    "train_seeds": [1, 2],
    "cost_texts": 4,
    "cost_repeats": 3,
}
DECODER = SMALL | {
    "model": "tiny-gemma3",
    "schemes": ["torchao-int8", "openvino-int8-weights"],
    "languages": ["en", "fr"],
    "likelihood_texts": 4,
    "context_lengths": [128, 320],
    "context_windows": 1,
    "translated_items": 2,
    "new_tokens": 3,
    "bits": [8, 2],
    "mixed_bits": [8],
    "cost_tokens": 4,
}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))

    def start(**changes):
        return steps.start(Params(**{**SMALL, **changes}))

    return start


def test_an_encoder_from_end_to_end(begin):
    study = begin()
    assert study.running == ["fp32", "torchao-int8", "openvino-int8"]
    assert "do not divide" in study.schemes.set_index("scheme").loc["torchao-int4-g32", "not_run"]
    found = quality.measure(study)
    table = found.table.set_index("scheme")
    assert table.loc["fp32", ["kept", "cosine_to_fp32"]].tolist() == pytest.approx([100, 1])
    assert set(found.kept) == {"torchao-int8", "openvino-int8"}
    sensitive = bits.sensitivity(study)
    assert len(sensitive) == 3 * len(bits.parts(study.model))
    harm = sensitive.groupby("bits")["divergence"].sum()
    assert harm[2] > harm[4] > harm[8]
    curve = bits.curve(study, sensitive)
    by_setting = curve.table.set_index("setting")
    assert by_setting.loc["mixed, size of 4 bits", "bytes"] <= by_setting.loc["4 bits", "bytes"]
    trained = training.train(study)
    assert set(trained.table["bits"]) == {32, 4, 2}
    full = trained.table[trained.table["way"] == training.FULL]
    assert full["kept"].tolist() == [100.0]
    assert full["flipped"].tolist() == [0.0]
    by_scheme, faster = costs.costs(study)
    sizes = by_scheme.set_index("scheme")["disk_bytes"]
    assert sizes["torchao-int8"] < sizes["fp32"]
    assert (by_scheme["resident_bytes"] > 0).all()
    shares = steps.as_quantized(study).set_index("scheme")["quantized_share"]
    assert shares["openvino-int8"] == pytest.approx(100)
    assert shares["torchao-int8"] == pytest.approx(64, abs=1)  # embedding tables stay
    assert set(steps.as_quantized(study)["computes_in"]) == {"float32"}
    assert by_scheme["computes_in"].str.startswith(("float32", "bfloat16")).all()
    claims = verdicts.verdicts(study, found, curve, trained, by_scheme, faster)
    ids = {claim.id for claim in claims}
    assert {"quantization-8-bits-torchao-int8", "quantization-speed", "quantization-mixed-4"} <= ids
    record = study.finish()
    assert {"kept_torchao-int8", "speed_up_openvino-int8", "disk_share_torchao-int8"} <= set(record.metrics)


def test_a_decoder_from_end_to_end(begin):
    study = begin(**DECODER)
    assert study.decoder
    trained = training.train(study)
    by_way = trained.table.set_index(["bits", "way"])
    assert by_way.loc[(32, training.FULL), ["kept", "flipped"]].tolist() == [100, 0]
    assert by_way.loc[(2, training.AFTER), "perplexity"] > by_way.loc[(4, training.AFTER), "perplexity"]
    assert set(trained.after) == {4, 2}
    found = quality.measure(study)
    table = found.table.set_index(["scheme", "view"])
    views = {"verses, en", "verses, fr", "news, en", "context of 128", "context of 320", "all texts"}
    assert views <= set(found.table["view"])
    assert table.loc[("fp32", "verses, en"), ["of_fp32", "kl_to_fp32", "flipped_tokens"]].tolist() == [
        100,
        0,
        0,
    ]
    assert table.loc[("torchao-int8", "verses, en"), "kl_to_fp32"] > 0
    sensitive = bits.sensitivity(study)
    curve = bits.curve(study, sensitive)
    by_scheme, faster = costs.costs(study)
    verdicts.verdicts(study, found, curve, trained, by_scheme, faster)
    study.finish()


def test_schemes_that_do_not_reach_experts_are_listed_before_long_work(begin, tmp_path):
    folder = tmp_path / "mixtral"
    models.tiny_twin("mixtral", num_hidden_layers=2, causal=True).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    study = begin(
        **DECODER | {"model": str(folder), "schemes": ["bf16", "torchao-int8", "openvino-int8-weights"]}
    )
    assert study.running == ["fp32", "bf16"]
    reasons = study.schemes.set_index("scheme")["not_run"]
    assert "MixtralExperts" in reasons["torchao-int8"]
    assert reasons["openvino-int8-weights"].startswith("MixtralForCausalLM cannot be exported")
    assert "ModuleList are not in linear layers but in MixtralExperts" in study.not_trained
    trained = training.train(study)
    assert trained.table.empty
    assert plots.plot_training(study, trained) is None
    as_quantized = steps.as_quantized(study).set_index("scheme")
    assert as_quantized.loc["bf16", ["computes_in", "cache_in", "quantized_share"]].tolist() == [
        "bfloat16",
        "bfloat16",
        100,
    ]
    parts = bits.parts(study.model)
    assert "model.layers.0.mlp.experts.down_proj" in parts["block 1, feed-forward"]
    claims = verdicts._against(
        study, quality.Quality(pd.DataFrame(), {}), trained, pd.DataFrame({"scheme": []})
    )
    assert "MixtralExperts" in next(claim for claim in claims if claim.id == "quantization-flips").note


def test_perplexity_after_a_context_is_that_of_the_whole_text(begin):
    study = begin(**DECODER)
    ids = list(range(4, 4 + 200))
    run = quantize.steps_of(study.model)
    items = study.subject.last_nats(run, ids, quality.SCORED)
    with torch.inference_mode():
        logits = study.model(input_ids=torch.tensor([ids])).logits[0, -quality.SCORED - 1 : -1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-quality.SCORED :]), reduction="none")
    assert items.shape == (quality.SCORED, 2)
    assert (items[:, 1] == 1).all()
    np.testing.assert_allclose(items[:, 0], losses, rtol=1e-4)


def test_parts_hold_every_matrix_once(begin):
    study = begin()
    parts = bits.parts(study.model)
    names = [name for several in parts.values() for name in several]
    assert sorted(names) == sorted(quantize.matrices(study.model))
    assert next(iter(parts)) == bits.EMBEDDINGS
    assert sum(part.endswith("attention") for part in parts) == 6
    assert len(parts["block 1, attention"]) == 4
    assert len(parts["block 1, feed-forward"]) == 2


def test_the_gap_closed_is_a_ratio_of_differences():
    rng = np.random.default_rng(0)
    hits = {
        name: (rng.random((400, 1)) < p).astype(float)
        for name, p in (("full", 0.9), ("plain", 0.5), ("aware", 0.8))
    }
    none = np.zeros(400, dtype=int)
    found = training.gap_closed(*({"a": [training.Outcome(each, none, none)]} for each in hits.values()))
    mean = {name: each.mean() for name, each in hits.items()}
    assert found.value == pytest.approx((mean["aware"] - mean["plain"]) / (mean["full"] - mean["plain"]))
    assert found.low < found.value < found.high


def test_mixed_bits_take_no_more_room():
    rows = [
        {"part": part, "bits": b, "size_bits": 10 * b, "divergence": harm / b**2}
        for part, harm in (("a", 8.0), ("b", 0.1))
        for b in (2, 4, 8)
    ]
    assert bits.allocated(pd.DataFrame(rows), 4) == {"a": 4, "b": 4}
    chosen = bits.allocated(
        pd.DataFrame([*rows, *({**row, "part": "c", "divergence": 0.0} for row in rows[:3])]), 4
    )
    assert sum(chosen.values()) <= 12
    assert chosen["a"] == 8 or chosen["a"] == 4


def test_the_rise_of_the_perplexity_is_what_is_not_kept():
    base = np.column_stack([np.full(8, 10.0), np.full(8, 5.0)])
    worse = base * [1.1, 1]
    kept = Decoder.kept(None, [{"a": training.Outcome(base)}], [{"a": training.Outcome(worse)}])
    assert kept.value == pytest.approx(100 * (2 - np.exp(0.2)))
    assert isinstance(kept, stats.Estimate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": ["int5"]}, "schemes must be among"),
        ({"schemes": ["bf16", "bf16"]}, "schemes repeat"),
        ({"mixed_bits": [5]}, "mixed_bits must be among"),
        ({"context_lengths": [512, 256]}, "context_lengths must increase"),
        ({"context_lengths": [64]}, "greater than or equal to 128"),
        ({"bits": [9, 4]}, "less than or equal to 8"),
        ({"nothing": 1}, "Extra inputs are not permitted"),
    ],
)
def test_parameters_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Params(**{**SMALL, **changes})
