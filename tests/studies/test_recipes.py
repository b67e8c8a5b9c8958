"""Studies embed as the folder of a model says, record how, and say what cannot be done so."""

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer

from overparam import models
from overparam.compress import depth, quantize
from overparam.compress.distill import encoders
from overparam.studies import distillation_retention, quantization_accuracy, trailing_layer_pruning
from overparam.studies.distillation_retention import specialists
from overparam.studies.distillation_retention import study as distilling
from overparam.studies.quantization_accuracy import study as quantizing
from overparam.studies.trailing_layer_pruning import study as trailing
from overparam.studies.trailing_layer_pruning import training

TEXTS = ["one", "Two or three words.", "A longer sentence, with a few more words in it than the others have"]
DENSE = {"pooling": "cls", "dense": [(24, torch.nn.Tanh())]}
QUANTIZED = {"schemes": ["torchao-int8"], "suite": ["LeeSTS"], "group_size": 16, "max_length": 512}
PRUNED = {
    "tasks": ("VersePairs",), "rule_tasks": ("VersePairs",), "max_items": 20, "max_length": 512, "loss_triplets": 16,
    "loss_batch_size": 8, "train_steps": 4, "warmup_steps": 1, "export": False,
}  # fmt: skip
DISTILLED = {"shares": (0.25,), "task_share": 0.25, "max_length": 32, "texts": 64, "suite": ("LeeSTS",)}


@pytest.fixture(autouse=True)
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))


def published(name):
    return SentenceTransformer(name, device="cpu", local_files_only=True).encode(TEXTS)


def said(study):
    """The recorded table, {part: (what the folder says, what is done)}, of the first model."""
    table = pd.read_csv(study.recorder.directory / "embeddings.csv", keep_default_na=False)
    table = table[table["model"] == table["model"].iloc[0]].set_index("part")
    return {part: tuple(row) for part, row in table[["folder", "here"]].iterrows()}


def start_quantizing(name, **changes):
    return quantizing.start(quantization_accuracy.Params(model=name, **{**QUANTIZED, **changes}))


def start_trailing(name, **changes):
    return trailing.start(trailing_layer_pruning.Params(model=name, **{**PRUNED, **changes}))


def start_distilling(name, **changes):
    return distilling.start(distillation_retention.Params(teacher=name, **{**DISTILLED, **changes}))


def test_quantization_embeds_as_the_folder_says(sentence_folder):
    name = sentence_folder(**DENSE, prompts={"q": "ask: "}, default_prompt_name="q")
    study = start_quantizing(name)
    run = study.quantized(quantize.BASELINE).run
    np.testing.assert_allclose(study.subject.embed(run, TEXTS), published(name), atol=1e-5)
    assert said(study)["pooling"] == ("cls", "cls")
    assert said(study)["dense"] == ("32 to 24, Tanh", "32 to 24, Tanh")
    assert said(study)["prompt"] == ("'ask: '", "'ask: '")
    assert said(study)["tokens at most"] == ("24", "24")


def test_quantization_compares_directions_where_the_folder_has_no_unit_length(sentence_folder):
    study = start_quantizing(sentence_folder(normalize=False))
    run = study.quantized(quantize.BASELINE).run
    assert np.linalg.norm(study.subject.embed(run, TEXTS), axis=1) != pytest.approx(1)
    assert np.linalg.norm(study.subject.outputs(run, TEXTS), axis=1) == pytest.approx(1)


def test_a_model_without_a_recipe_is_embedded_by_its_mean():
    study = start_quantizing("tiny-bert")
    assert said(study)["pooling"] == ("no recipe", "mean")


def test_an_embedder_made_of_a_decoder_is_an_encoder_unless_said_otherwise(sentence_folder):
    name = sentence_folder("qwen3", "lasttoken")
    study = start_quantizing(name)
    assert not study.decoder
    np.testing.assert_allclose(
        study.subject.embed(study.quantized(quantize.BASELINE).run, TEXTS), published(name), atol=1e-5
    )


def test_a_decoder_without_its_head_is_refused_at_the_start_and_can_be_an_encoder(tmp_path):
    folder = tmp_path / "base"
    models.tiny_twin("mistral").save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*encoder"):
        start_quantizing(str(folder))
    assert not (tmp_path / "job").exists()
    assert not start_quantizing(str(folder), kind="encoder").decoder


