import io
import json
import re
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
from filelock import FileLock

from overparam.cli import show
from overparam.record import record
from overparam.runner import execute
from overparam.runner import plan as planning
from overparam.runner.errors import BadInput
from overparam.runner.plan import Profile, load_profile
from overparam.runner.pool import Answer, Local


def make(project, sets=({},), only=(), overrides=(), **arguments):
    profile = Profile("mine", "mine.yaml", "", {"toy": list(sets)})
    results = arguments.pop("results", project / "results" / "mine")
    names = {"notebooks_dir": project / "notebooks", "studies_package": "toystudies"}
    return planning.plan(profile, only, overrides, results, **names, **arguments)


def problems(project, *args, **arguments):
    with pytest.raises(BadInput) as caught:
        make(project, *args, **arguments)
    return list(caught.value.problems)


def test_a_job_holds_everything_that_running_it_needs(project):
    (job,) = make(project, [{"keep_layers": 5}])
    assert job.params == {"model": "alpha", "keep_layers": 5, "margin": 1.0, "depths": [1, 2], "mode": "ok"}
    assert job.directory == project / "results" / "mine" / "toy" / f"alpha-{job.key[:8]}"
    assert (job.state, job.reason) == ("due", "missing")
    assert job.command == "python run_all.py --profile mine.yaml --only toy"


def test_results_go_beside_the_notebooks_by_default(project):
    (job,) = make(project, results=None)
    assert job.directory.parent == project / "results" / "mine" / "toy"


def test_only_chooses_studies_and_jobs(project):
    sets = [{"model": "alpha"}, {"model": "org/beta"}]
    assert [job.slug for job in make(project, sets, ["toy"])] == ["alpha", "org-beta"]
    (job,) = make(project, sets, ["toy/org-beta"])
    assert job.slug == "org-beta"
    assert job.command.endswith("--only toy/org-beta")


def test_sets_with_one_model_are_named_by_what_differs(project):
    sets = [{"keep_layers": 3}, {"keep_layers": 4}, {"model": "/somewhere/beta"}]
    assert [job.slug for job in make(project, sets)] == ["alpha-keep_layers-3", "alpha-keep_layers-4", "beta"]


def test_a_study_may_name_its_sets(project):
    path = project / "lib" / "toystudies" / "toy" / "__init__.py"
    path.write_text(
        path.read_text() + "\n    def slug(self):\n        return f'{self.model} at {self.keep_layers}'\n"
    )
    assert [job.slug for job in make(project)] == ["alpha-at-3"]


def test_set_overrides_every_set_and_is_in_the_command(project):
    overrides = ["toy.keep_layers=7", "toy.depths=[4, 5]"]
    jobs = make(project, [{"model": "alpha"}, {"model": "beta", "keep_layers": 2}], overrides=overrides)
    assert [(job.params["keep_layers"], job.params["depths"]) for job in jobs] == [(7, [4, 5])] * 2
    assert jobs[0].command.endswith("--only toy/alpha --set toy.keep_layers=7 --set 'toy.depths=[4, 5]'")


def test_force_makes_due(project):
    assert make(project, force=True)[0].reason == "forced"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_layers": 0.5}, "profile mine: toy, set 1: keep_layers: .*integer.*, got 0.5"),
        ({"keep_layers": "3"}, "keep_layers: .*integer.*, got '3'"),
        ({"keep_layers": True}, "keep_layers: .*integer.*, got True"),
        ({"keep_layers": 0}, "keep_layers: .*greater than or equal to 1, got 0"),
        ({"keep_layers": 19}, "keep_layers: .*less than or equal to 18, got 19"),
        ({"keep_layer": 3}, "unknown parameter 'keep_layer': did you mean 'keep_layers'?"),
        ({"model": None}, "model: .*string, got None"),
        ({"mode": "okay"}, "mode: .*'ok'.*got 'okay'"),
        ({"depths": 3}, "depths: .*got 3"),
    ],
)
def test_wrong_parameters_are_named(project, values, message):
    (problem,) = problems(project, [values])
    assert re.search(message.replace("?", r"\?"), problem)


