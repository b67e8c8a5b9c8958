import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from overparam import models
from overparam.measure import budget, flops
from overparam.models import anatomy, published

LLAMA = LlamaConfig(
    num_hidden_layers=2, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
    vocab_size=50,
)  # fmt: skip


def built_size(config):
    return sum(p.numel() for p in anatomy.on_meta(config).parameters())


def test_gpt_3_is_counted_as_by_hand():
    layers, width, vocabulary, context = 96, 12288, 50257, 2048
    found = anatomy.count(published.find("GPT-3 175B").config())
    by_hand = 12 * layers * width**2 + 13 * layers * width + (vocabulary + context) * width + 2 * width
    assert found.total == by_hand == 174_604_259_328
    assert found.parts["input table"] == vocabulary * width
    assert found.parts["positions"] == context * width
    assert found.parts["attention"] == layers * (4 * width**2 + 4 * width)
    assert found.parts["feed-forward"] == layers * (8 * width**2 + 5 * width)
    assert found.parts["norms"] == (4 * layers + 2) * width


@pytest.mark.parametrize("name", ["GPT-2", "T5-small", "Pythia-70M", "GPT-OSS-20B"])
def test_components_add_up_to_the_parameters_of_the_built_model(name):
    config = published.find(name).config()
    assert anatomy.count(config).total == built_size(config)


@pytest.mark.parametrize(
    "model",
    [each for each in published.models() if each.explanation or each.active],
    ids=lambda model: model.name,
)
def test_published_totals_and_active_parameters_are_met_or_explained(model):
    found = anatomy.count(model.config(), name=model.name)
    assert abs(model.unexplained(found)) <= 2
    assert (abs(model.difference(found)) > 2) == bool(model.explanation)
    if model.active:
        assert abs(model.active_difference(found)[model.definition]) <= 2


def test_a_published_number_is_compared_at_its_own_digits():
    assert published.number("6.9 B") == 6.9e9
    assert published.rounded(6_738_415_616, "7 B") == 7e9
    assert published.rounded(6_738_415_616, "6.7 B") == pytest.approx(6.7e9)
    with pytest.raises(ValueError, match="no published model is called 'GPT-9': use one of GPT-2"):
        published.find("GPT-9")


def test_a_tied_head_is_counted_once_and_multiplied_by():
    tied = anatomy.count(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True}))
    untied = anatomy.count(LLAMA)
    assert tied.tied
    assert not untied.tied
    assert untied.total - tied.total == 50 * 16
    assert untied.matrices == tied.matrices
    assert tied.active[anatomy.NO_INPUT] == tied.total
    assert untied.active[anatomy.NO_INPUT] == untied.total - 50 * 16
    assert tied.active[anatomy.NONE] == untied.active[anatomy.NONE]
    assert "counted once" in tied.notes[0]


@pytest.mark.parametrize("name", models.MOE_TWINS)
def test_active_experts_are_the_share_that_a_token_is_routed_to(name):
    twin = models.tiny_twin(name, causal=True)
    found, counts = anatomy.count(twin), models.count_parameters(twin)
    assert found.total == counts.total
    assert found.parts["experts"] == counts.expert
    assert found.active_experts == counts.active - counts.block


@pytest.mark.parametrize(
    "config",
    [
        published.find("GPT-2").config(),
        published.find("Gemma 3 270M").config(),
        MixtralConfig(num_hidden_layers=2),
        GptOssConfig(num_hidden_layers=2),
        DeepseekV3Config(num_hidden_layers=4),  # three dense layers come first
    ],
    ids=lambda config: config.model_type,
)
def test_operations_are_those_that_pytorch_counts(config):
    built = anatomy.on_meta(config)
    assert flops.counted(built, 24, experts="batched_mm") == anatomy.count(built).flops_per_token(24)


def test_an_encoders_pooler_is_for_one_token_of_a_text():
    config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60,
                        architectures=["BertModel"])  # fmt: skip
    found = anatomy.count(config)
    assert found.parts["other"] == 32 * 32 + 32
    assert found.notes == ("other: pooler.dense 1,056",)
    counted = flops.counted(anatomy.on_meta(config), 16)
    assert counted - 2 * 32 * 32 / 16 == found.flops_per_token(16)


def test_training_takes_three_times_the_operations():
    found = anatomy.count(LLAMA)
    assert found.flops_per_token(8, training=True) == 3 * found.flops_per_token(8)


def test_unknown_components_are_counted_as_other_and_said():
    config = MambaConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50, state_size=4)
    found = anatomy.count(config)
    assert found.parts["other"] > 0
    assert "backbone.layers.mixer.in_proj" in found.notes[-1]
    assert found.total == built_size(config)
    assert "operations are not counted: mamba has layers of type 'linear_attention'" in found.card()


def test_shared_layers_are_counted_once_and_their_operations_are_not():
    albert = AlbertConfig(
        num_hidden_layers=4,
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=24,
        embedding_size=8,
        vocab_size=50,
    )
    found = anatomy.count(albert)
    assert found.total == built_size(albert)
    with pytest.raises(ValueError, match="several times"):
        found.flops_per_token(8)


