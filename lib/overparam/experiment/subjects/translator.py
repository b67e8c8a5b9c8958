"""A translator: what it writes, scored by chrF++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from overparam.evaluate import translation
from overparam.experiment.subjects.base import Array, Repeats, Subject, paired
from overparam.record import stats

if TYPE_CHECKING:
    from overparam.data.parallel import Pair
    from overparam.evaluate.generation import Generation


@dataclass
class Translator(Subject):
    """A model that translates, whose quality is chrF++, mean over languages.

    Attributes:
        write: Gives the translations of the sources of pairs by a run.
        pairs: Sentences and their translations, by language.
    """

    write: Callable[[Any, Mapping[str, Sequence[Pair]]], Mapping[str, Sequence[Generation]]]
    pairs: Mapping[str, Sequence[Pair]]

    task: ClassVar[str] = "translation"

    def scored(self, run: Any) -> dict[str, translation.TranslationScore]:
        """Let a run translate all sentences, and score it in each language."""
        return scores_of(self.pairs, self.write(run, self.pairs))

    def kept(self, base: Repeats, scores: Repeats, *, n_resamples: int | None = None) -> stats.Estimate:
        """Estimate what a system keeps of the base's chrF++, in percent, paired by sentence and repeat."""
        return relative_change(paired(base, scores), n_resamples=n_resamples).shifted(100)


def scores_of(
    pairs: Mapping[str, Sequence[Pair]], written: Mapping[str, Sequence[Generation]]
) -> dict[str, translation.TranslationScore]:
    """Score translations by language."""
    return {
        language: translation.score(
            [each.text for each in written[language]],
            [pair.target for pair in some],
            ended=[each.ended for each in written[language]],
            target_language=language,
        )
        for language, some in pairs.items()
    }


def relative_change(
    pairs: Mapping[str, tuple[list[Array], list[Array], str]], *, n_resamples: int | None = None
) -> stats.Estimate:
    """Estimate the relative change of a mean over languages in percent, of the same sentences in each.

    A baseline of 0 (a random model, which translates nothing) bounds no change: its ends are infinite.
    """
    if not any(stats.STATISTICS[name](np.stack(before)).any() for before, _, name in pairs.values()):
        return stats.Estimate(0.0, -math.inf, math.inf, len(next(iter(pairs.values()))[0][0]))
    return stats.suite_retention(pairs, n_resamples=n_resamples, shared_items=True).shifted(-1).scaled(100)
