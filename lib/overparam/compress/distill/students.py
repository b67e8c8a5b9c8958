"""Students: encoders with a given share of their teacher's parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.distill.fits import check_fits
from overparam.models import count_parameters
from overparam.models.seeding import seeded
from overparam.models.tables import usable_positions

# (hidden size, layers), widest first; few layers, because of two encoders of equal size the shallower is faster
_SHAPES = (
    *((1024, 24), (1024, 12), (768, 12), (768, 6), (512, 8), (384, 6), (320, 6), (320, 4)),
    *((256, 4), (192, 3), (128, 3), (96, 3), (64, 3), (48, 2), (32, 2), (24, 2), (16, 2), (16, 1), (8, 1)),
)
_VOCABULARIES = (32768, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024)
_TABLES = 0.6  # maximum share of the budget: two fifths are left for the blocks
_POSITIONS = (256, 128)  # the longer table if it takes at most 1/25 of the budget
_TYPES = 2
_TOLERANCE = 0.03


@dataclass(frozen=True)
class _Shape:
    """The sizes that determine the number of parameters of a BERT encoder without pooler."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    positions: int

    @property
    def tables(self) -> int:
        return (self.vocabulary + self.positions + _TYPES + 2) * self.hidden  # 2: the norm after them

    @property
    def total(self) -> int:
        attention = 4 * self.hidden**2 + 9 * self.hidden  # with the two norms and the last bias of a block
        return self.tables + self.layers * (attention + self.feed_forward * (2 * self.hidden + 1))


def student_config(
    teacher: PreTrainedModel, share: float, *, vocabulary: int | None = None, head_size: int = 0
) -> BertConfig:
    """Choose the shape of a BERT encoder, without pooler, that has a given share of the parameters of `teacher`.

    From a fixed list of (hidden size, layers), none larger than the teacher's, take the widest that leaves a
    feed-forward width of at least twice the hidden size; the feed-forward width, a multiple of 8, is then chosen to
    meet the budget. The vocabulary is the teacher's if all tables then take at most three fifths of the budget, and
    otherwise the largest of a fixed list for which they do. There are 256 positions, or 128 if 256 would take more
    than 1/25 of the budget. Heads are as wide as the teacher's if that divides the hidden size. There is no dropout: a
    student of this size does not overfit its teacher, and drawing random numbers takes time.

    Args:
        teacher: A text encoder.
        share: Share of the teacher's total (`models.count_parameters`), between 0 and 1.
        vocabulary: Tokens of the student; by the rule above if not given.
        head_size: Parameters that will be added to the student (a projection, a classifier), part of the budget.

    Returns:
        A configuration whose total, `head_size` included, is within 3 % of the budget. ``AutoModel`` adds an unused
        pooler; `new_student` and ``add_pooling_layer=False`` leave it out.

    Raises:
        ValueError: If the share is not between 0 and 1, a number is out of range, or no shape is small enough.
    """
    config = teacher.config.get_text_config()
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if vocabulary is not None and not 1 <= vocabulary <= config.vocab_size:
        raise ValueError(f"vocabulary must be in 1..{config.vocab_size}, got {vocabulary}")
    if head_size < 0:
        raise ValueError(f"head_size must be at least 0, got {head_size}")
    total = count_parameters(teacher).total
    budget = share * total - head_size
    for shape in _shapes(teacher, budget, vocabulary):
        if abs(shape.total - budget) <= _TOLERANCE * (budget + head_size):
            return BertConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.hidden // _head_width(teacher, shape.hidden),
                intermediate_size=shape.feed_forward,
                max_position_embeddings=shape.positions,
                type_vocab_size=_TYPES,
                pad_token_id=_inside(config.pad_token_id, shape.vocabulary),
                hidden_act=getattr(config, "hidden_act", "gelu"),
                layer_norm_eps=getattr(config, "layer_norm_eps", 1e-12),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
    smallest = _smallest(teacher, vocabulary) + head_size
    enough = 1.005 * smallest / total  # rounding to three digits must not go below it
    tokens = f" with {vocabulary:,} tokens" if vocabulary else ""
    head = f" and a head of {head_size:,}" if head_size else ""
    raise ValueError(
        f"no student has a share of {share} of the {total:,} parameters of {type(teacher).__name__} "
        f"({share * total:,.0f}): the smallest{tokens}{head} has {smallest:,}; take a share of at least "
        f"{enough:.3g}{' or a smaller vocabulary' if vocabulary else ''}"
        f"{' or a smaller head' if head_size else ''}"
    )