def test_operations_of_an_encoder_decoder_are_refused():
    with pytest.raises(ValueError, match="lengths of both texts"):
        anatomy.count(published.find("T5-small").config()).flops_per_token(8)


def test_a_quantized_checkpoint_is_counted_as_what_it_unpacks_to():
    plain = published.find("GPT-OSS-20B").config()
    stored = published.find("GPT-OSS-20B").config()
    stored.quantization_config = {"quant_method": "mxfp4"}
    found = anatomy.count(stored)
    assert found.total == anatomy.count(plain).total
    assert "stored quantized (mxfp4)" in found.notes[0]


def test_a_folder_a_file_and_a_loaded_model_have_one_count(tmp_path):
    model = AutoModelForCausalLM.from_config(LLAMA)
    model.save_pretrained(tmp_path)
    counts = [anatomy.count(each) for each in (LLAMA, model, str(tmp_path), tmp_path / "config.json")]
    assert len({(each.total, each.matrices, each.layers) for each in counts}) == 1
    assert str(counts[2]).startswith(f"{tmp_path}: {model.num_parameters():,} parameters")
    assert "AdamW" in str(counts[0])


def test_a_configuration_without_what_is_counted_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(
        ValueError, match=r"config.json is not the configuration of a model.*needs a model_type"
    ):
        anatomy.count(file)
    with pytest.raises(
        ValueError, match=r"no .*model can be built from this configuration.*whole config.json"
    ):
        anatomy.count(PreTrainedConfig())
    broken = LlamaConfig(**LLAMA.to_dict())
    broken.num_attention_heads = 0
    with pytest.raises(ValueError, match="cannot be counted"):
        anatomy.count(broken)
    with pytest.raises(ValueError, match="unknown model 'gemma'"):
        anatomy.count("gemma")


def test_operations_need_heads():
    with pytest.raises(ValueError, match="has no num_attention_heads"):
        flops.attention_scores(PreTrainedConfig(num_hidden_layers=2), 8)
    hybrid = LlamaConfig(**LLAMA.to_dict())
    hybrid.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of type 'linear_attention'"):
        flops.attention_scores(hybrid, 8)


@pytest.mark.parametrize(("targets", "rank"), [("all-linear", 4), (("q_proj", "v_proj"), 3)])
def test_adapters_have_as_many_parameters_as_peft_makes(targets, rank):
    with torch.device("meta"):
        chosen = targets if isinstance(targets, str) else list(targets)
        adapted = get_peft_model(anatomy.on_meta(LLAMA), LoraConfig(r=rank, target_modules=chosen))
    made = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert anatomy.lora(LLAMA, rank, targets) == made > 0


def test_adapters_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        anatomy.lora(LLAMA, 0)
    with pytest.raises(ValueError, match=r"no matrix is called .*there are down_proj, gate_proj"):
        anatomy.lora(LLAMA, 1, ("query",))
    with pytest.raises(ValueError, match="fused tensors"):
        anatomy.lora(models.tiny_twin("qwen3_moe", causal=True), 1)


def test_training_bytes_are_those_of_the_tensors():
    model = AutoModelForCausalLM.from_config(LLAMA)
    total = model.num_parameters()
    made = {"SGD": (torch.optim.SGD, {}), "momentum or Muon": (torch.optim.SGD, {"momentum": 0.9}),
            "AdamW": (torch.optim.AdamW, {})}  # fmt: skip
    for recipe, (optimizer_class, options) in made.items():
        model.zero_grad()
        optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
        tensors += [
            t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim
        ]
        assert sum(t.nbytes for t in tensors) == anatomy.training_bytes(total, recipe)
    assert anatomy.training_bytes(100, "LoRA", 10) == 2 * 100 + 16 * 10
    with pytest.raises(ValueError, match="unknown recipe 'Lion'"):
        anatomy.training_bytes(1, "Lion")
    with pytest.raises(ValueError, match="say how many"):
        anatomy.training_bytes(1, "QLoRA")


def test_a_training_budget_is_arithmetic_on_stated_assumptions():
    device = budget.Device(flops=1e12, watts=500)
    total = budget.operations(1e9, 2e9)
    assert total == 1.2e19
    hours = budget.device_hours(total, device, 0.5)
    assert hours == pytest.approx(1.2e19 / 0.5e12 / 3600)
    assert budget.implied_utilisation(total, device, hours) == pytest.approx(0.5)
    assert budget.cost(10, 2.5) == 25
    assert budget.energy(10, device, 1.2) == 6
    assert budget.updates(300e9, 3.2e6) == 93_750


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: budget.cost(1, 0), "price of an hour must be above 0, got 0"),
        (lambda: budget.cost(1, -1), "price of an hour must be above 0, got -1"),
        (lambda: budget.device_hours(1, budget.DEVICES["H100"], 1.5), "utilisation must be above 0"),
        (lambda: budget.energy(1, budget.DEVICES["H100"], 0.9), "overhead must be at least 1"),
        (lambda: budget.updates(1, 0), "more than 0 tokens, got 0"),
    ],
)
def test_impossible_assumptions_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
