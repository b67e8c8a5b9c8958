"""A decoder: how likely it finds texts. A run reads tokens [1, n] in steps, as `quantize.StepwiseDecoder` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from overparam.experiment.costs import Call
from overparam.experiment.subjects.base import Array, Outputs, Repeats, Scores, Subject
from overparam.record import stats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_STEP = 256  # tokens that a decoder reads at once


@dataclass(frozen=True)
class Outcome:
    """What a run makes of texts.

    Attributes:
        items: Negative log-likelihood in nats, and tokens, [texts, 2]; or whether each text was classified rightly,
            [texts, 1].
        answers: Likeliest next tokens, all texts in a row; or classes.
        truth: The right ones.
    """

    items: Array
    answers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    truth: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def statistic(self) -> str:
        """Of `stats`: perplexity, or accuracy as a mean."""
        return "mean" if self.items.shape[1] == 1 else "perplexity"

    @property
    def score(self) -> float:
        """Perplexity, or accuracy."""
        return float(stats.STATISTICS[self.statistic](self.items))

    @property
    def gains(self) -> Array:
        """What is better the larger it is, [texts, 1]: log-likelihood, or hits."""
        return self.items if self.items.shape[1] == 1 else -self.items[:, :1]


@dataclass
class Decoder(Subject):
    """A decoder, whose quality is the perplexity of texts; it reads each from its beginning.

    Attributes:
        tokenizer: Its tokenizer.
        texts: Gives the texts by view, such as a language; called when they are first needed.
        prompt_tokens: Tokens of the prompt that is timed.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Callable[[], Mapping[str, list[str]]]
    prompt_tokens: int = 128

    task: ClassVar[str] = "likelihood"
    metric: ClassVar[str] = "100 less the rise of the perplexity"
    main_call: ClassVar[str] = "single"  # of `calls`: what it is meant for
    call_names: ClassVar = {"single": "one more token", "batch": "prompt"}

    @cached_property
    def views(self) -> Mapping[str, list[str]]:
        """Texts by view."""
        return self.texts()

    def joined(self) -> Decoder:
        """Return the same with all texts in one view."""
        texts = [text for some in self.views.values() for text in some]
        return replace(self, texts=lambda: {"all texts": texts})

    def scored(self, run: Any) -> Scores:
        """Let a run read all texts."""
        return {view: self.read(run, texts) for view, texts in self.views.items()}

    def points(self, repeats: Repeats, tasks: Iterable[str]) -> float:
        """Return the perplexity over the texts of several views, mean over repeats."""
        perplexity = stats.STATISTICS["perplexity"]
        views = list(tasks)
        return float(np.mean([perplexity(_joined(each, views)) for each in repeats]))

    def kept(self, base: Repeats, scores: Repeats, *, n_resamples: int | None = None) -> stats.Estimate:
        """Estimate 100 less the rise of the perplexity over all texts in percent, paired by text and repeat."""
        sides = [[_joined(each, scores[0]) for each in side] for side in (base, scores)]
        rise = stats.retention(*sides, statistic="perplexity", n_resamples=n_resamples)
        return stats.Estimate(100 * (2 - rise.value), 100 * (2 - rise.high), 100 * (2 - rise.low), rise.n)

    def gained(self, base: Repeats, before: Repeats, after: Repeats) -> stats.Estimate:  # noqa: ARG002
        """Estimate by how many percent the perplexity of one system is below another's."""
        return self.kept(before, after).shifted(-100)

    def read(self, run: Any, texts: Sequence[str]) -> Outcome:
        """Let a run read texts."""
        items, likeliest, tokens = [], [], []
        for text in texts:
            ids = self.ids(text)
            predicted = self.predicted(run, ids[:, :-1])
            items.append(nats(predicted, ids))
            likeliest.append(predicted.argmax(-1).numpy())
            tokens.append(ids[0, 1:].numpy())
        return Outcome(np.array(items, dtype=np.float64), np.concatenate(likeliest), np.concatenate(tokens))

    def ids(self, text: str) -> torch.Tensor:
        """Return the token ids of a text, [1, tokens]."""
        import torch

        return torch.tensor([self.tokenizer(text)["input_ids"]])

    @staticmethod
    def predicted(run: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the token after each, [tokens, vocabulary]."""
        import torch

        run.reset()
        logits = torch.cat([run(part)[0].float().cpu() for part in torch.split(ids, _STEP, dim=1)])
        return torch.log_softmax(logits, dim=-1)

    @staticmethod
    def last_nats(run: Any, ids: list[int], last: int) -> Array:
        """Return the nats of each of the last tokens, after all that stands before them, and ones, [last, 2]."""
        import torch

        run.reset()
        everything = torch.tensor([ids])
        for part in torch.split(everything[:, : -last - 1], _STEP, dim=1):
            run(part, last=1)
        logits = run(everything[:, -last - 1 : -1])[0].float().cpu()
        chosen = torch.log_softmax(logits, dim=-1).gather(1, everything[0, -last:, None]).double()
        return np.column_stack([-chosen.numpy(), np.ones(last)])

    def outputs(self, run: Any, texts: list[str]) -> Outputs:
        """Return the log-probabilities of the tokens after those of each text, [tokens, vocabulary]."""
        return [self.predicted(run, self.ids(text)).numpy() for text in texts]

    @staticmethod
    def divergence(base: Outputs, other: Outputs) -> Array:
        """Return the Kullback–Leibler divergence of next tokens, mean over each text in nats, [texts]."""
        each = zip(base, other, strict=True)
        return np.array([float((np.exp(a) * (a - b)).sum(axis=-1).mean()) for a, b in each])

    def calls(self, run: Any, texts: list[str]) -> dict[str, Call]:
        """Return what is timed: one more token after a prompt, which is read now, and the prompt."""
        ids = self.ids(" ".join(texts))[:, : self.prompt_tokens]

        def prompt() -> None:
            run.reset()
            run(ids)

        prompt()
        return {"single": lambda: run(ids[:, -1:]), "batch": prompt}


def nats(predicted: torch.Tensor, ids: torch.Tensor) -> tuple[float, int]:
    """Return nats and number of the tokens of a text after the first, from what was `Decoder.predicted`."""
    return -float(predicted.gather(1, ids[0, 1:, None]).double().sum()), ids.shape[1] - 1


def _joined(scores: Scores, views: Iterable[str]) -> Array:
    return np.concatenate([scores[view].items for view in views])