def test_all_problems_are_told_at_once(project):
    found = problems(
        project, [{"keep_layers": 0, "keep": 1}, {"margin": "wide"}], overrides=["toi.x=1", "nonsense"]
    )
    assert len(found) == 5
    assert "--set toi.x=1: unknown study 'toi': did you mean 'toy'?" in found
    assert "--set nonsense: must look like STUDY.PARAM=VALUE" in found


def test_unknown_names_get_the_nearest(project):
    assert "did you mean 'toy'?" in problems(project, only=["toys"])[0]
    assert "no such job: did you mean 'toy/alpha'?" in problems(project, only=["toy/alfa"])[0]
    assert (
        "unknown parameter 'depth': did you mean 'depths'?" in problems(project, overrides=["toy.depth=3"])[0]
    )
    profile = Profile("mine", "mine.yaml", "", {"toyy": [{}]})
    with pytest.raises(BadInput, match=r"unknown study 'toyy': did you mean 'toy'\?"):
        planning.plan(profile, notebooks_dir=project / "notebooks", studies_package="toystudies")


def test_identical_and_absent_sets_are_refused(project):
    assert "set 2 is identical to set 1" in problems(project, [{}, {"keep_layers": 3}])[0]
    assert "no parameter sets" in problems(project, [])[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keep_layers = 3", "keep_layers = 4", "'keep_layers' is 4, but Params has 3"),
        ("keep_layers", "keep_layer", "'keep_layer' is not in Params: did you mean 'keep_layers'\\?"),
        ("margin: float = 1.0\n", "", "'margin' of Params is missing"),
        ("margin: float = 1.0\n", "import os\n", "may only assign literals, found 'import os'"),
        ("= 3", "= 1 + x", r"found 'keep_layers = 1 \+ x'"),
        ("mode =", "model =", "'model' is assigned twice"),
        ("= 3", "= 0", "parameters cell: keep_layers: .*got 0"),
        ("= 3", "= (", "not valid Python"),
    ],
)
def test_a_parameters_cell_that_disagrees_is_named(project, toy, old, new, message):
    cells = [(kind, source.replace(old, new) if tags else source, tags) for kind, source, tags in toy.cells]
    toy.write_notebook(project / "notebooks" / "01_toy.ipynb", cells)
    assert any(
        re.search(f"01_toy.ipynb: .*{message}|01_toy.ipynb: {message}", text) for text in problems(project)
    )


def test_a_notebook_needs_one_parameters_cell(project, toy):
    toy.write_notebook(project / "notebooks" / "01_toy.ipynb", [cell for cell in toy.cells if not cell[2]])
    assert "exactly one code cell tagged 'parameters', found 0" in problems(project)[0]
    (project / "notebooks" / "01_toy.ipynb").write_text("{")
    assert "not a readable notebook" in problems(project)[0]


def test_key_follows_what_the_job_depends_on_and_nothing_else(project):
    package = project / "lib" / "toystudies"
    notebook = project / "notebooks" / "01_toy.ipynb"
    keys = {"first": make(project)[0].key}

    (package / "unrelated.py").write_text("x = 2\n")
    content = json.loads(notebook.read_text())
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "hello"}]
    content["cells"][1]["execution_count"] = 7
    content["metadata"]["kernelspec"]["name"] = "other"
    notebook.write_text(json.dumps(content))
    assert make(project)[0].key == keys["first"]

    keys["params"] = make(project, [{"keep_layers": 4}])[0].key
    keys["inputs"] = make(project, inputs={"weights": "abc"})[0].key
    for name in ("toy/more.py", "shared.py", "toy/__init__.py", "__init__.py"):
        before = make(project)[0].key
        (package / name).write_text('"""A docstring."""\n' + (package / name).read_text() + "\n# a comment\n")
        assert make(project)[0].key == before
        (package / name).write_text((package / name).read_text() + "CHANGED = True\n")
        keys[name] = make(project)[0].key
    content["cells"][0]["source"] = "# Another title"
    notebook.write_text(json.dumps(content))
    assert make(project)[0].key == keys["__init__.py"]
    content["cells"][4]["source"] = content["cells"][4]["source"].replace("keep_layers)", "keep_layers + 1)")
    notebook.write_text(json.dumps(content))
    keys["notebook"] = make(project)[0].key
    assert len(set(keys.values())) == len(keys)