def new_student(
    config: BertConfig, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Build an encoder of this configuration with random weights, in evaluation mode; the RNG state is not changed.

    Args:
        config: From `student_config`; it is not changed.
        seed: Seed of the weights.
        tokenizer: The student's tokenizer: its special token ids replace those of the configuration, which are the
            teacher's.

    Raises:
        ValueError: If ids of the configuration or the tokenizer are outside the vocabulary.
    """
    config = copy.deepcopy(config)
    if tokenizer is not None:
        for name in ("pad", "bos", "eos"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    with seeded(seed):
        student = BertModel(config, add_pooling_layer=False).eval()
    check_fits(student, tokenizer)
    return student


def _inside(token: int | None, vocabulary: int) -> int | None:
    """A token id of the teacher if the student has it too, else None."""
    return token if token is not None and 0 <= token < vocabulary else None


def _shapes(teacher: PreTrainedModel, budget: float, vocabulary: int | None) -> Iterator[_Shape]:
    """Shapes with a feed-forward width of at least twice the hidden size, widest first."""
    for hidden, layers in _steps(teacher):
        positions = _positions(teacher, hidden, budget)
        sizes = _vocabularies(teacher) if vocabulary is None else (vocabulary,)
        bare = [_Shape(hidden, layers, 0, size, positions) for size in sizes]
        fits = [shape for shape in bare if vocabulary or shape.tables <= _TABLES * budget]
        if fits:
            free = (budget - fits[0].total) / (layers * (2 * hidden + 1))
            width = round(free / 8) * 8
            if width >= 2 * hidden:
                yield _Shape(hidden, layers, width, fits[0].vocabulary, positions)


def _smallest(teacher: PreTrainedModel, vocabulary: int | None) -> int:
    """The smallest budget for which there is a shape."""
    counts = []
    for hidden, layers in _steps(teacher):
        size = vocabulary or min(_vocabularies(teacher))
        shape = _Shape(hidden, layers, 2 * hidden, size, _positions(teacher, hidden, 0))
        counts.append(shape.total if vocabulary else max(shape.total, int(shape.tables / _TABLES) + 1))
    return min(counts)


def _steps(teacher: PreTrainedModel) -> list[tuple[int, int]]:
    config = teacher.config.get_text_config()
    limits = config.hidden_size, config.num_hidden_layers
    steps = [step for step in _SHAPES if step[0] <= limits[0] and step[1] <= limits[1]]
    if not steps:
        raise ValueError(
            f"a teacher of {limits[1]} layers and hidden size {limits[0]} is smaller than any student"
        )
    return steps


def _vocabularies(teacher: PreTrainedModel) -> list[int]:
    size = int(teacher.config.get_text_config().vocab_size)
    return [size, *(smaller for smaller in _VOCABULARIES if smaller < size)]


def _positions(teacher: PreTrainedModel, hidden: int, budget: float) -> int:
    longer, shorter = _POSITIONS
    wished = longer if longer * hidden <= budget / 25 else shorter
    theirs = usable_positions(teacher)
    return wished if theirs is None else min(wished, theirs)


def _head_width(teacher: PreTrainedModel, hidden: int) -> int:
    config = teacher.config.get_text_config()
    theirs = int(config.hidden_size // config.num_attention_heads)
    return next(width for width in (theirs, 64, 32, 16, 8, 1) if width <= theirs and hidden % width == 0)
