"""The steps of the expert-pruning study, in the order of the notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam import models
from overparam.compress import experts
from overparam.data import corpora, kinds, parallel
from overparam.data.parallel import Pair
from overparam.evaluate import likelihood, prompts
from overparam.evaluate.comet import comet_command
from overparam.evaluate.generation import Generation, default_limit, translate
from overparam.evaluate.translation import TranslationScore
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.experiment.subjects.base import paired
from overparam.experiment.subjects.translator import relative_change, scores_of
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.models.translator import PLAIN
from overparam.record import stats
from overparam.record.record import Record
from overparam.studies.moe_expert_pruning import Params
from overparam.support.allocator import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GENERATING = 8  # tokens of a batch that is written, in multiples of one that is read with all its logits
_SHOTS = 3  # examples in a prompt of a base model

Items = NDArray[np.float64]
Losses = dict[str, Items]  # test -> [n, 2]: negative log-likelihood, tokens
Scores = dict[str, TranslationScore]  # language -> scores of what was translated into it


@dataclass(frozen=True)
class Test:
    """A set of texts whose likelihood is measured.

    Attributes:
        group: "seen" (into a language of the calibration), "unseen", "reverse" (into English), "interface" and
            "wmt24++" (out of domain, into languages of the calibration; the latter beside FLORES+) or "plain"
            (text that is not translated, of the kinds of `kinds.KINDS`).
        prompts: What the model is given.
        targets: What it is to find likely.
        ends: Whether the end token follows, and is scored.
    """

    group: str
    prompts: list[str]
    targets: list[str]
    ends: bool


@dataclass
class Study(experiment.Study[Params]):
    """A started study: what every step needs, and the per-item scores and translations collected so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    items: list[pd.DataFrame] = field(default_factory=list)
    written: list[pd.DataFrame] = field(default_factory=list)

    @cached_property
    def prompter(self) -> prompts.Prompter:
        """How the model is asked for translations."""
        if self.params.prompt == "chat":
            return prompts.chat(self.tokenizer)
        return prompts.tagged() if self.params.prompt == "tagged" else self._shots()

    @cached_property
    def layers(self) -> list[experts.MoeLayer]:
        """The mixture-of-experts layers of the unpruned model."""
        return experts.layers(self.model)

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.layers[0].n_experts

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.layers[0].top_k

    def pairs(self, source: str, target: str, part: str, n: int) -> list[Pair]:
        """Return `n` sentence pairs of a part, the same ones for all languages.

        The parts are "test", and of held-out text that is not tested "calibration", "training" and "examples"; they
        share no sentence, and the translators of this suite were trained on none of them.
        """
        params = self.params
        before = {
            "test": 0,
            "calibration": 0,
            "training": params.calibration_items,
            "examples": params.calibration_items + params.recovery_items,
        }[part]
        if params.corpus == "flores":
            split = "devtest" if part == "test" else "dev"
            return parallel.flores(source, target, split, n=before + n, seed=params.seed)[before:]
        split = "test" if part == "test" else "validation"
        return parallel.verse_pairs(source, target, split, n=before + n, seed=params.seed)[before:]

    def ask(self, sources: Sequence[str], source: str, target: str) -> list[str]:
        """Return the prompts that ask for translations."""
        return self.prompter(sources, source, target)

    def plain(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return prompts and targets of texts that are not translated; texts of one word are left out."""
        if self.params.prompt == "tagged":
            return [PLAIN] * len(texts), list(texts)
        # the first word is given, since not every model has a <bos>
        parts = [text.partition(" ") for text in texts if " " in text.strip()]
        return [first for first, _, _ in parts], [f" {rest}" for _, _, rest in parts]

    @cached_property
    def tests(self) -> dict[str, Test]:
        """Every test set, by name."""
        params, n = self.params, self.params.test_items
        found: dict[str, Test] = {}
        for group, languages in (("seen", params.languages), ("unseen", params.unseen)):
            for language in languages:
                found[f"en-{language}"] = self._test(
                    group, self.pairs("en", language, "test", n), "en", language
                )
        for language in (*params.languages, *params.unseen):
            pairs = self.pairs(language, "en", "test", n)
            found[f"{language}-en"] = self._test("reverse", pairs, language, "en")
        for language in params.languages:
            if language in parallel.INTERFACE_LANGUAGES:
                strings = parallel.interface_pairs(language, n=n, seed=params.seed)
                found[f"interface en-{language}"] = self._test("interface", strings, "en", language)
            if params.corpus == "flores":
                segments = parallel.wmt24pp(language, n=n, seed=params.seed)
                found[f"wmt24++ en-{language}"] = self._test("wmt24++", segments, "en", language)
        for kind in kinds.KINDS:
            found[kind] = Test("plain", *self.plain(self.plain_texts(kind, "test", n)), ends=False)
        return found

    def plain_texts(self, kind: str, split: str, n: int) -> list[str]:
        """Return `n` texts of a kind that are not translated, each cut to the same length.

        Raises:
            ValueError: If there are fewer.
        """
        texts = [text for text in kinds.texts(kind, split) if len(text.split()) > 8]
        if len(texts) < n:
            raise ValueError(f"{kind} ({split}) has {len(texts)} texts, {n} are asked for")
        return [text[: self.params.plain_characters].rsplit(" ", 1)[0] for text in texts[:n]]

    def losses(
        self, system: str, model: PreTrainedModel, tests: Sequence[str] = (), **columns: float | str
    ) -> Losses:
        """Measure the negative log-likelihood of tests (all by default), and keep it by item."""
        found = self.losses_on({name: self.tests[name] for name in tests or self.tests}, model)
        for name in found:
            self._keep(
                self.items,
                system,
                name,
                dict(zip(("nll", "tokens"), found[name].T.astype(np.float32), strict=True)),
                columns,
            )
        return found

    def losses_on(self, tests: Mapping[str, Test], model: PreTrainedModel) -> Losses:
        """Measure the negative log-likelihood of texts."""
        return {
            name: likelihood.negative_log_likelihood(
                model,
                self.tokenizer,
                test.prompts,
                test.targets,
                batch_tokens=self.params.batch_tokens,
                add_special_tokens=self.prompter.add_special_tokens,
                end_token=test.ends,
                label=f"likelihood of {name}",
            )
            for name, test in tests.items()
        }

    @property
    def calibration_tests(self) -> dict[str, Test]:
        """The calibration sentences with their references, by language."""
        return {
            f"en-{language}": self._test(
                "seen",
                self.pairs("en", language, "calibration", self.params.calibration_items),
                "en",
                language,
            )
            for language in self.params.languages
        }

    @property
    def lowered(self) -> float | None:
        """Share pruned where a layer keeps one expert less than a token uses, and the token uses one less; if any."""
        if self.top_k == 1 or self.layers[0].groups > 1:
            return None
        return 1 - (self.top_k - 1) / self.n_experts

    def translations(
        self, model: PreTrainedModel, pairs: Mapping[str, Sequence[Pair]], *, label: str
    ) -> dict[str, list[Generation]]:
        """Translate the sources of pairs from English into each language, greedily and all in the same batches."""
        found = iter(
            translate(
                model,
                self.tokenizer,
                [pair.source for some in pairs.values() for pair in some],
                source_language="en",
                target_language=[language for language, some in pairs.items() for _ in some],
                prompter=self.prompter,
                max_new_tokens=self.params.max_new_tokens or default_limit,
                batch_tokens=_GENERATING * self.params.batch_tokens,
                label=label,
            )
        )
        return {language: [next(found) for _ in some] for language, some in pairs.items()}

    def translate_test(
        self,
        system: str,
        model: PreTrainedModel,
        *,
        languages: Sequence[str] = (),
        **columns: float | str,
    ) -> tuple[Scores, dict[str, list[str]]]:
        """Translate the test sentences into each language; return scores and texts, and keep both by item."""
        texts: dict[str, list[str]] = {}
        asked = {
            language: self.pairs("en", language, "test", self.params.translated_items)
            for language in languages or self.params.languages
        }
        generated = self.translations(model, asked, label=f"translating into {', '.join(asked)}")
        scores: Scores = scores_of(asked, generated)
        for language, pairs in asked.items():
            texts[language] = [generation.text for generation in generated[language]]
            kept = {
                f"chrf_{k}": column.astype(np.float32)
                for k, column in enumerate(scores[language].chrf.items.T)
            }
            failed = [reason or "" for reason in scores[language].failures]
            named = (system, f"translated en-{language}")
            self._keep(self.items, *named, {**kept, "failure": failed}, columns)
            sentences = {
                "source": [pair.source for pair in pairs],
                "reference": [pair.target for pair in pairs],
            }
            self._keep(
                self.written,
                *named,
                {**sentences, "translation": texts[language], "failure": failed},
                columns,
            )
        return scores, texts

    def pruned(self, keep: Sequence[Sequence[int]]) -> PreTrainedModel:
        """Return a pruned copy that shares everything but its experts with the unpruned model.

        A layer that keeps fewer experts than a token uses lets it use fewer.
        """
        return experts.prune(models.sharing_copy(self.model), keep, lower_top_k=True)

    def finish(self) -> Record:
        """Write per-item scores, translations and the record; its last file is record.json."""
        collected = {} if self.recorder.replays else {"items": self.items, "translations": self.written}
        for name, frames in collected.items():
            found = pd.concat(frames, ignore_index=True)
            for column in ("system", "test", "failure"):
                found[column] = found[column].astype("category")
            self.recorder.items(name, found)
        return super().finish()

    @property
    def ends(self) -> bool:
        """Whether a translation ends with the end token, not with a text."""
        return self.prompter.stop is None

    def given(self, pairs: Sequence[Pair], source: str, target: str) -> tuple[list[str], list[str]]:
        """Return prompts and answers that give these translations."""
        asked = self.ask([pair.source for pair in pairs], source, target)
        return self.prompter.given(asked, [pair.target for pair in pairs])

    def _test(self, group: str, pairs: Sequence[Pair], source: str, target: str) -> Test:
        return Test(group, *self.given(pairs, source, target), ends=self.ends)

    def _shots(self) -> prompts.Prompter:
        """Ask by examples in whichever languages are asked for; no sentence of another step is an example."""
        cached: dict[tuple[str, str], Callable[[str, str, str], str]] = {}

        def build(text: str, source: str, target: str) -> str:
            if (source, target) not in cached:
                examples = self.pairs(source, target, "examples", _SHOTS)
                cached[source, target] = prompts.few_shot(examples).build
            return cached[source, target](text, source, target)

        return replace(prompts.few_shot([Pair("", "-", "-")]), build=build)

    @staticmethod
    def _keep(
        frames: list[pd.DataFrame],
        system: str,
        test: str,
        values: Mapping[str, Sequence[object] | Items],
        columns: Mapping[str, object],
    ) -> None:
        frame = pd.DataFrame({key: list(column) for key, column in values.items()})
        named = {"system": system, **columns, "test": test, "item": range(len(frame))}
        frames.append(pd.concat([pd.DataFrame(named, index=frame.index), frame], axis=1))


@begins
def start(params: Params) -> Study:
    """Check what can be checked at once, load the model, and open the record.

    Raises:
        ValueError: If the model is dense or of an unknown layout, or a share would leave fewer than top-k experts.
        RuntimeError: If COMET is asked for and not installed.
    """
    dtype, device = models.working_dtype(params.dtype), models.working_device()
    models.check_memory(
        params.model, dtype, times_weights=_peak(params, dtype), purpose="with its pruned copies"
    )
    model, tokenizer = models.load(params.model, dtype=dtype, device=device, causal=True)
    found = experts.layers(model)
    if len({(layer.n_experts, layer.top_k) for layer in found}) > 1:
        raise ValueError(f"the layers of {params.model} differ in their experts: give an unpruned model")
    for share in params.shares:
        least = found[0].top_k / found[0].n_experts
        if 1 - share < least - 1e-9:
            raise ValueError(
                f"shares must be at most {1 - least:g} for {params.model} (each layer keeps its top-k), got {share}"
            )
    if params.comet:
        comet_command()
    keep_freed_memory()
    sets = ["interface", *(["verses"] if params.corpus == "verses" else [])]
    inputs = models.provenance(params.model) | corpora.provenance(*sets) | kinds.provenance()
    if params.dense_reference:
        inputs |= models.provenance(params.dense_reference)
    recorder = experiment.open_record(
        params,
        inputs=inputs,
        seeds=sorted({params.seed, *params.recovery_seeds}),
    )
    counts = models.count_parameters(model)
    for name in ("total", "embedding", "expert", "active"):
        recorder.metric(f"parameters_{name}", getattr(counts, name))
    recorder.metric("moe_layers", len(found))
    recorder.metric("experts", found[0].n_experts, "per layer")
    recorder.metric("top_k", found[0].top_k)
    study = Study(params, recorder, model, tokenizer)
    study.pairs("en", params.languages[0], "examples", _SHOTS)  # there is enough text for every part
    assert study.layers  # known from here on without the model
    return study


def _peak(params: Params, dtype: torch.dtype) -> float:
    """Peak of the study in multiples of the weights: all cuts at once while costs are measured, or a recovery."""
    import torch

    costs = 1.1 + sum(1 - share for share in params.shares)
    if not params.recovery_shares:
        return costs
    # trained in float32: weights, gradients, and two numbers a weight in the optimizer
    recovery = 1.5 + 4 * torch.float32.itemsize / dtype.itemsize  # of the unpruned control
    return max(costs, recovery)


@dataclass(frozen=True)
class Baseline:
    """The unpruned model.

    Attributes:
        losses: Of every test.
        scores: Of its translations.
        texts: Its translations.
    """

    losses: Losses
    scores: Scores
    texts: dict[str, list[str]]


@step
def baseline(study: Study) -> Baseline:
    """Measure the unpruned model, and write what it gives as a table."""
    losses = study.losses("unpruned", study.model, share=0.0)
    everywhere = (*study.params.languages, *study.params.unseen)
    scores, texts = study.translate_test("unpruned", study.model, languages=everywhere, share=0.0)
    rows = []
    for name, items in losses.items():
        perplexity = stats.bootstrap(items, statistic="perplexity", n_resamples=CURVE_RESAMPLES)
        row = {"test": name, "group": study.tests[name].group, **perplexity.columns("perplexity")}
        if (language := name.removeprefix("en-")) in scores:
            found = scores[language]
            row |= stats.bootstrap(found.chrf.items, statistic="chrf++").columns("chrF++")
            row |= stats.bootstrap(found.bleu.items, statistic="bleu").columns("BLEU")
            row |= {
                "failed": found.failure_shares["any"],
                "signatures": f"{found.chrf.signature}; {found.bleu.signature}",
            }
        rows.append(row)
    study.recorder.table("baseline", pd.DataFrame(rows))
    suite = stats.suite_score(
        {language: (scores[language].chrf.items, "chrf++") for language in study.params.languages},
        shared_items=True,
    )
    study.recorder.metric("baseline_chrf", suite, "chrF++")
    return Baseline(losses, scores, texts)


def change_in_loss(study: Study, before: Losses, after: Losses, tests: Sequence[str] = ()) -> stats.Estimate:
    """Rise of the negative log-likelihood a token, mean over the tests into the seen languages, in nats."""
    named = tests or [f"en-{language}" for language in study.params.languages]
    return stats.suite_difference(
        {name: (before[name], after[name], "nll_per_token") for name in named},
        n_resamples=CURVE_RESAMPLES,
        shared_items=study.tests[named[0]].group != "plain",  # else the same sentences in several languages
    )


def change_in_chrf(
    study: Study,
    before: Scores | Sequence[Scores],
    after: Scores | Sequence[Scores],
    languages: Sequence[str] = (),
) -> stats.Estimate:
    """Relative change of chrF++, mean over languages, in percent; several runs are seeds (`relative_change`)."""
    some = languages or study.params.languages
    sides = ([side] if isinstance(side, dict) else side for side in (before, after))
    return relative_change(paired(*([{name: run[name] for name in some} for run in side] for side in sides)))


def columns(name: str, estimate: stats.Estimate) -> dict[str, float]:
    """Columns of a table that has one interval."""
    return {name: estimate.value, "low": estimate.low, "high": estimate.high}


def mean_chrf(scores: Scores, languages: Sequence[str]) -> float:
    """Mean chrF++ over languages."""
    return float(np.mean([scores[language].chrf.score for language in languages]))


def failure_share(scores: Scores, languages: Sequence[str]) -> float:
    """Mean share of failed generations over languages."""
    return float(np.mean([scores[language].failure_shares["any"] for language in languages]))
