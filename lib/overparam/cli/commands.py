"""The commands of ``run_all.py`` that read results and run no model: report, verify, redraw, compare and cite."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ValidationError

from overparam.publish import citing, compare, crate, inventory, pages, readme, verify
from overparam.record import figures, record
from overparam.record.record import Record
from overparam.runner import code, execute
from overparam.runner.job import Job
from overparam.runner.plan import STUDIES, Profile, drawing_parts, plan
from overparam.runner.pool import Local
from overparam.studies import claims
from overparam.support.files import digest, sha256

OK, FAILED = 0, 1


def main(arguments: Sequence[str], root: Path) -> int:
    """Do what the command line says and return the exit code.

    Args:
        arguments: The command and its arguments.
        root: The repository.

    Raises:
        ValueError: for bad input, in one readable line.
    """
    args = _parser(root).parse_args(arguments)
    if args.command == "report":
        return report(args.results, root)
    if args.command == "verify":
        return check(args.path, root)
    if args.command == "redraw":
        return redraw(args.path, args.style, root)
    if args.command == "compare":
        return compare_folders(args.a, args.b)
    return cite(args.figure, args.results, root)


def report(results: Path, root: Path) -> int:
    """Write everything that is made from records; return 1 when a record had to be left out.

    Raises:
        ValueError: when a record of the reference results was made with uncommitted changes; nothing is written then.
    """
    started = time.monotonic()
    found = inventory.take(results)
    is_reference = results.resolve() == _reference(root).resolve()
    if is_reference:
        _refuse_uncommitted(found)
    if found.studies and (root / "notebooks").is_dir():
        _summarise(results, root)
        found = inventory.take(results)
        if is_reference:
            _refuse_uncommitted(found)
    if results.is_dir():
        for name, write in (
            (pages.FILE, pages.write),
            (citing.FILE, citing.write),
            (crate.FILE, crate.write),
        ):
            print(f"{results / name} {'written' if write(found) else 'is current'}")
    if found.records:
        from overparam.publish import gallery  # loads nbconvert

        print(f"{gallery.build(found)} written")
    else:
        print(f"no records in {results}: `python run_all.py --profile {results.name}` makes them")
    if is_reference:
        changed = readme.fill(root / "README.md", results)
        print(f"README.md {'filled from' if changed else 'is current with'} {results}")
    for remark in found.remarks():
        print(f"note: {remark}")
    print(f"{len(found.studies)} records, {time.monotonic() - started:.0f} s")
    return FAILED if found.problems else OK


def check(results: Path, root: Path) -> int:
    """Print the table of `verify.check`; return 1 when something is wrong."""
    inputs = claims.record_hashes(results) if results.is_dir() else None
    findings = verify.check(results, age=lambda record: changed_since(record, root), summary_inputs=inputs)
    if results.resolve() == _reference(root).resolve():
        findings += [
            verify.Finding(
                name, "uncommitted", "made with uncommitted changes: not fit for reference results"
            )
            for name in inventory.take(results).uncommitted()
        ]
        if readme.stale(root / "README.md", results):
            changed = "records have changed since: run `run_all.py report`"
            findings.append(verify.Finding("README.md", "stale", changed))
    print(verify.table(findings))
    wrong = sum(finding.failed for finding in findings)
    print(f"\n{results}: {f'{wrong} of {len(findings)} checks failed' if wrong else 'all checks passed'}")
    return FAILED if wrong else OK


def redraw(path: Path, style: Path | None, root: Path) -> int:
    """Draw and judge anew what records hold, without measuring; return 1 when a record could not be drawn."""
    if style is not None:
        figures.read_style(style)
        os.environ["OVERPARAM_STYLE"] = str(style.resolve())
    inside = [record.load(path)] if (path / record.FILE_NAME).is_file() else record.find(path)
    if not inside:
        raise ValueError(f"no records in {path}: there is nothing to draw")
    jobs, left_out = [], []
    for one in inside:
        try:
            jobs.append(_drawing_job(one, style, root))
        except (ImportError, ValueError) as error:
            left_out.append(f"{one.study}/{one.slug}  left out: {error}")
    for line in left_out:
        print(line, file=sys.stderr)
    outcomes = execute.run(jobs, pool=partial(Local, 2))
    print(f"\n{execute.summary(outcomes)}")
    return FAILED if left_out else execute.exit_code(outcomes)


def _drawing_job(one: Record, style: Path | None, root: Path) -> Job:
    assert one.path is not None
    notebook = _notebook(one, root)
    if notebook is None:
        raise ValueError(f"there is no notebook of {one.study}")
    if not (one.path.parent / record.STEPS_NAME).is_file():
        raise ValueError(
            f"it keeps nothing of what its steps returned, as older records do; measure again: {one.command}"
        )
    module = f"{STUDIES}.{one.study}"
    drawing = drawing_parts(code.reached(notebook, module), _params(one))
    if style is not None:
        drawing["style"] = sha256(style)
    return Job(
        study=one.study,
        slug=one.slug,
        notebook=notebook,
        params=one.params,
        profile=one.profile,
        key=one.key,
        parts=one.provenance["key"],
        directory=one.path.parent,
        command=one.command,
        state="to redraw",
        reason="forced",
        drawing={"key": digest(drawing), **drawing},
        module=module,
    )


def compare_folders(a: Path, b: Path) -> int:
    """Print the comparison of two results folders; return 1 when a quality metric differs."""
    left, right = inventory.take(a), inventory.take(b)
    for found in (left, right):
        if not found.studies:
            raise ValueError(f"no records in {found.root}: there is nothing to compare")
        for problem in found.problems:
            print(f"note: {found.root}: {problem}")
    rows = compare.compare(left, right)
    wrong = compare.differences(rows)
    print(f"A: {a}\nB: {b}\n\n{compare.table(rows)}\n\n{compare.summary(rows)}")
    print(f"{len(wrong)} quality metrics differ" if wrong else "no quality metric differs")
    return FAILED if wrong else OK


def cite(name: str, results: Path, root: Path) -> int:
    """Print BibTeX and a caption of a figure."""
    cited = citing.find(inventory.take(results), name)
    print(f"{citing.bibtex(cited, root / 'CITATION.cff')}\n\n{citing.caption(cited)}")
    return OK


def changed_since(one: Record, root: Path) -> list[str]:
    """Which code, notebook or inputs a record was made with that are others today."""
    before = one.provenance.get("key", {})
    path = _notebook(one, root)
    if path is None:
        return [f"there is no notebook of {one.study}"]
    changed = []
    if "modules" in before and "drawing" not in one.provenance:
        return ["an older version, with one key for code that measures and code that draws"]
    if "modules" in before:  # a study whose key holds no code has none
        reached = code.reached(path, f"{STUDIES}.{one.study}")
        if before.get("notebook") != reached.notebook_measuring:
            changed.append("notebook")
        now, then = reached.measuring, before["modules"]
        changed += sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
    try:
        params = _params(one)
    except (ImportError, ValidationError):
        return [*changed, "parameters"]
    inputs: dict[str, str] = getattr(params, "key_inputs", dict)()
    return changed + [name for name, sha in inputs.items() if before.get("inputs", {}).get(name) != sha]


def _notebook(one: Record, root: Path) -> Path | None:
    return next((root / "notebooks").glob(f"[0-9]*_{one.study}.ipynb"), None)


def _params(one: Record) -> BaseModel:
    module = importlib.import_module(f"{STUDIES}.{one.study}")
    params: BaseModel = module.Params.model_validate_json(json.dumps(one.params))
    return params


def _summarise(results: Path, root: Path) -> None:
    """Run the notebook of all claims where a record has changed since."""
    inside = results.resolve().is_relative_to(claims.RESULTS)
    given = results.resolve().relative_to(claims.RESULTS).as_posix() if inside else str(results.resolve())
    profile = Profile(results.name, results.name, "", {inventory.SUMMARY: [{"results": given}]})
    jobs = plan(profile, results=results, notebooks_dir=root / "notebooks")
    command = "python run_all.py report" + (
        "" if given == "reference" else f" {shlex.quote(f'results/{given}' if inside else given)}"
    )
    outcomes = execute.run([replace(job, command=command) for job in jobs])
    for outcome in outcomes:
        if outcome.ending == "failed":
            print(f"note: the figures of all claims could not be made: {outcome.message}")


def _refuse_uncommitted(found: inventory.Inventory) -> None:
    """Raise ValueError for records whose code nobody can look up; a summary of claims among them is removed."""
    if names := found.uncommitted():
        for record in found.records:
            if record.study == inventory.SUMMARY and record.provenance["git"]["dirty"]:
                shutil.rmtree(inventory.folder(record))
        raise ValueError(
            f"made with uncommitted changes, so not fit for reference results: {', '.join(names)}. Commit the changes, "
            "then make them again: a study by `run_all.py --profile reference --force --only STUDY`, the summary of "
            "claims by `run_all.py report`"
        )


def _reference(root: Path) -> Path:
    return root / "results" / "reference"


def _parser(root: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reference = _reference(root)
    made = commands.add_parser(
        "report", help="README's picture and table, REPORT.md, figures.json, RO-Crate metadata, HTML gallery"
    )
    made.add_argument(
        "results", nargs="?", type=Path, default=reference, metavar="PATH", help="default: results/reference"
    )
    checked = commands.add_parser(
        "verify", help="every hash, every file, every generated page of a results folder"
    )
    checked.add_argument(
        "path", nargs="?", type=Path, default=reference, metavar="PATH", help="default: results/reference"
    )
    drawn = commands.add_parser("redraw", help="every figure, verdict and notebook anew, without measuring")
    drawn.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=reference,
        metavar="PATH",
        help="a results folder or a record's; default: results/reference",
    )
    drawn.add_argument("--style", type=Path, metavar="FILE.mplstyle", help="of matplotlib, for all figures")
    compared = commands.add_parser("compare", help="which quality metrics of two results folders agree")
    compared.add_argument("a", type=Path, metavar="RESULTS_A")
    compared.add_argument("b", type=Path, metavar="RESULTS_B")
    cited = commands.add_parser("cite", help="BibTeX and caption of a figure")
    cited.add_argument(
        "figure", metavar="FIGURE", help="fig:id, or fig:id@slug where several records have it"
    )
    cited.add_argument(
        "--results", type=Path, default=reference, metavar="DIR", help="default: results/reference"
    )
    return parser
