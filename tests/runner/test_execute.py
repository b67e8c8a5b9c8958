import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.waiting import wait_for

from overparam.record import record
from overparam.runner import attempt, execute
from overparam.runner.errors import BadInput
from overparam.runner.plan import Profile, plan
from overparam.runner.pool import Local, cores


def jobs_of(root, sets=({},), **arguments):
    profile = Profile("mine", "mine.yaml", "", {"toy": list(sets)})
    return plan(profile, notebooks_dir=root / "notebooks", studies_package="toystudies", **arguments)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, toy):
    """One real run of jobs that end in every way, and what it printed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = toy.write_project(tmp_path_factory.mktemp("ran") / "project")
        toy.use(root, monkeypatch)
        modes = {
            "good": "ok",
            "bad": "fail",
            "mute": "silent",
            "dead": "die",
            "astray": "outside",
            "sly": "hush",
        }
        jobs = jobs_of(root, [{"model": model, "mode": mode} for model, mode in modes.items()])
        out = io.StringIO()
        outcomes = execute.run(jobs, pool=lambda: Local(2), out=out)
        yield root, {outcome.job.slug: outcome for outcome in outcomes}, out.getvalue()


def test_a_good_job_leaves_a_sealed_record_and_nothing_else(ran):
    root, outcomes, _ = ran
    job = outcomes["good"].job
    assert outcomes["good"].ending == "done"
    assert sorted(path.name for path in job.directory.iterdir()) == ["executed.ipynb", "record.json"]
    left = record.load(outcomes["good"].message)
    assert (left.key, left.profile, left.command) == (job.key, "mine", job.command)
    assert left.params == job.params
    assert left.metrics["value"].value == 6
    assert left.provenance["key"]["modules"] == job.parts["modules"]
    assert record.missing_or_orphaned(root / "results") == []
    assert [found.slug for found in record.find(root / "results")] == ["good"]


def test_the_kernel_is_this_interpreter_whatever_the_notebook_says(ran):
    _, outcomes, _ = ran
    executed = json.loads((outcomes["good"].job.directory / "executed.ipynb").read_text())
    printed = "".join(
        "".join(out["text"]) for cell in executed["cells"] for out in cell.get("outputs", []) if "text" in out
    )
    expected = sys.executable.replace(sys.prefix, "<python>")
    assert f"{expected} ." in printed.splitlines()[-1]


def test_the_executed_notebook_names_no_place_of_this_machine(ran):
    root, outcomes, _ = ran
    text = (outcomes["good"].job.directory / "executed.ipynb").read_text()
    for place in (str(root), sys.prefix, str(Path.home()) + "/", "ipykernel_"):
        assert place not in text
    about = json.loads(text)["metadata"]["papermill"]
    assert (about["input_path"], about["output_path"]) == ("notebooks/01_toy.ipynb", "executed.ipynb")


def test_failures_are_kept_beside_with_their_reason_and_do_not_stop_the_rest(ran):
    root, outcomes, _ = ran
    reasons = {
        "bad": "RuntimeError: no such luck",
        "mute": "the notebook ended without a record: it must call finish() on its recorder",
        "dead": "Kernel died: the kernel crashed or was killed (out of memory?)",
        "astray": f"PermissionError: {root}/results/mine/toy/stray.txt is outside the job's own folder",
        "sly": f"the job wrote outside its own folder: {root}/results/mine/toy/stray.txt",
    }
    for slug, reason in reasons.items():
        assert outcomes[slug].ending == "failed"
        assert outcomes[slug].message.startswith(reason)
        job = outcomes[slug].job
        failed = job.directory.with_name(job.directory.name + ".failed")
        assert job.command in (failed / "error.txt").read_text()
        assert (failed / "executed.ipynb").exists()
        assert not job.directory.exists()
        if slug == "bad":
            assert 'raise RuntimeError("no such luck' in (failed / "error.txt").read_text()
    assert not list((root / "results").rglob("*.partial"))
    assert not list((root / "results").rglob("stray.txt"))


def test_progress_and_notes_are_shown_as_plain_lines(ran):
    _, _, shown = ran
    assert re.search(r"^\[1/6\] toy/good  thinking hard$", shown, re.MULTILINE)
    assert re.search(r"^\[1/6\] toy/good  cell 4/5  counting  \d/3, .*elapsed$", shown, re.MULTILINE)
    assert "[2/6] toy/bad  failed: RuntimeError: no such luck" in shown
    assert "\r" not in shown


def test_jobs_at_once_share_the_cores(ran):
    _, outcomes, _ = ran
    share = str(max(1, cores() // 2))
    left = record.load(outcomes["good"].message)
    assert {left.provenance["threads"][name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {share}


def test_each_job_has_a_log_that_is_no_result(ran):
    root, outcomes, _ = ran
    log = outcomes["bad"].job.beside("log").read_text()
    assert outcomes["bad"].job.command in log
    assert "cell 4/5" in log
    assert "no such luck" in log
    assert (root / "results" / "mine" / ".runner" / ".gitignore").read_text() == "*\n"


def test_summary_and_exit_code(ran):
    _, outcomes, _ = ran
    rows = execute.summary(list(outcomes.values())).splitlines()
    assert rows[0].split() == ["job", "state", "time", "record", "or", "error"]
    assert rows[2].split()[:2] == ["toy/bad", "failed"]
    assert execute.exit_code(list(outcomes.values())) == 1
    assert execute.exit_code([outcomes["good"]]) == 0
    assert execute.exit_code([]) == 0


def test_a_second_run_does_only_what_is_missing(ran, monkeypatch, toy):
    root, before, _ = ran
    toy.use(root, monkeypatch)
    jobs = jobs_of(root, [before["good"].job.params, before["bad"].job.params])
    failed = "failed last time: RuntimeError: no such luck"
    assert [(job.state, job.reason) for job in jobs] == [("up to date", ""), ("due", failed)]
    started = time.monotonic()
    (outcome,) = execute.run(jobs[:1], out=io.StringIO())
    assert outcome.ending == "up to date"
    assert time.monotonic() - started < 1


@pytest.fixture
def copy(ran, tmp_path, monkeypatch, toy):
    """The project with its results, to be changed, and the good job's parameters."""
    root = shutil.copytree(ran[0], tmp_path / "project")
    toy.use(root, monkeypatch)
    return root, ran[1]["good"].job.params


