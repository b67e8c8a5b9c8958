from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from overparam import models
from overparam.compress.distill import decoder, losses
from overparam.compress.distill.decoder import distill_decoder
from overparam.train import checkpoint
from overparam.train.causal import Recipe

LOSSES = {"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl, "jsd": losses.generalized_jsd}
RECIPE = Recipe(steps=6, warmup=2, decay=6, learning_rate=1e-2)


def twin(model_type="llama", seed=0, layers=2, **overrides):
    """A twin that prefers some tokens: those of transformers' initialisation find all equally likely."""
    model = models.tiny_twin(model_type, causal=True, num_hidden_layers=layers, seed=seed, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def pairs(number=16, seed=0, prompt=(1, 20), target=(1, 9)):
    rng = np.random.default_rng(seed)
    return tuple(
        [[1, *rng.integers(4, 260, size=rng.integers(*lengths)).tolist()] for _ in range(number)]
        for lengths in (prompt, target)
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def divergence(student, teacher, prompts, targets, loss=losses.forward_kl):
    """One pair after the other without padding, all logits; mean over target tokens."""
    total = tokens = 0
    for prompt, target in zip(prompts, targets, strict=True):
        ids = torch.tensor([[*prompt, *target]])
        with torch.no_grad():
            sides = [model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (student, teacher)]
        total += loss(*sides).item() * len(target)
        tokens += len(target)
    return total / tokens


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_student_comes_nearer_to_its_teacher(objective, share):
    student, teacher = twin(layers=1), twin(seed=1)
    held_out = pairs(seed=9)
    before = {name: divergence(student, teacher, *held_out, loss=loss) for name, loss in LOSSES.items()}
    untouched = weights(teacher)
    recipe = Recipe(steps=30, warmup=3, decay=30, learning_rate=5e-3)
    found = distill_decoder(
        student, teacher, *pairs(64), recipe, objective=objective, on_policy_share=share, max_new_tokens=6
    )
    assert len(found) == 30
    assert np.mean(found[-3:]) < 0.8 * found[0]
    assert divergence(student, teacher, *held_out, loss=LOSSES[objective]) < 0.8 * before[objective]
    assert divergence(student, teacher, *held_out) < 0.9 * before["forward_kl"]
    assert torch.equal(weights(teacher), untouched)
    assert not student.training
    assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "phi3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("objective", LOSSES)
def test_the_loss_is_that_of_one_pair_after_the_other(model_type, objective):
    overrides = {"final_logit_softcapping": 5.0} if model_type == "gemma3" else {}
    student, teacher = twin(model_type, **overrides), twin(model_type, seed=1, **overrides)
    prompts, targets = pairs(8, prompt=(1, 30))
    options = {"beta": 0.3} if objective == "jsd" else {}
    loss = partial(LOSSES[objective], temperature=1.5, **options)
    expected = divergence(student, teacher, prompts, targets, loss)
    found = distill_decoder(
        student,
        teacher,
        prompts,
        targets,
        replace(RECIPE, steps=1),
        objective=objective,
        temperature=1.5,
        **options,
    )
    assert expected > 1e-3
    assert found[0] == pytest.approx(expected, rel=1e-4)


def test_a_batch_in_parts_is_the_same_step():
    whole, parts = twin(), twin()
    data, recipe = pairs(8), replace(RECIPE, steps=1, learning_rate=1e-3, warmup=1)
    first = distill_decoder(whole, twin(seed=1), *data, recipe, batch_size=8)
    second = distill_decoder(parts, twin(seed=1), *data, replace(recipe, accumulate=4), batch_size=2)
    assert second == pytest.approx(first, rel=1e-5)
    start = weights(twin())
    # Adam divides by the gradient's size, which magnifies rounding where it is next to nothing
    moved, other = weights(whole) - start, weights(parts) - start
    assert torch.cosine_similarity(moved, other, dim=0) > 0.999


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_same_seed_gives_the_same_weights(share):
    found = []
    for noise, seed in ((0, 42), (1, 42), (2, 43)):
        torch.manual_seed(noise)  # of the process: plays no part, and is left alone
        state = torch.get_rng_state()
        student = twin()
        run = distill_decoder(
            student, twin(seed=1), *pairs(), replace(RECIPE, seed=seed), on_policy_share=share
        )
        assert torch.equal(torch.get_rng_state(), state)
        found.append((run, weights(student)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_a_student_that_writes_needs_no_targets_but_their_length():
    prompts, targets = pairs(8)
    others = [[7] * len(target) for target in targets]

    def trained(targets, share):
        student = twin()
        distill_decoder(student, twin(seed=1), prompts, targets, RECIPE, on_policy_share=share)
        return weights(student)

    assert torch.equal(trained(targets, 1.0), trained(others, 1.0))
    assert not torch.equal(trained(targets, 0.0), trained(others, 0.0))
    assert not torch.equal(trained(targets, 0.5), trained(others, 0.5))


def test_the_share_is_that_of_batches(monkeypatch):
    calls = []
    monkeypatch.setattr(
        decoder, "_sample", lambda student, prompts, *_: calls.append(1) or [[5]] * len(prompts)
    )
    recipe = replace(RECIPE, steps=100, accumulate=2, learning_rate=0.0)
    distill_decoder(twin(layers=1), twin(layers=1), *pairs(2), recipe, on_policy_share=0.3, batch_size=1)
    assert 45 <= len(calls) <= 75  # 60 of 200, ± 2.3 standard deviations


def test_samples_follow_the_students_distribution():
    student = twin(seed=3)
    student.generation_config.top_k, student.generation_config.repetition_penalty = 1, 5.0  # do not apply
    prompts = [[1, 50, 60], [1, 70, 80, 90, 100]]
    torch.manual_seed(0)
    written = decoder._sample(student, prompts * 2000, 1, [2])
    for place, prompt in enumerate(prompts):
        counts = np.bincount([row[0] for row in written[place::2]], minlength=260) / 2000
        with torch.no_grad():
            expected = student(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
        # its expectation is about the sum of sqrt(p / 2000) · 0.4
        assert np.abs(counts - expected).sum() / 2 < 0.4 * np.sqrt(expected / 2000).sum() * 1.3


def test_what_the_student_writes_ends_with_its_first_end_token():
    student = twin()
    handle = student.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([2]), 4.0)
    )
    torch.manual_seed(0)
    written = decoder._sample(student, [[1, 9]] * 500, 6, [2])
    handle.remove()
    assert {len(row) for row in written} == set(range(1, 7))
    assert all(row[-1] == 2 for row in written if len(row) < 6)
    assert all(2 not in row[:-1] for row in written)


@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_is_not_finite_leaves_the_last_good_weights(step):
    student, teacher, seen = twin(), twin(seed=1), []

    def spoil(_, __, logits):
        seen.append(1)
        return logits * float("nan") if len(seen) >= step else logits

    handle = teacher.lm_head.register_forward_hook(spoil)
    recipe = replace(RECIPE, decay=0)
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {step}"):
        distill_decoder(student, teacher, *pairs(), recipe)
    handle.remove()
    assert not student.training
    expected = twin()
    if step > 1:  # the loss was last finite with the weights that step - 2 updates had made
        distill_decoder(expected, teacher, *pairs(), replace(recipe, steps=step - 2))
    assert torch.equal(weights(student), weights(expected))


def test_a_step_that_ruins_the_student_is_taken_back():
    student = twin()
    with pytest.raises(FloatingPointError, match="at step 2"):
        distill_decoder(
            student, twin(seed=1), *pairs(), replace(RECIPE, learning_rate=1e38, warmup=1, decay=0)
        )
    assert torch.equal(weights(student), weights(twin()))


def test_only_parameters_that_require_a_gradient_are_trained():
    student = twin()
    student.get_input_embeddings().requires_grad_(False)
    before = student.get_input_embeddings().weight.detach().clone()
    head = student.lm_head.weight.detach().clone()
    distill_decoder(student, twin(seed=1), *pairs(), RECIPE)
    assert torch.equal(student.get_input_embeddings().weight, before)
    assert not torch.equal(student.lm_head.weight, head)


def test_vocabularies_must_be_the_same():
    larger = twin()
    larger.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="student's vocabulary has 260 tokens, the teacher's 300"):
        distill_decoder(twin(), larger, *pairs(), RECIPE)
    tokenizer, other = models.tiny_tokenizer(), models.tiny_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="'zebra' is missing in the student's, 260 in the teacher's"):
        distill_decoder(twin(), twin(), *pairs(), RECIPE, tokenizers=(tokenizer, other))
    found = distill_decoder(twin(), twin(), *pairs(), RECIPE, tokenizers=(tokenizer, models.tiny_tokenizer()))
    assert found[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1]]}, "equal in number, at least 1, got 1 and 2"),
        ({"prompts": [], "targets": []}, "got 0 and 0"),
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"targets": [[], [1]]}, "target 0 has no token"),
        ({"targets": [[5], [260]]}, r"target 1 has token 260, ids must be in 0\.\.259"),
        ({"prompts": [[-1, 3], [2]]}, "prompt 0 has token -1"),
        ({"objective": "mse"}, "objective must be one of forward_kl, reverse_kl, jsd, got 'mse'"),
        ({"on_policy_share": 1.5}, "on_policy_share must be in 0..1, got 1.5"),
        ({"batch_size": 0}, "must be at least 1, got 6, 1 and 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"recipe": replace(RECIPE, balance=0.01)}, "has no label_smoothing and no balance"),
        ({"recipe": replace(RECIPE, label_smoothing=0.1)}, "has no label_smoothing and no balance"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"objective": "jsd", "beta": 1.0}, "beta must be between 0 and 1"),
    ],
)
def test_what_cannot_be_distilled_is_refused(change, message):
    arguments = {"prompts": [[1, 5], [1]], "targets": [[6], [7, 8]], "recipe": RECIPE, **change}
    student = twin()
    with pytest.raises(ValueError, match=message):
        distill_decoder(student, twin(seed=1), **arguments)
    assert torch.equal(weights(student), weights(twin()))


