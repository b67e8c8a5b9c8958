"""L3Prune as published, against a recomputation in plain torch from its description."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from overparam import models
from overparam.compress import depth
from overparam.data.published import Triplet
from overparam.models.reading import recipe as recipes
from overparam.models.reading.tokens import batches
from overparam.train import contrastive

WORDS = [
    "light",
    "water",
    "earth",
    "heaven",
    "night",
    "morning",
    "river",
    "garden",
    "stone",
    "bread",
    "shepherd",
    "king",
    "prophet",
    "city",
    "temple",
]
CHAT = "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>{% endfor %}"
ASKED, GIVEN = "Find the verse that says the same", "Say the same"


def made(number, asked=None, given=None):
    return [
        Triplet(
            f"the {WORDS[i % 15]} of the {WORDS[(3 * i + 1) % 15]} {i}",
            f"{WORDS[(3 * i + 1) % 15]} and {WORDS[i % 15]} were {i} there",
            f"no {WORDS[(i + 7) % 15]} for the {WORDS[(5 * i + 2) % 15]}",
            "a",
            asked,
            given if i % 2 else None,
        )
        for i in range(number)
    ]


def byte_tokenizer(single=None, *, template=None):
    """The byte tokenizer with another arrangement of special tokens, and perhaps a chat template."""
    tokenizer = models.tiny_tokenizer()
    if single is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer():
    """Merges of bytes, spaces joined to the word that follows: a text alone has other tokens than after a space."""
    backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [f" {word} {word} {ASKED.lower()}" for word in WORDS] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=sorted({c for text in texts for c in text if c != " "} | {"Ġ", ";", "F"}),
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


TOKENIZERS = {
    "bos": byte_tokenizer,
    "none": lambda: byte_tokenizer("$A"),
    "chat": lambda: byte_tokenizer(template=CHAT),
    "chat without bos": lambda: byte_tokenizer("$A", template=CHAT),
    "merges": merging_tokenizer,
}


def reference(model, tokenizer, triplets, *, batch_size, scale, head="", tail="", seed=42):
    """The loss of depths 1 … L: three forward passes a batch, every layer normed, pooled from the text on."""
    order = np.random.default_rng(seed).permutation(len(triplets))[: len(triplets) // batch_size * batch_size]
    norm = getattr(model, "norm", None)
    losses = []
    for start in range(0, len(order), batch_size):
        batch = [triplets[i] for i in order[start : start + batch_size]]
        sides = [
            [(t.query_instruction, t.query) for t in batch],
            [(t.document_instruction, t.positive) for t in batch],
            [(t.document_instruction, t.negative) for t in batch],
        ]
        embedded = []
        for side in sides:
            rows = [tokenizer(head + (f"{i}; " if i else "") + x + tail)["input_ids"] for i, x in side]
            kept = [len(tokenizer(x + tail, add_special_tokens=False)["input_ids"]) for _, x in side]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            with torch.no_grad():
                states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                normed = [state if norm is None else norm(state) for state in states[1:-1]] + [states[-1]]
            weights = torch.zeros(len(rows), width)
            for row, (tokens, n) in enumerate(zip(rows, kept, strict=True)):
                weights[row, len(tokens) - n : len(tokens)] = torch.arange(1, n + 1) / (n * (n + 1) / 2)
            embedded.append([(weights[..., None] * state).sum(1) for state in normed])
        layer = []
        for q, p, n in zip(*embedded, strict=True):
            cosines = torch.nn.functional.cosine_similarity(q[:, None], torch.cat([p, n])[None], dim=-1)
            layer.append(torch.nn.functional.cross_entropy(scale * cosines.double(), torch.arange(len(q))))
        losses.append(torch.stack(layer))
    return torch.stack(losses).mean(0).numpy()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("instructed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "phi3", "mistral", "bert"])
def test_the_published_loss_equals_a_recomputation_from_its_description(name, instructed, kind):
    model, tokenizer = models.tiny_twin(name, num_hidden_layers=6), TOKENIZERS[kind]()
    triplets = made(21, ASKED, GIVEN) if instructed else made(21)
    around = {}
    if kind.startswith("chat"):
        bos = "<bos>" if kind == "chat without bos" else ""  # the other tokenizer adds its own
        around = {"head": f"{bos}<|start|>user\n", "tail": "<|end|>"}
    expected = reference(model, tokenizer, triplets, batch_size=8, scale=50.0, **around)
    found = depth.initial_loss(
        model, tokenizer, triplets, batch_size=8, recipe=depth.PUBLISHED, batch_tokens=512
    )
    assert found.scale == 50.0
    np.testing.assert_allclose(found.mean[1:], expected, rtol=1e-5, atol=1e-5)
    cuts = depth.l3prune(found)
    assert (cuts.small, cuts.large) == (expected[:3].argmin() + 1, expected[3:].argmin() + 4)


def test_the_recipes_differ_where_there_are_instructions_or_a_bos():
    model, triplets = models.tiny_twin("llama", num_hidden_layers=6), made(16, ASKED, GIVEN)
    published = dataclasses.replace(depth.PUBLISHED, scale=20.0)
    curves = [
        depth.initial_loss(model, TOKENIZERS["bos"](), triplets, batch_size=8, recipe=each).mean
        for each in (depth.PLAIN, dataclasses.replace(published, instructions=False), published)
    ]
    differences = [np.abs(curve / curves[0] - 1).max() for curve in curves[1:]]
    assert min(differences) > 1e-3
    without = [
        depth.initial_loss(model, TOKENIZERS["none"](), made(16), batch_size=8, recipe=each).mean
        for each in (depth.PLAIN, published)
    ]
    np.testing.assert_array_equal(*without)  # nothing stands before the text: nothing differs


def test_one_pass_gives_the_losses_of_several_scales():
    model, tokenizer, triplets = models.tiny_twin("qwen3"), models.tiny_tokenizer(), made(8)
    together = depth.initial_losses(model, tokenizer, triplets, scales=[20.0, 50.0], batch_size=4)
    for loss, scale in zip(together, (20.0, 50.0), strict=True):
        alone = depth.initial_loss(model, tokenizer, triplets, batch_size=4, scale=scale)
        for field in ("per_query", "mean", "low", "high"):
            np.testing.assert_array_equal(getattr(loss, field), getattr(alone, field))


def pooled(tokenizer, text, **options):
    """What is pooled of a text, decoded."""
    batch = batches(tokenizer, [text], **options)[0]
    return tokenizer.decode(batch.input_ids[0][batch.pooled_mask[0].bool()])


@pytest.mark.parametrize("single", [None, "$A", "<bos> $A <eos>", "<bos> <bos> $A"])
@pytest.mark.parametrize("instruction", [None, ASKED])
def test_the_text_and_what_follows_it_is_pooled(single, instruction):
    tokenizer = byte_tokenizer(single)
    text = "light and water"
    end = "<eos>" if single and single.endswith("<eos>") else ""
    assert pooled(tokenizer, text, instruction=instruction, recipe=depth.PUBLISHED) == text + end
    tokenizer.chat_template = CHAT
    assert pooled(tokenizer, text, instruction=instruction, recipe=depth.PUBLISHED) == f"{text}<|end|>{end}"


@pytest.mark.parametrize("single", [None, "$A", "<bos> $A <eos>"])
def test_a_long_text_is_cut_on_the_right_and_bos_and_instruction_stay_out(single):
    tokenizer = byte_tokenizer(single)
    kept = pooled(tokenizer, "abcdefghij" * 20, instruction=ASKED, recipe=depth.PUBLISHED, max_length=60)
    assert kept.removesuffix("<eos>").startswith("abcdefghij")
    batch = batches(tokenizer, ["abcdefghij" * 20], recipe=depth.PUBLISHED, max_length=60)[0]
    assert batch.input_ids.shape == (1, 60)
    with pytest.raises(ValueError, match="fills the window of 20"):
        pooled(tokenizer, "abc", instruction=ASKED, recipe=depth.PUBLISHED, max_length=20)


def test_weights_begin_where_the_recipe_says():
    model, tokenizer, text = models.tiny_twin("llama"), models.tiny_tokenizer(), "light and water"
    ids = tokenizer(f"{ASKED}; {text}")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    first = len(ids) - len(text)
    for start, weights_from in ((1, "first pooled token"), (first + 1, "first token")):
        recipe = dataclasses.replace(depth.PUBLISHED, weights_from=weights_from)
        weights = torch.arange(start, start + len(text)).float()
        expected = (weights[:, None] * hidden[first:]).sum(0) / weights.sum()
        found = depth.layer_embeddings(model, tokenizer, [text], instruction=ASKED, recipe=recipe)
        np.testing.assert_allclose(found[0, -1], expected, atol=1e-5)


def test_each_text_may_have_its_own_instruction():
    model, tokenizer, texts = models.tiny_twin("gemma3"), models.tiny_tokenizer(), ["light", "water", "bread"]
    asked = [ASKED, None, GIVEN]
    for recipe in depth.RECIPES.values():
        together = depth.layer_embeddings(model, tokenizer, texts, instruction=asked, recipe=recipe)
        alone = [
            depth.layer_embeddings(model, tokenizer, [text], instruction=one, recipe=recipe)[0]
            for text, one in zip(texts, asked, strict=True)
        ]
        np.testing.assert_allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="got 2 for 3"):
        depth.layer_embeddings(model, tokenizer, texts, instruction=asked[:2])


def test_a_template_of_ones_own_is_put_around_every_text():
    recipe = dataclasses.replace(depth.PUBLISHED, template="[INST] {text} [/INST]")
    tokenizer = models.tiny_tokenizer()
    batch = batches(tokenizer, [" light "], instruction=ASKED, recipe=recipe)[0]
    assert tokenizer.decode(batch.input_ids[0]) == f"<bos>[INST] {ASKED}; light [/INST]"
    assert pooled(tokenizer, " light ", instruction=ASKED, recipe=recipe) == "light [/INST]"
    with pytest.raises(ValueError, match="exactly once"):
        recipes.frame(tokenizer, "[INST]")


def test_a_chat_template_gives_one_bos_and_no_answer():
    for kind in ("chat", "chat without bos"):
        tokenizer = TOKENIZERS[kind]()
        batch = batches(tokenizer, ["light"], recipe=depth.PUBLISHED)[0]
        assert tokenizer.decode(batch.input_ids[0]) == "<bos><|start|>user\nlight<|end|>"
        assert pooled(tokenizer, "light", recipe=depth.PUBLISHED) == "light<|end|>"
    assert recipes.frame(models.tiny_tokenizer(), "own") == ("", "")


@pytest.mark.parametrize(
    "asks",
    [
        "{{ strftime_now('%Y-%m-%d') }}",
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}",
        "{%- set day = strftime_now('%B %d, %Y') %}{{ day }}",
    ],
)
def test_a_template_that_names_the_day_is_the_same_tomorrow(asks):
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = asks + " {{ messages[0]['content'] }}"
    head, _ = recipes.frame(tokenizer, "own")
    assert "2024" in head
    assert "26" in head


def test_a_template_that_refuses_a_user_alone_is_said():
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role required') }}"
    with pytest.raises(
        ValueError, match=r"not accept a single user message: System role required; give a template"
    ):
        batches(tokenizer, ["light"], recipe=depth.PUBLISHED)


RECIPE = contrastive.Recipe(steps=4, batch_size=4, learning_rate=1e-2, warmup=1, max_length=96)


@pytest.mark.parametrize("pooling", depth.POOLINGS)
def test_the_encoder_in_training_reads_and_pools_as_layer_embeddings(pooling):
    model, tokenizer = models.tiny_twin("gemma3", num_hidden_layers=2), byte_tokenizer(template=CHAT)
    encoder = contrastive.as_sentence_transformer(
        model, tokenizer, pooling=pooling, text_recipe=depth.PUBLISHED
    )
    texts = ["light and water", "bread"]
    for instruction, prompt in ((None, None), (ASKED, f"{ASKED}; ")):
        ours = depth.layer_embeddings(
            model,
            tokenizer,
            texts,
            pooling=pooling,
            instruction=instruction,
            recipe=depth.PUBLISHED,
            depths=[2],
        )
        np.testing.assert_allclose(encoder.encode(texts, prompt=prompt), ours[:, 0], atol=1e-5)


def test_training_puts_the_instructions_before_queries_and_documents(monkeypatch, tmp_path):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    seen = []
    original = MultipleNegativesRankingLoss.forward

    def spy(self, features, labels):
        seen.append(
            [{key: feature[key].clone() for key in ("input_ids", "pooled_mask")} for feature in features]
        )
        return original(self, features, labels)

    monkeypatch.setattr(MultipleNegativesRankingLoss, "forward", spy)
    model, tokenizer = models.tiny_twin("llama", num_hidden_layers=2), models.tiny_tokenizer()
    triplets = [dataclasses.replace(each, document_instruction=GIVEN) for each in made(8, ASKED)]
    trained = contrastive.train(
        model, tokenizer, triplets, RECIPE, text_recipe=depth.PUBLISHED, cache=tmp_path
    )
    monkeypatch.undo()
    texts = {"query": ASKED, "positive": GIVEN, "negative": GIVEN}
    for column, (side, instruction) in enumerate(texts.items()):
        ids, mask = seen[0][column]["input_ids"], seen[0][column]["pooled_mask"]
        for row, kept in zip(ids, mask, strict=True):
            assert tokenizer.decode(row, skip_special_tokens=True).startswith(f"{instruction}; ")
            assert tokenizer.decode(row[kept.bool()]) in {getattr(each, side) for each in triplets}
    ours = depth.layer_embeddings(trained.encoder[0].model, tokenizer, ["light"], recipe=depth.PUBLISHED)
    np.testing.assert_allclose(trained.encoder.encode(["light"]), ours[:, -1], atol=1e-5)
    again = contrastive.train(model, tokenizer, triplets, RECIPE, text_recipe=depth.PUBLISHED, cache=tmp_path)
    assert again.cached
    plain = contrastive.train(model, tokenizer, triplets, RECIPE, cache=tmp_path)
    assert not plain.cached
    assert np.mean(trained.losses) != np.mean(plain.losses)
