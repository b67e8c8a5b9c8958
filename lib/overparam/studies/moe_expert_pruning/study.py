"""The steps of the expert-pruning study, in the order of the notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam import models, progress
from overparam.allocator import keep_freed_memory
from overparam.compress import experts
from overparam.data import corpora, parallel
from overparam.data.parallel import Pair
from overparam.evaluate import likelihood, prompts
from overparam.evaluate.generation import Generation, default_limit, translate
from overparam.evaluate.translation import TranslationScore, score
from overparam.models.translator import PLAIN
from overparam.report import record, stats
from overparam.studies.moe_expert_pruning import Params

CURVE_RESAMPLES = 1000  # of the intervals in curves; the verdicts use the defaults of `stats`
_SHOTS = 3  # examples in a prompt of a base model

Items = NDArray[np.float64]
Losses = dict[str, Items]  # test -> [n, 2]: negative log-likelihood, tokens
Scores = dict[str, TranslationScore]  # language -> scores of what was translated into it


@dataclass(frozen=True)
class Test:
    """A set of texts whose likelihood is measured.

    Attributes:
        group: "seen" (into a language of the calibration), "unseen", "reverse" (into English), "interface"
            (out of domain, into languages of the calibration) or "plain" (English news and newsgroup text).
        prompts: What the model is given.
        targets: What it is to find likely.
        ends: Whether the end token follows, and is scored.
    """

    group: str
    prompts: list[str]
    targets: list[str]
    ends: bool


@dataclass
class Study:
    """A started study: what every step needs, and the per-item scores collected so far."""

    params: Params
    recorder: record.Recorder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    items: list[pd.DataFrame] = field(default_factory=list)

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
        """Return `n` sentence pairs for "calibration", "training" or "test", the same ones for all languages."""
        params = self.params
        if params.corpus == "flores":
            split = "devtest" if part == "test" else "dev"
            return parallel.flores(source, target, split, n=n, seed=params.seed)
        split = {"calibration": "validation", "training": "train", "test": "test"}[part]
        return parallel.verse_pairs(source, target, split, n=n, seed=params.seed)

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
        for name, corpus in (("news", "reuters-r52"), ("newsgroups", "20newsgroups")):
            found[name] = Test("plain", *self.plain(self.plain_texts(corpus, "test", n)), ends=False)
        return found

    def plain_texts(self, corpus: str, part: str, n: int) -> list[str]:
        """Return `n` texts of news or newsgroups, spread over the corpus, each cut to the same length.

        Raises:
            ValueError: If the corpus has fewer.
        """
        texts = [text for _, text in corpora.topic_rows(corpus, part) if len(text.split()) > 8]
        if len(texts) < n:
            raise ValueError(f"{corpus} ({part}) has {len(texts)} texts, {n} are asked for")
        step = len(texts) // n
        return [text[: self.params.plain_characters].rsplit(" ", 1)[0] for text in texts[::step][:n]]

    def losses(
        self, system: str, model: PreTrainedModel, tests: Sequence[str] = (), **columns: float | str
    ) -> Losses:
        """Measure the negative log-likelihood of tests (all by default), and keep it by item."""
        found = {}
        for name in tests or self.tests:
            test = self.tests[name]
            found[name] = likelihood.negative_log_likelihood(
                model,
                self.tokenizer,
                test.prompts,
                test.targets,
                batch_tokens=self.params.batch_tokens,
                add_special_tokens=self.prompter.add_special_tokens,
                end_token=test.ends,
                label=f"likelihood of {name}",
            )
            self._keep(system, name, {"nll": found[name][:, 0], "tokens": found[name][:, 1]}, columns)
        return found

    def translations(
        self, model: PreTrainedModel, pairs: Sequence[Pair], language: str, *, label: str
    ) -> list[Generation]:
        """Translate the sources of pairs from English, greedily."""
        return translate(
            model,
            self.tokenizer,
            [pair.source for pair in pairs],
            source_language="en",
            target_language=language,
            prompter=self.prompter,
            max_new_tokens=self.params.max_new_tokens or default_limit,
            batch_tokens=2 * self.params.batch_tokens,
            label=label,
        )

    def translate_test(
        self,
        system: str,
        model: PreTrainedModel,
        *,
        languages: Sequence[str] = (),
        **columns: float | str,
    ) -> tuple[Scores, dict[str, list[str]]]:
        """Translate the test sentences into each language; return scores and texts, and keep scores by item."""
        scores: Scores = {}
        texts: dict[str, list[str]] = {}
        for language in languages or self.params.languages:
            pairs = self.pairs("en", language, "test", self.params.translated_items)
            generated = self.translations(model, pairs, language, label=f"translating into {language}")
            texts[language] = [generation.text for generation in generated]
            scores[language] = score(
                texts[language],
                [pair.target for pair in pairs],
                ended=[generation.ended for generation in generated],
                target_language=language,
            )
            kept = {
                f"chrf_{k}": column.astype(np.float32)
                for k, column in enumerate(scores[language].chrf.items.T)
            }
            failed = [reason or "" for reason in scores[language].failures]
            self._keep(system, f"translated en-{language}", {**kept, "failure": failed}, columns)
        return scores, texts

    def pruned(self, keep: Sequence[Sequence[int]]) -> PreTrainedModel:
        """Return a pruned copy that shares everything but its experts with the unpruned model."""
        return experts.prune(models.sharing_copy(self.model), keep)

    def finish(self) -> record.Record:
        """Write the per-item scores and the record; its last file is record.json."""
        frames = pd.concat(self.items, ignore_index=True)
        for column in ("system", "test", "failure"):
            frames[column] = frames[column].astype("category")
        self.recorder.items("items", frames)
        self.recorder.finish()
        return self.recorder.record

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
        used = max(self.params.calibration_items, self.params.recovery_items)

        def build(text: str, source: str, target: str) -> str:
            if (source, target) not in cached:
                examples = self.pairs(source, target, "training", used + _SHOTS)[used:]
                cached[source, target] = prompts.few_shot(examples).build
            return cached[source, target](text, source, target)

        return replace(prompts.few_shot([Pair("", "-", "-")]), build=build)

    def _keep(
        self,
        system: str,
        test: str,
        values: Mapping[str, Sequence[object] | Items],
        columns: Mapping[str, object],
    ) -> None:
        frame = pd.DataFrame({key: list(column) for key, column in values.items()})
        named = {"system": system, **columns, "test": test, "item": range(len(frame))}
        self.items.append(pd.concat([pd.DataFrame(named, index=frame.index), frame], axis=1))


def start(params: Params) -> Study:
    """Check what can be checked at once, load the model, and open the record.

    Raises:
        ValueError: If the model is dense or of an unknown layout, or a share would leave fewer than top-k experts.
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
    keep_freed_memory()
    sets = ["interface", "reuters", "newsgroups", *(["verses"] if params.corpus == "verses" else [])]
    inputs = models.provenance(params.model) | corpora.provenance(*sets)
    if params.dense_reference:
        inputs |= models.provenance(params.dense_reference)
    recorder = record.start(
        "moe_expert_pruning",
        params.model_dump(mode="json"),
        slug=params.slug(),
        inputs=inputs,
        seeds=sorted({params.seed, *params.recovery_seeds}),
    )
    counts = models.count_parameters(model)
    for name in ("total", "embedding", "expert", "active"):
        recorder.metric(f"parameters_{name}", getattr(counts, name))
    recorder.metric("moe_layers", len(found))
    recorder.metric("experts", found[0].n_experts, "per layer")
    recorder.metric("top_k", found[0].top_k)
    return Study(params, recorder, model, tokenizer)


