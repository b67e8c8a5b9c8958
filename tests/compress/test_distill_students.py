import copy
import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    MPNetConfig,
    MPNetModel,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
)

from overparam import models
from overparam.compress import depth, distill
from overparam.models.tables import principal_rows

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["king", "queen", "potato", "prince", "river", "carrot", "doctor", "ocean", "violin", "winter"]
SUBJECTS = [*WORDS, "the old man", "a quick brown fox", "every student", "no woman", "some travellers"]
VERBS = ["reads", "wrote about", "remembered", "crossed over to", "was unhappy without", "questioned"]
ENDS = ["yesterday", "in spite of the weather", "before breakfast", "because nobody listened", "quietly"]
TEXTS = [  # many ties between pieces
    f"{a} {verb} {b}, {end}; {b}!"
    for (a, verb, b), end in zip(
        itertools.product(SUBJECTS, VERBS, SUBJECTS), itertools.cycle(ENDS), strict=False
    )
]
SIZE = 200
EXPECTED = {  # share -> hidden, layers, heads, feed-forward, vocabulary, positions
    0.5: (320, 6, 10, 928, 16384, 256),
    0.25: (256, 4, 8, 688, 12288, 256),
    0.1: (192, 3, 6, 512, 6144, 256),
    0.05: (128, 3, 4, 488, 4096, 256),
}


@pytest.fixture(scope="module")
def minilm():
    return models.load("all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def mpnet():
    with torch.device("meta"):
        return MPNetModel(MPNetConfig(vocab_size=30527, max_position_embeddings=514))


@pytest.fixture(scope="module")
def retrained(minilm):
    return distill.retrained_tokenizer(minilm[1], TEXTS, SIZE)


def shape(config):
    return (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )


def bert(**fields):
    """A small configuration that a tiny-bert (32 dimensions, 4 heads, 4 layers, 48 neurons) contains."""
    defaults = {
        "vocab_size": 260,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**defaults, **fields})


def random_ids(vocabulary, seed=0):
    return torch.randint(5, vocabulary, (3, 20), generator=torch.Generator().manual_seed(seed))