def test_a_study_may_leave_code_out_of_its_key(project):
    package = project / "lib" / "toystudies" / "toy" / "__init__.py"
    text = package.read_text().replace("from typing import", "from typing import ClassVar,")
    package.write_text(text + "    code_in_key: ClassVar[bool] = False\n")
    (first,) = make(project)
    assert set(first.parts) == {"params", "inputs"}
    shared = project / "lib" / "toystudies" / "shared.py"
    shared.write_text("import os\n")
    notebook = project / "notebooks" / "01_toy.ipynb"
    notebook.write_text(notebook.read_text().replace("A toy study", "Another title"))
    assert make(project)[0].key == first.key
    assert make(project, [{"keep_layers": 4}])[0].key != first.key
    assert make(project, inputs={"weights": "abc"})[0].key != first.key


def test_a_study_may_add_hashes_to_its_keys(project):
    package = project / "lib" / "toystudies" / "toy" / "__init__.py"
    package.write_text(package.read_text() + "    def key_inputs(self):\n        return {'weights': 'abc'}\n")
    (job,) = make(project)
    assert job.parts["inputs"] == {"weights": "abc"}


def test_reachable_code_includes_ours_and_what_only_records_is_in_the_drawing_key(project):
    (job,) = make(project)
    modules = job.parts["modules"]
    assert {"overparam.support.progress", "overparam.record.record"} <= set(job.drawing["modules"])
    assert not job.drawing["modules"].keys() & modules.keys()
    assert {"toystudies.shared", "toystudies.toy.more", "toystudies.toy.steps"} <= set(modules)
    assert not {"toystudies.unrelated", "overparam.runner.plan", "json"} & set(modules)


def made(job):
    """Leave a complete record of a job."""
    recorder = record.start(job.study, job.params, slug=job.slug, key=job.key, directory=job.directory)
    recorder.record.provenance["key"] = job.parts
    return recorder.finish()


def test_every_reason_is_told(project):
    package = project / "lib" / "toystudies"
    notebook = project / "notebooks" / "01_toy.ipynb"
    path = made(make(project, inputs={"weights": "abc"})[0])
    assert make(project, inputs={"weights": "abc"})[0].state == "up to date"
    assert make(project, inputs={"weights": "abd"})[0].reason == "data changed: weights"
    for name in ("a", "b", "c", "d"):
        (package / "toy" / f"{name}.py").write_text("")
    (package / "shared.py").write_text("import os\n")
    notebook.write_text(
        notebook.read_text().replace("steps.value(keep_layers)", "steps.value(keep_layers + 1)")
    )
    (job,) = make(project, [{"margin": 2.0}], inputs={"weights": "abc"})
    expected = "notebook changed; code changed: toystudies.shared, toystudies.toy.a, toystudies.toy.b, toystudies.toy.c"
    assert job.reason == f"{expected} and 1 more; parameters changed: margin (1.0 → 2.0)"
    assert job.changes["code"][-1] == "toystudies.toy.d"
    assert path.exists()


def test_a_record_edited_by_hand_is_due(project):
    path = made(make(project)[0])
    path.write_text(path.read_text().replace('"keep_layers": 3', '"keep_layers": 4', 1))
    (job,) = make(project)
    assert job.state == "due"
    assert re.match(r"damaged: .*record.json: edited since it was written", job.reason)
    path.write_text("{")
    assert re.match(r"damaged: .*record.json is not a record", make(project)[0].reason)


