"""The students as folders that others load without this project, each with a card written from the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overparam.compress import depth
from overparam.experiment.study import step
from overparam.studies.distillation_retention.general import DISTILLED, Students, Suite
from overparam.studies.distillation_retention.study import Study
from overparam.studies.distillation_retention.tasks import Taught
from overparam.support import cache, progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@step
def export(study: Study, students: Students, suite: Suite, taught: Taught) -> list[Path]:
    """Save the students of the first seed as sentence-transformers folders in the user's cache, unless told not to.

    Encoders of every share, and the classifiers of `task_share`, whose outputs are logits.
    """
    if not study.params.export:
        return []
    own = study.params.task_share
    models = [
        (f"{share:g}", several[0], card(study, share, several[0], suite))
        for share, several in students.distilled.items()
    ]
    models += [
        (f"{own:g}-{task.replace('/', '-')}", model, classifier_card(study, task, taught))
        for task, model in taught.classifiers.items()
    ]
    found = []
    for name, model, text in models:
        run = f"{study.params.slug()}-{study.recorder.record.key[:8]}"
        folder = cache.directory() / "encoders" / run / f"student-{name}"
        depth.save_encoder(model, folder, card=text, replace=True)
        found.append(folder)
    progress.note(f"saved {len(found)} students in {folder.parent}")
    return found


def classifier_card(study: Study, task: str, taught: Taught) -> str:
    """Write the model card of a student's classifier."""
    params, record, data = study.params, study.recorder.record, taught.data[task]
    kept = taught.kept[task, params.task_share]
    classes = ", ".join(f"{number}: {name}" for number, name in enumerate(data.classes))
    return f"""---
library_name: sentence-transformers
pipeline_tag: text-classification
---

# A student of {params.teacher} for {task}

Its outputs are logits of {len(data.classes)} classes: {classes}.
Fine-tuned on {len(data.texts):,} labelled texts and the soft targets of its teacher, those of {len(data.unlabelled):,}
unlabelled texts among them. It keeps {kept.value:.1f} % [{kept.low:.1f}, {kept.high:.1f}] of its teacher's accuracy on
{len(data.test_texts):,} test texts (95 % bootstrap interval).

Run {record.key[:8]} of overparam, git {record.provenance["git"]["sha"]}.
"""


def card(study: Study, share: float, encoder: SentenceTransformer, suite: Suite) -> str:
    """Write the model card of a student."""
    params, record = study.params, study.recorder.record
    kept, count = suite.kept[share], sum(parameter.numel() for parameter in encoder.parameters())
    tasks = suite.by_task[f"{share:.0%} {DISTILLED}"]
    scores = "\n".join(f"| {task} | {score:.1f} |" for task, score in tasks.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
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
