import random

import pytest
import torch

from overparam import models
from overparam.data.parallel import Pair
from overparam.evaluate import prompts
from overparam.evaluate.generation import Generation, default_limit, generate, translate

EXAMPLES = [Pair("a", "One thing.", "Une chose."), Pair("b", "Two\nthings.", "Deux choses.")]


@pytest.fixture(scope="module")
def twin():
    return models.tiny_twin("llama", causal=True), models.tiny_tokenizer()


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefg é日", k=rng.randint(1, 60))).strip() or "x" for _ in range(24)]


def biased(token, strength):
    """A twin that likes to write one token: at the greatest strength, nothing else."""
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(token)] = strength
    return model, tokenizer


def greedy(model, ids, limit, ends):
    """The plain loop: no batch, no padding, no cache."""
    new = []
    for _ in range(limit):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] in ends:
            break
    return new


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "qwen3", "gpt_oss", "qwen3_moe"])
def test_greedy_output_is_that_of_each_prompt_alone(model_type, texts):
    model, tokenizer = models.tiny_twin(model_type, causal=True), models.tiny_tokenizer()
    with torch.no_grad():  # the end token becomes likely enough to be met now and then
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 2.5
    together = generate(model, tokenizer, texts, max_new_tokens=40)
    for text, mine in zip(texts, together, strict=True):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        expected = greedy(model, ids, 40, {tokenizer.eos_token_id})
        assert mine.ended == (expected[-1] == tokenizer.eos_token_id)
        assert mine.n_tokens == len(expected)
        assert mine.ids == expected[: len(expected) - mine.ended]
        assert mine.text == tokenizer.decode(mine.ids, skip_special_tokens=True).strip()
    assert 0 < sum(one.ended for one in together) < len(texts)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_change_nothing(twin, texts, num_beams):
    alone = generate(*twin, texts, max_new_tokens=12, num_beams=num_beams, batch_tokens=1)
    assert generate(*twin, texts, max_new_tokens=12, num_beams=num_beams) == alone
    assert generate(*twin, texts, max_new_tokens=12, num_beams=num_beams, batch_tokens=300) == alone


def test_beams_find_likelier_texts(twin, texts):
    def likelihood(text, one):
        model, tokenizer = twin
        ids = [*tokenizer(text).input_ids, *one.ids]
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - len(one.ids), len(ids)))

    with torch.no_grad():
        sums = [
            sum(map(likelihood, texts, generate(*twin, texts, max_new_tokens=8, num_beams=beams)))
            for beams in (1, 4)
        ]
    assert sums[1] > sums[0]


def test_every_prompt_has_its_own_limit(texts):
    model, tokenizer = biased("a", 1000.0)
    found = generate(model, tokenizer, texts, max_new_tokens=lambda tokens: tokens // 2 + 1)
    for text, one in zip(texts, found, strict=True):
        limit = len(tokenizer(text).input_ids) // 2 + 1
        assert one == Generation("a" * limit, one.ids, False, limit)
        assert len(one.ids) == limit
    assert {one.n_tokens for one in generate(model, tokenizer, ["ab"])} == {2 * 3 + 20}
    assert default_limit(3) == 26


def test_a_checkpoints_own_settings_do_not_sample(twin, texts):
    expected = generate(*twin, texts, max_new_tokens=8)
    model, tokenizer = models.tiny_twin("llama", causal=True), models.tiny_tokenizer()
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.repetition_penalty = True, 5.0, 3, 9.0
    assert generate(model, tokenizer, texts, max_new_tokens=8) == expected


def test_an_immediate_end_is_an_empty_text():
    model, tokenizer = biased("<eos>", 1000.0)
    assert generate(model, tokenizer, ["ab", "c"]) == [Generation("", [], True, 1)] * 2


@pytest.mark.parametrize("num_beams", [1, 2])
def test_few_shot_answers_end_with_their_line(texts, num_beams):
    model, tokenizer = biased("Ċ", 0.22)  # the byte of a new line
    prompter = prompts.few_shot(EXAMPLES)
    found = translate(
        model,
        tokenizer,
        texts,
        source_language="en",
        target_language="fr",
        prompter=prompter,
        max_new_tokens=30,
        num_beams=num_beams,
    )
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    for prompt, one in zip(prompter(texts, "en", "fr"), found, strict=True):
        assert "\n" not in one.text
        if newline in one.ids:
            assert one.ended
            assert one.ids.index(newline) == len(one.ids) - 1 == one.n_tokens - 1
        if num_beams == 1:
            expected = greedy(model, tokenizer(prompt).input_ids, 30, {newline, tokenizer.eos_token_id})
            assert one.n_tokens == len(expected)
            assert one.ended == (expected[-1] in (newline, tokenizer.eos_token_id))
            text = tokenizer.decode(expected, skip_special_tokens=True)
            assert one.text == text.split("\n")[0].strip()
    assert 0 < sum(newline in one.ids for one in found) < len(found)


def test_prompts_read_as_documented():
    assert prompts.tagged()(["A b.", "C."], "en", "fr") == ["A b.<2fr>", "C.<2fr>"]
    prompter = prompts.few_shot(EXAMPLES)
    assert prompter(["Three."], "en", "fr") == [
        "English: One thing.\nFrench: Une chose.\n\nEnglish: Two things.\nFrench: Deux choses.\n\n"
        "English: Three.\nFrench:"
    ]
    assert prompter.stop == "\n"


def test_chat_prompts_go_through_the_template():
    tokenizer = models.tiny_tokenizer()
    with pytest.raises(ValueError, match=r"no chat template.*few_shot"):
        prompts.chat(tokenizer)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant {{ reasoning_effort }}]{% endif %}"
    )
    prompter = prompts.chat(tokenizer)
    (prompt,) = prompter(["Hello."], "en", "de")
    assert prompt == (
        "<bos>[user]Translate the following text from English into German. Give only the translation."
        "\n\nHello.[assistant low]"
    )
    assert not prompter.add_special_tokens  # the template has written <bos>
    assert prompter.answer_after is None


