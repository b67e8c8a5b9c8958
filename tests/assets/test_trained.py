import json

import pytest
import torch

from overparam import models
from overparam.assets import trained

NAME = "moe-translator"


def save(folder, seed=0):
    model = models.tiny_twin("qwen3_moe", causal=True, seed=seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return model


def record(folder, started):
    (folder / "record.json").write_text(json.dumps({"started": started}))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.delenv("OVERPARAM_MOE_TRANSLATOR", raising=False)
    monkeypatch.setattr(trained, "RESULTS", tmp_path)
    return tmp_path / "moe_pretraining"


def test_the_newest_finished_record_is_loaded_as_float32(results):
    weights = {}
    for seed, (name, started) in enumerate({"a": "2026-01-02", "b": "2026-01-01", "c": "2026-01-03"}.items()):
        weights[name] = save(results / f"{NAME}-{name * 8}", seed=seed).lm_head.weight
        if name != "c":
            record(results / f"{NAME}-{name * 8}", started)
    (results / f"{NAME}-{'d' * 8}.failed").mkdir()
    record(results / f"{NAME}-{'d' * 8}.failed", "2026-01-04")
    (results / f"{NAME}-without-sinks-{'e' * 8}").mkdir()  # another model
    record(results / f"{NAME}-without-sinks-{'e' * 8}", "2026-01-05")
    model, tokenizer = models.load(NAME, causal=True)
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, weights["a"].float())
    assert tokenizer.eos_token_id is not None
    assert models.provenance(NAME) == models.provenance(str(results / f"{NAME}-aaaaaaaa"))
    assert models.required_memory(NAME) > 0
    (digest,) = trained.hashes(NAME).values()
    assert digest in models.provenance(NAME).values()


def test_without_a_record_the_error_says_how_to_make_one(results):
    with pytest.raises(FileNotFoundError, match=r"run_all\.py --profile reference --only moe_pretraining"):
        models.load(NAME, causal=True)
    assert trained.hashes(NAME) == {}


def test_a_folder_may_be_named(results, tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_MOE_TRANSLATOR", str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match=r"OVERPARAM_MOE_TRANSLATOR .*not a folder with a model"):
        models.load(NAME)
    expected = save(tmp_path / "model")
    assert torch.equal(models.load(NAME, causal=True)[0].lm_head.weight, expected.lm_head.weight.float())