def test_results_of_a_newer_version_are_refused(project):
    path = made(make(project)[0])
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    assert re.match(r".*record.json has schema version 2, this version .* reads 1: use", problems(project)[0])


def test_a_job_that_another_process_runs_is_not_due(project):
    (job,) = make(project)
    job.beside("lock").parent.mkdir(parents=True)
    with FileLock(job.beside("lock")):
        (job,) = make(project, force=True)
        assert (job.state, job.reason) == ("running elsewhere", "another process is running it")
    assert make(project)[0].state == "due"  # the file of the lock stays


def test_explain_says_all_of_one_job(project):
    made(make(project)[0])
    jobs = make(project, [{"keep_layers": 4}, {"model": "beta"}])
    text = show.explain(jobs, "toy/alpha")
    for line in (
        "  state      due: parameters changed: keep_layers (3 → 4)",
        f"  key        {jobs[0].key}",
        f"  command    {jobs[0].command}",
        "    keep_layers (3 → 4)",
        f"    code       toystudies.shared {jobs[0].parts['modules']['toystudies.shared'][:16]}",
    ):
        assert line in text.splitlines()
    with pytest.raises(BadInput, match=r"--explain toy: which one\? there are toy/alpha, toy/beta"):
        show.explain(jobs, "toy")
    with pytest.raises(BadInput, match=r"no such job.*did you mean 'toy/beta'"):
        show.explain(jobs, "toy/bet")


def test_a_plan_is_json_for_other_programs(project):
    profile = Profile("mine", "mine.yaml", "", {})
    jobs = make(project, [{"keep_layers": 4}])
    content = json.loads(show.as_json(profile, project / "results", jobs))
    (job,) = content["jobs"]
    assert (content["profile"], job["name"], job["state"]) == ("mine", "toy/alpha", "due")
    assert (job["reason"], job["params"]["keep_layers"], job["key"]) == ("missing", 4, jobs[0].key)
    assert planning.Job.from_dict(json.loads(json.dumps(jobs[0].to_dict()))) == jobs[0]


@pytest.fixture
def three(project, toy):
    """A function that plans three studies, given what each of them needs."""

    def planned(needs, only=(), resources=None):
        for name in ("one", "two", "three"):
            toy.write_notebook(project / "notebooks" / f"02_{name}.ipynb")
            params = (project / "lib" / "toystudies" / "toy" / "__init__.py").read_text()
            params += f"    def needs(self):\n        return {needs.get(name, {})!r}\n"
            params += f"    def resources(self):\n        return {resources or {}!r}\n"
            (project / "lib" / "toystudies" / f"{name}.py").write_text(params)
            sys.modules.pop(f"toystudies.{name}", None)
        profile = Profile("mine", "mine.yaml", "", {"one": [{}], "two": [{}], "three": [{}]})
        return planning.plan(profile, only, notebooks_dir=project / "notebooks", studies_package="toystudies")

    return planned


def test_a_study_comes_after_those_that_it_needs(three):
    assert [job.study for job in three({})] == ["one", "two", "three"]
    jobs = three({"one": {"three": "weights"}}, resources={"GPU": 2})
    assert [job.study for job in jobs].index("three") < [job.study for job in jobs].index("one")
    assert jobs[0].resources == {"GPU": 2}


def test_what_is_needed_and_not_there_is_named(three):
    with pytest.raises(BadInput, match="one/alpha needs three, which is not in this plan: no weights yet"):
        three({"one": {"three": "no weights yet"}}, only=["one"])
    assert len(three({"one": {"three": ""}}, only=["one"])) == 1
    with pytest.raises(BadInput, match=r"one/alpha needs 'tree': no such study: did you mean 'three'\?"):
        three({"one": {"tree": ""}})
    with pytest.raises(BadInput, match=r"in a circle: (one needs two needs one|two needs one needs two)"):
        three({"one": {"two": ""}, "two": {"one": ""}})


