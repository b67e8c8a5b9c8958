"""Run the studies of a profile and keep their results; or report, verify, compare and cite results.

    python run_all.py                               the laptop profile
    python run_all.py --profile smoke --dry-run     what would run, and why
    python run_all.py report [PATH]                 README's table, REPORT.md and the gallery from results
    python run_all.py verify [PATH]                 is every file of a results folder what its record says?
    python run_all.py compare A B                   which quality metrics of two results folders agree
    python run_all.py cite FIGURE                   BibTeX and a caption

Exit code: 0 all done, 1 some jobs failed or something is not right, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from overparam import commands
from overparam.runner import execute
from overparam.runner.errors import BadInput
from overparam.runner.plan import STUDIES, describe, load_profile, plan

ROOT = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, studies_package: str = STUDIES) -> int:
    """Do what the command line says and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in commands.NAMES:
            return commands.main(given, root)
        args = _parser().parse_args(given)
        return _run(args, root, studies_package)
    except BadInput as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return execute.INTERRUPTED
    return execute.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run",), default="run", help="default: run")
    parser.add_argument(
        "--profile", default="laptop", metavar="NAME|FILE", help="what to run (default: laptop)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="STUDY[/SLUG]", help="just these")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STUDY.PARAM=VALUE",
        help="change a parameter; repeatable",
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="default: results/<profile>; smoke: temporary"
    )
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    return parser


def _run(args: argparse.Namespace, root: Path, studies_package: str) -> int:
    profile = load_profile(args.profile)
    results = args.results or root / "results" / profile.name
    if args.results is None and profile.name == "smoke" and not args.dry_run:
        results = Path(tempfile.mkdtemp(prefix="overparam-smoke-"))
    jobs = plan(
        profile,
        args.only,
        args.set,
        results,
        force=args.force,
        notebooks_dir=root / "notebooks",
        studies_package=studies_package,
    )
    print(f"{profile.name}: {profile.description}\nresults: {results}\n\n{describe(jobs)}", flush=True)
    if args.dry_run:
        return execute.ALL_DONE
    outcomes = execute.run(jobs)
    print(f"\n{execute.summary(outcomes)}")
    return execute.exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
