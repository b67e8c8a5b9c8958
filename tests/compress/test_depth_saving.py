"""Cut models that come back from disk as they were, or are refused before anything is changed or written."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from overparam import models
from overparam.compress import depth
from overparam.compress.depth.states import no_cache
from overparam.models.proof import NotExactError, probe
from overparam.support.files import new_folder
from overparam.train import contrastive

LAYERS = {"num_hidden_layers": 6}
POSITIONAL = [  # architectures whose configuration counts positions, and layers that are not leading
    ("qwen2_moe", {"mlp_only_layers": [1, 3]}, [1, 2, 4]),
    ("qwen2_moe", {"mlp_only_layers": []}, [1, 2, 4]),
    ("qwen3_moe", {"mlp_only_layers": [2], "decoder_sparse_step": 1}, [1, 2, 4]),
    ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 2, 4]),
    ("deepseek_v2", {"first_k_dense_replace": 2}, [1, 2, 4]),
    ("deepseek_v3", {"first_k_dense_replace": 3}, [1, 2, 4]),
    ("glm4_moe", {"first_k_dense_replace": 2}, [1, 2, 4]),
    ("dots1", {"first_k_dense_replace": 2}, [1, 2, 4]),
    ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 4}, [1, 2, 4, 5]),
    ("afmoe", {"num_dense_layers": 2}, [1, 2, 4]),
    ("lfm2_moe", {"num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * 3}, [1, 2, 4]),
    ("recurrent_gemma", {}, [1, 2, 4]),
    ("llama4_text", {"interleave_moe_layer_step": 2}, [1, 2, 4]),
    ("llama4_text", {"no_rope_layers": [1, 0, 1, 1, 0, 1]}, [1, 2, 4]),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0, 1]}, [1, 2, 4]),
    ("modernbert", {}, [0, 2, 3]),
    ("gpt_neo", {"num_layers": 6, "attention_types": [[["global", "local"], 3]]}, [1, 2, 4]),
    ("bamba", {"attn_layer_indices": [1, 3]}, [1, 2, 4]),
    ("granitemoehybrid", {"layer_types": ["linear_attention", "full_attention"] * 3}, [1, 2, 4]),
    ("gemma3_text", {"sliding_window": 16}, [1, 2, 5]),
    ("longcat_flash", {"num_layers": 6}, [1, 2, 4]),
]


def twin(name, fields):
    count = {} if {"num_layers"} & fields.keys() else LAYERS
    return models.tiny_twin(name, **count, **fields)


def outputs(model):
    batch = probe(model)
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask, **no_cache(model))[0]


def bypassing(model, kept):
    """The output of `model` whose other blocks give back what they are given. [texts, tokens, hidden]"""

    def pass_by(_, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [
        layer.register_forward_hook(pass_by, with_kwargs=True)
        for index, layer in enumerate(models.blocks(model).layers)
        if index not in kept
    ]
    found = outputs(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("name", "fields", "kept"), POSITIONAL)
def test_layers_from_anywhere_are_the_same_layers_in_memory_and_on_disk(name, fields, kept, tmp_path):
    model = twin(name, fields)
    expected = bypassing(model, kept)
    small = depth.truncated(model, kept)
    torch.testing.assert_close(outputs(small), expected, atol=1e-5, rtol=1e-4)
    depth.save(small, models.tiny_tokenizer(), tmp_path / "pruned")
    again = AutoModel.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(outputs(again), expected, atol=1e-5, rtol=1e-4)
    assert len(models.blocks(again).layers) == len(kept)


@pytest.mark.parametrize(
    ("name", "fields", "kept", "part"),
    [
        ("jamba", {}, [1, 2, 4], "Jamba.*DecoderLayer"),
        ("diffllama", {}, [1, 2, 4], "lambda_init"),
        ("modernbert", {}, [1, 2, 4], "attn_norm"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, [0, 1, 2, 4], "Ernie4_5"),
        ("gemma3n_text", {"num_kv_shared_layers": 2}, 3, "Gemma3nTextModel"),
        ("gemma3n_text", {"num_kv_shared_layers": 2}, [0, 2, 4], "Gemma3nTextModel"),
        ("gemma4_text", {}, 3, "Gemma4TextModel"),
        ("minicpm3", {}, 3, "residual_scale"),
        ("esmc", {}, 3, "scaling_factor"),
    ],
)
def test_a_cut_that_no_configuration_describes_is_refused_and_changes_nothing(name, fields, kept, part):
    if name == "gemma3n_text":
        fields = fields | {"layer_types": ["sliding_attention", "full_attention"] * 3}
    model = twin(name, fields)
    before, config = outputs(model), model.config.to_json_string(use_diff=False)
    with pytest.raises(NotExactError, match=part) as raised:
        depth.truncate(model, kept)
    assert type(model).__name__ in str(raised.value)
    assert model.config.to_json_string(use_diff=False) == config
    assert len(models.blocks(model).layers) == 6
    assert torch.equal(outputs(model), before)


def test_gpt2_that_scales_by_position_keeps_leading_layers_only():
    model = models.tiny_twin("gpt2", n_layer=6, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(NotExactError, match="scal"):
        depth.truncate(model, [1, 2, 4])
    assert depth.truncate(model, 3).config.num_hidden_layers == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "gpt2", "opt", "distilbert", "mixtral"])
def test_saved_folder_is_an_ordinary_checkpoint(name, dtype, tmp_path):
    model, tokenizer = models.tiny_twin(name), models.tiny_tokenizer()
    model = AutoModel.from_config(model.config, dtype=dtype).eval()
    small = depth.truncate(model, 2)
    assert depth.save(small, tokenizer, tmp_path / "pruned") == tmp_path / "pruned"
    again, theirs = models.load(str(tmp_path / "pruned"), dtype=dtype)
    assert type(again) is type(model)
    assert again.config.architectures == [type(model).__name__]
    assert again.config.num_hidden_layers == 2
    assert torch.equal(outputs(small), outputs(again))
    assert theirs("text")["input_ids"] == tokenizer("text")["input_ids"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_a_model_that_was_cast_in_memory_is_saved(name, tmp_path):
    small = depth.truncate(models.tiny_twin(name).to(torch.bfloat16), 2)
    assert depth.save(small, models.tiny_tokenizer(), tmp_path / "pruned").is_dir()


def test_lists_of_layers_are_shortened_with_the_layers(tmp_path):
    model = models.tiny_twin("gemma3", num_hidden_layers=12)
    kinds = model.config.layer_types
    assert depth.truncate(model, [0, 5, 7]).config.layer_types == [kinds[index] for index in (0, 5, 7)]
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1, 2]


def test_a_model_that_its_configuration_does_not_describe_is_not_saved(tmp_path):
    model = models.tiny_twin("llama")
    model.layers = model.layers[:2]  # by hand: the configuration still says four
    with pytest.raises(NotExactError, match=r"LlamaModel is not the same after.*layers\.2\."):
        depth.save(model, models.tiny_tokenizer(), tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_a_pooler_that_nobody_calls_is_no_reason_to_refuse(tmp_path):
    model = models.tiny_twin("bert")
    without = type(model)(model.config, add_pooling_layer=False).eval()
    small = depth.truncate(without, 2)
    depth.save(small, models.tiny_tokenizer(), tmp_path / "pruned")
    again = AutoModel.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(again(probe(small).input_ids)[0], small(probe(small).input_ids)[0])


def test_what_is_set_by_hand_survives_a_cut_but_not_a_save(tmp_path):
    model = models.tiny_twin("llama")
    for layer in model.layers:
        layer.self_attn.scaling = 1.0
    small = depth.truncate(model, 2)
    assert small.layers[1].self_attn.scaling == 1.0
    with pytest.raises(NotExactError, match="something set on the model"):
        depth.save(small, models.tiny_tokenizer(), tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="pruned exists already"):
        depth.save(models.tiny_twin("llama"), models.tiny_tokenizer(), tmp_path / "pruned")
    assert (tmp_path / "pruned" / "mine").read_text() == "mine"


def test_a_folder_that_may_be_replaced_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("mine")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "old", replace=True) as folder:
        (folder / "no such folder" / "yours").write_text("half")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["mine"]
    with new_folder(tmp_path / "old", replace=True) as folder:
        (folder / "yours").write_text("whole")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["yours"]


def test_saved_encoders_give_the_same_embeddings_or_leave_nothing(tmp_path):
    encoder = contrastive.as_sentence_transformer(
        depth.truncate(models.tiny_twin("bert"), 2), models.tiny_tokenizer(), pooling="mean"
    )
    depth.save_encoder(encoder, tmp_path / "encoder", card="# An encoder")
    again = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert (tmp_path / "encoder" / "README.md").read_text() == "# An encoder"
    assert (again.encode(["a", "b c"]) == encoder.encode(["a", "b c"])).all()
    encoder[0].model.encoder.layer = encoder[0].model.encoder.layer[:1]
    with pytest.raises(NotExactError, match="is not the same after"):
        depth.save_encoder(encoder, tmp_path / "encoder", replace=True)
    assert (tmp_path / "encoder" / "README.md").read_text() == "# An encoder"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_cast_model_with_weights_that_stay_in_float32_is_saved(tmp_path):
    model = models.tiny_twin("deepseek_v3").bfloat16()
    depth.save(model, models.tiny_tokenizer(), tmp_path / "saved")
    again, _ = models.load(str(tmp_path / "saved"), dtype=torch.bfloat16)
    for name, ours in model.state_dict().items():
        assert torch.equal(ours.float(), again.state_dict()[name].float()), name


def test_a_model_with_adapters_is_not_saved(tmp_path):
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    added = models.tiny_twin("qwen3")
    added.add_adapter(settings)
    for model in (added, get_peft_model(models.tiny_twin("qwen3"), settings)):
        with pytest.raises(NotExactError, match=r"has adapters.*merge_and_unload"):
            depth.save(model, models.tiny_tokenizer(), tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    depth.save(model.merge_and_unload(), models.tiny_tokenizer(), tmp_path / "saved")


@pytest.mark.parametrize("name", ["qwen3_next", "recurrent_gemma", "jamba"])
def test_layers_without_attention_run_as_anybody_calls_them(name, tmp_path):
    model = depth.truncate(models.tiny_twin(name), 1)
    depth.save(model, models.tiny_tokenizer(), tmp_path / "cut")
    again = AutoModel.from_pretrained(tmp_path / "cut")
    batch = probe(model)
    with torch.no_grad():
        states = [each(batch.input_ids, batch.attention_mask).last_hidden_state for each in (model, again)]
    assert torch.equal(*states)


def test_a_cut_that_keeps_attention_keeps_its_cache():
    assert depth.truncate(models.tiny_twin("qwen3_next"), [0, 3]).config.use_cache is True
