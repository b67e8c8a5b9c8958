import io
import subprocess
import sys

import pytest
from tests.waiting import complete_json, wait_for

from overparam.record import record
from overparam.runner import cluster, execute
from overparam.runner.cluster import Cluster, mismatches
from overparam.runner.errors import BadInput
from overparam.runner.plan import Profile, plan


def dask(command, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.dask_{command}", "--no-dashboard", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture
def started(project):
    """A scheduler and two workers, each a process of its own, as a user starts them: its address, and the three."""
    file = project / "scheduler.json"
    processes = [dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))]
    try:
        address = wait_for(lambda: complete_json(file))["address"]
        processes += [
            dask("worker", address, "--nthreads", "1", "--no-nanny", "--name", name) for name in "ab"
        ]
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_worker_that_dies_in_mid_job_has_its_job_run_again_elsewhere(project, started):
    address, (_, worker, _) = started
    names = ["alpha", "beta", "gamma"]
    profile = Profile("mine", "mine.yaml", "", {"toy": [{"model": name, "mode": "long"} for name in names]})
    jobs = plan(profile, notebooks_dir=project / "notebooks", studies_package="toystudies")
    out = Killing(worker, after=2)
    outcomes = execute.run(jobs, pool=lambda: Cluster(address), out=out)
    assert worker.poll() is not None
    assert [(outcome.ending, outcome.message) for outcome in outcomes] == [
        ("done", str(job.directory / "record.json")) for job in jobs
    ]
    assert [found.slug for found in record.find(project / "results")] == names
    assert record.missing_or_orphaned(project / "results") == []
    folder = project / "results" / "mine" / "toy"
    assert sorted(path.name for path in folder.iterdir()) == sorted(job.directory.name for job in jobs)


def test_a_scheduler_that_dies_leaves_a_plan_that_resumes(project, started):
    address, (scheduler, _, _) = started
    profile = Profile("mine", "mine.yaml", "", {"toy": [{"mode": "long"}]})
    places = {"notebooks_dir": project / "notebooks", "studies_package": "toystudies"}
    jobs = plan(profile, **places)
    (outcome,) = execute.run(jobs, pool=lambda: Cluster(address), retries=1, out=Killing(scheduler, after=1))
    assert outcome.ending == "failed"
    assert "the scheduler is gone" in outcome.message
    (outcome,) = execute.run(plan(profile, **places), out=io.StringIO())
    assert outcome.ending == "done"
    assert record.missing_or_orphaned(project / "results") == []


class Killing(io.StringIO):
    """An output that kills a process once some jobs are seen in the middle of their notebooks."""

    def __init__(self, process, after):
        super().__init__()
        self.process, self.after = process, after

    def write(self, text):
        shown = super().write(text)
        running = {line.split()[1] for line in self.getvalue().splitlines() if "crossing" in line}
        if len(running) == self.after and self.process.poll() is None:
            self.process.kill()
        return shown


def test_jobs_that_no_worker_can_take_are_refused(project, started, monkeypatch):
    address, _ = started
    package = project / "lib" / "toystudies" / "toy" / "__init__.py"
    package.write_text(package.read_text() + "    def resources(self):\n        return {'GPU': 2}\n")
    profile = Profile("mine", "mine.yaml", "", {"toy": [{}]})
    jobs = plan(profile, notebooks_dir=project / "notebooks", studies_package="toystudies")
    with pytest.raises(BadInput, match="toy/alpha needs a worker with GPU=2, and there is none: start one"):
        execute.run(jobs, pool=lambda: Cluster(address), out=io.StringIO())


def test_a_scheduler_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT", 0.5)
    with pytest.raises(BadInput, match=r"--cluster tcp://127.0.0.1:9: no dask scheduler answers there"):
        Cluster("tcp://127.0.0.1:9")


def test_workers_on_this_machine_are_asked_for_by_jobs():
    with pytest.raises(
        BadInput, match="--cluster local:2: to run several jobs at once on this machine, use --jobs N"
    ):
        Cluster("local:2")


def test_other_versions_are_named():
    here = {"packages": {"python": "3.11.7", "distributed": "2026.8.0", "overparam": "0.1.0"}}
    older = {"packages": {"python": "3.11.7", "distributed": "2026.7.0", "overparam": None}}
    assert mismatches({"client": here, "scheduler": here, "workers": {"tcp://a": here}}) == []
    assert mismatches({"client": here, "scheduler": older, "workers": {"tcp://a": older}}) == [
        "the scheduler has distributed 2026.7.0, here is 2026.8.0: start it in the same environment",
        "worker tcp://a has distributed 2026.7.0, here is 2026.8.0: start it in the same environment",
        "worker tcp://a has overparam missing, here is 0.1.0: start it in the same environment",
    ]
