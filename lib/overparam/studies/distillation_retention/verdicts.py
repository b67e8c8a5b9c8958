"""What was published, and the verdict of this run on it."""

from __future__ import annotations

import pandas as pd

from overparam.report import stats
from overparam.report.claims import Claim, judged
from overparam.studies.distillation_retention.general import Suite
from overparam.studies.distillation_retention.specialists import ALL, STUDENT
from overparam.studies.distillation_retention.study import Study
from overparam.studies.distillation_retention.tasks import Taught

# share of the teacher's parameters and of its score that students kept, in percent
PUBLISHED = pd.DataFrame(
    [
        ("DistilBERT", 60.0, 97.0, "arXiv 1910.01108, abstract: 40 % smaller, 97 % kept, 60 % faster"),
        ("MiniLM-L6", 20.2, 97.6, "MiniLM's repository, mean of 8 tasks, 22 of 109 M parameters"),
        ("TinyBERT-4", 13.3, 96.8, "arXiv 1909.10351, abstract: 7.5 times smaller, 9.4 times as fast"),
    ],
    columns=["student", "share_percent", "kept_percent", "source"],
)
CLAIM = "A student with one tenth of the parameters keeps 90 % or more of its teacher"


def verdicts(
    study: Study,
    suite: Suite,
    taught: Taught,
    specialists: pd.DataFrame,
    faster: dict[float, stats.Estimate],
) -> list[Claim]:
    """Judge each claim by its rule, and put it into the record."""
    params = study.params
    share, target = params.task_share, params.retention_target
    kept = {"embedding": suite.kept[share]} | {task: taught.kept[task, share] for task in params.topics}
    claims = [
        judged(
            f"distillation-tenth-{name.lower()}",
            f"{CLAIM}: {'mean of the embedding suite' if name == 'embedding' else name}",
            source="said of distillation in general; DistilBERT, TinyBERT and MiniLM keep 97 % with 60, 13 and 20 %",
            published=f"at least {target:g} % kept",
            kind="no_worse",
            measured=found.shifted(-100),
            margin=100 - target,
            unit="% of the teacher's score",
            figure="fig:distillation-retention",
            note=_note(study, name),
        )
        for name, found in kept.items()
    ]
    claims.append(
        judged(
            "distillation-soft-targets",
            "Soft probabilities carry knowledge that labels do not",
            source="Hinton et al. 2015, arXiv 1503.02531",
            published="better than labels alone",
            kind="difference",
            measured=taught.soft,
            margin=0.0,
            published_value=0.0,
            unit="points of accuracy",
            figure="fig:distillation-tasks",
            note=f"Mean over {len(params.topics)} tasks, {share:.0%} student, temperature {params.temperature:g}, "
            "weight of the soft targets "
            f"{params.soft_weight:g}. The rule asks whether they are no worse; read the interval for better.",
        )
    )
    claims += [_specialist(study, specialists), _faster(study, faster)]
    for claim in claims:
        study.recorder.claim(claim)
    return claims


def _note(study: Study, name: str) -> str:
    params = study.params
    if name == "embedding":
        return (
            f"{params.steps} steps of {params.batch_size} texts, {params.texts} unlabelled texts, "
            f"{len(params.suite)} tasks."
        )
    return (
        f"Student and teacher fine-tuned on {params.labelled} labelled texts, the student also on soft targets of up "
        f"to {params.unlabelled} unlabelled ones; {len(params.train_seeds)} seed(s)."
    )


def _specialist(study: Study, table: pd.DataFrame) -> Claim:
    """The student against the best general encoder, all labelled texts, mean over tasks."""
    rows = table[table["per_class"] == ALL]
    mine = rows[rows["system"] == STUDENT].set_index("task")
    probes = rows[rows["system"].str.contains("probe|neighbours")]
    measured, note = None, "No general encoder among the parameters."
    if not probes.empty:
        best = probes.loc[probes.groupby("task")["accuracy"].idxmax()].set_index("task")
        gaps = mine["accuracy"] - best["accuracy"].reindex(mine.index)
        both = pd.concat([mine, best])
        widths = (both["accuracy_high"] - both["accuracy_low"]) / 2
        half = float((widths**2).sum() ** 0.5) / len(mine)  # as if independent: wide for the same texts
        value = float(gaps.mean())
        measured = stats.Estimate(value, value - half, value + half, len(mine))
        note = (
            "Per task against the better of a linear probe and the nearest neighbours of "
            f"{', '.join(study.params.general_models)}, all labelled texts. The interval adds tasks as independent."
        )
    return judged(
        "distillation-specialist",
        "A small task-specific student beats a larger general model on its task",
        source="said of task-specific students in general",
        published="better",
        kind="no_worse",
        measured=measured,
        margin=0.0,
        unit="points of accuracy",
        figure="fig:distillation-specialists",
        note=note,
    )


def _faster(study: Study, faster: dict[float, stats.Estimate]) -> Claim:
    share = study.params.task_share
    found = faster[share]
    return judged(
        "distillation-speed",
        f"The {share:.0%} student encodes at least 4 times as fast as its teacher",
        source="the goal of this suite; TinyBERT-4: 9.4 times with 13 % of the parameters",
        published="4 times",
        kind="no_worse",
        measured=found.shifted(-4),
        margin=0.0,
        unit="times, above 4",
        figure="fig:distillation-cost",
        note=f"{study.params.cost_texts} texts at a time, {found.value:.1f} times as fast.",
    )
