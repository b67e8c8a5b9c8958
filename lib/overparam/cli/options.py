"""The command-line options of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run to a parser."""
    add = parser.add_argument
    add("--profile", default="quick", metavar="NAME|FILE", help="what to run (default: quick)")
    add("--only", nargs="+", default=[], metavar="STUDY[/SLUG]", help="run only these")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STUDY.PARAM=VALUE",
        help="change a parameter; repeatable",
    )
    add("--results", type=Path, metavar="DIR", help="default: results/<profile>; smoke: temporary")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="notebooks at once on this machine (default: 1)",
    )
    where.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="run on the workers of a dask scheduler, such as tcp://HOST:8786",
    )
    add("--timeout", type=_at_least(1), metavar="SECONDS", help="end a longer job as failed")
    add("--retries", type=_at_least(0), default=0, metavar="N", help="try a failed job up to N more times")
    add("--force", action="store_true", help="also run jobs that are up to date")
    add("--dry-run", action="store_true", help="show the plan and stop")
    add("--explain", metavar="JOB", help="show everything about a job and why it is due, and stop")
    add("--json", action="store_true", help="show the plan as JSON and stop")
    add("--clean", action="store_true", help="empty the cache of steps within jobs and stop")


def _at_least(minimum: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number, {minimum} or more, got {text!r}")
        return int(text)

    return count