def states(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("head_size", [0, 7_700, 150_000])
@pytest.mark.parametrize("share", EXPECTED)
def test_student_has_its_share_of_the_teachers_parameters(minilm, share, head_size):
    teacher = models.count_parameters(minilm[0]).total
    config = distill.student_config(minilm[0], share, head_size=head_size)
    counts = models.count_parameters(distill.new_student(config, seed=0))
    assert counts.total + head_size == pytest.approx(share * teacher, rel=0.03)
    assert counts.block >= 0.35 * counts.total
    assert config.intermediate_size % 8 == 0
    assert config.hidden_size // config.num_attention_heads == 32  # as wide as the teacher's
    if share <= 0.25:
        assert config.vocab_size < 30522


@pytest.mark.parametrize("share", EXPECTED)
def test_shapes_are_those_that_are_published(minilm, share):
    assert shape(distill.student_config(minilm[0], share)) == EXPECTED[share]


def test_a_tenth_computes_at_most_a_quarter(minilm):
    def work(config, tokens=64):
        h = config.hidden_size
        matrices = 4 * h * h + 2 * h * config.intermediate_size
        return config.num_hidden_layers * (matrices + 2 * tokens * h)  # multiplications a token

    config = distill.student_config(minilm[0], 0.1)
    assert work(config) <= work(minilm[0].config) / 4
    counts = models.count_parameters(distill.new_student(config, seed=0))
    assert 0.4 <= counts.block / counts.total <= 0.6


@pytest.mark.parametrize(("share", "hidden", "vocabulary"), [(0.1, 320, 16384), (0.2, 384, 30527)])
def test_mpnet_has_students_with_heads_of_its_width(mpnet, share, hidden, vocabulary):
    config = distill.student_config(mpnet, share)
    counts = models.count_parameters(distill.new_student(config, seed=0))
    assert counts.total == pytest.approx(share * models.count_parameters(mpnet).total, rel=0.03)
    assert (config.hidden_size, config.vocab_size, config.pad_token_id) == (hidden, vocabulary, 1)
    assert config.hidden_size == 64 * config.num_attention_heads


def test_shares_up_to_nearly_all_are_met(minilm):
    total = models.count_parameters(minilm[0]).total
    for share in np.arange(0.01, 1.0, 0.01):
        config = distill.student_config(minilm[0], float(share))
        with torch.device("meta"):
            count = models.count_parameters(distill.new_student(config, seed=0)).total
        assert count == pytest.approx(share * total, rel=0.03)
        assert config.intermediate_size >= 2 * config.hidden_size


@pytest.mark.parametrize("vocabulary", [2000, 8000, 30522])
def test_a_wished_vocabulary_is_kept(minilm, vocabulary):
    config = distill.student_config(minilm[0], 0.2, vocabulary=vocabulary)
    count = models.count_parameters(distill.new_student(config, seed=0)).total
    assert config.vocab_size == vocabulary
    assert count == pytest.approx(0.2 * models.count_parameters(minilm[0]).total, rel=0.03)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_tiny_twins_have_students_that_can_be_cut_from_them(share):
    teacher, tokenizer = models.load("tiny-bert")
    config = distill.student_config(teacher, share)
    student = distill.cut_student(teacher, config)
    total = models.count_parameters(teacher).total
    assert models.count_parameters(student).total == pytest.approx(share * total, rel=0.03)
    ids = tokenizer(["a student of a tiny teacher"], return_tensors="pt").input_ids
    assert states(student, ids).isfinite().all()


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.0, {}, "between 0 and 1, got 0.0"),
        (1.0, {}, "between 0 and 1, got 1.0"),
        (10, {}, "between 0 and 1, got 10"),
        (float("nan"), {}, "between 0 and 1, got nan"),
        (0.1, {"vocabulary": 0}, r"vocabulary must be in 1\.\.30522, got 0"),
        (0.1, {"vocabulary": 30523}, r"vocabulary must be in 1\.\.30522, got 30523"),
        (0.1, {"head_size": -1}, "head_size must be at least 0, got -1"),
        (
            0.0001,
            {},
            r"share of 0\.0001 of the 22,713,216 .* \(2,271\): the smallest has .* share of at least",
        ),
        (0.005, {"vocabulary": 30522}, "smallest with 30,522 tokens has .* or a smaller vocabulary"),
        (0.01, {"head_size": 300_000}, "a head of 300,000 has .* or a smaller head"),
    ],
)
def test_impossible_students_are_refused_with_advice(minilm, share, options, message):
    with pytest.raises(ValueError, match=message):
        distill.student_config(minilm[0], share, **options)


@pytest.mark.parametrize("options", [{}, {"vocabulary": 5000}, {"head_size": 100_000}])
def test_the_share_that_the_error_names_works(minilm, options):
    with pytest.raises(ValueError) as error:
        distill.student_config(minilm[0], 1e-5, **options)
    share = float(str(error.value).split("share of at least ")[1].split()[0])
    config = distill.student_config(minilm[0], share, **options)
    count = models.count_parameters(distill.new_student(config, seed=0)).total + options.get("head_size", 0)
    assert count == pytest.approx(share * models.count_parameters(minilm[0]).total, rel=0.03)


def test_a_teacher_smaller_than_any_student_is_named():
    teacher = models.tiny_twin("bert", hidden_size=4, num_attention_heads=1)
    with pytest.raises(ValueError, match="4 layers and hidden size 4 is smaller than any student"):
        distill.student_config(teacher, 0.5)


