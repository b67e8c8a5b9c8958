"""Distillation of text encoders: students of a given size, their vocabulary, and their first weights.

A student is an ordinary BERT encoder with a given share of its teacher's parameters, embedding tables included.
`vocabulary` trains its tokenizer, `students` chooses its shape, and `starts` writes its first weights: token vectors
borrowed from the teacher's outputs, or, for the control, a cut through the teacher's own layers.
"""

from overparam.compress.distill.starts import borrow_token_vectors, cut_student
from overparam.compress.distill.students import new_student, student_config
from overparam.compress.distill.vocabulary import VocabularyCost, cost, retrained_tokenizer

__all__ = [
    "VocabularyCost",
    "borrow_token_vectors",
    "cost",
    "cut_student",
    "new_student",
    "retrained_tokenizer",
    "student_config",
]