def test_harmony_answers_are_those_of_the_final_channel():
    model, tokenizer = biased("a", 1000.0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    prompter = prompts.chat(tokenizer)
    assert prompter.answer_after == "<|channel|>final<|message|>"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    channel, message = tokenizer.convert_tokens_to_ids(["<|channel|>", "<|message|>"])
    thought = [channel, *tokenizer("analysis", add_special_tokens=False).input_ids, message, 100]
    final = [channel, *tokenizer("final", add_special_tokens=False).input_ids, message]
    answer = tokenizer("Hallo, a", add_special_tokens=False).input_ids
    script = torch.tensor([*thought, *final, *answer, tokenizer.eos_token_id])
    writes(model, script)
    (full,) = generate(model, tokenizer, ["x"], max_new_tokens=50, answer_after=prompter.answer_after)
    assert (full.text, full.ended) == ("Hallo, a", True)
    assert full.ids == script[:-1].tolist()
    (cut,) = generate(model, tokenizer, ["x"], max_new_tokens=12, answer_after=prompter.answer_after)
    assert (cut.text, cut.ended) == ("", False)


def writes(model, script):
    """Make the model write `script` whatever it is asked, one token after the other."""
    steps = iter(script.tolist() * 10)

    def head(module, args, output):
        output = torch.zeros_like(output)
        output[..., next(steps)] = 1.0
        return output

    model.get_output_embeddings().register_forward_hook(head)
    original = model.generate

    def restart(*args, **kwargs):
        nonlocal steps
        if kwargs.get("past_key_values") is None:  # else it goes on
            steps = iter(script.tolist())
        return original(*args, **kwargs)

    model.generate = restart


def test_bad_input_is_named(twin):
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(*twin, [])
    with pytest.raises(ValueError, match="1 of 2 prompts are empty, the first at index 1"):
        generate(*twin, ["a", " "])
    with pytest.raises(ValueError, match="must be a list of texts"):
        generate(*twin, "text")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1 for each of 1 prompts, got 0"):
        generate(*twin, ["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="num_beams and batch_tokens"):
        generate(*twin, ["a"], num_beams=0)
    with pytest.raises(ValueError, match="at least one example"):
        prompts.few_shot([])
    with pytest.raises(ValueError, match="unknown language 'frr': did you mean 'fr'"):
        prompts.few_shot(EXAMPLES)(["a"], "en", "frr")
    with pytest.raises(ValueError, match="unknown language 'xfr': did you mean 'fr'"):
        prompts.tagged()(["a"], "en", "xfr")
    with pytest.raises(ValueError, match="there are no sources"):
        translate(*twin, [], source_language="en", target_language="fr", prompter=prompts.tagged())