def test_a_damaged_record_is_due(copy):
    root, params = copy
    (job,) = jobs_of(root, [params])
    assert job.state == "up to date"
    (job.directory / "executed.ipynb").write_bytes(b"edited")
    (job,) = jobs_of(root, [params])
    assert job.state == "due"
    assert "SHA-256 differs" in job.reason


def test_changed_code_gives_a_reason_and_the_new_record_replaces_the_old(copy):
    root, params = copy
    (job,) = jobs_of(root, [params])
    (root / "lib" / "toystudies" / "toy" / "more.py").write_text("def factor():\n    return 5\n")
    (again,) = jobs_of(root, [{**params, "keep_layers": 4}])
    assert again.reason == "code changed: toystudies.toy.more; parameters changed: keep_layers (3 → 4)"
    assert again.state == "due"
    out = io.StringIO()
    assert execute.run([again], out=out)[0].ending == "done"
    assert f"replaced the older {job.directory.name}" in out.getvalue()
    assert [path.name for path in again.directory.parent.glob("good-*")] == [again.directory.name]
    assert record.load(again.directory).metrics["value"].value == 20


def test_a_full_disk_keeps_the_old_result(copy, monkeypatch):
    root, params = copy
    (job,) = jobs_of(root, [params], force=True)
    old = (job.directory / "record.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_atomic", full)
    assert attempt.attempt(job) == ("failed", "OSError: [Errno 28] No space left on device")
    assert (job.directory / "record.json").read_bytes() == old
    assert jobs_of(root, [params])[0].state == "up to date"


@pytest.mark.parametrize(
    ("study", "params", "key", "message"),
    [
        (
            "toy",
            {"keep_layers": 17},
            "",
            "the record's parameters differ from the job's: {'keep_layers': 17}",
        ),
        ("toy", {}, "0" * 64, "the record is of another job: study 'toy', key 00000000"),
        ("top", {}, "", "the record is of another job: study 'top'"),
    ],
)
def test_a_record_that_is_not_the_jobs_is_refused(project, monkeypatch, study, params, key, message):
    (job,) = jobs_of(project)

    def leave(job, *_):
        monkeypatch.setenv("OVERPARAM_JOB_DIR", str(job.partial))
        record.start(study, params or job.params, slug="alpha", key=key or job.key).finish()

    monkeypatch.setattr(attempt, "_execute", leave)
    ending, said = attempt.attempt(job)
    assert ending == "failed"
    assert said.startswith(message)
    assert not job.directory.exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(project):
    (project / "file").write_text("")
    (job,) = jobs_of(project, results=project / "file" / "results")
    with pytest.raises(BadInput, match=r"cannot write into .*file.*Not a directory.*--results"):
        execute.run([job], out=io.StringIO())


def test_a_job_past_its_limit_is_ended_with_all_its_children(project, monkeypatch):
    monkeypatch.setenv("TOY_PIDS", str(project / "pids"))
    (job,) = jobs_of(project, [{"mode": "sleep"}])
    out = io.StringIO()
    (outcome,) = execute.run([job], timeout=6, out=out)
    assert (outcome.ending, outcome.message) == ("failed", "ended at its limit of 6 s")
    assert not family_of(job)
    (again,) = jobs_of(project, [{"mode": "sleep"}])
    assert again.reason == "failed last time: ended at its limit of 6 s"