def test_student_reloads_exactly(minilm, tmp_path):
    config = distill.student_config(minilm[0], 0.05)
    student = distill.new_student(config, seed=3)
    student.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert shape(again.config) == shape(config)
    assert models.count_parameters(again) == models.count_parameters(student)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    plain, ids = AutoModel.from_pretrained(tmp_path), random_ids(4096)
    torch.testing.assert_close(states(plain, ids), states(student, ids), atol=0, rtol=0)
    with_pooler = models.count_parameters(plain).total  # what somebody else sees keeps the share too
    assert with_pooler == pytest.approx(0.05 * models.count_parameters(minilm[0]).total, rel=0.03)


def test_student_is_the_same_for_the_same_seed_and_leaves_the_caller_alone():
    config = bert()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (distill.new_student(config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embeddings.word_embeddings.weight, other.embeddings.word_embeddings.weight)
    assert not first.training
    assert first.config is not config


def test_retrained_tokenizer_has_the_size_and_the_special_tokens(minilm, retrained):
    assert len(retrained) == SIZE == len(set(retrained.get_vocab().values()))
    assert type(retrained) is type(minilm[1])
    assert retrained.convert_ids_to_tokens(range(5)) == SPECIALS
    assert set(retrained.all_special_tokens) == set(SPECIALS)
    assert retrained.pad_token_id == distill.student_config(minilm[0], 0.1).pad_token_id


def test_retrained_tokenizer_gives_texts_back(retrained):
    text = "Every queen REMEMBERED the winter, the ocean, a reed!"
    ids = retrained(text).input_ids
    assert (ids[0], ids[-1]) == (retrained.cls_token_id, retrained.sep_token_id)
    assert retrained.unk_token_id not in ids
    assert retrained.decode(ids, skip_special_tokens=True) == text.lower()
    assert "##" not in retrained.decode(retrained("##a").input_ids, skip_special_tokens=True)
    assert retrained.tokenize("king river") == ["king", "river"]


def test_retrained_tokenizer_is_the_same_again(minilm, retrained):
    # the library alone numbers pieces as its hash map comes: two orders in a few runs of one process
    for texts in (TEXTS, list(reversed(TEXTS)), TEXTS, iter(TEXTS)):
        assert distill.retrained_tokenizer(minilm[1], texts, SIZE).get_vocab() == retrained.get_vocab()


def test_padding_and_truncation_of_the_packaged_tokenizer_stay_behind(minilm, retrained, tmp_path):
    teacher = minilm[1]
    before = (teacher.backend_tokenizer.to_str(), teacher.model_max_length)
    new = distill.retrained_tokenizer(teacher, TEXTS, SIZE, max_length=96)
    assert (teacher.backend_tokenizer.to_str(), teacher.model_max_length) == before
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["padding"] is stored["truncation"] is None
    assert not {"max_length", "name_or_path", "vocab_file"} & set(
        json.loads((tmp_path / "tokenizer_config.json").read_text())
    )
    long = "king " * 300
    assert again.get_vocab() == new.get_vocab() == retrained.get_vocab()
    for tokenizer in (new, again):
        assert tokenizer.model_max_length == 96
        assert len(tokenizer("king", verbose=False).input_ids) == 3
        assert len(tokenizer(long, verbose=False).input_ids) == 302
        assert len(tokenizer(long, truncation=True).input_ids) == 96
        batch = tokenizer(["king", "king queen"], padding=True, return_tensors="pt")
        assert batch.input_ids.shape == (2, 4)
    assert retrained.model_max_length == 256  # as many as a student has positions


def mpnet_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<s>", "<pad>", "</s>", "[UNK]", *letters, *(f"##{letter}" for letter in letters), "<mask>"]
    return MPNetTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@pytest.mark.parametrize(("make", "size"), [(mpnet_tokenizer, 150), (models.tiny_tokenizer, 320)])
def test_other_kinds_keep_their_special_tokens_and_template(make, size):
    teacher = make()
    new, again = (distill.retrained_tokenizer(teacher, TEXTS, size) for _ in range(2))
    assert type(new) is type(teacher)
    assert len(new) == size
    assert new.get_vocab() == again.get_vocab()
    assert new.pad_token_id == teacher.pad_token_id
    assert new.special_tokens_map == teacher.special_tokens_map
    text = "no woman crossed over to king"
    ids = new(text).input_ids
    ours, theirs = (new.convert_ids_to_tokens(ids), teacher.convert_ids_to_tokens(teacher(text).input_ids))
    special = set(teacher.all_special_tokens)
    assert [token in special for token in ours[:2]] == [token in special for token in theirs[:2]]
    assert ours[0] == theirs[0]
    assert new.decode(ids, skip_special_tokens=True) == text
    assert len(ours) < len(theirs)


def test_a_unigram_tokenizer_is_trained_with_a_word_of_warning(capsys):
    backend = Tokenizer(tokenizer_models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<pad>"]
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=68, special_tokens=specials, unk_token="<unk>", show_progress=False
        ),
    )
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    small = distill.retrained_tokenizer(teacher, TEXTS, 60)
    assert len(small) == 60
    assert "Unigram" in "".join(capsys.readouterr())


