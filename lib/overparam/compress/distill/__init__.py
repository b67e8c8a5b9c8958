"""Distillation: students of a given size, their first weights, and what they learn from a teacher.

A student is an ordinary BERT encoder with a given share of its teacher's parameters, embedding tables included.
`vocabulary` trains its tokenizer, `students` chooses its shape, and `starts` writes its first weights: token vectors
borrowed from the teacher's outputs, or, for the control, a cut through the teacher's own layers. It then learns the
teacher's embeddings (`embedding`), a task (`classifier`), or, for decoders, next tokens (`decoder`); the losses are
in `losses`, the loop in `training`.
"""

from typing import TYPE_CHECKING

from overparam.support import lazy

if TYPE_CHECKING:
    from overparam.compress.distill.classifier import train_classifier
    from overparam.compress.distill.decoder import distill_decoder
    from overparam.compress.distill.embedding import distill_embeddings
    from overparam.compress.distill.encoders import as_classifier, as_encoder, outputs
    from overparam.compress.distill.fits import check_fits
    from overparam.compress.distill.starts import borrow_token_vectors, cut_student
    from overparam.compress.distill.students import new_student, student_config
    from overparam.compress.distill.vocabulary import VocabularyCost, cost, retrained_tokenizer
    from overparam.train.distillation import Recipe
else:
    __getattr__, __dir__ = lazy.exports(__name__)

__all__ = [
    "Recipe",
    "VocabularyCost",
    "as_classifier",
    "as_encoder",
    "borrow_token_vectors",
    "check_fits",
    "cost",
    "cut_student",
    "distill_decoder",
    "distill_embeddings",
    "new_student",
    "outputs",
    "retrained_tokenizer",
    "student_config",
    "train_classifier",
]
