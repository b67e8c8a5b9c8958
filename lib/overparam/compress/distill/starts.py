"""Initial weights of a student: cut from its teacher's layers, or token vectors taken from its teacher's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerBase

from overparam.compress.depth import layer_embeddings
from overparam.compress.distill.fits import check_fits
from overparam.compress.distill.students import new_student
from overparam.compress.distill.vocabulary import inside_word_prefix
from overparam.models import blocks
from overparam.models.tables import principal_rows, usable_positions

# names of a block's parts in BERT and in MPNet
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
}
_MPNET = {
    **{name: f"attention.attn.{name[0]}" for name in ("query", "key", "value", "output")},
    "norm": "attention.LayerNorm",
}


def cut_student(
    teacher: PreTrainedModel,
    config: BertConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Cut a student out of its teacher: the control for a student that starts from random weights.

    Parts are chosen by magnitude. Blocks are spread evenly from the first to the last (as in DistilBERT, arXiv
    1910.01108). The same hidden dimensions are kept everywhere: those whose columns of the token table have the largest
    norms. Each block keeps the heads with the largest product of the norms of value and output weights, and the
    neurons with the largest product of the norms of input and output weights. A token that the teacher has too gets
    the teacher's row; another token gets the mean row of the teacher's tokens for its string. Positions are the first
    ones of the teacher. MPNet's relative positions do not exist in BERT and are lost.

    Args:
        teacher: A BERT or MPNet encoder; it is not changed.
        config: Configuration of the student (`student_config`).
        tokenizer: The student's tokenizer; the teacher's if not given.
        teacher_tokenizer: The teacher's tokenizer, if `tokenizer` is given.
        seed: Seed of the random weights where the student is larger: extra neurons, and rows without a token.

    Returns:
        The student, without pooler, in evaluation mode.

    Raises:
        ValueError: If the teacher's blocks are not BERT's or MPNet's; the student is larger in hidden size, layers,
            heads or positions; its heads have another width; or the vocabularies do not fit.
    """
    _check_cut(teacher, config)
    student = new_student(config, seed=seed, tokenizer=tokenizer)
    theirs = blocks(teacher).layers
    spread = torch.linspace(0, len(theirs) - 1, config.num_hidden_layers).round().int().tolist()
    with torch.no_grad():
        dimensions = _largest(teacher.get_input_embeddings().weight.norm(dim=0), config.hidden_size)
        _cut_tables(student, teacher, dimensions)
        _fill_tokens(student, tokenizer, teacher, teacher_tokenizer, dimensions)
        for ours, source in zip(blocks(student).layers, (theirs[index] for index in spread), strict=True):
            _cut_block(ours, source, dimensions, config)
    return student