class Immediate:
    """A pool that ends each job as it is told to, without a process."""

    def __init__(self, answers):
        self.answers, self.order = answers, []

    def check(self, jobs):
        pass

    def submit(self, job, token, timeout):
        self.order.append(job.key)
        future = Future()
        future.set_result(Answer(self.answers.get(job.study, "done"), "", 0.0))
        return future

    def stop(self):
        pass


def test_jobs_that_need_a_failed_one_are_not_run(three):
    jobs = three({"one": {"three": ""}, "two": {"one": ""}})
    outcomes = execute.run(jobs, pool=lambda: Immediate({"three": "failed"}), out=io.StringIO())
    assert {outcome.job.study: (outcome.ending, outcome.message) for outcome in outcomes} == {
        "three": ("failed", ""),
        "one": ("not run", "needs three/alpha, which is not done"),
        "two": ("not run", "needs one/alpha, which is not done"),
    }
    assert execute.exit_code(outcomes) == 1


def test_a_job_whose_inputs_were_made_anew_is_planned_anew(three):
    jobs = three({"one": {"three": ""}})
    fresh = [replace(job, key="anew") for job in jobs]
    pool = Immediate({})
    execute.run(jobs, pool=lambda: pool, replan=lambda: fresh, out=io.StringIO())
    by_study = {job.study: job.key for job in jobs}
    assert pool.order == [by_study["two"], by_study["three"], "anew"]


def test_a_job_that_needs_more_gpus_than_there_are_is_refused(three, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(BadInput, match="one/alpha needs 2 GPU, this machine has 1: leave it out"):
        Local(1).check(three({}, resources={"GPU": 2}))
    Local(1).check(three({}, resources={"GPU": 1}))


def test_profiles_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "PROFILES", tmp_path)
    path = tmp_path / "laptop.yaml"
    path.write_text("description: one seed\njobs:\n  toy:\n    - {model: alpha}\n")
    assert load_profile("laptop") == Profile("laptop", "laptop", "one seed", {"toy": [{"model": "alpha"}]})
    assert load_profile(path).name == "laptop"
    with pytest.raises(BadInput, match=r"unknown profile 'labtop': did you mean 'laptop'\?"):
        load_profile("labtop")
    with pytest.raises(BadInput, match="No such file"):
        load_profile(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: [", "not valid YAML"),
        ("description: x", "'jobs' is missing"),
        ("jobs: {}\njob: {}", "unknown parameter 'job': did you mean 'jobs'?"),
        ("jobs: {toy: {model: a}}", "jobs.toy: .*list"),
        ("- 1", "as a whole: .*got"),
        ("!!python/object/apply:os.system ['false']", "not valid YAML"),
    ],
)
def test_bad_profiles_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message.replace("?", r"\?")):
        load_profile(path)


def test_an_absolute_profile_path_does_not_reach_the_command(project):
    profile = Profile("mine", str(project / "mine.yaml"), "", {"toy": [{}]})
    (job,) = planning.plan(profile, notebooks_dir=project / "notebooks", studies_package="toystudies")
    assert "--profile mine.yaml" in job.command


def test_planning_is_light(project):
    code = f"""
import sys
from pathlib import Path
from overparam.runner import execute, plan
profile = plan.Profile("mine", "mine", "", {{"toy": [{{}}]}})
folder = Path({str(project / "notebooks")!r})
plan.describe(plan.plan(profile, notebooks_dir=folder, studies_package="toystudies"))
heavy = {{"torch", "transformers", "mteb", "papermill", "pandas", "matplotlib", "jupyter_client"}}
heavy |= {{"dask", "distributed", "rich"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_profile_says_how_long_a_job_takes_that_has_not_run_yet(project):
    profile = Profile("mine", "mine.yaml", "", {"toy": [{}]}, {"toy": 2})
    (job,) = planning.plan(profile, notebooks_dir=project / "notebooks", studies_package="toystudies")
    assert job.expected == 120