def _peak(params: Params, dtype: torch.dtype) -> float:
    """Peak of the study in multiples of the weights: all cuts at once while costs are measured, or a recovery."""
    costs = 1.1 + sum(1 - share for share in params.shares)
    if not params.recovery_shares:
        return costs
    # trained in float32: weights, gradients, and two numbers a weight in the optimizer
    recovery = 1.5 + 4 * (1 - min(params.recovery_shares)) * torch.float32.itemsize / dtype.itemsize
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


def baseline(study: Study) -> Baseline:
    """Measure the unpruned model, and write what it gives as a table."""
    losses = study.losses("unpruned", study.model, share=0.0)
    everywhere = (*study.params.languages, *study.params.unseen)
    scores, texts = study.translate_test("unpruned", study.model, languages=everywhere, share=0.0)
    rows = []
    for name, items in losses.items():
        perplexity = stats.bootstrap(items, statistic="perplexity", n_resamples=CURVE_RESAMPLES)
        row = {"test": name, "group": study.tests[name].group, **_columns("perplexity", perplexity)}
        if (language := name.removeprefix("en-")) in scores:
            found = scores[language]
            row |= _columns("chrF++", stats.bootstrap(found.chrf.items, statistic="chrf++"))
            row |= _columns("BLEU", stats.bootstrap(found.bleu.items, statistic="bleu"))
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
    """Relative change of chrF++, mean over languages, in percent of `before`; several runs are seeds.

    A baseline that translates nothing (a random model) bounds no change: the interval is then unbounded.
    """
    sides = [[side] if isinstance(side, dict) else list(side) for side in (before, after)]
    named = languages or study.params.languages
    if not any(mean_chrf(one, named) for one in sides[0]):
        return stats.Estimate(0.0, -math.inf, math.inf, study.params.translated_items)
    kept = stats.suite_retention(
        {
            language: (
                [run[language].chrf.items for run in sides[0]],
                [run[language].chrf.items for run in sides[1]],
                "chrf++",
            )
            for language in named
        },
        shared_items=True,  # the same sentences in every language
    )
    return percent(kept)