def test_a_student_without_an_end_token_cannot_write():
    student = twin()
    student.generation_config.eos_token_id = None
    assert len(distill_decoder(student, twin(seed=1), *pairs(), RECIPE)) == RECIPE.steps
    with pytest.raises(ValueError, match="needs a student with an end token"):
        distill_decoder(student, twin(seed=1), *pairs(), RECIPE, on_policy_share=0.5)


def test_divergence_by_text_is_that_of_one_text_after_the_other():
    student, teacher = twin(layers=1), twin(seed=1)
    prompts, targets = pairs(11)
    items = decoder.token_kl(student, teacher, prompts, targets, batch_size=4)
    assert items[:, 2].tolist() == [len(target) for target in targets]
    for row, prompt, target in zip(items, prompts, targets, strict=True):
        for column, loss in enumerate((losses.forward_kl, losses.reverse_kl)):
            alone = divergence(student, teacher, [prompt], [target], loss=loss)
            assert row[column] / row[2] == pytest.approx(alone, rel=1e-4)
    assert np.abs(decoder.token_kl(teacher, teacher, prompts, targets)[:, :2]).max() < 1e-5
    with pytest.raises(ValueError, match="equal in number"):
        decoder.token_kl(student, teacher, prompts, targets[1:])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(share, tmp_path, monkeypatch):
    options = {"on_policy_share": share, "max_new_tokens": 4, "batch_size": 4, "every": 2}

    def run(**more):
        student = twin(layers=1)
        return student, distill_decoder(student, twin(seed=1), *pairs(), RECIPE, **options, **more)

    whole, expected = run()
    store = checkpoint.store

    def stop(*args, **named):
        store(*args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "store", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path / "state")
    resumed, found = run(checkpoint=tmp_path / "state")
    assert found == expected
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match="another recipe: objective differ"):
        run(checkpoint=tmp_path / "state", objective="jsd")
