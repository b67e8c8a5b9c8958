"""A sentence-transformers folder is embedded with as its authors say, equal to what sentence-transformers gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from overparam import models
from overparam.compress import depth, distill, quantize
from overparam.compress.quantize import systems

TEXTS = [
    "one",
    "Two or three words.",
    "A Longer sentence, with a few more words in it than the others have; so many that it is cut.",
    "an eighth",
]


def published(name):
    return SentenceTransformer(name, device="cpu", local_files_only=True).encode(TEXTS)


TANH, NONE = torch.nn.Tanh(), torch.nn.Identity()
FOLDERS = {
    "cls": {"pooling": "cls"},
    "cls, old layout": {"pooling": "cls", "old": True},
    "max": {"pooling": "max"},
    "last of a decoder": {"name": "qwen3", "pooling": "lasttoken"},
    "weighted mean": {"pooling": "weightedmean", "normalize": False},
    "sum over root of length": {"pooling": "mean_sqrt_len_tokens", "normalize": False},
    "two poolings": {"pooling": ("cls", "mean")},
    "two poolings, old layout": {"pooling": ("mean", "max"), "old": True},
    "dense": {"dense": [(24, TANH)]},
    "two dense layers": {"pooling": "cls", "dense": [(48, NONE), (16, torch.nn.GELU())], "normalize": False},
    "prompt": {"prompts": {"query": "search: "}, "default_prompt_name": "query"},
    "prompt that is not pooled": {
        "prompts": {"all": "search: "}, "default_prompt_name": "all", "include_prompt": False, "pooling": "cls",
    },
    "first dimensions": {"truncate_dim": 8},
    "lower case": {"do_lower_case": True},
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_embeddings_are_those_of_sentence_transformers(case, sentence_folder):
    name = sentence_folder(**FOLDERS[case])
    expected = published(name)
    model, tokenizer = models.load(name)
    encoder = distill.as_encoder(model, tokenizer, max_length=512)
    np.testing.assert_allclose(distill.outputs(encoder, TEXTS), expected, atol=1e-5)
    embedder = models.Embedder(models.recipe(model))
    found = quantize.embed(
        systems.states_of(model), tokenizer, TEXTS, batch_size=2,
        max_length=models.recipe(model).length(512), embedder=embedder,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert models.recipe(model).outputs(32) == expected.shape[1]
    assert not models.is_decoder(name)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "all-mpnet-base-v2"])
def test_bundled_encoders_follow_their_recipes(name):
    recipe = models.recipe(name)
    assert recipe.pooling == ("mean",)
    assert recipe.unit_length
    assert not recipe.dense
    assert recipe.max_length == {"all-MiniLM-L6-v2": 256, "all-mpnet-base-v2": 384}[name]


def test_a_plain_model_has_no_recipe(tmp_path):
    model = models.tiny_twin("bert")
    model.save_pretrained(tmp_path)
    models.tiny_tokenizer().save_pretrained(tmp_path)
    assert models.recipe(str(tmp_path)) is None
    assert models.recipe("tiny-bert") is None
    assert models.recipe(models.load(str(tmp_path))[0]) is None


def test_texts_are_cut_where_the_folder_says(sentence_folder):
    name = sentence_folder(max_seq_length=8)
    model, tokenizer = models.load(name)
    assert models.recipe(model).length(512) == 8
    assert models.recipe(model).length(4) == 4
    assert distill.as_encoder(model, tokenizer, max_length=512).max_seq_length == 8
    assert tokenizer.model_max_length == 8


def test_old_folders_keep_the_transformer_in_one_of_its_own(tmp_path, sentence_folder):
    name = sentence_folder(pooling="cls", old=True)
    expected = published(name)
    inner = tmp_path / "model" / "0_Transformer"
    inner.mkdir()
    for path in (tmp_path / "model").iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inner / path.name)
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "model/modules.json").write_text(json.dumps(modules))
    model, tokenizer = models.load(name)
    encoder = distill.as_encoder(model, tokenizer, max_length=512)
    np.testing.assert_allclose(distill.outputs(encoder, TEXTS), expected, atol=1e-5)
    assert set(models.provenance(name)) == {"0_Transformer/model.safetensors"}


def test_weights_of_dense_layers_are_part_of_what_identifies_a_model(sentence_folder):
    name = sentence_folder(dense=[(24, TANH)])
    assert set(models.provenance(name)) == {"model.safetensors", "2_Dense/model.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules.json": lambda m: [*m[:2], m[2] | {"type": "custom_st.Whitening"}]}, "custom_st.Whitening"),
        ({"modules.json": lambda m: [m[0], *m[2:]]}, "not a Transformer and a Pooling"),
        ({"modules.json": lambda m: [*m[:2], m[2] | {"type": "sentence_transformers.models.CNN"}]}, "CNN"),
        ({"1_Pooling/config.json": lambda c: c | {"pooling_mode": "median"}}, "median"),
        ({"2_Dense/config.json": lambda c: c | {"activation_function": "my.module.Act"}}, "my.module.Act"),
        ({"sentence_bert_config.json": lambda c: c | {"config_kwargs": {"rope_theta": 3}}}, "rope_theta"),
        ({"config_sentence_transformers.json": lambda c: c | {"default_prompt_name": "no"}}, "'no'"),
        ({"config_sentence_transformers.json": lambda c: c | {"model_type": "SparseEncoder"}}, "SparseEncoder"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name_and_nothing_else_is(change, message, tmp_path, sentence_folder):
    name = sentence_folder(dense=[(24, TANH)])
    for file, edit in change.items():
        path = tmp_path / "model" / file
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    model, tokenizer = models.load(name)  # a plain load needs no recipe
    for embeds in (
        lambda: distill.as_encoder(model, tokenizer, max_length=64),
        lambda: models.Embedder(models.recipe(model)),
    ):
        with pytest.raises(ValueError, match=message):
            embeds()


def test_texts_are_cut_to_the_positions_that_can_be_used(tmp_path, sentence_folder):
    config = RobertaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    name = sentence_folder()
    RobertaModel(config).save_pretrained(name)
    models.tiny_tokenizer().save_pretrained(name)
    settings = tmp_path / "model/sentence_bert_config.json"
    said = json.loads(settings.read_text()) | {"max_seq_length": None}
    settings.write_text(json.dumps(said))
    model, tokenizer = models.load(name)
    assert models.recipe(model).max_length == tokenizer.model_max_length == 64
    encoder = distill.as_encoder(model, tokenizer, max_length=512)
    assert np.isfinite(distill.outputs(encoder, ["word " * 100])).all()


def test_a_dense_layer_without_safetensors_is_refused(tmp_path, sentence_folder):
    name = sentence_folder(dense=[(24, TANH)])
    (tmp_path / "model/2_Dense/model.safetensors").unlink()
    assert list(models.provenance(name)) == ["model.safetensors"]
    model, tokenizer = models.load(name)
    with pytest.raises(OSError, match=r"2_Dense/model\.safetensors"):
        distill.as_encoder(model, tokenizer, max_length=64)


def test_another_width_than_the_recipes_is_refused(sentence_folder):
    model, tokenizer = models.load(sentence_folder(dense=[(24, TANH)]))
    distill.as_encoder(model, tokenizer, width=24, max_length=64)
    with pytest.raises(ValueError, match=r"have 24 dimensions .* not 32"):
        distill.as_encoder(model, tokenizer, width=32, max_length=64)


def test_a_truncated_model_leaves_its_dense_layers_out_and_says_so(sentence_folder, capsys):
    model, tokenizer = models.load(sentence_folder(pooling="cls", dense=[(24, TANH)]))
    assert models.recipe(model).dense
    cut = depth.truncated(model, 2)
    assert not models.recipe(cut).dense
    assert "dense layers" in capsys.readouterr().out
    found = distill.outputs(distill.as_encoder(cut, tokenizer, max_length=24), TEXTS)
    rows = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="cls", depths=[2], max_length=24)[:, 0]
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5)


def test_a_student_does_not_take_its_teachers_recipe(sentence_folder):
    teacher, tokenizer = models.load(sentence_folder(pooling="cls"))
    config = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    student = BertModel(config, add_pooling_layer=False)
    encoder = distill.as_encoder(student, tokenizer, width=teacher.config.hidden_size, max_length=24)
    assert encoder[1].pooling_mode == "mean"
    assert distill.outputs(encoder, TEXTS).shape == (4, 32)


def test_first_tokens_are_pooled_at_every_depth(tmp_path):
    model, tokenizer = models.load("tiny-bert")
    rows = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="cls")
    for row, text in enumerate(TEXTS):
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = torch.stack([each[0, 0] for each in states]).numpy()
        np.testing.assert_allclose(rows[row], expected, atol=1e-4)
