"""Distillation losses on classes, embeddings, states and next tokens.

Every loss is a scalar in the student's dtype or float32, whichever is wider, so that bfloat16 logits lose no further
precision. The teacher's side is a constant: no gradient reaches it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from overparam.data.packing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


def soft_targets(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the classes at temperature T, mean over rows.

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531, section 2): the factor T² keeps the gradient at the scale of the
    cross entropy's for any temperature.

    Args:
        student_logits: [rows, classes].
        teacher_logits: [rows, classes].
        temperature: T, above 0.

    Raises:
        ValueError: T is not above 0, or classes or rows differ in number.
    """
    _check_rows(student_logits, teacher_logits)
    _check_width(student_logits, teacher_logits, "classes")
    student, teacher = _logs(student_logits, temperature), _logs(teacher_logits, temperature).detach()
    return temperature**2 * _kl(teacher, student).mean()


def classification(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float,
    soft_weight: float,
) -> Tensor:
    """(1 − `soft_weight`) · cross entropy + `soft_weight` · `soft_targets`.

    The cross entropy is the mean over rows with a label, at temperature 1. The soft part is the mean over all rows,
    so texts without a label teach only through the teacher.

    Args:
        student_logits: [rows, classes].
        labels: int64 [rows]; −100 for rows without a label. A batch without any label has a cross entropy of 0.
        teacher_logits: [rows, classes]; None to train without a teacher, which needs a `soft_weight` of 0.
        temperature: Temperature of the soft part.
        soft_weight: Weight of the soft part, 0..1.

    Raises:
        ValueError: A weight outside 0..1, or above 0 without a teacher; a label that is not a class; nothing to learn
            from; and as for `soft_targets`.
    """
    from torch.nn import functional

    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight must be in 0..1, got {soft_weight}")
    if soft_weight and teacher_logits is None:
        raise ValueError(f"soft_weight {soft_weight} needs teacher_logits; without a teacher it must be 0")
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels must be one per row, [{len(student_logits)}], got {list(labels.shape)}")
    labelled, classes = labels != IGNORED, student_logits.shape[-1]
    known = labels[labelled]
    if wrong := known[(known < 0) | (known >= classes)].tolist():
        raise ValueError(f"labels must be in 0..{classes - 1}, or {IGNORED} for none, got {wrong[0]}")
    if not soft_weight and not len(known):
        raise ValueError("no row has a label, and soft_weight is 0: there is nothing to learn from")
    logits = _widened(student_logits)
    hard = functional.cross_entropy(logits[labelled], known) if len(known) else logits.new_zeros(())
    if teacher_logits is None or not soft_weight:
        return hard
    soft = soft_targets(student_logits, teacher_logits, temperature=temperature)
    return (1 - soft_weight) * hard + soft_weight * soft