def test_rare_characters_beyond_the_limit_become_unknown(minilm):
    rare = [chr(0x4E00 + index) for index in range(1100)]
    texts = [*(f"{a} {a} {a}" for a in rare[:990]), *rare[990:], *TEXTS]
    tokenizer = distill.retrained_tokenizer(minilm[1], texts, 1100)
    again = distill.retrained_tokenizer(minilm[1], reversed(texts), 1100)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.tokenize(rare[0]) == [rare[0]]
    assert tokenizer.tokenize(rare[-1]) == ["[UNK]"]


def slow_tokenizer():
    tokenizer = copy.copy(models.tiny_tokenizer())
    tokenizer.__class__ = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})
    return tokenizer


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], SIZE, "there are no texts"),
        (["", "  "], SIZE, "there are no texts"),
        (TEXTS, 20, r"size must be at least \d+ for the special tokens and the alphabet .* got 20"),
        (["king"], 1000, r"1 texts have only \d+ pieces, not 1000"),
    ],
)
def test_tokenizers_that_cannot_be_trained_are_refused(minilm, texts, size, message):
    with pytest.raises(ValueError, match=message):
        distill.retrained_tokenizer(minilm[1], texts, size)


def test_the_size_that_the_error_names_works(minilm):
    with pytest.raises(ValueError) as error:
        distill.retrained_tokenizer(minilm[1], TEXTS, 20)
    size = int(str(error.value).split("at least ")[1].split()[0])
    assert len(distill.retrained_tokenizer(minilm[1], TEXTS, size)) == size


def test_only_fast_tokenizers_can_be_trained_again():
    with pytest.raises(ValueError, match="SlowTokenizer is not a fast tokenizer"):
        distill.retrained_tokenizer(slow_tokenizer(), TEXTS, SIZE)


def test_cost_counts_tokens_and_unknown_ones():
    def tokenizer(*tokens):
        return BertTokenizer(vocab={token: index for index, token in enumerate([*SPECIALS, *tokens])})

    reference = tokenizer("the", "cat", "sat", "dog")
    small = tokenizer("the", "c", "##a", "##t", "sat")
    # the cat sat | the c ##a ##t sat;   the dog | the [UNK];   fox | [UNK] in both
    cost = distill.cost(small, reference, ["the cat sat", "the dog", "fox"])
    assert cost == distill.VocabularyCost(8 / 6, 2 / 8, 1 / 6)
    assert distill.cost(reference, reference, ["the cat"]) == distill.VocabularyCost(1.0, 0.0, 0.0)


def test_cost_counts_whole_texts_and_no_padding(minilm, retrained):
    cost = distill.cost(retrained, minilm[1], ["king " * 600, "queen"])
    assert cost == distill.VocabularyCost(1.0, 0.0, 0.0)


