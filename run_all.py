"""Run the studies of a profile and keep their results; or fill the README from results.

    python run_all.py                               the laptop profile
    python run_all.py --profile smoke --dry-run     what would run, and why
    python run_all.py --jobs 2 --timeout 7200       two notebooks at once, two hours each at most
    python run_all.py --cluster tcp://HOST:8786     on the workers of a dask cluster
    python run_all.py report                        README's table from results/reference

Exit code: 0 all done, 1 some jobs failed or were left to another run, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from overparam import cache
from overparam.report import readme
from overparam.runner import execute, show
from overparam.runner.errors import BadInput
from overparam.runner.plan import STUDIES, describe, load_profile, plan
from overparam.runner.pool import Local, Pool

ROOT = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, studies_package: str = STUDIES) -> int:
    """Do what the command line says and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in ("run", "report", "-h", "--help"):
        given.insert(0, "run")
    args = _parser().parse_args(given)
    try:
        if args.command == "report":
            return _report(root, args.results or root / "results" / "reference")
        return _clean() if args.clean else _run(args, root, studies_package)
    except BadInput as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return execute.INTERRUPTED
    return execute.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    commands = parser.add_subparsers(dest="command")
    report = commands.add_parser("report", help="fill the README's table from results")
    report.add_argument("--results", type=Path, metavar="DIR", help="default: results/reference")
    run = commands.add_parser(
        "run", help="run what is due (the default)", description=__doc__, formatter_class=as_is
    )
    add = run.add_argument
    add("--profile", default="laptop", metavar="NAME|FILE", help="what to run (default: laptop)")
    add("--only", nargs="+", default=[], metavar="STUDY[/SLUG]", help="just these")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STUDY.PARAM=VALUE",
        help="change a parameter; repeatable",
    )
    add("--results", type=Path, metavar="DIR", help="default: results/<profile>; smoke: temporary")
    where = run.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=_at_least(1), default=1, metavar="N", help="notebooks at once (default: 1)"
    )
    where.add_argument(
        "--cluster", metavar="ADDRESS", help="a dask scheduler, tcp://HOST:8786, or local:WORKERS"
    )
    add("--timeout", type=_at_least(1), metavar="SECONDS", help="end a job that takes longer, as failed")
    add("--retries", type=_at_least(0), default=0, metavar="N", help="try a job that failed N times more")
    add("--force", action="store_true", help="run also what is up to date")
    add("--dry-run", action="store_true", help="show the plan and stop")
    add("--explain", metavar="JOB", help="say in full what a job is and why it is due, and stop")
    add("--json", action="store_true", help="show the plan as JSON and stop")
    add("--clean", action="store_true", help="empty the cache of steps inside of jobs and stop")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
        return int(text)

    return count


def _run(args: argparse.Namespace, root: Path, studies_package: str) -> int:
    profile = load_profile(args.profile)
    only_show = args.dry_run or args.json or args.explain
    results = args.results or root / "results" / profile.name
    if args.results is None and profile.name == "smoke" and not only_show:
        results = Path(tempfile.mkdtemp(prefix="overparam-smoke-"))
    places = {"notebooks_dir": root / "notebooks", "studies_package": studies_package}
    replan = partial(plan, profile, args.only, args.set, results.absolute(), **places)
    jobs = replan(force=args.force)
    if args.json:
        print(show.as_json(profile, results, jobs))
    elif args.explain:
        print(show.explain(jobs, args.explain))
    else:
        print(f"{profile.name}: {profile.description}\nresults: {results}\n\n{describe(jobs)}", flush=True)
    if only_show:
        return execute.ALL_DONE
    pool = partial(Local, args.jobs) if args.cluster is None else partial(_cluster, args.cluster)
    limits = {"timeout": args.timeout, "retries": args.retries}
    outcomes = execute.run(jobs, pool=pool, replan=replan, **limits)
    print(f"\n{execute.summary(outcomes)}")
    return execute.exit_code(outcomes)


def _cluster(address: str) -> Pool:
    from overparam.runner.cluster import Cluster  # loads dask

    return Cluster(address)


def _clean() -> int:
    print(cache.describe(cache.clean()))
    return execute.ALL_DONE


def _report(root: Path, results: Path) -> int:
    changed = readme.fill(root / "README.md", results)
    print(f"README.md {'filled from' if changed else 'is current with'} {results}")
    return execute.ALL_DONE


if __name__ == "__main__":
    sys.exit(main())