def percent(kept: stats.Estimate) -> stats.Estimate:
    """A retention as a change in percent."""
    return stats.Estimate(100 * (kept.value - 1), 100 * (kept.low - 1), 100 * (kept.high - 1), kept.n)


def mean_chrf(scores: Scores, languages: Sequence[str]) -> float:
    """Mean chrF++ over languages."""
    return float(np.mean([scores[language].chrf.score for language in languages]))


def failure_share(scores: Scores, languages: Sequence[str]) -> float:
    """Mean share of failed generations over languages."""
    return float(np.mean([scores[language].failure_shares["any"] for language in languages]))


def _columns(name: str, estimate: stats.Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


@dataclass(frozen=True)
class Calibration:
    """How the unpruned model routes calibration text.

    Attributes:
        parts: For each language, statistics of parts of its text: instruction, source and the model's own
            translation.
        generated: For each language, statistics of the generated tokens alone.
        english: The same sentences as plain English text.
        news: English news.
        reverse: Into English, for each language.
        others: What is never calibrated on, and counts only where idle experts are looked for: the unseen
            languages in both directions, and newsgroup text.
    """

    parts: dict[str, list[experts.RoutingStatistics]]
    generated: dict[str, experts.RoutingStatistics]
    english: experts.RoutingStatistics
    news: experts.RoutingStatistics
    reverse: dict[str, experts.RoutingStatistics]
    others: list[experts.RoutingStatistics]

    def of(self, language: str) -> experts.RoutingStatistics:
        """Statistics of one language."""
        return added(self.parts[language])

    @property
    def pooled(self) -> experts.RoutingStatistics:
        """Statistics of all languages of the calibration together."""
        return added([part for parts in self.parts.values() for part in parts])

    @property
    def mix(self) -> NDArray[np.float64]:
        """Mean routing mass over every direction and kind of text of the study, each counted alike."""
        every = [*map(self.of, self.parts), *self.reverse.values(), self.english, self.news, *self.others]
        return np.asarray(np.mean([each.routing_mass for each in every], axis=0))


def added(parts: Sequence[experts.RoutingStatistics]) -> experts.RoutingStatistics:
    """Add statistics up."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_PART = 4  # sentences of a part: what a bootstrap over calibration text draws


def calibrate(study: Study) -> Calibration:
    """Let the model translate the calibration text, and collect the routing of all that it read and wrote."""
    params = study.params
    n = params.calibration_items
    parts: dict[str, list[experts.RoutingStatistics]] = {}
    generated: dict[str, experts.RoutingStatistics] = {}
    reverse: dict[str, experts.RoutingStatistics] = {}
    for language in params.languages:
        pairs = study.pairs("en", language, "calibration", n)
        asked = study.ask([pair.source for pair in pairs], "en", language)
        own = study.translations(study.model, pairs, language, label=f"calibration, {language}")
        sequences = _sequences(study, asked, [generation.ids for generation in own], end=study.ends)
        chunks = [sequences[at : at + _PART] for at in range(0, n, _PART)]
        label = f"routing of {language}"
        parts[language] = [
            experts.collect(study.model, [_batch(study, chunk)], reap=True)
            for chunk in progress.track(chunks, label)
        ]
        generated[language] = experts.collect(
            study.model, (_batch(study, chunk, generated_only=True) for chunk in chunks)
        )
        reverse[language] = _reading(study, language, "en")
    texts = [pair.source for pair in study.pairs("en", params.languages[0], "calibration", n)]
    collections = (texts, *(study.plain_texts(name, "train", n) for name in ("reuters-r52", "20newsgroups")))
    english, news, newsgroups = (_collected(study, *study.plain(some), end=False) for some in collections)
    others = [_reading(study, *way) for other in params.unseen for way in (("en", other), (other, "en"))]
    return Calibration(parts, generated, english, news, reverse, [*others, newsgroups])


def _reading(study: Study, source: str, target: str) -> experts.RoutingStatistics:
    """Statistics of reference translations of the calibration sentences."""
    pairs = study.pairs(source, target, "calibration", study.params.calibration_items)
    return _collected(study, *study.given(pairs, source, target), end=study.ends)


def _collected(
    study: Study, given: Sequence[str], written: Sequence[str], *, end: bool
) -> experts.RoutingStatistics:
    ids = [list(row) for row in study.tokenizer(list(written), add_special_tokens=False)["input_ids"]]
    return experts.collect(study.model, _batches(study, _sequences(study, given, ids, end=end)))


Sequence_ = tuple[list[int], list[int]]  # what was given, what was written


def _sequences(
    study: Study, given: Sequence[str], written: Sequence[Sequence[int]], *, end: bool
) -> list[Sequence_]:
    before = study.tokenizer(list(given), add_special_tokens=study.prompter.add_special_tokens)["input_ids"]
    eos = [study.tokenizer.eos_token_id] if end else []
    return [(list(first), [*second, *eos]) for first, second in zip(before, written, strict=True)]


def _batches(study: Study, sequences: Sequence[Sequence_], size: int = 16) -> list[dict[str, torch.Tensor]]:
    return [_batch(study, sequences[at : at + size]) for at in range(0, len(sequences), size)]


def _batch(
    study: Study, sequences: Sequence[Sequence_], *, generated_only: bool = False
) -> dict[str, torch.Tensor]:
    width = max(len(given) + len(written) for given, written in sequences)
    ids = torch.full((len(sequences), width), int(study.tokenizer.pad_token_id or 0))
    mask, count = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (given, written) in enumerate(sequences):
        end = len(given) + len(written)
        ids[row, :end] = torch.tensor([*given, *written])
        mask[row, :end] = 1
        count[row, len(given) if generated_only else 0 : end] = True
    return {"input_ids": ids, "attention_mask": mask, "count_mask": count}


def keep_sets(
    study: Study,
    statistics: experts.RoutingStatistics,
    english: experts.RoutingStatistics,
    share: float,
    *,
    method: str = "routing_mass",
    allocation: str = "divergence",
    seed: int = 0,
) -> list[list[int]]:
    """Choose the experts that stay when `share` of all are pruned.

    Args:
        study: The started study.
        statistics: Of the calibration text.
        english: Of English text of the same content, for the layer budgets.
        share: Share of all experts that is pruned.
        method: One of `experts.METHODS`.
        allocation: "divergence" (published), "uniform" or "inverse".
        seed: Of the method "random".
    """
    layers, groups = len(study.layers), study.layers[0].groups
    # in units of one expert a group, since routers that choose among groups need them equal
    total = round(layers * study.n_experts * (1 - share) / groups)
    limits = (math.ceil(study.top_k / groups), study.n_experts // groups)
    if allocation == "uniform":
        units = experts.allocate_uniform(total, layers, *limits)
    else:
        apart = experts.divergence(statistics.routing_mass, english.routing_mass)
        share_out = experts.allocate if allocation == "divergence" else experts.allocate_inverse
        units = share_out(apart, total, *limits)
    counts = [groups * unit for unit in units]
    return experts.select(experts.scores(statistics, method, seed=seed), counts, groups=groups)
