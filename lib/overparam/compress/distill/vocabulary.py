"""A smaller vocabulary for a student, and how many more tokens it takes per text."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from overparam.compress.distill.fits import emitted
from overparam.support import progress

_ALPHABET = 1000  # maximum characters, the limit of the WordPiece trainer; the rarest become unknown
_SETTINGS_OF_THE_TEACHER = (  # left over from its last use; they would cut or pad the student's texts
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only"),
)


@dataclass(frozen=True)
class VocabularyCost:
    """The cost of a tokenizer compared with a reference on the same texts; special tokens are not counted.

    Attributes:
        tokens_ratio: Number of tokens, divided by the reference's. 1.2 means 20 % more to compute.
        unknown_share: Share of unknown tokens, 0 to 1.
        unknown_share_reference: The same for the reference.
    """

    tokens_ratio: float
    unknown_share: float
    unknown_share_reference: float


def retrained_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int, *, max_length: int = 256
) -> PreTrainedTokenizerBase:
    """Train a tokenizer of the same kind (normaliser, splitting, special tokens, template) with fewer tokens.

    Special tokens come first, in the order of `tokenizer`. The same texts give the same tokens in every process: the
    WordPiece trainer of `tokenizers` numbers the first pieces inside words in the order of a hash map, and breaks ties
    by these numbers (https://github.com/huggingface/tokenizers/issues/1794), so these pieces are numbered here. The
    Unigram trainer (XLM-RoBERTa, T5) gives slightly different scores each time, and a note says so: keep such a
    tokenizer and reuse it. Padding and truncation settings of `tokenizer` are dropped.

    Args:
        tokenizer: A fast tokenizer: WordPiece, BPE or Unigram.
        texts: Training texts.
        size: Number of tokens, special tokens included.
        max_length: ``model_max_length`` of the result: the number of positions of the student.

    Raises:
        ValueError: If the tokenizer is not a fast one, there are no texts, `size` is too small for the special tokens
            and the alphabet or too large for the texts, or the tokenizer would give ids outside its vocabulary.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, only those can be trained again"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("there are no texts to train a tokenizer on")
    if isinstance(tokenizer.backend_tokenizer.model, Unigram):
        progress.note(
            "a Unigram tokenizer differs each time it is trained: results with it vary slightly between runs"
        )
    alphabet, inside = _first_pieces(tokenizer, texts)
    fixed = {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet)} if alphabet else {}
    trained = tokenizer.train_new_from_iterator(
        iter([texts]), size, new_special_tokens=inside or None, show_progress=False, **fixed
    )
    if len(trained) > size:
        raise ValueError(
            f"size must be at least {len(trained)} for the special tokens and the alphabet of these texts, got {size}"
        )
    if len(trained) < size:
        raise ValueError(
            f"{len(texts)} texts have only {len(trained)} pieces, not {size}; take more texts or a smaller size"
        )
    return _plain(trained, tokenizer, inside=set(inside), max_length=max_length)


def cost(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, texts: Sequence[str]
) -> VocabularyCost:
    """Measure the cost of `tokenizer` on `texts`, compared with `reference`; texts are not cut.

    Raises:
        ValueError: If there are no texts, or they have no tokens.
    """
    if not texts:
        raise ValueError("there are no texts to compare the tokenizers on")
    ours, theirs = _ids(tokenizer, texts), _ids(reference, texts)
    if not ours or not theirs:
        raise ValueError(f"there is only white space in the {len(texts)} texts")
    return VocabularyCost(
        tokens_ratio=len(ours) / len(theirs),
        unknown_share=_unknown_share(tokenizer, ours),
        unknown_share_reference=_unknown_share(reference, theirs),
    )


def inside_word_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """The mark of a token that continues a word, ``##`` in WordPiece; empty if there is none."""
    model = tokenizer.backend_tokenizer.model
    return str(getattr(model, "continuing_subword_prefix", None) or "")


def _first_pieces(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The characters of words, and pieces for characters inside words (``##a``), sorted; empty for byte-level BPE."""
    prefix = inside_word_prefix(tokenizer)
    if not prefix:
        return [], []
    backend = tokenizer.backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, None)]
        words.update(word for word, _ in pieces)
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for character in word:
            counts[character] += times
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:_ALPHABET])
    kept = set(alphabet)
    inside = {character for word in words for character in word[1:] if character in kept}
    return alphabet, [prefix + character for character in sorted(inside)]


def _plain(
    trained: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    inside: set[str],
    max_length: int,
) -> PreTrainedTokenizerBase:
    """Turn pieces that were special during training into ordinary ones, and drop the teacher's settings."""
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        trained.save_pretrained(folder)
        stored, settings = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        spec = json.loads(stored.read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in inside]
        spec["padding"] = spec["truncation"] = None
        spec["post_processor"] = _with_ids_of(spec["post_processor"], trained)
        stored.write_text(json.dumps(spec))
        config: dict[str, Any] = json.loads(settings.read_text())
        config = {key: value for key, value in config.items() if key not in _SETTINGS_OF_THE_TEACHER}
        config["extra_special_tokens"] = [str(token) for token in teacher.extra_special_tokens or []]
        config["model_max_length"] = max_length
        settings.write_text(json.dumps(config))
        plain = type(teacher).from_pretrained(folder)
    plain.name_or_path = plain.init_kwargs["name_or_path"] = ""  # not the temporary folder
    for what, ids in emitted(plain).items():
        if max(ids, default=0) >= len(plain):
            raise ValueError(
                f"{type(teacher).__name__} cannot be trained again: it would have {len(plain)} tokens, but {what} "
                f"gives id {max(ids)}"
            )
    return plain


def _with_ids_of(part: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A post-processor, at any depth of nesting, with the ids that its tokens have in `tokenizer`."""
    if isinstance(part, list):
        return [_with_ids_of(each, tokenizer) for each in part]
    if not isinstance(part, dict):
        return part
    part = {key: _with_ids_of(value, tokenizer) for key, value in part.items()}
    if "tokens" in part and "ids" in part:  # of a template
        part["ids"] = [_id(tokenizer, token) for token in part["tokens"]]
    for key in ("cls", "sep"):  # of BERT and RoBERTa
        if key in part:
            part[key] = [part[key][0], _id(tokenizer, part[key][0])]
    return part


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    row = tokenizer.get_vocab().get(token)
    if row is None:
        raise ValueError(
            f"the tokenizer puts {token!r} around texts, which is not one of its special tokens and therefore not "
            "in the smaller vocabulary"
        )
    return int(row)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return [token for ids in encoded["input_ids"] for token in ids]


def _unknown_share(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> float:
    return 0.0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id) / len(ids)
