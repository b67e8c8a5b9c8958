import hashlib
import json
import subprocess
import sys

import pandas as pd
import pytest

from overparam.record import provenance, record


def test_record_reads_back_as_it_was(tmp_path, make_record):
    path = make_record(tmp_path / "tiny-1")
    loaded = record.load(path)
    assert loaded == record.load(path.parent)
    assert loaded.status == "complete"
    assert loaded.seeds == [3]
    assert loaded.metrics["retention"].estimate.high == float("inf")
    assert loaded.metrics["parameters"].value == 268_000_000
    assert [claim.verdict for claim in loaded.claims] == ["reproduced", "not testable at this scale"]
    assert pd.read_parquet(path.parent / "scores.parquet")["score"].tolist() == [0.5, 0.25]
    assert pd.read_csv(path.parent / "by_depth.csv")["loss"].tolist() == [3.0, 1.0, 2.0]


def test_every_file_is_named_with_its_hash(tmp_path, make_record):
    folder = make_record(tmp_path / "tiny-1", figure=True).parent
    named = record.load(folder).files()
    assert set(named) | {"record.json"} == {path.name for path in folder.iterdir()}
    for name, sha in named.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha
    assert record.missing_or_orphaned(tmp_path) == []


def test_unfinished_work_does_not_look_finished_and_the_old_result_stays(tmp_path, make_record):
    old = make_record(tmp_path / "tiny-1").read_bytes()
    recorder = make_record(tmp_path / "tiny-1", finish=False)
    assert recorder.directory.name == ".tiny-1.partial"
    assert (tmp_path / "tiny-1" / "record.json").read_bytes() == old
    assert len(record.find(tmp_path)) == 1
    recorder.input("weights", "0" * 64)
    recorder.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-1"]
    assert record.load(tmp_path / "tiny-1").provenance["inputs"] == {"weights": "0" * 64}


def test_failed_and_partial_folders_are_left_out(tmp_path, make_record):
    make_record(tmp_path / "tiny-1")
    for name in ("tiny-2.failed", ".tiny-3.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{")
    assert [found.slug for found in record.find(tmp_path)] == ["tiny"]
    assert record.missing_or_orphaned(tmp_path) == []


def test_missing_changed_and_orphaned_files_are_listed(tmp_path, make_record):
    folder = make_record(tmp_path / "tiny-1", figure=True).parent
    (folder / "loss.png").unlink()
    (folder / "loss.csv").write_text("edited")
    (folder / "notes.txt").write_text("mine")
    problems = record.missing_or_orphaned(tmp_path)
    assert len(problems) == 3
    assert any("loss.png" in p and "missing" in p for p in problems)
    assert any("loss.csv" in p and "SHA-256" in p for p in problems)
    assert any("notes.txt" in p and "no record names" in p for p in problems)


def test_seal_adds_the_notebook(tmp_path, make_record):
    folder = make_record(tmp_path / "tiny-1", figure=True).parent
    record.seal(folder, b"{}")
    assert record.load(folder).notebook.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert record.missing_or_orphaned(tmp_path) == []
    (folder / "loss.pdf").unlink()
    with pytest.raises(ValueError, match=r"loss\.pdf.*missing"):
        record.seal(folder, b"{}")


def test_the_batch_runner_decides_folder_key_and_command(tmp_path, monkeypatch, make_record):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / ".x.partial"))
    monkeypatch.setenv("OVERPARAM_JOB_KEY", "k" * 64)
    monkeypatch.setenv("OVERPARAM_PROFILE", "smoke")
    monkeypatch.setenv("OVERPARAM_COMMAND", "python run_all.py --profile smoke --only layers")
    made = record.load(make_record(None))
    assert made.path.parent == tmp_path / ".x.partial"
    assert (made.key, made.profile) == ("k" * 64, "smoke")
    assert made.command == "python run_all.py --profile smoke --only layers"


def test_by_hand_it_goes_to_scratch_with_a_command_that_repeats_it(tmp_path, monkeypatch, make_record):
    monkeypatch.setattr(record, "SCRATCH", tmp_path / "scratch")
    made = record.load(make_record(None))
    assert made.profile == "interactive"
    assert made.path.parent.parent == tmp_path / "scratch" / "layers"
    assert made.path.parent.name == f"tiny-{made.key[:8]}"
    assert made.command == (
        "python run_all.py --only layers --set layers.model='\"tiny\"' --set layers.seed=3"
    )


def test_a_newer_schema_and_broken_records_are_named(tmp_path, make_record):
    path = make_record(tmp_path / "tiny-1")
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"schema": 99}))
    with pytest.raises(ValueError, match=r"schema version 99.*reads 1"):
        record.load(path)
    path.write_text(json.dumps(good | {"colour": "blue"}))
    with pytest.raises(ValueError, match="colour"):
        record.load(path)
    path.write_text("{half")
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        record.load(path)
    with pytest.raises(FileNotFoundError):
        record.load(tmp_path / "none")


