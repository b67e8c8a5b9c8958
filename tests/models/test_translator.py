import pytest
import torch

from overparam import models
from overparam.evaluate import prompts
from overparam.models import translator

TEXTS = ["Au commencement, Dieu créa les cieux.", "Im Anfang schuf Gott", "In the beginning God created"] * 20
SHAPE = {
    "hidden": 16,
    "layers": 2,
    "experts": 4,
    "top_k": 2,
    "expert_width": 8,
    "heads": 2,
    "key_value_heads": 1,
}


@pytest.fixture(scope="module")
def tokenizer():
    return translator.tokenizer(TEXTS, vocabulary=320)


def test_a_prompt_is_bos_source_and_tag(tokenizer):
    source = "In the beginning, créa"
    (prompt,) = prompts.tagged()([source], "en", "fr")
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<2fr>") != tokenizer.unk_token_id
    assert ids[1:-1] == tokenizer(source, add_special_tokens=False).input_ids  # as in training
    plain = tokenizer(translator.PLAIN + source).input_ids
    assert plain == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<lm>"), *ids[1:-1]]


@pytest.mark.parametrize("text", ["¿Qué? Él creó", "hätte größer", "perciocchè così", "日本 🙂"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_vocabulary_has_the_size_asked_for_and_is_the_same_again(tokenizer):
    assert len(tokenizer) == 320
    assert translator.tokenizer(TEXTS, vocabulary=320).get_vocab() == tokenizer.get_vocab()


def test_model_is_the_same_for_the_same_seed_and_leaves_the_caller_alone(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    shape = {"architecture": "qwen3_moe", "vocabulary": 320, **SHAPE}
    first, second, other = (translator.build(**shape, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.get_input_embeddings().weight
    counts = models.count_parameters(first)
    assert counts.expert == 2 * 4 * 3 * 16 * 8


def test_borrowed_embeddings_are_the_donors_seen_from_fewer_sides(tokenizer):
    donor, donor_tokenizer = models.load("tiny-llama")  # 32 dimensions, a token a byte
    model = translator.build(architecture="qwen3_moe", vocabulary=320, seed=1, **SHAPE)
    before = model.get_input_embeddings().weight.detach().clone()
    translator.borrow_embeddings(model, tokenizer, donor, donor_tokenizer)
    table = model.get_input_embeddings().weight.detach()
    rows = [row for row in range(10, 320) if (text := tokenizer.decode([row])).strip() and "�" not in text]
    kept = sorted(set(range(320)) - set(rows))
    assert torch.equal(table[kept], before[kept])  # special tokens, and parts of characters
    assert table[rows].std() == pytest.approx(0.03, rel=1e-3)
    means = torch.stack(
        [
            donor.embed_tokens.weight[
                donor_tokenizer(tokenizer.decode([row]), add_special_tokens=False)["input_ids"]
            ]
            .detach()
            .mean(0)
            for row in rows
        ]
    )
    means = means / means.norm(dim=-1, keepdim=True)
    centred = means - means.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = u[:, :16] * s[:16]  # principal components: distances stay up to one scale
    ours, theirs = torch.cdist(table[rows], table[rows]), torch.cdist(expected, expected)
    scale = (ours * theirs).sum() / (theirs * theirs).sum()
    torch.testing.assert_close(ours, scale * theirs, atol=2e-3, rtol=1e-2)