def similarity_kl(student_embeddings: Tensor, teacher_embeddings: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher ‖ student) between the similarity distributions of each row of a batch, mean over rows.

    A row's distribution is the softmax over its cosine similarities to the other rows, divided by the temperature;
    the row itself is excluded. Only relations between rows count, so student and teacher may differ in width (Park et
    al. 2019, arXiv 1904.05068; in this form Fang et al. 2021, arXiv 2101.04731, with the batch as their queue).

    Args:
        student_embeddings: [rows, width].
        teacher_embeddings: [rows, other width].
        temperature: Above 0; small values focus on the nearest rows. The loss is not multiplied by its square.

    Raises:
        ValueError: The temperature is not above 0, rows differ in number, or there are fewer than 3: with 2, the one
            other row has all of the probability on both sides.
    """
    import torch
    from torch.nn import functional

    _check_rows(student_embeddings, teacher_embeddings)
    rows = len(student_embeddings)
    if rows < 3:
        raise ValueError(f"similarities need a batch of at least 3 rows, got {rows}")
    others = ~torch.eye(rows, dtype=torch.bool, device=student_embeddings.device)

    def relations(embeddings: Tensor) -> Tensor:
        unit = functional.normalize(_widened(embeddings), dim=-1)
        return _logs(_products(unit)[others].view(rows, rows - 1), temperature)

    return _kl(relations(teacher_embeddings).detach(), relations(student_embeddings)).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of each row [rows, width] to the teacher's, mean over rows.

    Raises:
        ValueError: Rows or widths differ.
    """
    from torch.nn import functional

    _check_rows(student, teacher)
    _check_width(student, teacher, "dimensions")
    return (1 - functional.cosine_similarity(_widened(student), _widened(teacher).detach(), dim=-1)).mean()


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher ‖ student) of the next token, mean over tokens: the student covers everything the teacher may say.

    Word-level distillation of Kim & Rush 2016 (arXiv 1606.07947). Like the other token losses, it is not multiplied
    by the squared temperature.

    Args:
        student_logits: Finite, [..., vocabulary]; usually [tokens, vocabulary].
        teacher_logits: Same shape.
        mask: [...], true or 1 at tokens that count; all by default.
        temperature: Above 0; divides the logits of both.

    Raises:
        ValueError: The temperature is not above 0, shapes differ, or no token counts.
    """
    student, teacher = _token_logs(student_logits, teacher_logits, mask, temperature)
    return _kl(teacher, student).mean()


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(student ‖ teacher) of the next token, mean over tokens: the student avoids what the teacher would not say.

    The divergence of MiniLLM (Gu et al. 2024, arXiv 2306.08543), computed per token through the student's
    distribution, without the paper's policy gradient over whole texts. Arguments and errors as in `forward_kl`.
    """
    student, teacher = _token_logs(student_logits, teacher_logits, mask, temperature)
    return _kl(student, teacher).mean()


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Generalized Jensen-Shannon divergence of the next token, mean over tokens.

    β KL(teacher ‖ M) + (1 − β) KL(student ‖ M) with the mixture M = β teacher + (1 − β) student (GKD, Agarwal et al.
    2024, arXiv 2306.13649, section 2); at most ln 2 for β = 1/2. It goes to 0 at both ends of β. Divided by β, it goes
    to the forward KL for β → 0; divided by 1 − β, to the reverse KL for β → 1: its gradients point in their directions.

    Args:
        student_logits: As in `forward_kl`.
        teacher_logits: As in `forward_kl`.
        beta: β, between 0 and 1 (exclusive).
        mask: As in `forward_kl`.
        temperature: As in `forward_kl`.

    Raises:
        ValueError: β is not between 0 and 1; and as for `forward_kl`.
    """
    import torch

    if not 0 < beta < 1:
        raise ValueError(
            f"beta must be between 0 and 1, got {beta}; the ends are forward_kl (β → 0) and reverse_kl (β → 1)"
        )
    student, teacher = _token_logs(student_logits, teacher_logits, mask, temperature)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return (beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)).mean()


def _widened(values: Tensor) -> Tensor:
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def _products(vectors: Tensor) -> Tensor:
    """Dot products of all pairs of vectors, [..., n, width] -> [..., n, n], without autocast's bfloat16."""
    import torch

    with torch.autocast(vectors.device.type, enabled=False):
        return vectors @ vectors.transpose(-1, -2)


def _logs(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the last dimension."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return (_widened(logits) / temperature).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension; both are log probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _token_logs(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log probabilities of student and teacher at the tokens that count, [tokens, vocabulary]."""
    import torch

    _check_width(student_logits, teacher_logits, "tokens of the vocabulary")
    _check_rows(student_logits, teacher_logits)
    places = student_logits.shape[:-1]
    if mask is None:
        mask = torch.ones(places, dtype=torch.bool, device=student_logits.device)
    if mask.shape != places:
        raise ValueError(f"mask must have the shape {list(places)}, got {list(mask.shape)}")
    if not (counted := mask.bool()).any():
        raise ValueError("the mask leaves no token to learn from")
    student, teacher = student_logits[counted], teacher_logits[counted]
    return _logs(student, temperature), _logs(teacher, temperature).detach()


def _check_rows(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1] or not student.numel():
        raise ValueError(
            "student and teacher must have the same rows, at least 1, "
            f"got shapes {list(student.shape)} and {list(teacher.shape)}"
        )


def _check_width(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"the student has {student.shape[-1]} {what}, the teacher {teacher.shape[-1]}")
