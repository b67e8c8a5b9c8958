"""Students and their tokenizers: no id without a row, whatever the teacher's tokenizer puts around a text."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as kinds
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from overparam import models
from overparam.compress import distill
from overparam.compress.distill import fits
from overparam.train import causal

WORDS = ["king", "queen", "potato", "prince", "river", "carrot", "doctor", "ocean", "violin", "winter"]
TEXTS = [
    f"the {a} reads about a {b}, quietly; {c}!" for a, b, c in itertools.product(WORDS, WORDS, WORDS[:3])
]
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
FIRST = 6000  # id of the first special token, after all others


def template(ids):
    pair = f"{BEGIN} $A {END} {BEGIN}:1 $B:1 {END}:1"
    return processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=pair, special_tokens=[(token, ids[token]) for token in (BEGIN, END)]
    )


def bert(ids):
    return processors.BertProcessing((END, ids[END]), (BEGIN, ids[BEGIN]))


def roberta(ids):
    return processors.RobertaProcessing((END, ids[END]), (BEGIN, ids[BEGIN]))


def sequence(inner):
    return lambda ids: processors.Sequence([processors.ByteLevel(trim_offsets=False), inner(ids)])


POST = {
    "template": template,
    "bert": bert,
    "roberta": roberta,
    "sequence of a template (Llama 3)": sequence(template),
    "sequence of bert": sequence(bert),
    "sequence of roberta": sequence(roberta),
}


def teachers_tokenizer(post):
    """A byte-level tokenizer whose special tokens come last, as Llama 3's do."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"x{index}": index for index in range(len(vocabulary), FIRST)}
    backend = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BEGIN, END, PAD])
    backend.post_processor = post({token: backend.token_to_id(token) for token in (BEGIN, END, PAD)})
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END, pad_token=PAD)


@pytest.mark.parametrize("post", POST)
def test_a_retrained_tokenizer_gives_no_id_of_its_teacher(post):
    teacher = teachers_tokenizer(POST[post])
    assert teacher("king")["input_ids"][0] == FIRST
    small = distill.retrained_tokenizer(teacher, TEXTS, 300)
    assert len(small) == 300
    for found in (small("king"), small("king", "queen"), small("")):
        assert max(found["input_ids"]) < 300
    for texts in (("king",), ("king", "queen"), ("",)):
        whole = small.convert_ids_to_tokens(small(*texts)["input_ids"])
        expected = teacher.convert_ids_to_tokens(teacher(*texts)["input_ids"])
        around = [token for token in whole if token in (BEGIN, END)]
        assert around == [token for token in expected if token in (BEGIN, END)]  # the same template
    again = json.loads(small.backend_tokenizer.to_str())["post_processor"]
    assert str(FIRST) not in json.dumps(again)


def test_a_student_of_such_a_teacher_reads_texts(tmp_path):
    tokenizer = teachers_tokenizer(POST["sequence of a template (Llama 3)"])
    small = distill.retrained_tokenizer(tokenizer, TEXTS, 300)
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, pad_token_id=7,
    )  # fmt: skip
    student = distill.new_student(config, seed=0, tokenizer=small)
    assert student.config.pad_token_id == small.pad_token_id
    assert student.get_input_embeddings().padding_idx == small.pad_token_id
    encoder = distill.as_encoder(student, small, width=16, max_length=32)
    assert np.isfinite(distill.outputs(encoder, [*TEXTS[:3], "", "🙂"])).all()
    with pytest.raises(ValueError, match="padding is token 7, which is never trained"):
        distill.as_encoder(distill.new_student(config, seed=0), small, width=16, max_length=32)


def test_a_student_does_not_inherit_a_padding_that_it_has_no_row_for():
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    teacher = BertModel(BertConfig(vocab_size=9000, pad_token_id=8999, **sizes))
    config = distill.student_config(teacher, 0.1)
    assert config.vocab_size < 9000
    assert config.pad_token_id is None
    distill.new_student(config, seed=0)


@pytest.mark.parametrize(
    ("field", "value"), [("pad_token_id", 300), ("eos_token_id", [2, 6000]), ("mask_token_id", 500)]
)
def test_ids_of_a_configuration_outside_of_the_vocabulary_are_named(field, value):
    model = models.tiny_twin("bert")
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"260 tokens.*{field}: {max(np.atleast_1d(value))}"):
        distill.check_fits(model)


def test_ids_of_a_tokenizer_outside_of_the_vocabulary_are_named():
    tokenizer = teachers_tokenizer(POST["sequence of a template (Llama 3)"])
    ids = fits.emitted(tokenizer)
    assert ids["bos_token"] == [FIRST]
    assert ids["the text ''"] == [FIRST, FIRST + 1]
    with pytest.raises(ValueError, match="6003 tokens, the student's table 260 rows"):
        distill.check_fits(models.tiny_twin("bert"), tokenizer)


def test_texts_longer_than_a_students_positions_are_refused():
    config = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    student = distill.new_student(config, seed=0, tokenizer=models.tiny_tokenizer())
    with pytest.raises(ValueError, match="at most 32, the positions of the student, got 64"):
        distill.as_encoder(student, models.tiny_tokenizer(), width=16, max_length=64)


def test_positions_that_begin_after_the_paddings_are_not_counted():
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    roberta = RobertaModel(
        RobertaConfig(vocab_size=260, max_position_embeddings=66, pad_token_id=1, **sizes)
    ).eval()
    ids = torch.full((1, 64), 5)
    assert roberta(input_ids=ids).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 65), 5))
    distill.check_fits(roberta, max_length=64)
    with pytest.raises(ValueError, match="at most 64, the positions of the student, got 65"):
        distill.check_fits(roberta, max_length=65)
    config = distill.student_config(roberta, 0.5)
    assert config.max_position_embeddings == 64
    assert distill.cut_student(roberta, config).config.pad_token_id == 1


def test_a_teacher_without_a_number_of_positions_has_students():
    sizes = {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16, "num_layers": 4}
    teacher = T5EncoderModel(T5Config(vocab_size=1200, pad_token_id=0, **sizes))
    config = distill.student_config(teacher, 0.3, vocabulary=600)
    assert config.max_position_embeddings in (128, 256)
    distill.new_student(config, seed=0)


def test_a_decoder_whose_end_token_is_its_teachers_is_refused():
    teacher = models.tiny_twin("llama", causal=True)
    student = models.tiny_twin("llama", causal=True, seed=1)
    student.generation_config.eos_token_id = [2, 128001]
    pairs = [[1, 5, 6]], [[7, 2]]
    with pytest.raises(ValueError, match="eos_token_id: 128001"):
        distill.distill_decoder(student, teacher, *pairs, causal.Recipe(steps=1))
    student.generation_config.eos_token_id = 2
    assert torch.isfinite(
        torch.tensor(distill.distill_decoder(student, teacher, *pairs, causal.Recipe(steps=1)))
    )