def test_a_job_that_failed_is_tried_again(project, monkeypatch):
    monkeypatch.setenv("TOY_FLAG", str(project / "flag"))
    out = io.StringIO()
    (outcome,) = execute.run(jobs_of(project, [{"mode": "flaky"}]), retries=2, out=out)
    assert outcome.ending == "done"
    assert out.getvalue().count("failed: RuntimeError: only once; trying again (1 of 2)") == 1
    assert [path.name for path in outcome.job.directory.parent.iterdir()] == [outcome.job.directory.name]


def test_code_edited_after_the_plan_is_not_run_under_the_old_key(project):
    (job,) = jobs_of(project)
    (project / "lib" / "toystudies" / "shared.py").write_text("import os\n")
    ending, message = attempt.attempt(job)
    assert ending == "failed"
    assert message.startswith("the code has changed since the plan was made: code toystudies.shared;")


DRIVER = """
import sys
from pathlib import Path
from overparam.runner import execute, plan
root = Path(sys.argv[1])
profile = plan.Profile("mine", "mine.yaml", "", {"toy": [{"mode": "sleep"}, {"model": "beta"}]})
jobs = plan.plan(profile, notebooks_dir=root / "notebooks", studies_package="toystudies")
outcomes = execute.run(jobs)
print(execute.summary(outcomes))
sys.exit(execute.exit_code(outcomes))
"""


@pytest.fixture
def asleep(project, monkeypatch):
    """A runner in a process of its own, in the middle of its first job, and the processes of that job."""
    pids = project / "pids"
    monkeypatch.setenv("TOY_PIDS", str(pids))
    runner = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(project)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: pids.exists() or runner.poll() is not None)
        family = [int(pid) for pid in pids.read_text().split()]
        assert all(psutil.pid_exists(pid) for pid in family)
        yield runner, family
    finally:
        runner.kill()
        runner.communicate()


def family_of(job):
    """The processes that work for a job, by their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OVERPARAM_JOB_DIR") == str(job.partial.resolve()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_ctrl_c_ends_the_kernel_and_all_its_children(project, asleep):
    runner, family = asleep
    interrupted = time.monotonic()
    runner.send_signal(signal.SIGINT)
    shown, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130, shown
    assert time.monotonic() - interrupted < 5
    assert not [pid for pid in family if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert re.search(r"^toy/alpha +interrupted", shown, re.MULTILINE)
    assert re.search(r"^toy/beta +not run", shown, re.MULTILINE)
    assert "Traceback" not in shown
    assert "Task was destroyed" not in shown
    assert list((project / "results" / "mine" / "toy").iterdir()) == []


def test_two_runs_share_a_folder_and_one_that_is_killed_leaves_nothing_behind(project, asleep, monkeypatch):
    runner, _ = asleep
    sets = [{"mode": "sleep"}, {"model": "beta"}]
    monkeypatch.setattr(execute, "LOCK_WAIT", 0.5)
    jobs = jobs_of(project, sets)
    assert [job.state for job in jobs] == ["running elsewhere", "due"]
    outcomes = execute.run(jobs, out=io.StringIO())
    assert [outcome.ending for outcome in outcomes] == ["running elsewhere", "done"]
    assert execute.exit_code(outcomes) == 1
    assert family_of(jobs[0])

    runner.send_signal(signal.SIGKILL)
    monkeypatch.setattr(execute, "LOCK_WAIT", 60)
    # its file of process ids is there by now: the notebook does not sleep again
    outcomes = execute.run(jobs_of(project, sets), out=io.StringIO())
    assert [outcome.ending for outcome in outcomes] == ["done", "up to date"]
    assert not family_of(jobs[0])
    folder = project / "results" / "mine" / "toy"
    assert sorted(path.name for path in folder.iterdir()) == sorted(job.directory.name for job in jobs)
    assert record.missing_or_orphaned(project / "results") == []


def test_what_a_run_left_that_was_killed_at_its_end_is_removed(copy):
    root, params = copy
    (job,) = jobs_of(root, [params])
    for name in ("good-00000000", ".good-00000000.partial", "good-00000000.failed"):
        shutil.copytree(job.directory, job.directory.with_name(name))
    execute.run([job], out=io.StringIO())
    names = {path.name.partition("-")[0] for path in job.directory.parent.iterdir()}
    assert len([name for name in job.directory.parent.iterdir() if "good" in name.name]) == 1, names


def test_scrubbing_takes_whole_paths_only(project):
    (job,) = jobs_of(project)
    job = replace(job, notebook=Path("/opt/work/notebooks/01_toy.ipynb"))
    text = json.dumps(
        {"metadata": {}, "cells": ["/opt/work/lib/a.py /opt/workshop /tmp/ipykernel_12/34.py:1"]}
    )
    cleaned = json.loads(attempt.scrub(text, job))
    assert cleaned["cells"] == ["./lib/a.py /opt/workshop <cell>:1"]