def test_cost_without_an_unknown_token_is_no_unknown_share():
    tokenizer = models.tiny_tokenizer()
    tokenizer.unk_token = None
    assert distill.cost(tokenizer, tokenizer, ["日本"]) == distill.VocabularyCost(1.0, 0.0, 0.0)


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), ([" ", ""], "only white space in the 2")])
def test_cost_of_nothing_is_refused(retrained, texts, message):
    with pytest.raises(ValueError, match=message):
        distill.cost(retrained, retrained, texts)


def test_a_cut_of_full_size_is_the_teacher(minilm):
    teacher = minilm[0]
    student = distill.cut_student(teacher, teacher.config)
    ids = random_ids(30522)
    torch.testing.assert_close(states(student, ids), states(teacher, ids), atol=0, rtol=0)
    assert student.pooler is None


def test_a_cut_of_mpnet_is_mpnet_without_relative_positions():
    shared = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    teacher = MPNetModel(
        MPNetConfig(vocab_size=100, max_position_embeddings=66, layer_norm_eps=1e-12, **shared)
    ).eval()
    torch.nn.init.zeros_(teacher.encoder.relative_attention_bias.weight)
    for name, parameter in teacher.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "Norm.weight" in name else 0.0, std=0.2)
    student = distill.cut_student(teacher, bert(vocab_size=100, **shared))
    ids = random_ids(100)
    torch.testing.assert_close(states(student, ids), states(teacher, ids), atol=1e-6, rtol=1e-5)


def test_cutting_heads_and_neurons_that_do_nothing_changes_nothing():
    teacher = models.tiny_twin("bert", seed=1)
    with torch.no_grad():
        for block in teacher.encoder.layer:
            block.attention.self.value.weight[8:24] = 0  # heads 1 and 2
            block.attention.self.value.bias[8:24] = 0
            block.output.dense.weight[:, ::2] = 0
    student = distill.cut_student(
        teacher, bert(hidden_size=32, num_hidden_layers=4, intermediate_size=24, num_attention_heads=4)
    )
    ids = random_ids(260)
    torch.testing.assert_close(states(student, ids), states(teacher, ids), atol=1e-6, rtol=1e-5)
    narrow = distill.cut_student(teacher, bert(hidden_size=16, num_hidden_layers=4, num_attention_heads=2))
    dimensions = torch.argsort(-teacher.embeddings.word_embeddings.weight.norm(dim=0))[:16].sort().values
    for ours, theirs in zip(narrow.encoder.layer, teacher.encoder.layer, strict=True):
        kept = [*range(8), *range(24, 32)]  # heads 0 and 3
        for part in ("query", "key", "value"):
            source = getattr(theirs.attention.self, part)
            target = getattr(ours.attention.self, part)
            torch.testing.assert_close(target.weight, source.weight[kept][:, dimensions])
            torch.testing.assert_close(target.bias, source.bias[kept])
        source = theirs.attention.output
        torch.testing.assert_close(
            ours.attention.output.dense.weight, source.dense.weight[dimensions][:, kept]
        )
        torch.testing.assert_close(
            ours.attention.output.LayerNorm.weight, source.LayerNorm.weight[dimensions]
        )
        torch.testing.assert_close(
            ours.intermediate.dense.weight, theirs.intermediate.dense.weight[1::2][:, dimensions]
        )
        torch.testing.assert_close(ours.output.dense.weight, theirs.output.dense.weight[dimensions][:, 1::2])


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_blocks_are_spread_evenly(count, kept):
    teacher = models.tiny_twin("bert")
    for index, block in enumerate(teacher.encoder.layer):
        torch.nn.init.constant_(block.output.dense.bias, float(index))
    student = distill.cut_student(teacher, bert(num_hidden_layers=count))
    assert [int(block.output.dense.bias[0]) for block in student.encoder.layer] == kept


