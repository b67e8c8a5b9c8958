"""What each scheme keeps of the model's quality, in several views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from overparam import progress
from overparam.compress import quantize
from overparam.data import corpora, parallel, splits
from overparam.evaluate import embedding, prompts, samples, translation
from overparam.report import stats
from overparam.studies.quantization_accuracy.study import CURVE_RESAMPLES, Study

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
    """

    table: pd.DataFrame
    kept: dict[str, stats.Estimate]


def measure(study: Study) -> Quality:
    """Measure the quality of every scheme that runs here: `of_encoder` or `of_decoder`."""
    found = of_decoder(study) if study.decoder else of_encoder(study)
    for name, kept in found.kept.items():
        study.recorder.metric(f"kept_{name}", kept, "% of full precision")
    study.recorder.table("quality", found.table)
    return found


def of_encoder(study: Study) -> Quality:
    """Score the embedding suite under every scheme, and say how far embeddings moved."""
    names = study.running
    systems = [study.quantized(name).run for name in progress.track(names, "quantizing")]

    def embed(texts: list[str], instruction: str | None = None) -> NDArray[np.float32]:  # noqa: ARG001
        runs = progress.track(systems, "embedding the suite")
        return np.stack([study.embed(run, texts) for run in runs], axis=1)

    scores = suite(study, embed, names)
    base = scores[quantize.BASELINE]
    texts = study.train_texts[-study.params.probe_texts :]
    vectors = {name: study.embed(run, texts) for name, run in zip(names, systems, strict=True)}
    kept = {name: retained(base, scores[name]) for name in names if name != quantize.BASELINE}
    adjusted = dict(zip(kept, stats.holm([_p_value(base, scores[name]) for name in kept]), strict=True))
    rows = [
        {
            "scheme": name,
            "score": 100 * float(np.mean([each.score for each in scores[name].values()])),
            **(
                kept[name].columns("kept")
                if name in kept
                else stats.Estimate(100, 100, 100, 1).columns("kept")
            ),
            "p_holm": adjusted.get(name, 1.0),
            "within_margin": name not in kept
            or stats.equivalent(kept[name].shifted(-100), study.params.margin) == "equivalent",
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
        study.keep(names[each.view], f"suite: {each.task}", each.items)
    return found


def retained(base: Scores, scores: Scores) -> stats.Estimate:
    """What a system keeps of the suite's mean score, in percent, paired by item."""
    pairs = {task: (base[task].items, each.items, each.statistic) for task, each in scores.items()}
    return stats.suite_retention(pairs, n_resamples=CURVE_RESAMPLES).scaled(100)


def of_decoder(study: Study) -> Quality:
    """Measure likelihood, divergence, flipped tokens, long contexts and translation under every scheme."""
    texts_of = views(study)
    windows = _windows(study)
    base: dict[str, NDArray[np.float64]] = {}
    rows, kept = [], {}
    reference = study.quantized(quantize.BASELINE)
    for name in progress.track(study.running, "schemes"):
        system = reference if name == quantize.BASELINE else study.quantized(name)
        everything = []
        for view, texts in texts_of.items():
            items, kl, flipped = _likelihood(study, reference.run, system.run, texts)
            study.keep(name, f"likelihood: {view}", np.column_stack([items, kl, flipped]))
            everything.append(items)
            tokens = items[:, 1].sum()
            moved = {"kl_to_fp32": float(kl.sum() / tokens), "flipped_tokens": float(flipped.sum() / tokens)}
            rows.append(_row(name, view, base.setdefault(view, items), items) | moved)
        for length, texts_ids in windows.items():
            view = f"context of {length}"
            items = np.array([_window(system.run, ids) for ids in texts_ids])
            study.keep(name, f"likelihood: {view}", items)
            rows.append(_row(name, view, base.setdefault(view, items), items))
        joined = np.concatenate(everything)
        base.setdefault("all texts", joined)
        if name != quantize.BASELINE:
            kept[name] = kept_of_perplexity(base["all texts"], joined)
        rows.append(_row(name, "all texts", base["all texts"], joined))
        if study.params.translated_items:
            rows.append(_translations(study, name, system.run, base))
        del system
    return Quality(pd.DataFrame(rows), kept)


def nats(run: quantize.Steps, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> NDArray[np.float64]:
    """Negative log-likelihood of each text, and its tokens, [texts, 2]."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        chosen = torch.log_softmax(_logits(run, ids[:, :-1]), dim=-1).gather(1, ids[0, 1:, None]).double()
        found.append((-float(chosen.sum()), ids.shape[1] - 1))
    return np.array(found, dtype=np.float64)


def kept_of_perplexity(base: NDArray[np.float64], items: NDArray[np.float64]) -> stats.Estimate:
    """100 less the rise of the perplexity in percent, paired by text."""
    rise = stats.retention(base, items, statistic="perplexity", n_resamples=CURVE_RESAMPLES)
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


def _likelihood(
    study: Study, reference: quantize.Steps, run: quantize.Steps, texts: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per text: (nats, tokens), sum of the divergences from full precision in nats, and flipped likeliest tokens."""
    items, divergences, flips = [], [], []
    for text in texts:
        ids = torch.tensor([study.tokenizer(text)["input_ids"]])
        expected = torch.log_softmax(_logits(reference, ids[:, :-1]), dim=-1)
        found = expected if run is reference else torch.log_softmax(_logits(run, ids[:, :-1]), dim=-1)
        chosen = found.gather(1, ids[0, 1:, None]).double()
        items.append((-float(chosen.sum()), ids.shape[1] - 1))
        divergences.append(float((expected.exp() * (expected - found)).sum()))
        flips.append(int((expected.argmax(-1) != found.argmax(-1)).sum()))
    return np.array(items, dtype=np.float64), np.array(divergences), np.array(flips, dtype=np.float64)


def _window(run: quantize.Steps, ids: list[int]) -> tuple[float, float]:
    """Nats and number of the last tokens of a window, after all that stands before them."""
    run.reset()
    everything = torch.tensor([ids])
    before = everything[:, : -SCORED - 1]
    for part in torch.split(before, _STEP, dim=1):
        run(part)
    logits = run(everything[:, -SCORED - 1 : -1])[0].float().cpu()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, everything[0, -SCORED:, None]).double()
    return -float(chosen.sum()), float(SCORED)


def _logits(run: quantize.Steps, ids: torch.Tensor) -> torch.Tensor:
    run.reset()
    return torch.cat([run(part)[0].float().cpu() for part in torch.split(ids, _STEP, dim=1)])


def _translations(
    study: Study, name: str, run: quantize.Steps, base: dict[str, NDArray[np.float64]]
) -> dict[str, object]:
    """Translate verses into French after three examples; corpus chrF++, paired with full precision."""
    params = study.params
    examples = parallel.verse_pairs("en", "fr", "train", n=_SHOTS, seed=params.seed)
    pairs = parallel.verse_pairs("en", "fr", "test", n=params.translated_items, seed=params.seed)
    prompter = prompts.few_shot(examples)
    asked = prompter([pair.source for pair in pairs], "en", "fr")
    written = [_continued(study, run, prompt, prompter.stop or "\n") for prompt in asked]
    score = translation.score(
        [text for text, _ in written],
        [pair.target for pair in pairs],
        ended=[ended for _, ended in written],
        target_language="fr",
    )
    view = "translation into French, chrF++"
    items = score.chrf.items
    study.keep(name, view, items)
    value = stats.bootstrap(items, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
    change = stats.difference(
        base.setdefault(view, items), items, statistic="chrf++", n_resamples=CURVE_RESAMPLES
    )  # in points: a model that translates nothing has no share to keep
    return {
        "scheme": name, "view": view, **value.columns("score"), **change.columns("change"),
        "bleu": score.bleu.score, "signature": score.chrf.signature, "failed": score.failure_shares["any"],
    }  # fmt: skip


def _continued(study: Study, run: quantize.Steps, prompt: str, stop: str) -> tuple[str, bool]:
    """Greedy continuation up to a text that ends it, and whether that came."""
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


def _p_value(base: Scores, scores: Scores) -> float:
    """Two-sided p-value of the change of the suite's mean, by a normal approximation to its paired bootstrap."""
    from scipy.stats import norm

    pairs = {task: (base[task].items, each.items, each.statistic) for task, each in scores.items()}
    change = stats.suite_difference(pairs, n_resamples=CURVE_RESAMPLES)
    spread = (change.high - change.low) / (2 * norm.ppf(0.975))
    return 1.0 if spread == 0 else float(2 * norm.sf(abs(change.value) / spread))
