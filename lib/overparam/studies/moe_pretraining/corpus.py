"""What the small generalist is trained on: verses in several directions, and plain text of several kinds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overparam.data import kinds, splits
from overparam.data.kinds import KINDS
from overparam.data.packing import Tree, balanced, endless
from overparam.data.parallel import VERSIONS
from overparam.data.splits import Split
from overparam.models.translator import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSLATION = "translation"
PIECE = 200  # tokens of a piece of plain text: short enough to fill what verses leave of a row
_TOKENIZER_CHARACTERS = 2_000_000  # of each kind of plain text that the tokenizer is trained on


@dataclass(frozen=True)
class Mix:
    """How the kinds of text are mixed.

    Attributes:
        translation: Share of the tokens that belongs to translation; the kinds of plain text share the rest equally.
        languages: Target languages of every verse.
        unseen: A language that only some verses are translated into, and that calibration never uses.
        unseen_share: Share of the verses that are.
        reverse_share: Share of the verses that are also translated into English, from one language each.
    """

    translation: float = 0.5
    languages: tuple[str, ...] = ("fr", "de", "es")
    unseen: str = "it"
    unseen_share: float = 0.35
    reverse_share: float = 0.5

    def shares(self) -> dict[str, float]:
        """Return the share of the tokens of every kind of text."""
        plain = (1 - self.translation) / len(KINDS)
        return {TRANSLATION: self.translation, **dict.fromkeys(KINDS, plain)}


def tokenizer_texts(max_texts: int | None = None) -> list[str]:
    """Return the texts that the tokenizer is trained on, all of the training split.

    Args:
        max_texts: Read only the first of each corpus, for a trial; None: all.
    """
    texts = [
        verse.text for name in VERSIONS.values() for verse in splits.verses_in(name, "train")[:max_texts]
    ]
    for kind in KINDS:
        characters = 0
        for text in random.Random(0).sample(found := kinds.texts(kind, "train", max_texts), len(found)):
            texts.append(text[: _TOKENIZER_CHARACTERS - characters])
            characters += len(text)
            if characters >= _TOKENIZER_CHARACTERS:
                break
    return texts


def trees(
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    *,
    seed: int,
    split: Split = "train",
    length: int = 320,
    max_texts: int | None = None,
) -> Iterator[Tree]:
    """Yield training sequences for ever, each epoch in another order: the same ones for the same seed.

    The next sequence is of the kind that lacks most of its share of the tokens so far.
    """
    shares = {kind: share for kind, share in mix.shares().items() if share}
    streams = {kind: of_kind(kind, tokenizer, mix, seed, split, length, max_texts) for kind in shares}
    yield from balanced(streams, shares)


def of_kind(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    seed: int,
    split: Split,
    length: int,
    max_texts: int | None = None,
) -> Iterator[Tree]:
    """Yield sequences of one kind of text for ever: "translation", or one of `KINDS`."""
    if kind == TRANSLATION:
        yield from _translations(tokenizer, mix, seed, split, length, max_texts)
        return
    yield from endless(
        pieces(tokenizer, kind, split, max_texts),
        first=tokenizer.bos_token_id,
        head=tokenizer.convert_tokens_to_ids(PLAIN),
        seed=f"{seed} {kind}",
    )


def _translations(
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    seed: int,
    split: Split,
    length: int,
    max_texts: int | None,
) -> Iterator[Tree]:
    """Verses with their translations; one longer than `length` loses the last translations of a random order."""
    tokens = {
        language: _tokens(tokenizer, [(v.id, v.text) for v in splits.verses_in(name, split)[:max_texts]])
        for language, name in VERSIONS.items()
    }
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tag = {language: tokenizer.convert_tokens_to_ids(f"<2{language}>") for language in VERSIONS}
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
        epoch += 1


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
    encoded = tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    return {identity: ids for (identity, _), ids in zip(texts, encoded, strict=True)}


def pieces(
    tokenizer: PreTrainedTokenizerBase, kind: str, split: Split, max_texts: int | None = None
) -> list[list[int]]:
    """Return plain text of a kind in pieces of at most `PIECE` tokens."""
    texts = kinds.texts(kind, split, max_texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[at : at + PIECE] for ids in encoded for at in range(0, len(ids), PIECE)]