def test_cut_student_holds_the_teachers_rows(minilm, retrained):
    teacher, teacher_tokenizer = minilm
    config = distill.student_config(teacher, 0.1, vocabulary=SIZE)
    student = distill.cut_student(teacher, config, tokenizer=retrained, teacher_tokenizer=teacher_tokenizer)
    theirs, ours = (m.embeddings.word_embeddings.weight.detach().numpy() for m in (teacher, student))
    norms = np.sqrt((theirs.astype(np.float64) ** 2).sum(0))
    dimensions = np.sort(np.argsort(-norms)[: config.hidden_size])
    known = teacher_tokenizer.get_vocab()
    shared = [token for token in retrained.get_vocab() if token in known]
    assert {*SPECIALS, "king", "queen", "##s"} < set(shared)
    for token in shared:
        row = ours[retrained.convert_tokens_to_ids(token)]
        np.testing.assert_array_equal(row, theirs[known[token]][dimensions])
    split = [token for token in retrained.get_vocab() if token not in known]
    assert split
    for token in split:
        pieces = teacher_tokenizer.tokenize(token.removeprefix("##"))
        if token.startswith("##") and "##" + pieces[0] in known:
            pieces[0] = "##" + pieces[0]
        expected = theirs[[known[piece] for piece in pieces]][:, dimensions].mean(0)
        np.testing.assert_allclose(ours[retrained.convert_tokens_to_ids(token)], expected, atol=1e-6)
    positions = teacher.embeddings.position_embeddings.weight[:256, dimensions]
    torch.testing.assert_close(student.embeddings.position_embeddings.weight, positions)
    ids = retrained(TEXTS[:2], padding=True, return_tensors="pt").input_ids
    assert states(student, ids).isfinite().all()
    assert shape(student.config) == shape(config)


def test_neurons_beyond_the_teachers_are_random_by_seed():
    teacher, config = models.tiny_twin("bert"), bert(intermediate_size=64)
    first, again, other = (distill.cut_student(teacher, config, seed=seed) for seed in (0, 0, 1))
    ours, same, others = (m.encoder.layer[0].intermediate.dense.weight for m in (first, again, other))
    assert torch.equal(ours, same)
    assert torch.equal(ours[:48], others[:48])
    assert not torch.equal(ours[48:], others[48:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 40, "num_attention_heads": 5}, "it has 40 hidden size, the teacher 32"),
        ({"num_hidden_layers": 5}, "it has 5 layers, the teacher 4"),
        ({"max_position_embeddings": 513}, "it has 513 positions, the teacher 512"),
        ({"num_attention_heads": 8}, "it has 8 heads, the teacher 4"),
        ({"num_attention_heads": 1}, "heads have 16 dimensions, the teacher's 8"),
        ({"vocab_size": 100}, "the student has 100 tokens, the teacher 260; give both tokenizers"),
    ],
)
def test_students_that_the_teacher_does_not_contain_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        distill.cut_student(models.tiny_twin("bert"), bert(**fields))


def test_cutting_needs_both_tokenizers_and_blocks_it_knows(retrained):
    teacher = models.tiny_twin("bert")
    with pytest.raises(ValueError, match="needs teacher_tokenizer too"):
        distill.cut_student(teacher, bert(), tokenizer=retrained)
    with pytest.raises(ValueError, match=f"the tokenizer has {SIZE} tokens, the student's table 100 rows"):
        distill.cut_student(
            teacher, bert(vocab_size=100), tokenizer=retrained, teacher_tokenizer=models.tiny_tokenizer()
        )
    with pytest.raises(ValueError, match="not from ModernBertEncoderLayer"):
        distill.cut_student(models.tiny_twin("modernbert"), bert())