def test_a_record_edited_by_hand_is_noticed_and_older_ones_stay_valid(tmp_path, make_record):
    path = make_record(tmp_path / "tiny-1")
    assert record.problems(record.load(path)) == []
    content = json.loads(path.read_text())
    content["seconds"] = 0.5
    path.write_text(json.dumps(content))
    assert record.missing_or_orphaned(tmp_path) == [
        f"{path}: edited since it was written (its own SHA-256 differs)"
    ]
    del content["sealed"]  # as in records from before there was such a hash
    path.write_text(json.dumps(content))
    assert record.missing_or_orphaned(tmp_path) == []


def test_what_the_runner_keeps_beside_results_is_none(tmp_path, make_record):
    make_record(tmp_path / "tiny-1")
    (tmp_path / ".runner" / "study").mkdir(parents=True)
    (tmp_path / ".runner" / "study" / "tiny-1.log").write_text("")
    assert record.missing_or_orphaned(tmp_path) == []


def test_names_cannot_leave_the_folder(tmp_path, make_record):
    recorder = make_record(tmp_path / "tiny-1", finish=False)
    for name in ("../x", "record.json", "executed.ipynb", "a/b"):
        with pytest.raises(ValueError, match="plain name"):
            recorder.write_file(name, b"")


def test_provenance_names_code_machine_and_no_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("OVERPARAM_CACHE", str(tmp_path))
    monkeypatch.setenv("OVERPARAM_LEVEL", "7")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = provenance.provenance()
    named = {
        name: found["environment"][name]
        for name in ("OVERPARAM_CACHE", "OVERPARAM_LEVEL", "ONEDNN_MAX_CPU_ISA")
    }
    assert named == {"OVERPARAM_CACHE": "(path)", "OVERPARAM_LEVEL": "7", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert "HOME" not in found["environment"]
    assert found["hardware"]["ram_gib"] > 0
    assert found["packages"]["papermill"]
    assert str(tmp_path) not in json.dumps(found)


def test_git_state(tmp_path):
    def git(*args):
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "lib"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert provenance.git_state(package)["sha"] is None
    assert "not in a git repository" in provenance.git_state(package)["reason"]
    git("init")
    assert provenance.git_state(package)["sha"] is None  # somebody else's repository around it
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance.git_state(package)
    assert len(clean["sha"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "record.json").write_text("")
    assert provenance.git_state(package)["dirty"] is False
    (package / "__init__.py").write_text("1")
    assert provenance.git_state(package)["dirty"] is True


def test_without_git_the_reason_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path)["reason"] == "git is not installed"


def test_reading_records_is_light():
    heavy = {"torch", "pandas", "scipy", "mteb", "matplotlib"}
    code = f"import sys, overparam.publish.readme; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def saved_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_artifacts_are_files_of_the_record(tmp_path, make_record):
    recorder = make_record(tmp_path / "tiny-1", finish=False, figure=True)
    recorder.artifact_folder(saved_model(tmp_path / "model"))
    recorder.artifact("MODEL_CARD.md", b"first")
    recorder.artifact("MODEL_CARD.md", b"second")
    recorder.artifact_folder(tmp_path / "model")
    folder = recorder.finish().parent
    loaded = record.load(folder)
    assert set(loaded.artifacts) == {"config.json", "model.safetensors", "MODEL_CARD.md"}
    assert loaded.files()["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert (folder / "MODEL_CARD.md").read_bytes() == b"second"
    assert record.missing_or_orphaned(folder) == []
    (folder / "config.json").write_text("{ }")
    (folder / "model.safetensors").unlink()
    assert len(record.problems(loaded)) == 2


def test_artifacts_take_no_name_of_another_file(tmp_path, make_record):
    recorder = make_record(tmp_path / "tiny-1", finish=False)
    folder = saved_model(tmp_path / "model")
    (folder / "by_depth.csv").write_text("")
    with pytest.raises(ValueError, match=r"'by_depth\.csv' is the name of another file"):
        recorder.artifact_folder(folder)
    assert recorder.record.artifacts == {}
    (folder / "by_depth.csv").rename(folder / "other.csv")
    recorder.artifact_folder(folder)
    with pytest.raises(ValueError, match=r"'other\.csv' is the name of an artifact"):
        recorder.table("other", pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match="plain name"):
        recorder.artifact("record.json", b"")
    (folder / "inside").mkdir()
    with pytest.raises(ValueError, match="'inside' is not a file"):
        recorder.artifact_folder(folder)


def test_records_from_before_there_were_artifacts_are_read(tmp_path, make_record):
    path = make_record(tmp_path / "tiny-1")
    values = json.loads(path.read_text())
    del values["artifacts"]
    path.write_text(json.dumps(values))
    assert record.load(path).artifacts == {}
