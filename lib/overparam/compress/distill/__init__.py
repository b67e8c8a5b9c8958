"""Distillation: students of a given size, their initial weights, and training with a teacher.

A student is an ordinary BERT encoder with a given share of its teacher's parameters, embedding tables included.
`vocabulary` trains its tokenizer, `students` chooses its shape, and `starts` sets its initial weights: token vectors
taken from the teacher's outputs or, as a control, a part of the teacher's own layers. It then learns the teacher's
embeddings (`embedding`) or a task (`classifier`); decoders learn next tokens (`decoder`). Losses are in `losses`, the
training itself in `train.distillation`.
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
