"""Corpus scores of translations; failed generations count as empty and are reported by reason.

chrF++ and BLEU are from sacrebleu (the modules of `evaluate` would download code). Each score comes with the counts
of every sentence, so that a bootstrap over sentences can recompute the corpus score.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from overparam.support import progress

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

REASONS = ("empty", "loop", "no_end", "wrong_language")
_BLEU_TOKENIZERS = {"zh": "zh", "ja": "char"}  # others: 13a
_KIN = {"arz": ("ar", "ary"), "zh": ("wuu", "yue")}  # languages that are accepted in place of these
_MIN_LETTERS = 20  # minimum letters of a text whose language is checked
_MUCH_LIKELIER = 5.0  # how many times more probable another language must be
_CYCLES, _CYCLE_CHARS = 4, 24  # a loop: this many repetitions in a row, over at least this many characters


@dataclass(frozen=True)
class CorpusScore:
    """One metric on one set of sentences.

    Attributes:
        metric: "chrF2++" or "BLEU".
        score: Score of the corpus, 0..100.
        signature: sacrebleu's signature.
        items: float64 [n, k], counts of every sentence, whose sums over sentences give the score. chrF++: for each
            n-gram order (6 of characters, 2 of words) the counts of hypothesis, reference and matches, k = 24.
            BLEU: tokens of hypothesis and reference, matches of order 1 to 4, n-grams of order 1 to 4, k = 10.
        statistic: Name of the function of `items` in `record.stats`: "chrf++" or "bleu".
    """

    metric: str
    score: float
    signature: str
    items: NDArray[np.float64]
    statistic: str


@dataclass(frozen=True)
class TranslationScore:
    """Scores of a system on a test set.

    Attributes:
        chrf: chrF++ (Popović 2017).
        bleu: BLEU (Papineni et al. 2002).
        failures: Why each generation failed, one of `REASONS`, or None; failed ones count as empty.
        language_checked: Whether "wrong_language" can be detected for this target language.
    """

    chrf: CorpusScore
    bleu: CorpusScore
    failures: list[str | None]
    language_checked: bool

    @property
    def score(self) -> float:
        """chrF++ of the corpus, 0..100."""
        return self.chrf.score

    @property
    def items(self) -> NDArray[np.float64]:
        """Counts of chrF++ of every sentence; see `CorpusScore`."""
        return self.chrf.items

    @property
    def statistic(self) -> str:
        """Name of chrF++ in `record.stats`."""
        return self.chrf.statistic

    @property
    def failure_shares(self) -> dict[str, float]:
        """Share of failed generations, 0..1, by reason and as "any"."""
        counts = Counter(self.failures)
        shares = {reason: counts[reason] / len(self.failures) for reason in REASONS}
        return {"any": 1 - counts[None] / len(self.failures), **shares}


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, ended: Sequence[bool], target_language: str
) -> TranslationScore:
    """Score translations against one reference each; failed generations count as empty ones.

    Args:
        hypotheses: Output of a system (`Generation.text`).
        references: Human translations.
        ended: Whether each generation ended within its limit (`Generation.ended`).
        target_language: ISO 639 code, such as "fr".

    Raises:
        ValueError: No hypotheses, unequal numbers, or an empty reference.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    reasons = failures(hypotheses, references, ended=ended, target_language=target_language)
    kept = ["" if reason else text for text, reason in zip(hypotheses, reasons, strict=True)]
    bleu = BLEU(tokenize=_BLEU_TOKENIZERS.get(target_language, "13a"))
    return TranslationScore(
        _corpus_score(CHRF(word_order=2), "chrf++", kept, references),
        _corpus_score(bleu, "bleu", kept, references),
        reasons,
        language_is_known(target_language),
    )


def failures(
    hypotheses: Sequence[str], references: Sequence[str], *, ended: Sequence[bool], target_language: str
) -> list[str | None]:
    """Return which generations failed, and why, as in Martin, Bandarkar and Peng (arXiv 2605.28042).

    The first reason that applies, in this order:

    - "empty": no text was generated.
    - "loop": a part is repeated at least four times in a row, over at least 24 characters.
    - "no_end": the generation was cut at its limit.
    - "wrong_language": another of the 139 languages of py3langid is at least five times as probable as the target
      language; checked for texts of at least 20 letters. This wrongly applies to 0.1 % (verses cut to 10–20 words) to
      0.2 % (interface strings) of human translations, and detects untranslated English in all verses and in 95 % of
      interface strings.

    A reason that also applies to the reference (a refrain, a list of names) is not a failure. For a target language
    that py3langid does not know, languages are not checked, and a note says so.

    Returns:
        One of `REASONS`, or None, for each hypothesis.

    Raises:
        ValueError: No hypotheses, unequal numbers, or an empty reference.
    """
    sizes = (len(hypotheses), len(references), len(ended))
    if len(set(sizes)) > 1 or not sizes[0] or isinstance(hypotheses, str):
        raise ValueError(
            f"hypotheses, references and ended must be equal in number, at least 1, got {sizes[0]}, {sizes[1]} "
            f"and {sizes[2]}"
        )
    if empty := [index for index, reference in enumerate(references) if not reference.strip()]:
        raise ValueError(f"{len(empty)} of {sizes[1]} references are empty, the first at index {empty[0]}")
    if not language_is_known(target_language):
        progress.note(f"py3langid does not know the language {target_language!r}: languages are not checked")
    return [_failure(*each, target_language) for each in zip(hypotheses, references, ended, strict=True)]


def language_is_known(language: str) -> bool:
    """Whether texts in `language` (an ISO 639 code) can be identified."""
    return language in _identifier().labels


def is_loop(text: str) -> bool:
    """Whether a part of `text` is repeated four times in a row or more, over at least 24 characters."""
    spaced = "".join(word + " " for word in text.split())
    codes = np.frombuffer(spaced.encode("utf-32-le"), dtype=np.uint32)
    for period in range(1, len(codes) // _CYCLES + 1):
        needed = max((_CYCLES - 1) * period, _CYCLE_CHARS - period)
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        ends = np.concatenate([[-1], differs, [len(codes) - period]])
        if np.diff(ends).max() - 1 >= needed:
            return True
    return False


def is_wrong_language(text: str, language: str) -> bool:
    """Whether `text` has at least 20 letters and is far more probably in another language than in `language`."""
    if sum(map(str.isalpha, text)) < _MIN_LETTERS or not language_is_known(language):
        return False
    probabilities = dict(_identifier().rank(text))
    own = max(probabilities[name] for name in (language, *_KIN.get(language, ())))
    return bool(max(probabilities.values()) > _MUCH_LIKELIER * own)


def _failure(hypothesis: str, reference: str, ended: bool, language: str) -> str | None:
    if not hypothesis.strip():
        return "empty"
    if is_loop(hypothesis) and not is_loop(reference):
        return "loop"
    if not ended:
        return "no_end"
    if is_wrong_language(hypothesis, language) and not is_wrong_language(reference, language):
        return "wrong_language"
    return None


@functools.cache
def _identifier() -> Any:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _corpus_score(
    metric: BLEU | CHRF, statistic: str, hypotheses: Sequence[str], references: Sequence[str]
) -> CorpusScore:
    result = metric.corpus_score(hypotheses, [references])
    counts = metric._extract_corpus_statistics(hypotheses, [references])
    items = np.asarray(counts, dtype=np.float64)
    return CorpusScore(result.name, float(result.score), str(metric.get_signature()), items, statistic)