@pytest.fixture(scope="module")
def borrowed(minilm, retrained):
    """A student of 64 dimensions before and after, and the teacher's outputs for its tokens."""
    config = bert(vocab_size=SIZE + 8, hidden_size=64, num_attention_heads=2)
    before = distill.new_student(config, seed=0)
    after = copy.deepcopy(before)
    distill.borrow_token_vectors(after, retrained, *minilm)
    return [m.embeddings.word_embeddings.weight.detach() for m in (before, after)]


def test_borrowed_vectors_know_what_words_mean(borrowed, retrained):
    unit = torch.nn.functional.normalize(borrowed[1], dim=-1)
    king, queen, potato, carrot = (
        unit[retrained.convert_tokens_to_ids(word)] for word in ("king", "queen", "potato", "carrot")
    )
    assert king @ queen > king @ potato + 0.2
    assert potato @ carrot > queen @ carrot + 0.2
    before = torch.nn.functional.normalize(borrowed[0], dim=-1)
    ids = retrained.convert_tokens_to_ids(["king", "queen"])
    assert abs(before[ids[0]] @ before[ids[1]]) < 0.5  # the random table does not


def test_special_rows_and_unused_rows_are_left_alone(borrowed):
    before, after = borrowed
    kept = [*range(5), *range(SIZE, SIZE + 8)]
    assert torch.equal(after[kept], before[kept])
    assert (after[5:SIZE] != before[5:SIZE]).any(dim=1).all()
    assert after[5:SIZE].std() == pytest.approx(float(before[5:SIZE].std()), rel=1e-4)


def test_borrowed_vectors_are_the_principal_components_of_the_teachers_outputs(minilm, borrowed, retrained):
    tokens = [token.removeprefix("##") for token in retrained.convert_ids_to_tokens(range(5, SIZE))]
    outputs = depth.layer_embeddings(*minilm, tokens, pooling="mean", depths=[6])[:, 0].astype(np.float64)
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(outputs - outputs.mean(0), full_matrices=False)
    expected = u[:, :64] * s[:64]
    ours = borrowed[1][5:SIZE].double().numpy()
    expected *= ours.std() / expected.std()
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=1e-4 * np.abs(ours @ ours.T).max())


def test_borrowing_leaves_the_teacher_and_the_random_state_alone():
    teacher, tokenizer = models.load("tiny-bert")
    weights = copy.deepcopy(teacher.state_dict())
    tables = []
    for training, seed in ((False, 0), (True, 0), (False, 1)):
        teacher.train(training)  # dropout would show
        student = distill.new_student(bert(), seed=0)
        torch.manual_seed(5)
        distill.borrow_token_vectors(student, tokenizer, teacher, tokenizer, seed=seed)
        drawn = torch.rand(1)
        assert teacher.training is training
        tables.append(student.embeddings.word_embeddings.weight.detach())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])
    ascii_rows = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    distances = [torch.pdist(table[ascii_rows]) for table in (tables[0], tables[2])]
    torch.testing.assert_close(*distances, atol=1e-4, rtol=1e-3)  # only rotated
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"vocab_size": 100}, {}, "the tokenizer has 260 tokens, the student's table 100 rows"),
        ({}, {"pooling": "max"}, "pooling must be one of .* got 'max'"),
        ({"hidden_size": 64}, {}, "of 32 dimensions have fewer than 64 principal components"),
    ],
)
def test_vectors_that_cannot_be_borrowed_are_refused(fields, options, message):
    teacher, tokenizer = models.load("tiny-bert")
    student = distill.new_student(bert(**fields), seed=0)
    with pytest.raises(ValueError, match=message):
        distill.borrow_token_vectors(student, tokenizer, teacher, tokenizer, **options)


def test_fewer_rows_than_dimensions_have_no_components():
    with pytest.raises(
        ValueError, match=r"10 vectors of 32 dimensions have fewer than 16 .* at most 10 dimensions"
    ):
        principal_rows(torch.randn(10, 32), 16, scale=0.02)
