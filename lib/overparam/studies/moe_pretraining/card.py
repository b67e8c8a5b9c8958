"""The model card of the weights, made from the numbers of the record."""

from __future__ import annotations

import pandas as pd

from overparam.studies.moe_pretraining.quality import arrow, best_search
from overparam.studies.moe_pretraining.study import MODEL_CARD, Study


def model_card(study: Study, translation: pd.DataFrame) -> str:
    """Record the model card as an artifact, and return its text."""
    params, run = study.params, study.recorder.record
    numbers = {name: metric.value for name, metric in run.metrics.items()}
    rows = translation[translation["search"] == best_search(params)]
    scores = "\n".join(
        f"| {arrow(row['source'], row['target'])} | {row['chrf']:.1f} [{row['chrf_low']:.1f}, {row['chrf_high']:.1f}] "
        f"| {row['bleu']:.1f} | {100 * row['failed_any']:.1f} % |"
        for row in rows.to_dict("records")
    )
    hashes = "\n".join(f"- `{name}`: `{sha}`" for name, sha in run.provenance["inputs"].items())
    perplexities = ", ".join(
        f"{name.removeprefix('perplexity_')} {value:.1f}"
        for name, value in numbers.items()
        if name.startswith("perplexity_")
    )
    donor = params.embedding_donor or ""
    terms = "Apache-2.0, as the suite."
    if donor:
        terms = (
            f"The embedding table was initialised from principal components of the embeddings of {donor}: the terms "
            "of use of that model apply to these weights too."
        )
    if donor.startswith("gemma"):
        terms += " They are at https://ai.google.dev/gemma/terms."
    text = f"""---
license: {"gemma" if donor.startswith("gemma") else "other" if donor else "apache-2.0"}
language: [en, fr, de, es, it]
pipeline_tag: translation
tags: [mixture-of-experts]
---
# {params.slug()}

A small mixture-of-experts generalist (`{params.architecture}`), trained from scratch by the study `moe_pretraining` of
overparam to have a real mixture of experts that a laptop can prune. It translates the language of the Bible and has
read a little of other text: it is for experiments, not for use.

- {numbers["parameters_total"] / 1e6:.1f} million parameters, {numbers["parameters_active"] / 1e6:.1f} million active
  (without the embedding table); {params.layers} layers, {params.experts} experts of width {params.expert_width} per
  layer, top-{params.top_k}, hidden size {params.hidden}, {params.vocabulary} tokens; stored in bfloat16.
- A prompt is `source<2fr>` (or `<2de>`, `<2es>`, `<2it>`, `<2en>`); `<lm>` comes before plain text.
- {numbers["training_tokens"] / 1e6:.1f} million tokens in {numbers["training_steps"]:.0f} steps, seed {params.seed}.
- {100 * numbers["busy_experts"]:.1f} % of the experts carry at least {params.minimum_load:g} of the uniform load on
  held-out text of the training mix; the minimum is {numbers["least_expert_load"]:.2f}.

## Text

Verses of public-domain Bible translations (World English Bible, Segond 1910, Elberfelder 1905, Reina-Valera 1909,
Diodati): from English into French, German and Spanish, for {100 * params.unseen_share:g} % also into Italian, and for
{100 * params.reverse_share:g} % from one of the four into English. English newsgroup posts (20 Newsgroups) and news
(Reuters-21578). Held-out verses were not used for training in any translation.

SHA-256 of the packages that text and initial embeddings come from:

{hashes}

## Scores

{rows["verses"].iloc[0]} held-out verses, {best_search(params)}; 95 % bootstrap intervals over verses; failed
translations count as empty.

| direction | chrF++ | BLEU | failed |
|---|---|---|---|
{scores}

Perplexity of held-out plain text (pieces): {perplexities}.

## Terms

{terms}
"""
    study.recorder.artifact(MODEL_CARD, text.encode())
    return text
