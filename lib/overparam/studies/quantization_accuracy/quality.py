"""What each scheme keeps of the model's quality, in several views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.compress import quantize
from overparam.data import corpora, parallel, splits
from overparam.evaluate import embedding, prompts, samples, translation
from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import CURVE_RESAMPLES, Study, as_quantized
from overparam.support import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SCORED = 64  # last tokens of a window, whose likelihood is a context length's
_STEP = 256  # tokens that a decoder reads at once
_SHOTS = 3
Scores = dict[str, embedding.TaskScore]


@dataclass(frozen=True)
class Quality:
    """Quality by scheme.

    Attributes:
        table: One row a scheme, and, of a decoder, a view.
        kept: Percent of full precision's quality by scheme: of the mean score of an encoder's suite; of a decoder,
            100 less the rise of its perplexity over all texts in percent.
        read: Of a decoder: nats and tokens of each text [texts, 2], by scheme and view; after a long context, of each
            token.
    """

    table: pd.DataFrame
    kept: dict[str, stats.Estimate]
    read: dict[tuple[str, str], NDArray[np.float64]] = field(default_factory=dict)


@step
def measure(study: Study) -> Quality:
    """Measure the quality of every scheme that runs here: `of_encoder` or `of_decoder`."""
    for name, share in as_quantized(study).set_index("scheme")["quantized_share"].items():
        study.recorder.metric(f"quantized_share_{name}", share, "% of weights in the scheme's bits or fewer")
    found = of_decoder(study) if study.decoder else of_encoder(study)
    for name, kept in found.kept.items():
        study.recorder.metric(f"kept_{name}", kept, "% of full precision")
    study.recorder.table("quality", found.table)
    return found


def of_encoder(study: Study) -> Quality:
    """Score the embedding suite under every scheme, and say how far embeddings moved."""
    names = study.running
    systems = [study.quantized(name).run for name in names]

    def embed(texts: list[str], instruction: str | None = None) -> NDArray[np.float32]:  # noqa: ARG001
        runs = progress.track(systems, "embedding the suite")
        return np.stack([study.embed(run, texts) for run in runs], axis=1)

    scores = suite(study, embed, names)
    base = scores[quantize.BASELINE]
    texts = study.train_texts[-study.params.probe_texts :]
    vectors = {name: study.directions(run, texts) for name, run in zip(names, systems, strict=True)}
    kept = {name: retained(base, scores[name]) for name in names if name != quantize.BASELINE}
    judged = _judged(kept, study.params.margin)
    rows = [
        {
            "scheme": name,
            "score": 100 * float(np.mean([each.score for each in scores[name].values()])),
            **(
                kept[name].columns("kept")
                if name in kept
                else stats.Estimate(100, 100, 100, 1).columns("kept")
            ),
            **judged[name],
            "cosine_to_fp32": float(np.mean(np.sum(vectors[name] * vectors[quantize.BASELINE], axis=1))),
            "other_neighbour": float(
                np.mean(_neighbours(vectors[name]) != _neighbours(vectors[quantize.BASELINE]))
            ),
            **{task: 100 * each.score for task, each in scores[name].items()},
        }
        for name in names
    ]
    return Quality(pd.DataFrame(rows), kept)


def suite(study: Study, embed: embedding.Embed, names: list[str]) -> dict[str, Scores]:
    """Score systems on the embedding suite, {name: {task: score}}, and keep the per-item scores."""
    found: dict[str, Scores] = {name: {} for name in names}
    params = study.params
    for each in embedding.evaluate(embed, params.suite, max_items=params.suite_items, seed=params.seed):
        found[names[each.view]][each.task] = each
        study.recorder.keep(each.items, system=names[each.view], task=f"suite: {each.task}")
    return found


def retained(base: Scores, scores: Scores) -> stats.Estimate:
    """What a system keeps of the suite's mean score, in percent, paired by item."""
    pairs = {task: (base[task].items, each.items, each.statistic) for task, each in scores.items()}
    return stats.suite_retention(pairs).scaled(100)


def of_decoder(study: Study) -> Quality:
    """Measure likelihood, divergence, flipped tokens, long contexts and translation under every scheme."""
    names = study.running
    runs: dict[str, quantize.StepwiseDecoder] = {name: study.quantized(name).run for name in names}
    rows: list[dict[str, object]] = []
    read: dict[tuple[str, str], NDArray[np.float64]] = {}
    for view, texts in views(study).items():
        found = _likelihoods(study, runs, progress.track(texts, f"reading {view}"))
        for name, items in found.items():
            study.recorder.keep(items, system=name, task=f"likelihood: {view}")
            read[name, view] = items[:, :2]
            tokens = items[:, 1].sum()
            moved = {"kl_to_fp32": items[:, 2].sum() / tokens, "flipped_tokens": items[:, 3].sum() / tokens}
            rows.append(_row(name, view, found[quantize.BASELINE][:, :2], items[:, :2]) | moved)
    joined = {
        name: np.concatenate([items for (each, _), items in read.items() if each == name]) for name in names
    }
    base = joined[quantize.BASELINE]
    kept = {name: kept_of_perplexity(base, joined[name]) for name in names if name != quantize.BASELINE}
    judged = _judged(kept, study.params.margin)
    rows += [_row(name, "all texts", base, items) | judged[name] for name, items in joined.items()]
    for length, windows in _windows(study).items():
        view = context(length)
        scored = {
            name: np.concatenate([_window(run, ids) for ids in windows])
            for name, run in progress.track(runs.items(), f"reading {view}")
        }
        read |= {(name, view): items for name, items in scored.items()}
        for name, items in scored.items():
            study.recorder.keep(items, system=name, task=f"likelihood: {view}")
            rows.append(_row(name, view, scored[quantize.BASELINE], items))
    if study.params.translated_items:
        rows += _translations(study, runs)
    return Quality(pd.DataFrame(rows), kept, read)


