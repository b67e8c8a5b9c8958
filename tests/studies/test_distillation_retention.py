import itertools

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer

from overparam.compress.distill import encoders
from overparam.record import stats
from overparam.studies.distillation_retention import (
    Params,
    costs,
    decoders,
    export,
    general,
    specialists,
    study,
    tasks,
    verdicts,
)
from overparam.train import distillation as training

_FOLDER = study.Study.checkpoint

TINY = {
    "teacher": "tiny-bert",
    "shares": (0.5, 0.25),
    "task_share": 0.25,
    "max_length": 32,
    "texts": 64,
    "steps": 3,
    "batch_size": 8,
    "suite": ("LeeSTS",),
    "suite_items": 20,
    "topics": ("ReutersR8",),
    "labelled": 64,
    "unlabelled": 16,
    "test_items": 20,
    "characters": 64,
    "teacher_steps": 2,
    "teacher_batch_size": 8,
    "student_steps": 2,
    "student_batch_size": 8,
    "train_seeds": (1, 2),
    "per_class": (2,),
    "general_models": ("tiny-bert",),
    "cost_texts": 2,
    "cost_repeats": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "all-MiniLM"}, "did you mean 'all-MiniLM-L6-v2'"),
        ({"shares": (0.5,)}, "task_share must be among shares, 0.1 is not"),
        ({"shares": (0.1, 0.1)}, "shares repeat"),
        ({"shares": (1.5,)}, "less than 1"),
        ({"temperature": 0}, "greater than 0"),
        ({"suite": ("STS12",)}, "'STS12' is not"),
        ({"topics": ("R8",)}, "'R8' is not"),
        ({"topics": ("glue/foo",)}, "'glue/foo' is not"),
        ({"per_class": (32, 8)}, "must increase"),
        ({"general_models": ("nothing",)}, "unknown model 'nothing'"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERPARAM_JOB_DIR", str(tmp_path_factory.mktemp("job")))
        states = (tmp_path_factory.mktemp("state") / "state" for _ in itertools.count())
        patch.setattr(study.Study, "checkpoint", lambda *_: next(states))  # every training is done anew
        yield study.start(Params(**TINY))


@pytest.fixture(scope="module")
def students(started):
    return general.build(started)


@pytest.fixture(scope="module")
def taught(started, students):
    return tasks.teach(started, students)


def test_the_cache_knows_all_that_a_training_depends_on(started, students, monkeypatch):
    monkeypatch.undo()
    encoder, recipe = students.distilled[0.5][0], training.Recipe(steps=2)
    array = np.zeros(3)
    first = _FOLDER(started, encoder, recipe, ["a b", "c"], array)
    assert first == _FOLDER(started, encoder, recipe, ["a b", "c"], np.zeros(3))
    others = [
        _FOLDER(started, encoder, recipe, ["a b", "d"], array),
        _FOLDER(started, encoder, recipe, ["a b", "c"], array + 1),
        _FOLDER(started, encoder, recipe, ["a b", "c"], array, 2.0),
        _FOLDER(started, encoder, training.Recipe(steps=3), ["a b", "c"], array),
        _FOLDER(started, students.distilled[0.25][1], recipe, ["a b", "c"], array),
    ]
    assert len({first, *others}) == 6


def test_texts_longer_than_a_student_reads_are_refused_at_once():
    with pytest.raises(ValueError, match=r"max_length must be at most 128, .* got 256"):
        study.start(Params(**{**TINY, "max_length": 256}))


def test_ready_made_students_stand_beside(started, students, monkeypatch):
    params = Params(**{**TINY, "ready_made": ("tiny-modernbert",)})
    beside = study.Study(params, started.recorder, started.teacher, started.tokenizer)
    table = general.score(beside, students).table
    assert "tiny-modernbert, ready-made" in set(table["system"])


def test_texts_come_from_every_source_in_turns(started):
    assert len(started.texts) == 64
    assert started.texts == started.vocabulary_texts[:64]
    assert len(set(started.vocabulary_texts)) == len(started.vocabulary_texts)
    assert max(map(len, started.texts)) <= 64
    with pytest.raises(ValueError, match="texts = 999999 asks for more"):
        _ = study.Study(
            Params(**{**TINY, "texts": 999999}), started.recorder, started.teacher, started.tokenizer
        ).texts


def test_a_student_meets_its_budget_with_its_projection(started, students):
    for row in students.table.itertuples():
        assert row.share_reached == pytest.approx(row.share, rel=0.03)
        encoder = students.distilled[row.share][TINY["train_seeds"].index(row.seed)]
        assert row.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert set(students.controls) == {general.UNTRAINED, general.BORROWED, general.CUT}
    sizes = {sum(p.numel() for p in control.parameters()) for control in students.controls.values()}
    assert sizes == {sum(p.numel() for p in students.distilled[0.25][0].parameters())}


def test_the_teacher_keeps_all_of_itself(started, students):
    suite = general.score(started, students)
    table = suite.table.set_index("system")
    assert table.loc[general.TEACHER, "kept"] == 100
    assert set(table.index) == {general.TEACHER, general.DISTILLED, *students.controls, general.WORDS}
    assert set(suite.kept) == {0.5, 0.25}
    card = export.card(started, 0.25, students.distilled[0.25][0], suite)
    kept = suite.kept[0.25]
    assert f"{kept.value:.1f} % [{kept.low:.1f}, {kept.high:.1f}]" in card
    assert started.recorder.record.key[:8] in card


def test_every_way_to_learn_is_tried_with_every_seed(started, taught):
    table = taught.table.set_index(["system", "share"])
    systems = (tasks.LABELS, tasks.SOFT, tasks.MATCHED, tasks.EXTRA, tasks.OTHER)
    for system in (*systems, tasks.RANDOM_START, tasks.CUT_START):
        assert table.loc[(system, 0.25), "seeds"] == 2
    assert table.loc[(tasks.EXTRA, 0.5), "seeds"] == 1
    assert (table.loc[[tasks.LABELS, general.TEACHER], "training_kwh"] > 0).all()
    assert table.loc[(general.TEACHER, 1.0), "agreement"] == 100
    assert table.loc[(general.TEACHER, 1.0), "right_to_wrong"] == 0
    majority = taught.probabilities["ReutersR8", tasks.MAJORITY, 0.0][0]
    assert (majority.argmax(axis=1) == majority[0].argmax()).all()
    assert set(taught.kept) == {("ReutersR8", 0.5), ("ReutersR8", 0.25)}


def test_a_second_run_gives_the_same_probabilities(started, students, taught):
    again = tasks.teach(started, students)
    for key, several in taught.probabilities.items():
        for first, second in zip(several, again.probabilities[key], strict=True):
            np.testing.assert_array_equal(first, second)


def test_specialist_and_general_encoders_see_the_same_labels(started, students, taught):
    compared = specialists.compare(started, taught, students)
    table = compared.table
    assert set(table["system"]) == {
        "student",
        specialists.PROBED,
        "bag of words",
        "tiny-bert, linear probe",
        "tiny-bert, nearest neighbours",
        "tiny-bert, zero-shot",
    }
    assert set(table["per_class"]) == {specialists.NONE, "2", specialists.ALL}
    draws = specialists._draws(started, taught.data["ReutersR8"])
    labels = taught.data["ReutersR8"].labels
    assert np.bincount(labels[draws["2"]]).tolist() == [2] * 8
    assert len(draws[specialists.ALL]) == 64


def test_a_student_that_takes_half_the_time_is_twice_as_fast():
    found = costs.measuring.speed_up([2.0, 2.2, 2.1], [1.0, 1.1, 1.05])
    assert found.value == pytest.approx(2)
    assert found.low == pytest.approx(2)


def test_verdicts_follow_the_target(started, taught):
    kept = {0.25: stats.Estimate(93.0, 91.0, 95.0, 50), 0.5: stats.Estimate(97.0, 96.0, 98.0, 50)}
    suite = general.Suite(pd.DataFrame(), pd.DataFrame(), kept)
    right = {"student": [1] * 16 + [0] * 4, "tiny-bert, linear probe": [1] * 12 + [0] * 8}
    right["tiny-bert, nearest neighbours"] = [1] * 10 + [0] * 10
    right[specialists.PROBED] = [1] * 14 + [0] * 6  # a student, not one of the larger models
    items = {
        ("ReutersR8", system, specialists.ALL): np.array(values, dtype=float)[:, None]
        for system, values in right.items()
    }
    rows = [(task, system, count, 100 * each.mean()) for (task, system, count), each in items.items()]
    columns = ["task", "system", "per_class", "accuracy"]
    compared = specialists.Compared(pd.DataFrame(rows, columns=columns), items)
    faster = {0.25: stats.Estimate(3.0, 2.9, 3.1, 7)}
    claims = verdicts.verdicts(started, suite, taught, compared, faster)
    found = {claim.id: claim for claim in claims}
    assert found["distillation-25-embedding"].verdict == "reproduced"
    assert found["distillation-25-embedding"].statement.startswith("A student with 25%")
    assert found["distillation-specialist"].verdict == "reproduced"
    assert found["distillation-specialist"].measured.value == pytest.approx(20)
    assert found["distillation-specialist"].measured.low > 0
    assert found["distillation-speed"].verdict == "not reproduced"
    assert found["distillation-own-kind"].measured == taught.kind
    own = tasks.correct(taught.data["ReutersR8"], taught.probabilities["ReutersR8", tasks.EXTRA, 0.25])[0]
    gain = found["distillation-task-definition"].measured
    assert gain.value == pytest.approx(100 * (own.mean() - 0.7))
    assert len(found) == 7


def test_a_decoder_is_distilled_in_every_way(started):
    assert decoders.compare(started) is None
    asked = {"decoder_teacher": "tiny-llama", "decoder_student": "tiny-llama", "decoder_texts": 16}
    params = Params(**{**TINY, **asked, "decoder_steps": 2})
    table = decoders.compare(study.Study(params, started.recorder, started.teacher, started.tokenizer))
    assert len(table) == 4
    for name in ("forward_kl", "reverse_kl"):
        assert (table[f"{name}_before"].abs() < 1e-6).all()  # the same model
        assert (table[f"{name}_change_low"] <= table[f"{name}_change"]).all()


def test_half_a_pair_of_decoders_is_refused():
    with pytest.raises(ValidationError, match="given together"):
        Params(decoder_teacher="tiny-llama")


def test_students_are_saved_with_their_cards(started, students, taught, tmp_path, monkeypatch):
    monkeypatch.setattr("overparam.support.cache.directory", lambda: tmp_path)
    suite = general.score(started, students)
    folders = export.export(started, students, suite, taught)
    assert [folder.name for folder in folders] == ["student-0.5", "student-0.25", "student-0.25-ReutersR8"]
    again = SentenceTransformer(str(folders[2]), device="cpu")
    texts = taught.data["ReutersR8"].test_texts
    logits = encoders.outputs(again, texts)
    np.testing.assert_array_equal(logits, encoders.outputs(taught.classifiers["ReutersR8"], texts))
    assert "0: acq" in (folders[2] / "README.md").read_text()
