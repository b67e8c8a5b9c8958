"""What each scheme keeps of the model's quality, in several views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.compress import quantize
from overparam.data import parallel, splits
from overparam.evaluate import prompts
from overparam.evaluate.generation import Generation
from overparam.experiment import sweep
from overparam.experiment.study import step
from overparam.experiment.subjects.base import System
from overparam.experiment.subjects.decoder import Decoder, Outcome, nats
from overparam.experiment.subjects.encoder import Encoder
from overparam.experiment.subjects.translator import Translator
from overparam.experiment.sweep import CURVE_RESAMPLES
from overparam.record import stats
from overparam.studies.quantization_accuracy.study import Study, as_quantized
from overparam.support import progress

SCORED = 64  # last tokens of a window, whose likelihood is a context length's
_SHOTS = 3


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
    subject = study.subject
    found = of_decoder(study, subject) if isinstance(subject, Decoder) else of_encoder(study, subject)
    for name, kept in found.kept.items():
        study.recorder.metric(f"kept_{name}", kept, "% of full precision")
    study.recorder.table("quality", found.table)
    return found


def of_encoder(study: Study, subject: Encoder) -> Quality:
    """Score the embedding suite under every scheme, and say how far embeddings moved."""
    runs = {name: study.quantized(name).run for name in study.running}
    systems = [System.ready(name, run) for name, run in runs.items()]
    found = sweep.sweep(study, subject, systems, margin=study.params.margin)
    texts = study.train_texts[-study.params.probe_texts :]
    vectors = [np.stack(subject.outputs(run, texts)) for run in runs.values()]
    base = vectors[0]
    cosines = [float(np.mean(np.sum(each * base, axis=1))) for each in vectors]
    others = [float(np.mean(_neighbours(each) != _neighbours(base))) for each in vectors]
    table = found.table.rename(columns={"system": "scheme"}).drop(columns="n")
    at = list(table).index("within_margin") + 1
    table.insert(at, "cosine_to_fp32", cosines)
    table.insert(at + 1, "other_neighbour", others)
    return Quality(table, {name: each for (name,), each in found.kept.items()})


def of_decoder(study: Study, subject: Decoder) -> Quality:
    """Measure likelihood, divergence, flipped tokens, long contexts and translation under every scheme."""
    names = study.running
    runs: dict[str, quantize.StepwiseDecoder] = {name: study.quantized(name).run for name in names}
    rows: list[dict[str, object]] = []
    read: dict[tuple[str, str], NDArray[np.float64]] = {}
    for view, texts in subject.views.items():
        found = _likelihoods(subject, runs, progress.track(texts, f"reading {view}"))
        for name, items in found.items():
            study.recorder.keep(items, system=name, task=f"likelihood: {view}")
            read[name, view] = items[:, :2]
            tokens = items[:, 1].sum()
            moved = {"kl_to_fp32": items[:, 2].sum() / tokens, "flipped_tokens": items[:, 3].sum() / tokens}
            rows.append(_row(name, view, found[quantize.BASELINE][:, :2], items[:, :2]) | moved)
    joined = {
        name: np.concatenate([items for (each, _), items in read.items() if each == name]) for name in names
    }
    whole = sweep.compare(
        subject,
        {(name,): [{"all texts": Outcome(items)}] for name, items in joined.items()},
        margin=study.params.margin,
    )
    base, tests = joined[quantize.BASELINE], whole.table[["p_holm", "within_margin"]]
    for (name, items), (p, within) in zip(joined.items(), tests.itertuples(index=False), strict=True):
        row = _row(name, "all texts", base, items)
        rows.append(row | {"p_holm": p, "within_margin": within})
    for length, windows in _windows(study).items():
        view = context(length)
        scored = {
            name: np.concatenate([subject.last_nats(run, ids, SCORED) for ids in windows])
            for name, run in progress.track(runs.items(), f"reading {view}")
        }
        read |= {(name, view): items for name, items in scored.items()}
        for name, items in scored.items():
            study.recorder.keep(items, system=name, task=f"likelihood: {view}")
            rows.append(_row(name, view, scored[quantize.BASELINE], items))
    if study.params.translated_items:
        rows += _translations(study, runs)
    return Quality(pd.DataFrame(rows), {name: each for (name,), each in whole.kept.items()}, read)


def context(length: int) -> str:
    """Name of the view of texts that come after so many tokens."""
    return f"context of {length}"


def rise(quality: Quality, scheme: str, view: str) -> NDArray[np.float64]:
    """By how many nats a token each text of a view is less likely than in full precision, in percent, [texts, 1]."""
    base, items = quality.read[quantize.BASELINE, view], quality.read[scheme, view]
    return 100 * ((items[:, :1] - base[:, :1]) / base[:, 1:])


def _row(name: str, view: str, base: NDArray[np.float64], items: NDArray[np.float64]) -> dict[str, object]:
    perplexity = stats.bootstrap(items, statistic="perplexity", n_resamples=CURVE_RESAMPLES)
    rise = stats.retention(base, items, statistic="perplexity", n_resamples=CURVE_RESAMPLES).scaled(100)
    return {"scheme": name, "view": view, **perplexity.columns("perplexity"), **rise.columns("of_fp32")}


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
    subject: Decoder, runs: Mapping[str, quantize.StepwiseDecoder], texts: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """By scheme and text: nats, tokens, divergences from full precision in nats, and other likeliest tokens."""
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for text in texts:
        ids = subject.ids(text)
        expected = subject.predicted(runs[quantize.BASELINE], ids[:, :-1])
        for name, run in runs.items():
            found = expected if name == quantize.BASELINE else subject.predicted(run, ids[:, :-1])
            divergence = float((expected.exp() * (expected - found)).sum())
            flipped = int((expected.argmax(-1) != found.argmax(-1)).sum())
            rows[name].append((*nats(found, ids), divergence, flipped))
    return {name: np.array(several, dtype=np.float64) for name, several in rows.items()}


def _translations(study: Study, runs: Mapping[str, quantize.StepwiseDecoder]) -> list[dict[str, object]]:
    """Translate verses into French after three examples; corpus chrF++, paired with full precision."""
    params = study.params
    examples = parallel.verse_pairs("en", "fr", "train", n=_SHOTS, seed=params.seed)
    prompter = prompts.few_shot(examples)

    def write(run: Any, pairs: Mapping[str, Sequence[parallel.Pair]]) -> dict[str, list[Generation]]:
        asked = prompter([pair.source for pair in pairs["fr"]], "en", "fr")
        return {"fr": [_continued(study, run, prompt, prompter.stop or "\n") for prompt in asked]}

    pairs = parallel.verse_pairs("en", "fr", "test", n=params.translated_items, seed=params.seed)
    systems = [System.ready(name, run) for name, run in runs.items()]
    scores = [each["fr"] for each in Translator(write, {"fr": pairs}).score(systems)]
    view = "translation into French, chrF++"
    rows: list[dict[str, object]] = []
    for name, score in zip(runs, scores, strict=True):
        study.recorder.keep(score.items, system=name, task=view)
        value = stats.bootstrap(score.items, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
        # in points: a model that translates nothing has no share to keep; full precision comes first
        sides = (scores[0].items, score.items)
        change = stats.difference(*sides, statistic="chrf++", n_resamples=CURVE_RESAMPLES)
        rows.append({
            "scheme": name, "view": view, **value.columns("score"), **change.columns("change"),
            "bleu": score.bleu.score, "signature": score.chrf.signature, "failed": score.failure_shares["any"],
        })  # fmt: skip
    return rows


def _continued(study: Study, run: quantize.StepwiseDecoder, prompt: str, stop: str) -> Generation:
    """Greedy continuation up to a text that ends it."""
    import torch

    run.reset()
    ids = torch.tensor([study.tokenizer(prompt)["input_ids"]])
    written: list[int] = []
    text, ended = "", False
    while not ended and len(written) < study.params.new_tokens:
        token = int(run(ids)[0, -1].argmax())
        ended = token == study.tokenizer.eos_token_id
        if not ended:
            written.append(token)
            text = study.tokenizer.decode(written)
            ended = stop in text
            ids = torch.tensor([[token]])
    return Generation(text.split(stop)[0].strip(), written, ended, len(written))


def _neighbours(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which other text is nearest to each."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(cosines.argmax(axis=1))