def context(length: int) -> str:
    """Name of the view of texts that come after so many tokens."""
    return f"context of {length}"


def rise(quality: Quality, scheme: str, view: str) -> NDArray[np.float64]:
    """By how many nats a token each text of a view is less likely than in full precision, in percent, [texts, 1]."""
    base, items = quality.read[quantize.BASELINE, view], quality.read[scheme, view]
    return 100 * ((items[:, :1] - base[:, :1]) / base[:, 1:])


@dataclass(frozen=True)
class Reading:
    """What a decoder made of texts.

    Attributes:
        items: Negative log-likelihood in nats, and tokens, [texts, 2].
        likeliest: Its likeliest next tokens, all texts in a row.
        tokens: The next tokens that came.
    """

    items: NDArray[np.float64]
    likeliest: NDArray[np.int64]
    tokens: NDArray[np.int64]


def read(run: quantize.StepwiseDecoder, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Reading:
    """Let a decoder read texts."""
    import torch

    items, likeliest, tokens = [], [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        found = torch.log_softmax(_logits(run, ids[:, :-1]), dim=-1)  # [tokens, vocabulary]
        items.append(_nats(found, ids))
        likeliest.append(found.argmax(-1).numpy())
        tokens.append(ids[0, 1:].numpy())
    return Reading(np.array(items, dtype=np.float64), np.concatenate(likeliest), np.concatenate(tokens))


def kept_of_perplexity(base: stats.Items, items: stats.Items) -> stats.Estimate:
    """100 less the rise of the perplexity in percent, paired by text."""
    rise = stats.retention(base, items, statistic="perplexity")
    return stats.Estimate(100 * (2 - rise.value), 100 * (2 - rise.high), 100 * (2 - rise.low), rise.n)


def _row(name: str, view: str, base: NDArray[np.float64], items: NDArray[np.float64]) -> dict[str, object]:
    perplexity = stats.bootstrap(items, statistic="perplexity", n_resamples=CURVE_RESAMPLES)
    rise = stats.retention(base, items, statistic="perplexity", n_resamples=CURVE_RESAMPLES).scaled(100)
    return {"scheme": name, "view": view, **perplexity.columns("perplexity"), **rise.columns("of_fp32")}


def views(study: Study) -> dict[str, list[str]]:
    """Held-out texts by view: the same verses in every language, and news."""
    params = study.params
    found = {}
    for language in params.languages:
        other = "fr" if language == "en" else "en"
        pairs = parallel.verse_pairs(language, other, "test", n=params.likelihood_texts, seed=params.seed)
        found[f"verses, {language}"] = [pair.source for pair in pairs]
    news = [samples.cut(text, 2 * params.characters) for _, text in corpora.topic_rows("reuters-r52", "test")]
    found["news, en"] = samples.shuffled([text for text in news if text], params.seed)[
        : params.likelihood_texts
    ]
    return found


def _windows(study: Study) -> dict[int, list[list[int]]]:
    """Windows of running text that end alike for every length, token ids."""
    params = study.params
    longest = params.context_lengths[-1]
    text = " ".join(verse.text for verse in splits.verses_in("web", "test"))
    ids = study.tokenizer(text, add_special_tokens=False)["input_ids"]
    needed = longest * params.context_windows
    if len(ids) < needed:
        raise ValueError(
            f"context_lengths and context_windows ask for {needed} tokens of text, there are {len(ids)}"
        )
    ends = [longest * (number + 1) for number in range(params.context_windows)]
    first = [study.tokenizer.bos_token_id] if study.tokenizer.bos_token_id is not None else []
    return {length: [first + ids[end - length : end] for end in ends] for length in params.context_lengths}


def _likelihoods(
    study: Study, runs: Mapping[str, quantize.StepwiseDecoder], texts: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """By scheme and text: nats, tokens, divergences from full precision in nats, and other likeliest tokens."""
    import torch

    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for text in texts:
        ids = torch.tensor([study.tokenizer(text)["input_ids"]])
        expected = torch.log_softmax(_logits(runs[quantize.BASELINE], ids[:, :-1]), dim=-1)
        for name, run in runs.items():
            same = name == quantize.BASELINE
            found = expected if same else torch.log_softmax(_logits(run, ids[:, :-1]), dim=-1)
            divergence = float((expected.exp() * (expected - found)).sum())
            flipped = int((expected.argmax(-1) != found.argmax(-1)).sum())
            rows[name].append((*_nats(found, ids), divergence, flipped))
    return {name: np.array(several, dtype=np.float64) for name, several in rows.items()}


def _nats(found: torch.Tensor, ids: torch.Tensor) -> tuple[float, int]:
    """Nats and number of the tokens after the first, from log-probabilities [tokens, vocabulary]."""
    return -float(found.gather(1, ids[0, 1:, None]).double().sum()), ids.shape[1] - 1


def _window(run: quantize.StepwiseDecoder, ids: list[int]) -> NDArray[np.float64]:
    """Nats of each of the last tokens of a window, after all that stands before them, and ones, [tokens, 2]."""
    import torch

    run.reset()
    everything = torch.tensor([ids])
    before = everything[:, : -SCORED - 1]
    for part in torch.split(before, _STEP, dim=1):
        run(part, last=1)
    logits = run(everything[:, -SCORED - 1 : -1])[0].float().cpu()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, everything[0, -SCORED:, None]).double()
    return np.column_stack([-chosen.numpy(), np.ones(SCORED)])


def _logits(run: quantize.StepwiseDecoder, ids: torch.Tensor) -> torch.Tensor:
    import torch

    run.reset()
    return torch.cat([run(part)[0].float().cpu() for part in torch.split(ids, _STEP, dim=1)])


def _translations(study: Study, runs: Mapping[str, quantize.StepwiseDecoder]) -> list[dict[str, object]]:
    """Translate verses into French after three examples; corpus chrF++, paired with full precision."""
    params = study.params
    examples = parallel.verse_pairs("en", "fr", "train", n=_SHOTS, seed=params.seed)
    pairs = parallel.verse_pairs("en", "fr", "test", n=params.translated_items, seed=params.seed)
    prompter = prompts.few_shot(examples)
    asked = prompter([pair.source for pair in pairs], "en", "fr")
    view = "translation into French, chrF++"
    rows: list[dict[str, object]] = []
    base = None
    for name, run in progress.track(runs.items(), "translating"):
        written = [_continued(study, run, prompt, prompter.stop or "\n") for prompt in asked]
        score = translation.score(
            [text for text, _ in written],
            [pair.target for pair in pairs],
            ended=[ended for _, ended in written],
            target_language="fr",
        )
        items = score.chrf.items
        base = items if base is None else base  # full precision comes first
        study.recorder.keep(items, system=name, task=view)
        value = stats.bootstrap(items, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
        # in points: a model that translates nothing has no share to keep
        change = stats.difference(base, items, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
        rows.append({
            "scheme": name, "view": view, **value.columns("score"), **change.columns("change"),
            "bleu": score.bleu.score, "signature": score.chrf.signature, "failed": score.failure_shares["any"],
        })  # fmt: skip
    return rows


def _continued(study: Study, run: quantize.StepwiseDecoder, prompt: str, stop: str) -> tuple[str, bool]:
    """Greedy continuation up to a text that ends it, and whether that came."""
    import torch

    run.reset()
    ids = torch.tensor([study.tokenizer(prompt)["input_ids"]])
    written: list[int] = []
    for _ in range(study.params.new_tokens):
        token = int(run(ids)[0, -1].argmax())
        if token == study.tokenizer.eos_token_id:
            return study.tokenizer.decode(written).strip(), True
        written.append(token)
        text = study.tokenizer.decode(written)
        if stop in text:
            return text.split(stop)[0].strip(), True
        ids = torch.tensor([[token]])
    return study.tokenizer.decode(written).strip(), False


def _neighbours(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which other text is nearest to each."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(cosines.argmax(axis=1))


def _judged(kept: Mapping[str, stats.Estimate], margin: float) -> dict[str, dict[str, object]]:
    """Whether each scheme changes the quality, and whether it stays within the margin for certain.

    `p_holm`: two-sided p-value of the change, by a normal approximation to its bootstrap, corrected for the number of
    schemes (Holm 1979). `within_margin`: the whole interval lies within the margin.
    """
    from scipy.stats import norm

    def p_value(change: stats.Estimate) -> float:
        spread = (change.high - change.low) / (2 * norm.ppf(0.975))
        return 1.0 if spread == 0 else float(2 * norm.sf(abs(change.value) / spread))

    changes = {name: each.shifted(-100) for name, each in kept.items()}
    adjusted = stats.holm([p_value(change) for change in changes.values()])
    found: dict[str, dict[str, object]] = {quantize.BASELINE: {"p_holm": 1.0, "within_margin": True}}
    for (name, change), p in zip(changes.items(), adjusted, strict=True):
        found[name] = {"p_holm": p, "within_margin": stats.equivalent(change, margin) == "equivalent"}
    return found
