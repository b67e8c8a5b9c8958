"""The students as folders that others load without this project, each with a card written from the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overparam import packages, progress
from overparam.studies.distillation_retention.general import DISTILLED, Students, Suite
from overparam.studies.distillation_retention.study import Study

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def export(study: Study, students: Students, suite: Suite) -> dict[float, Path]:
    """Save the distilled encoders as sentence-transformers folders in the user's cache, unless `export` is false."""
    if not study.params.export:
        return {}
    found = {}
    for share, encoder in students.distilled.items():
        folder = packages.cache_dir() / "encoders" / f"{study.params.slug()}-student-{share:g}"
        encoder.save(str(folder), create_model_card=False)
        (folder / "README.md").write_text(card(study, share, encoder, suite), encoding="utf-8")
        progress.note(f"saved the student with {share:g} of the parameters at {folder}")
        found[share] = folder
    return found


def card(study: Study, share: float, encoder: SentenceTransformer, suite: Suite) -> str:
    """Write the model card of a student."""
    params, record = study.params, study.recorder.record
    kept, count = suite.kept[share], sum(parameter.numel() for parameter in encoder.parameters())
    tasks = suite.by_task[f"{share:.0%} {DISTILLED}"]
    scores = "\n".join(f"| {task} | {score:.1f} |" for task, score in tasks.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: sentence-transformers/{Path(params.teacher).name}
---

# A student of {params.teacher} with {count:,} parameters

Distilled from {params.teacher} on {params.texts:,} unlabelled texts in {params.steps} steps of {params.batch_size}.
Its embeddings have {study.width} dimensions and unit length.
It keeps {kept.value:.1f} % [{kept.low:.1f}, {kept.high:.1f}]
of its teacher's mean score over {len(params.suite)} embedding tasks (95 % bootstrap interval over items).

| task | score |
|---|---|
{scores}

Texts were cut to {params.max_length} tokens; its vocabulary of {len(encoder.tokenizer):,} tokens was trained on English
verses, news and newsgroup posts.

Run {record.key[:8]} of overparam, git {record.provenance["git"]["sha"]}.
"""
