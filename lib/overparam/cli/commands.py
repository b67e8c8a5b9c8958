"""The commands of ``run_all.py`` that read results without running models: report, verify, redraw, compare, cite."""

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

from overparam.publish import citing, compare, crate, pages, readme, verify
from overparam.publish.inventory import SUMMARY, Inventory, folder, take
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
    """Run a command and return the exit code.

    Args:
        arguments: The command and its arguments.
        root: Root of the repository.

    Raises:
        ValueError: for bad input, with one readable line.
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
    """Write all pages that are made from records; return 1 if a record had to be left out.

    Raises:
        ValueError: if a record of the reference results was made with uncommitted changes; nothing is written then.
    """
    started = time.monotonic()
    contents = take(results)
    is_reference = results.resolve() == _reference(root).resolve()
    if is_reference:
        _refuse_uncommitted(contents)
    if contents.studies and (root / "notebooks").is_dir():
        _summarise(results, root)
        contents = take(results)
        if is_reference:
            _refuse_uncommitted(contents)
    if results.is_dir():
        for name, write in (
            (pages.FILE, pages.write),
            (citing.FILE, citing.write),
            (crate.FILE, crate.write),
        ):
            print(f"{results / name} {'written' if write(contents) else 'is current'}")
    if contents.records:
        from overparam.publish import gallery  # imported here: it loads nbconvert

        print(f"{gallery.build(contents)} written")
    else:
        print(f"no records in {results}: `python run_all.py --profile {results.name}` makes them")
    if is_reference:
        changed = readme.fill(root / "README.md", results)
        print(f"README.md {'filled from' if changed else 'is current with'} {results}")
    for remark in contents.remarks():
        print(f"note: {remark}")
    print(f"{len(contents.studies)} records, {time.monotonic() - started:.0f} s")
    return FAILED if contents.problems else OK


def check(results: Path, root: Path) -> int:
    """Print the table of `verify.check`; return 1 if a check failed."""
    inputs = claims.record_hashes(results) if results.is_dir() else None
    findings = verify.check(results, age=lambda record: changed_since(record, root), summary_inputs=inputs)
    if results.resolve() == _reference(root).resolve():
        findings += [
            verify.Finding(
                name, "uncommitted", "made with uncommitted changes: not fit for reference results"
            )
            for name in take(results).uncommitted()
        ]
        if readme.stale(root / "README.md", results):
            changed = "records have changed since: run `run_all.py report`"
            findings.append(verify.Finding("README.md", "stale", changed))
    print(verify.table(findings))
    wrong = sum(finding.failed for finding in findings)
    print(f"\n{results}: {f'{wrong} of {len(findings)} checks failed' if wrong else 'all checks passed'}")
    return FAILED if wrong else OK


def redraw(path: Path, style: Path | None, root: Path) -> int:
    """Redraw figures and verdicts of records without measuring; return 1 if a record could not be redrawn."""
    if style is not None:
        figures.read_style(style)
        os.environ["OVERPARAM_STYLE"] = str(style.resolve())
    records = [record.load(path)] if (path / record.FILE_NAME).is_file() else record.find(path)
    if not records:
        raise ValueError(f"no records in {path}: there is nothing to draw")
    jobs, left_out = [], []
    for one in records:
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
            f"it was made by an older version, without the values of its steps; measure again: {one.command}"
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
    """Print the comparison of two results folders; return 1 if a quality metric differs."""
    left, right = take(a), take(b)
    for each in (left, right):
        if not each.studies:
            raise ValueError(f"no records in {each.root}: there is nothing to compare")
        for problem in each.problems:
            print(f"note: {each.root}: {problem}")
    rows = compare.compare(left, right)
    wrong = compare.differences(rows)
    print(f"A: {a}\nB: {b}\n\n{compare.table(rows)}\n\n{compare.summary(rows)}")
    print(f"{len(wrong)} quality metrics differ" if wrong else "no quality metric differs")
    return FAILED if wrong else OK


def cite(name: str, results: Path, root: Path) -> int:
    """Print a BibTeX entry and a caption for a figure."""
    cited = citing.find(take(results), name)
    print(f"{citing.bibtex(cited, root / 'CITATION.cff')}\n\n{citing.caption(cited)}")
    return OK


def changed_since(one: Record, root: Path) -> list[str]:
    """List the code, notebook and inputs that changed since a record was made."""
    before = one.provenance.get("key", {})
    path = _notebook(one, root)
    if path is None:
        return [f"there is no notebook of {one.study}"]
    changed = []
    if "modules" in before and "drawing" not in one.provenance:
        return ["an older version, with one key for code that measures and code that draws"]
    if "modules" in before:  # absent if the study's key covers no code
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
    """Run the notebook that summarises all claims, if a record has changed."""
    inside = results.resolve().is_relative_to(claims.RESULTS)
    given = results.resolve().relative_to(claims.RESULTS).as_posix() if inside else str(results.resolve())
    profile = Profile(results.name, results.name, "", {SUMMARY: [{"results": given}]})
    jobs = plan(profile, results=results, notebooks_dir=root / "notebooks")
    command = "python run_all.py report" + (
        "" if given == "reference" else f" {shlex.quote(f'results/{given}' if inside else given)}"
    )
    outcomes = execute.run([replace(job, command=command) for job in jobs])
    for outcome in outcomes:
        if outcome.ending == "failed":
            print(f"note: the figures of all claims could not be made: {outcome.message}")


def _refuse_uncommitted(inventory: Inventory) -> None:
    """Raise ValueError for records made with uncommitted changes; a summary of claims among them is removed."""
    if names := inventory.uncommitted():
        for record in inventory.records:
            if record.study == SUMMARY and record.provenance["git"]["dirty"]:
                shutil.rmtree(folder(record))
        raise ValueError(
            f"made with uncommitted changes, so not fit for reference results: {', '.join(names)}. Commit the changes, "
            "then run them again: a study with `run_all.py --profile reference --force --only STUDY`, the summary of "
            "claims with `run_all.py report`"
        )


def _reference(root: Path) -> Path:
    return root / "results" / "reference"


def _parser(root: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reference = _reference(root)
    made = commands.add_parser(
        "report", help="write README's picture and table, REPORT.md, figures.json, RO-Crate metadata, gallery"
    )
    made.add_argument(
        "results", nargs="?", type=Path, default=reference, metavar="PATH", help="default: results/reference"
    )
    checked = commands.add_parser(
        "verify", help="check every hash, file and generated page of a results folder"
    )
    checked.add_argument(
        "path", nargs="?", type=Path, default=reference, metavar="PATH", help="default: results/reference"
    )
    drawn = commands.add_parser("redraw", help="redraw figures, verdicts and notebooks without measuring")
    drawn.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=reference,
        metavar="PATH",
        help="folder of results or of one record; default: results/reference",
    )
    drawn.add_argument("--style", type=Path, metavar="FILE.mplstyle", help="matplotlib style for all figures")
    compared = commands.add_parser("compare", help="compare the quality metrics of two results folders")
    compared.add_argument("a", type=Path, metavar="RESULTS_A")
    compared.add_argument("b", type=Path, metavar="RESULTS_B")
    cited = commands.add_parser("cite", help="print BibTeX and a caption for a figure")
    cited.add_argument("figure", metavar="FIGURE", help="fig:id, or fig:id@slug if several records have it")
    cited.add_argument(
        "--results", type=Path, default=reference, metavar="DIR", help="default: results/reference"
    )
    return parser
