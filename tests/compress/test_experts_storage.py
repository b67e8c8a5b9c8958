import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from overparam import models
from overparam.compress import experts

IDS = torch.arange(3, 35).reshape(2, 16)
COUNTS = [3, 7, 2, 8]


def pruned(name, *, uniform, causal=True):
    groups = {"n_group": 1, "topk_group": 1} if name == "deepseek_v3" else {}
    model = models.tiny_twin(name, causal=causal, **groups)
    counts = [4] * 4 if uniform else COUNTS
    keep = [list(range(8 - count, 8)) for count, _ in zip(counts, experts.layers(model), strict=False)]
    return experts.prune(model, keep)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_reload_is_exact(name, uniform, tmp_path):
    model = pruned(name, uniform=uniform)
    folder = experts.save_pruned(model, tmp_path / "pruned")
    again = experts.load_pruned(folder)
    assert type(again) is type(model)
    assert not again.training
    assert again.config.model_type == name
    state, expected = again.state_dict(), model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(logits(again), logits(model))
    assert [layer.n_experts for layer in experts.layers(again)] == [
        layer.n_experts for layer in experts.layers(model)
    ]
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(IDS, **arguments), model.generate(IDS, **arguments))
    second = experts.load_pruned(experts.save_pruned(again, tmp_path / "again"))
    assert torch.equal(logits(second), logits(model))
    assert names(tmp_path / "again") == names(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "pruned"]


@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_uniform_folders_are_ordinary_checkpoints(name, tmp_path):
    model = pruned(name, uniform=True)
    folder = experts.save_pruned(model, tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(again), logits(model))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == name
    assert config["overparam_expert_format"] == 1
    assert "per_layer_config" not in config


def test_qwen3_folders_say_the_count_for_older_readers_too(tmp_path):
    folder = experts.save_pruned(pruned("qwen3_moe", uniform=True), tmp_path / "pruned")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 4


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_no_other_loader_reads_layers_that_differ(name, ignore, tmp_path):
    model = pruned(name, uniform=False)
    folder = experts.save_pruned(model, tmp_path / "pruned")
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"overparam_pruned_{name}"):
            auto.from_pretrained(folder, ignore_mismatched_sizes=ignore)
    with pytest.raises(ValueError, match=f"overparam_pruned_{name}"):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        type(model).from_pretrained(folder, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_folders_of_differing_layers_list_their_counts_under_the_names_of_the_architecture(name, tmp_path):
    model = pruned(name, uniform=False)
    folder = experts.save_pruned(model, tmp_path / "pruned")
    config = json.loads((folder / "config.json").read_text())
    found = experts.layers(model)
    counts = [layer.n_experts for layer in found]
    assert config["num_local_experts_per_layer"] == counts
    assert [int(index) for index in config["per_layer_config"]] == [layer.index for layer in found]
    models.tiny_twin(name, causal=True).save_pretrained(tmp_path / "whole")
    assert names(folder) <= names(tmp_path / "whole")
    numbered = [
        re.findall(r"experts\.(\d+)\.", each) for each in names(folder) if f"layers.{found[0].index}." in each
    ]
    on_disk = {int(number) for each in numbered for number in each}
    assert on_disk in (set(), set(range(counts[0])))  # fused on disk, or numbered without a gap


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the mapped files")
def test_loaded_models_do_not_keep_the_file_in_memory(tmp_path):
    folder = experts.save_pruned(pruned("mixtral", uniform=False), tmp_path / "pruned")
    model = experts.load_pruned(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    del model


def test_tied_embeddings_stay_tied(tmp_path):
    model = models.tiny_twin("qwen3_moe", causal=True, tie_word_embeddings=True)
    experts.prune(model, [[0, 1], [1, 2, 3], [4, 5], [6, 7]])
    again = experts.load_pruned(experts.save_pruned(model, tmp_path / "pruned"))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_base_models_and_other_dtypes(tmp_path):
    model = pruned("gpt_oss", uniform=False, causal=False).to(torch.bfloat16)
    folder = experts.save_pruned(model, tmp_path / "pruned")
    again = experts.load_pruned(folder)
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert experts.load_pruned(folder, dtype=torch.float32, device="cpu").dtype == torch.float32


def test_tokenizers_load_from_the_folder(tmp_path):
    folder = experts.save_pruned(pruned("mixtral", uniform=False), tmp_path / "pruned")
    models.tiny_tokenizer().save_pretrained(folder)
    assert (
        AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
        == models.tiny_tokenizer()("abc")["input_ids"]
    )


def test_loaded_models_prune_further(tmp_path):
    model = pruned("olmoe", uniform=False)
    again = experts.load_pruned(experts.save_pruned(model, tmp_path / "pruned"))
    for each in (model, again):
        experts.prune(each, [[0, 1]] * 4)
    assert torch.equal(logits(again), logits(model))
    assert again.config.num_experts == 2
    assert not hasattr(again.config, "num_local_experts_per_layer")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        experts.load_pruned(tmp_path / "nowhere")
    models.tiny_twin("mixtral").save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="not written by save_pruned"):
        experts.load_pruned(tmp_path / "whole")


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_other_versions_are_refused(tmp_path):
    folder = experts.save_pruned(pruned("mixtral", uniform=False), tmp_path / "pruned")
    edit(folder, overparam_expert_format=2)
    with pytest.raises(ValueError, match=r"version 2 .* reads version 1"):
        experts.load_pruned(folder)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([3, 7, 2, 7], "do not fit|mismatch"), ([3, 7, 2], "lists 3 layers, the model has 4")],
)
def test_counts_that_do_not_fit_the_tensors_are_refused(counts, message, tmp_path):
    folder = experts.save_pruned(pruned("mixtral", uniform=False), tmp_path / "pruned")
    edit(folder, num_local_experts_per_layer=counts)
    with pytest.raises((ValueError, RuntimeError), match=message):
        experts.load_pruned(folder)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match="exists already"):
        experts.save_pruned(pruned("mixtral", uniform=True), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert experts.save_pruned(pruned("mixtral", uniform=True), tmp_path / "empty").is_dir()


def test_failed_saves_leave_nothing(tmp_path, monkeypatch):
    model = pruned("mixtral", uniform=True)

    def save(self, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    with pytest.raises(OSError, match="No space left"):
        experts.save_pruned(model, tmp_path / "pruned")
    assert not list(tmp_path.iterdir())


def test_dense_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is dense"):
        experts.save_pruned(models.tiny_twin("llama"), tmp_path / "pruned")
    assert not list(tmp_path.iterdir())
