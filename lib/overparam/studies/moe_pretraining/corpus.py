"""What the small generalist is trained on: verses in both directions, and English news and newsgroup text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overparam.data import corpora, splits
from overparam.data.packing import Tree
from overparam.data.parallel import VERSIONS
from overparam.models.translator import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 120  # tokens of a piece of plain text: short enough to fill what verses leave of a row
PLAIN_CORPORA = ("20newsgroups", "reuters-r52")
_NEWS_CHARACTERS = 2000  # of a text that the tokenizer is trained on
_NEWS_TEXTS = 3000


@dataclass(frozen=True)
class Mix:
    """How the three kinds of text are mixed.

    Attributes:
        languages: Target languages of every verse.
        unseen: A language that only some verses are translated into, and that calibration never uses.
        unseen_share: Share of the verses that are.
        reverse_share: Share of the verses that are also translated into English, from one language each.
        plain_share: Pieces of plain English text for each verse.
    """

    languages: tuple[str, ...] = ("fr", "de", "es")
    unseen: str = "it"
    unseen_share: float = 0.35
    reverse_share: float = 0.5
    plain_share: float = 0.3


def tokenizer_texts(max_texts: int | None = None) -> list[str]:
    """Return the texts that the tokenizer is trained on, all of the training split.

    Args:
        max_texts: Read only the first of each corpus, for a trial; None: all.
    """
    verses = [
        verse.text for name in VERSIONS.values() for verse in splits.verses_in(name, "train")[:max_texts]
    ]
    plain = [
        text[:_NEWS_CHARACTERS]
        for corpus in PLAIN_CORPORA
        for _, text in corpora.topic_rows(corpus, "train")[:_NEWS_TEXTS][:max_texts]
    ]
    return verses + plain


def trees(
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    *,
    seed: int,
    split: str = "train",
    length: int = 320,
    max_texts: int | None = None,
) -> Iterator[Tree]:
    """Yield training sequences for ever, each epoch in another order: the same ones for the same seed.

    A verse with its translations that is longer than `length` loses translations, the last of a random order first.
    """
    tokens = {
        language: _tokens(tokenizer, [(v.id, v.text) for v in splits.verses_in(name, split)[:max_texts]])
        for language, name in VERSIONS.items()
    }
    plain_text = pieces(tokenizer, split, max_texts)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tag = {language: tokenizer.convert_tokens_to_ids(f"<2{language}>") for language in VERSIONS}
    plain = tokenizer.convert_tokens_to_ids(PLAIN)
    ids = [identity for identity in tokens["en"] if all(identity in each for each in tokens.values())]
    epoch = 0
    while True:
        rng = random.Random(f"{seed} {epoch}")
        order = rng.sample(ids, len(ids))
        for identity in order:
            targets = [*mix.languages, *([mix.unseen] if rng.random() < mix.unseen_share else [])]
            rng.shuffle(targets)
            prefix = [bos, *tokens["en"][identity]]
            branches: list[Sequence[int]] = []
            for language in targets:
                branch = [tag[language], *tokens[language][identity], eos]
                if len(prefix) + sum(map(len, branches)) + len(branch) <= length:
                    branches.append(branch)
            if branches:
                yield Tree(prefix, branches)
            if rng.random() < mix.reverse_share:
                language = rng.choice([*mix.languages, mix.unseen])
                other = rng.choice(order)
                prefix = [bos, *tokens[language][other]]
                branch = [tag["en"], *tokens["en"][other], eos]
                if len(prefix) + len(branch) <= length:
                    yield Tree(prefix, [branch])
            if rng.random() < mix.plain_share:
                yield Tree([bos], [[plain, *rng.choice(plain_text)]])
        epoch += 1


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
    encoded = tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    return {identity: ids for (identity, _), ids in zip(texts, encoded, strict=True)}


def pieces(tokenizer: PreTrainedTokenizerBase, split: str, max_texts: int | None = None) -> list[list[int]]:
    """Return plain text in pieces of at most `PIECE` tokens.

    Newsgroups and news have no validation split: "validation" gives the test split.
    """
    part = "train" if split == "train" else "test"
    texts = [text for corpus in PLAIN_CORPORA for _, text in corpora.topic_rows(corpus, part)[:max_texts]]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[at : at + PIECE] for ids in encoded for at in range(0, len(ids), PIECE)]
