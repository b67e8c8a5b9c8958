import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from overparam.compress.distill import losses

TOKEN_LOSSES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.generalized_jsd,
    "skewed jsd": lambda *args, **kwargs: losses.generalized_jsd(*args, beta=0.1, **kwargs),
}


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def kl(p, q):
    """Closed form, in loops of Python floats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
LABELLED = torch.tensor([0, 2, 1, 1])
EVERY = {  # name -> (loss, shape of both sides)
    "soft_targets": (lambda s, t: losses.soft_targets(s, t, temperature=3.0), (4, 5)),
    "classification": (
        lambda s, t: losses.classification(s, LABELLED, t, temperature=3.0, soft_weight=1.0),
        (4, 5),
    ),
    "similarity_kl": (lambda s, t: losses.similarity_kl(s, t, temperature=0.1), (5, 8)),
    "cosine_distance": (losses.cosine_distance, (5, 8)),
    "forward_kl": (losses.forward_kl, (6, 11)),
    "reverse_kl": (losses.reverse_kl, (6, 11)),
    "generalized_jsd": (lambda s, t: losses.generalized_jsd(s, t, beta=0.3), (6, 11)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name, dtype):
    loss, shape = EVERY[name]
    teacher = draw(*shape, scale=3, dtype=dtype)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_is_that_of_the_value_and_stays_with_the_student(name):
    loss, shape = EVERY[name]
    student, teacher = draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    value = loss(student, teacher)
    assert value > 0
    value.backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_is_computed_in_float32(name):
    loss, shape = EVERY[name]
    student, teacher = draw(*shape, dtype=torch.bfloat16), draw(*shape, seed=1, dtype=torch.bfloat16)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(student.float(), teacher.float()).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"classification"}))  # its labels would move, too
def test_the_order_of_rows_does_not_matter(name):
    loss, shape = EVERY[name]
    student, teacher, order = draw(*shape), draw(*shape, seed=1), torch.randperm(shape[0])
    assert loss(student[order], teacher[order]).item() == pytest.approx(loss(student, teacher).item())


@pytest.mark.parametrize("name", EVERY)
def test_different_rows_are_refused(name):
    loss, shape = EVERY[name]
    with pytest.raises(ValueError, match="rows"):
        loss(draw(*shape), draw(*shape)[:-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_torchs_divergence_times_the_squared_temperature(temperature):
    student, teacher = draw(6, 5, scale=2), draw(6, 5, seed=1, scale=2)
    expected = functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    found = losses.soft_targets(student, teacher, temperature=temperature)
    assert found.item() == pytest.approx(temperature**2 * expected.item())
    by_hand = [
        kl(softmax([v / temperature for v in t]), softmax([v / temperature for v in s]))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert found.item() == pytest.approx(temperature**2 * np.mean(by_hand))


def test_hot_soft_targets_have_the_gradient_of_a_squared_distance():
    """Hinton et al. 2015, eq. 4: for T → ∞ and centred logits it is (student − teacher) / classes."""
    student, teacher = draw(1, 5), draw(1, 5, seed=1)
    student, teacher = (each - each.mean() for each in (student, teacher))
    student.requires_grad_()
    losses.soft_targets(student, teacher, temperature=1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_must_be_above_zero(temperature):
    for loss in (losses.soft_targets, losses.forward_kl, losses.reverse_kl, losses.generalized_jsd):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            loss(draw(4, 5), draw(4, 5), temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        losses.similarity_kl(draw(4, 5), draw(4, 5), temperature=temperature)


def test_numbers_of_classes_that_differ_are_named():
    with pytest.raises(ValueError, match="student has 5 classes, the teacher 7"):
        losses.soft_targets(draw(4, 5), draw(4, 7), temperature=1.0)


def test_classification_mixes_labels_and_teacher():
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    labels = torch.tensor([2, -100, 0, -100, 1])
    rows = [row for row, label in enumerate(labels.tolist()) if label >= 0]
    hard = -np.mean([math.log(softmax(student[row].tolist())[labels[row]]) for row in rows])
    soft = 4 * np.mean(  # unlabelled rows count here
        [
            kl(softmax([v / 2 for v in t]), softmax([v / 2 for v in s]))
            for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
    )
    found = losses.classification(student, labels, teacher, temperature=2.0, soft_weight=0.7)
    assert found.item() == pytest.approx(0.3 * hard + 0.7 * soft)
    order = torch.tensor([3, 0, 4, 2, 1])
    again = losses.classification(
        student[order], labels[order], teacher[order], temperature=2, soft_weight=0.7
    )
    assert again.item() == pytest.approx(found.item())
    alone = losses.classification(student, labels, temperature=2.0, soft_weight=0.0)
    assert alone.item() == pytest.approx(hard)


def test_a_batch_without_labels_learns_from_the_teacher_alone():
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    nothing = torch.full((4,), -100)
    found = losses.classification(student, nothing, teacher, temperature=2.0, soft_weight=0.25)
    assert found.item() == pytest.approx(0.25 * losses.soft_targets(student, teacher, temperature=2.0).item())
    found.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "teacher", "soft_weight", "message"),
    [
        ([0, 1], True, 1.1, "soft_weight must be in 0..1, got 1.1"),
        ([0, 1], False, 0.5, "soft_weight 0.5 needs teacher_logits"),
        ([0, 3], True, 0.5, "labels must be in 0..2, or -100 for none, got 3"),
        ([0, -1], True, 0.5, "got -1"),
        ([0, 1, 2], True, 0.5, r"labels must be one per row, \[2\], got \[3\]"),
        ([-100, -100], True, 0.0, "nothing to learn"),
    ],
)
def test_classification_refuses(labels, teacher, soft_weight, message):
    with pytest.raises(ValueError, match=message):
        losses.classification(
            draw(2, 3),
            torch.tensor(labels),
            draw(2, 3) if teacher else None,
            temperature=1.0,
            soft_weight=soft_weight,
        )


def test_similarities_are_those_of_loops():
    student, teacher = draw(6, 4), draw(6, 9, seed=1)

    def relations(embeddings, row):
        def cosine(a, b):
            return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))

        return softmax([cosine(embeddings[row], embeddings[o]) / 0.2 for o in range(6) if o != row])

    expected = np.mean([kl(relations(teacher, row), relations(student, row)) for row in range(6)])
    found = losses.similarity_kl(student, teacher, temperature=0.2)
    assert found.item() == pytest.approx(expected)
    assert expected > 0.01


def test_similarities_know_no_rotation_and_no_length():
    teacher = draw(6, 8)
    rotation = torch.linalg.qr(draw(8, 8, seed=1)).Q
    turned = torch.cat([teacher @ rotation, torch.zeros(6, 3)], dim=1) * torch.arange(1, 7)[:, None]
    assert losses.similarity_kl(turned, teacher, temperature=0.05).item() == pytest.approx(0, abs=1e-9)


def test_two_rows_have_no_similarities_to_compare():
    assert losses.similarity_kl(draw(3, 4), draw(3, 4, seed=1), temperature=0.1) > 0
    with pytest.raises(ValueError, match="at least 3 rows, got 2"):
        losses.similarity_kl(draw(2, 4), draw(2, 4, seed=1), temperature=0.1)


def test_cosine_distance_has_its_known_values():
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    teacher = torch.tensor([[5.0, 0.0], [4.0, 0.0], [-1.0, -1.0]])
    assert losses.cosine_distance(student, teacher).item() == pytest.approx((0 + 1 + 2) / 3)
    with pytest.raises(ValueError, match="student has 2 dimensions, the teacher 3"):
        losses.cosine_distance(student, draw(3, 3))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_token_losses_are_torchs_divergences(temperature):
    student, teacher = draw(6, 11, scale=2), draw(6, 11, seed=1, scale=2)
    log_s, log_t = ((each / temperature).log_softmax(-1) for each in (student, teacher))

    def divergence(p, q):  # torch's argument order is the other way round
        return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()

    options = {"temperature": temperature}
    assert losses.forward_kl(student, teacher, **options).item() == pytest.approx(divergence(log_t, log_s))
    assert losses.reverse_kl(student, teacher, **options).item() == pytest.approx(divergence(log_s, log_t))
    for beta in (0.1, 0.5, 0.8):
        mixture = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        expected = beta * divergence(log_t, mixture) + (1 - beta) * divergence(log_s, mixture)
        found = losses.generalized_jsd(student, teacher, beta=beta, **options)
        assert found.item() == pytest.approx(expected)


def test_jsd_has_the_limits_of_the_paper():
    student, teacher = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)

    def value_and_gradient(loss, factor=1.0):
        student.grad = None
        value = loss / factor
        value.backward()
        return value.item(), student.grad.clone()

    tiny = 1e-6
    for beta, factor, limit in ((tiny, tiny, losses.forward_kl), (1 - tiny, tiny, losses.reverse_kl)):
        value, gradient = value_and_gradient(losses.generalized_jsd(student, teacher, beta=beta), factor)
        expected, direction = value_and_gradient(limit(student, teacher))
        assert value == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(gradient, direction, rtol=1e-3, atol=1e-6)


def test_jsd_is_symmetric_at_a_half_and_bounded():
    student, teacher = draw(6, 11), draw(6, 11, seed=1)
    found = losses.generalized_jsd(student, teacher).item()
    assert found == pytest.approx(losses.generalized_jsd(teacher, student).item())
    skewed = losses.generalized_jsd(student, teacher, beta=0.2).item()
    assert skewed == pytest.approx(losses.generalized_jsd(teacher, student, beta=0.8).item())
    apart = losses.generalized_jsd(1000 * torch.eye(4), 1000 * torch.eye(4).roll(1, 0))
    assert apart.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_only_tokens_in_the_mask_count(name):
    loss = TOKEN_LOSSES[name]
    student, teacher = draw(3, 4, 11).requires_grad_(), draw(3, 4, 11, seed=1)
    value = loss(student, teacher, mask=MASK)
    value.backward()
    assert (student.grad[MASK == 0] == 0).all()
    counted = [loss(student[r, p][None], teacher[r, p][None]).item() for r, p in MASK.nonzero().tolist()]
    assert value.item() == pytest.approx(np.mean(counted))
    order = torch.randperm(11)  # names of tokens do not matter
    assert loss(student[..., order], teacher[..., order], mask=MASK).item() == pytest.approx(value.item())


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_large_bfloat16_logits_lose_nothing(name):
    student = draw(8, 50_000, scale=30, dtype=torch.bfloat16).requires_grad_()
    teacher = draw(8, 50_000, seed=1, scale=30, dtype=torch.bfloat16)
    value = TOKEN_LOSSES[name](student, teacher)
    value.backward()
    assert student.grad.isfinite().all()
    exact = TOKEN_LOSSES[name](student.detach().double(), teacher.double())
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_token_losses_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="student has 11 tokens of the vocabulary, the teacher 12"):
        losses.forward_kl(draw(6, 11), draw(6, 12))
    with pytest.raises(ValueError, match="leaves no token"):
        losses.reverse_kl(draw(6, 11), draw(6, 11), mask=torch.zeros(6))
    with pytest.raises(ValueError, match=r"mask must have the shape \[6\], got \[5\]"):
        losses.reverse_kl(draw(6, 11), draw(6, 11), mask=torch.ones(5))
    for beta in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="beta must be between 0 and 1"):
            losses.generalized_jsd(draw(6, 11), draw(6, 11), beta=beta)
