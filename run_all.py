"""Run the studies of a profile and keep their results; or report, verify, compare and cite results.

    python run_all.py                               the quick profile
    python run_all.py --profile smoke --dry-run     what would run, and why
    python run_all.py --jobs 2 --timeout 7200       two notebooks at once, two hours each at most
    python run_all.py --cluster tcp://HOST:8786     on the workers of a dask cluster
    python run_all.py report [PATH]                 write README's table, REPORT.md and the gallery from results
    python run_all.py verify [PATH]                 check every file of a results folder against its record
    python run_all.py redraw [PATH]                 redraw figures and verdicts without measuring; --style FILE
    python run_all.py compare A B                   compare the quality metrics of two results folders
    python run_all.py cite FIGURE                   print BibTeX and a caption

Exit code: 0 all done; 1 some jobs failed or were left to another run, or a check failed; 2 bad input;
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from overparam.cli import options, show
from overparam.runner import execute, settings
from overparam.runner.errors import BadInput
from overparam.runner.plan import STUDIES, describe, load_profile, plan
from overparam.runner.pool import Local, Pool
from overparam.support import cache

ROOT = Path(__file__).resolve().parent
COMMANDS = ("report", "verify", "redraw", "compare", "cite")


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, studies_package: str = STUDIES) -> int:
    """Run the command line and return the exit code."""
    settings.take_defaults()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in COMMANDS:
            from overparam.cli import commands  # imported here: it loads pandas, which a run does not need

            return commands.main(given, root)
        args = _parser().parse_args(given[1:] if given[:1] == ["run"] else given)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_to(parser)
    return parser


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
    outcomes = execute.run(jobs, pool=pool, timeout=args.timeout, retries=args.retries, replan=replan)
    print(f"\n{execute.summary(outcomes)}")
    return execute.exit_code(outcomes)


def _cluster(address: str) -> Pool:
    from overparam.runner.cluster import Cluster  # imported here: it loads dask

    return Cluster(address)


def _clean() -> int:
    print(cache.describe(cache.clean()))
    return execute.ALL_DONE


if __name__ == "__main__":
    sys.exit(main())
