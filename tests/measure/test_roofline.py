import pandas as pd
import pytest
import torch
from torch import nn

from overparam import models
from overparam.measure import roofline
from overparam.measure.roofline import Machine, Work

HERE = Machine({"float32": 100.0, "bfloat16": 400.0}, 10.0, 1)


def linear_work(model, tokens):
    return sum(
        2 * m.in_features * m.out_features * tokens for m in model.modules() if isinstance(m, nn.Linear)
    )


def test_the_bound_is_set_by_operations_or_by_bytes():
    assert roofline.bound(Work(1000, 20, 0), HERE, "float32") == 10
    assert roofline.bound(Work(1000, 150, 50), HERE, "float32") == 20
    assert roofline.bound(Work(8000, 20, 0), HERE, "best") == 20
    assert HERE.balance("bfloat16") == 40
    emulated = Machine({"float32": 100.0, "bfloat16": 2.0}, 10.0, 1)
    assert roofline.bound(Work(1000, 20, 0), emulated, "bfloat16") == 10
    assert Work(1000, 150, 50).intensity == 5


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 16)])
def test_work_of_an_encoder_is_that_of_its_layers_and_of_attention(batch, length):
    model, _ = models.load("tiny-bert")
    config, tokens = model.config, batch * length
    pooler = linear_work(model.pooler, 1) * (tokens - batch) if getattr(model, "pooler", None) else 0
    attention = 4 * config.num_hidden_layers * batch * length**2 * config.hidden_size
    found = roofline.work(model, batch, length)
    assert found.flops == linear_work(model, tokens) - pooler + attention
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    assert found.weight_bytes == 4 * (sum(p.numel() for p in model.parameters()) - tables)


def test_a_token_reads_all_weights_and_what_was_kept():
    model, _ = models.load("tiny-llama", causal=True)
    config, context = model.config, 12
    found = roofline.work(model, 1, 1, context=context)
    heads = config.num_attention_heads * config.head_dim
    scores = 4 * config.num_hidden_layers * heads * (context + 1)
    assert found.flops == linear_work(model, 1) + scores
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (context + 1)
    read = 0 if config.tie_word_embeddings else config.hidden_size
    assert found.other_bytes == 4 * (kept + config.vocab_size + read)
    assert roofline.work(model, 1, 1, context=context, bits=8).weight_bytes == found.weight_bytes / 4


def test_only_the_last_token_of_a_prompt_goes_through_the_head():
    model, _ = models.load("tiny-llama", causal=True)
    head = 2 * model.config.hidden_size * model.config.vocab_size
    base, _ = models.load("tiny-llama")
    assert roofline.work(model, 1, 9).flops == roofline.work(base, 1, 9).flops + head


def test_bad_work_is_refused():
    model, _ = models.load("tiny-qwen3_moe", causal=True)
    with pytest.raises(ValueError, match="mixture of experts"):
        roofline.work(model, 1, 4)
    with pytest.raises(ValueError, match="at least 1"):
        roofline.work(models.load("tiny-bert")[0], 0, 4)


def test_limits_are_the_best_of_all_tries():
    table = roofline.measured(("float32", "int8"), (1,), sizes=(32, 64), copied_bytes=2**20, repeats=3)
    found = roofline.limits(table, 1)
    own = table[table["what"] == "float32"]
    assert found.peaks["float32"] == own["best"].max()
    assert (table["best"] >= table["median"]).all()
    assert found.bandwidth == table.loc[table["unit"] == "byte/s", "best"].max()


def test_a_dtype_that_cannot_be_multiplied_has_a_reason_and_no_limit(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such product")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    table = roofline.measured(("float32", "int8"), (1,), sizes=(16,), copied_bytes=2**20, repeats=2)
    assert table.set_index("what").loc["int8", "reason"] == "no such product"
    assert pd.isna(table.set_index("what").loc["int8", "best"])
    assert "int8" not in roofline.limits(table, 1).peaks


def test_arrays_that_do_not_fit_are_refused_before_they_are_made():
    with pytest.raises(MemoryError, match="copy a smaller one"):
        roofline.measured((), (1,), copied_bytes=2**50)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with roofline.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_caches_are_read_as_the_system_writes_them(monkeypatch, tmp_path):
    for number, size in enumerate(("32K", "1M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(roofline, "_CACHES", tmp_path)
    assert roofline.largest_cache() == 2**20
    monkeypatch.setattr(roofline, "_CACHES", tmp_path / "none")
    assert roofline.largest_cache() == 0
