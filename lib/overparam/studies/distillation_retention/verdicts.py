"""The verdict of this run on each published claim."""

from __future__ import annotations

import numpy as np
import pandas as pd

from overparam.record import ledger, stats
from overparam.record.claims import Claim
from overparam.studies.distillation_retention.general import TEACHER, Suite
from overparam.studies.distillation_retention.specialists import ALL, PROBED, STUDENT, Compared
from overparam.studies.distillation_retention.study import Study
from overparam.studies.distillation_retention.tasks import EXTRA, Taught, correct

# published students: share of the teacher's parameters, and share of its score that they kept, in percent
PUBLISHED = pd.DataFrame(
    [
        ("DistilBERT", 60.0, 97.0, "arXiv 1910.01108, abstract: 40 % smaller, 97 % kept, 60 % faster"),
        ("MiniLM-L6", 20.2, 97.6, "MiniLM's repository, mean of 8 tasks, 22 of 109 M parameters"),
        ("TinyBERT-4", 13.3, 96.8, "arXiv 1909.10351, abstract: 7.5 times smaller, 9.4 times as fast"),
    ],
    columns=["student", "share_percent", "kept_percent", "source"],
)


def verdicts(
    study: Study,
    suite: Suite,
    taught: Taught,
    compared: Compared,
    faster: dict[float, stats.Estimate],
) -> list[Claim]:
    """Judge each claim by its rule, and put it into the record."""
    params = study.params
    share, target = params.task_share, params.retention_target
    kept = {"embedding": suite.kept[share]} | {task: taught.kept[task, share] for task in params.topics}
    claims = [
        ledger.judged(
            f"distillation-{100 * share:g}-{name.lower().replace('/', '-')}",
            measured=found.shifted(-100),
            margin=100 - target,
            note=_note(study, taught, name),
            words={
                "share": share,
                "target": target,
                "task": "mean of the embedding suite" if name == "embedding" else name,
            },
        )
        for name, found in kept.items()
    ]
    claims.append(
        ledger.judged(
            "distillation-soft-targets",
            measured=taught.soft,
            margin=0.0,
            note=f"Mean over {len(params.topics)} tasks, {share:.0%} student, temperature {params.temperature:g}, "
            f"weight of the soft targets {params.soft_weight:g}; the labels have the rest.",
        )
    )
    claims += [
        _specialist(study, taught, compared),
        _task_definition(study, taught, compared),
        _own_kind(study, taught),
        _faster(study, faster),
    ]
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _note(study: Study, taught: Taught, name: str) -> str:
    params = study.params
    if name == "embedding":
        return (
            f"{params.steps} steps of {params.batch_size} texts, {params.texts} unlabelled texts, "
            f"{len(params.suite)} tasks, {len(params.train_seeds)} seed(s)."
        )
    data = taught.data[name]
    return (
        f"Student and teacher fine-tuned on {len(data.texts)} labelled texts, the student also on soft targets of "
        f"{len(data.unlabelled)} unlabelled ones; {len(params.train_seeds)} seed(s)."
    )


def _specialist(study: Study, taught: Taught, compared: Compared) -> Claim:
    """The student against the best general encoder of each task, all labelled texts, mean over tasks."""
    table = compared.table
    probes = table[
        (table["per_class"] == ALL)
        & table["system"].str.contains("linear probe|nearest neighbours")
        & (table["system"] != PROBED)
    ]
    measured, note = None, "No general encoder among the parameters."
    if not probes.empty:
        best = probes.loc[probes.groupby("task")["accuracy"].idxmax()].set_index("task")["system"]
        measured = stats.suite_difference(
            {
                task: (compared.items[task, system, ALL], compared.items[task, STUDENT, ALL], "mean")
                for task, system in zip(map(str, best.index), best, strict=True)
            }
        ).scaled(100)
        note = (
            f"All labelled texts, first seed; against the better probe of {', '.join(study.params.general_models)} for "
            "each task, chosen on the test texts, which favours the general encoders. The student had learned from "
            "unlabelled text of the same kinds. "
        )
        note += _teacher_note(study, taught, compared)
    return ledger.judged(
        "distillation-specialist",
        measured=measured,
        margin=0.0,
        note=note,
    )


def _task_definition(study: Study, taught: Taught, compared: Compared) -> Claim:
    """The student distilled for each task, against a linear probe on the same student as a general encoder."""
    share = study.params.task_share
    pairs = {
        name: (
            compared.items[name, PROBED, ALL],
            correct(task, taught.probabilities[name, EXTRA, share])[0],
            "mean",
        )
        for name, task in taught.data.items()
    }
    return ledger.judged(
        "distillation-task-definition",
        measured=stats.suite_difference(pairs).scaled(100),
        margin=0.0,
        note="Taught by the fine-tuned teacher, against a linear probe on the student before that, with the same "
        "labelled texts; first seed.",
    )


def _own_kind(study: Study, taught: Taught) -> Claim:
    """Unlabelled text of the task's kind, against an equal number of verses."""
    counts = ", ".join(f"{len(task.unlabelled)} of {name}" for name, task in taught.data.items())
    return ledger.judged(
        "distillation-own-kind",
        measured=taught.kind,
        margin=0.0,
        note=f"The teacher labels {counts}, or an equal number of verses. {len(study.params.train_seeds)} seed(s).",
    )


def _teacher_note(study: Study, taught: Taught, compared: Compared) -> str:
    """List tasks where the fine-tuned teacher is worse than a linear probe of the same model."""
    system = f"{study.params.teacher}, linear probe"
    weak = [
        task
        for task in taught.data
        if (task, system, ALL) in compared.items
        and np.mean(correct(taught.data[task], taught.probabilities[task, TEACHER, 1.0]))
        < compared.items[task, system, ALL].mean()
    ]
    return (
        f"The fine-tuned teacher is worse than a linear probe of itself on {', '.join(weak)}." if weak else ""
    )


def _faster(study: Study, faster: dict[float, stats.Estimate]) -> Claim:
    share = study.params.task_share
    found = faster[share]
    return ledger.judged(
        "distillation-speed",
        measured=found.shifted(-4),
        margin=0.0,
        note=f"{study.params.cost_texts} texts at a time, {found.value:.1f} times as fast.",
        words={"share": share},
    )