def test_trailing_layers_are_pooled_as_the_folder_says_and_a_dense_head_is_left_out(sentence_folder, capsys):
    name = sentence_folder(**DENSE, prompts={"q": "ask: "}, default_prompt_name="q")
    study = start_trailing(name)
    assert "dense is 32 to 24, Tanh in its folder, here left out" in capsys.readouterr().out
    assert said(study)["dense"] == ("32 to 24, Tanh", "left out: trained for the last depth")
    found = study.embedder(study.model, [2, 4])(TEXTS, None)
    rows = depth.layer_embeddings(
        study.model, study.tokenizer, ["ask: " + text for text in TEXTS], pooling="cls", depths=[2, 4], max_length=24
    )  # fmt: skip
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=-1, keepdims=True), atol=1e-6)
    assert all(each.query.startswith("ask: ") for each in study.triplets(4, seed=1))


def test_the_last_depth_is_the_folders_own_embedding_where_nothing_is_left_out(sentence_folder):
    name = sentence_folder(pooling="cls", prompts={"q": "ask: "}, default_prompt_name="q")
    study = start_trailing(name)
    found = study.embedder(study.model, [study.layers])(TEXTS, None)[:, 0]
    np.testing.assert_allclose(found, published(name), atol=1e-5)


def test_a_pooling_that_is_set_replaces_the_folders(sentence_folder):
    study = start_trailing(sentence_folder(**DENSE), pooling="mean")
    assert study.pooling == "mean"
    assert study.folder_recipe is None
    assert said(study)["pooling"] == ("cls", "mean")
    assert said(study)["unit length"] == ("yes", "no")


def test_a_decoder_without_a_recipe_keeps_its_weighted_mean():
    study = start_trailing("tiny-gemma3")
    assert (study.pooling, study.folder_recipe, study.max_length) == ("weighted_mean", None, 512)


@pytest.mark.parametrize("pooling", ["max", ("cls", "mean")])
def test_a_pooling_that_no_inner_depth_has_is_refused_before_work(pooling, sentence_folder, tmp_path):
    with pytest.raises(ValueError, match="set pooling to one of"):
        start_trailing(sentence_folder(pooling=pooling))
    assert not (tmp_path / "job").exists()


def test_an_exported_encoder_embeds_as_it_was_measured(sentence_folder):
    from overparam.train import contrastive

    name = sentence_folder(pooling="cls", prompts={"q": "ask: "}, default_prompt_name="q")
    study = start_trailing(name)
    encoder = contrastive.as_sentence_transformer(
        study.model, study.tokenizer, pooling=study.pooling, max_length=study.max_length
    )
    np.testing.assert_allclose(
        training._as_measured(study, encoder).encode(TEXTS), published(name), atol=1e-5
    )


def test_a_teacher_embeds_as_its_folder_says(sentence_folder):
    name = sentence_folder(**DENSE, prompts={"q": "ask: "}, default_prompt_name="q")
    study = start_distilling(name, general_models=(name,))
    found, expected = encoders.outputs(study.encoder, TEXTS), published(name)
    np.testing.assert_allclose(np.sum(found * expected, axis=1), 1, atol=1e-6)
    assert study.width == 24
    assert study.pooling == "cls"
    assert said(study)["dense"][1] == "32 to 24, Tanh"
    teacher = encoders.as_classifier(study.encoder, 3)
    assert encoders.outputs(teacher, TEXTS).shape == (3, 3)


def test_a_general_model_embeds_as_its_folder_says(sentence_folder):
    name = sentence_folder("qwen3", "lasttoken")
    study = start_distilling("tiny-bert", general_models=(name,))
    np.testing.assert_allclose(specialists._embedder(study, name)(TEXTS), published(name), atol=1e-5)


def test_a_general_model_can_be_said_to_be_an_encoder():
    params = {"general_models": ("tiny-llama",)}
    middle = specialists._embedder(start_distilling("tiny-bert", **params), "tiny-llama")(TEXTS)
    study = start_distilling("tiny-bert", **params, kinds={"tiny-llama": "encoder"})
    last = specialists._embedder(study, "tiny-llama")(TEXTS)
    assert not np.allclose(middle, last)
    with pytest.raises(ValueError, match="'tiny-phi3' is not"):
        start_distilling("tiny-bert", **params, kinds={"tiny-phi3": "encoder"})