def borrow_token_vectors(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: str = "mean",
    seed: int = 0,
) -> None:
    """Initialise the student's token table from the teacher's output for each token as a text by itself.

    The outputs are reduced to the student's width by PCA (`models.tables.principal_rows`) and scaled to the standard
    deviation of the table. The idea is from Model2Vec (MinishLab, https://github.com/MinishLab/model2vec), where such
    a table is the whole student. Special tokens, and tokens that are parts of a character, keep their rows; a token
    inside a word (``##s``) gets the vector of its string without the mark.

    Args:
        student: The student; changed in place.
        tokenizer: The student's tokenizer.
        teacher: A text encoder that is at least as wide.
        teacher_tokenizer: The teacher's tokenizer.
        pooling: See `depth.layer_embeddings`.
        seed: Seed of the rotation of the components.

    Raises:
        ValueError: If the tokenizer has more tokens than the student, or fewer than the student has dimensions; the
            pooling is unknown; or the teacher is narrower than the student.
    """
    table = student.get_input_embeddings().weight
    check_fits(student, tokenizer)
    special = set(tokenizer.all_special_ids)
    texts = _texts(tokenizer)
    rows = [row for row, text in enumerate(texts) if row not in special and text.strip() and "�" not in text]
    depth = len(blocks(teacher).layers)
    training = teacher.training
    try:
        outputs = layer_embeddings(
            teacher.eval(), teacher_tokenizer, [texts[row] for row in rows], pooling=pooling, depths=[depth]
        )[:, 0]
    finally:
        teacher.train(training)
    with torch.no_grad():
        scale = float(table[rows].std())
        begun = principal_rows(torch.from_numpy(outputs), table.shape[1], scale=scale, seed=seed)
        table[rows] = begun.to(table)


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The string of every token, in order of ids, without the mark of tokens inside words."""
    prefix = inside_word_prefix(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [tokenizer.convert_tokens_to_string([token]).removeprefix(prefix) for token in tokens]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The teacher's ids for each token of the student: the same token, or the tokens of its string."""
    known = teacher_tokenizer.get_vocab()
    prefix = inside_word_prefix(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    pieces_of = []
    for token, text in zip(tokens, _texts(tokenizer), strict=True):
        pieces = [token] if token in known else teacher_tokenizer.tokenize(text)
        if pieces and token not in known and token.removeprefix(prefix) != token:
            pieces[0] = prefix + pieces[0] if prefix + pieces[0] in known else pieces[0]
        pieces_of.append(teacher_tokenizer.convert_tokens_to_ids(pieces))
    return pieces_of


def _fill_tokens(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    dimensions: torch.Tensor,
) -> None:
    """Write the student's token table from the teacher's."""
    target = student.get_input_embeddings().weight
    source = teacher.get_input_embeddings().weight[:, dimensions]  # [teacher's tokens, hidden]
    if tokenizer is None:
        if len(target) != len(source):
            raise ValueError(
                f"the student has {len(target)} tokens, the teacher {len(source)}; give both tokenizers"
            )
        target.copy_(source)
        return
    if teacher_tokenizer is None:
        raise ValueError("a student with its own tokenizer needs teacher_tokenizer too")
    check_fits(student, tokenizer)
    for row, ids in enumerate(_pieces(tokenizer, teacher_tokenizer)):
        if ids:
            target[row].copy_(source[ids].mean(0))


def _cut_tables(student: PreTrainedModel, teacher: PreTrainedModel, dimensions: torch.Tensor) -> None:
    """Write positions, token types and their norm."""
    ours, theirs = student.embeddings, teacher.embeddings
    first = _first_position(teacher)
    count = ours.position_embeddings.num_embeddings
    ours.position_embeddings.weight.copy_(
        theirs.position_embeddings.weight[first : first + count, dimensions]
    )
    types = getattr(theirs, "token_type_embeddings", None)
    if types is None:
        ours.token_type_embeddings.weight.zero_()
    else:
        kept = types.weight[: len(ours.token_type_embeddings.weight), dimensions]
        ours.token_type_embeddings.weight[: len(kept)].copy_(kept)
    _cut_norm(ours.LayerNorm, theirs.LayerNorm, dimensions)


def _cut_block(ours: nn.Module, theirs: nn.Module, dimensions: torch.Tensor, config: BertConfig) -> None:
    """Write one block."""
    names = _names(theirs)
    source: dict[str, Any] = {part: theirs.get_submodule(name) for part, name in names.items()}
    target = {part: ours.get_submodule(name) for part, name in _BERT.items()}
    width = config.hidden_size // config.num_attention_heads
    read = source["value"].weight[:, dimensions].unflatten(0, (-1, width)).flatten(1).norm(dim=1)
    write = source["output"].weight[dimensions].unflatten(1, (-1, width)).norm(dim=(0, 2))
    heads = _largest(read * write, config.num_attention_heads)
    inside = (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
    for part in ("query", "key", "value"):
        _cut_linear(target[part], source[part], inside, dimensions)
    _cut_linear(target["output"], source["output"], dimensions, inside)
    _cut_norm(target["norm"], source["norm"], dimensions)
    into: Any = theirs.get_submodule("intermediate.dense")
    out: Any = theirs.get_submodule("output.dense")
    strength = into.weight[:, dimensions].norm(dim=1) * out.weight[dimensions].norm(dim=0)
    neurons = _largest(strength, min(config.intermediate_size, len(strength)))
    _cut_linear(ours.get_submodule("intermediate.dense"), into, neurons, dimensions)
    _cut_linear(ours.get_submodule("output.dense"), out, dimensions, neurons)
    _cut_norm(ours.get_submodule("output.LayerNorm"), theirs.get_submodule("output.LayerNorm"), dimensions)


def _cut_linear(ours: Any, theirs: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
    ours.weight[: len(rows), : len(columns)].copy_(theirs.weight[rows][:, columns])
    ours.bias[: len(rows)].copy_(theirs.bias[rows])


def _cut_norm(ours: Any, theirs: Any, dimensions: torch.Tensor) -> None:
    ours.weight.copy_(theirs.weight[dimensions])
    ours.bias.copy_(theirs.bias[dimensions])


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the `count` largest scores, in increasing order; of equal scores the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def _first_position(teacher: PreTrainedModel) -> int:
    """The row of the first position: models with a padding position begin after it."""
    padding = teacher.embeddings.position_embeddings.padding_idx
    return 0 if padding is None else int(padding) + 1


def _names(block: nn.Module) -> dict[str, str]:
    modules = dict(block.named_modules())
    for names in (_BERT, _MPNET):
        if all(name in modules for name in (*names.values(), "intermediate.dense", "output.dense")):
            return names
    raise ValueError(f"a student can be cut from BERT's or MPNet's blocks, not from {type(block).__name__}")


def _check_cut(teacher: PreTrainedModel, config: BertConfig) -> None:
    layers = blocks(teacher).layers
    _names(layers[0])
    theirs = teacher.config
    for name, student_has, teacher_has in (
        ("hidden size", config.hidden_size, theirs.hidden_size),
        ("layers", config.num_hidden_layers, len(layers)),
        ("heads", config.num_attention_heads, theirs.num_attention_heads),
        ("positions", config.max_position_embeddings, usable_positions(teacher) or 0),
    ):
        if student_has > teacher_has:
            raise ValueError(
                f"a student is cut from a larger teacher, but it has {student_has} {name}, the teacher {teacher_has}"
            )
    widths = [each.hidden_size // each.num_attention_heads for each in (config, theirs)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the student's heads have {widths[0]} dimensions, the teacher's {widths[1]}; "
            f"choose a hidden size and heads of {widths[1]} dimensions"
        )
