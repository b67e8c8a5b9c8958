"""What the proofs cost: their seconds as a share of each study's, from the records of `make run` and of the reference.

The goal is 3 % on the laptop profile. A proof runs once for each architecture in a process; later calls look it up.
"""

from __future__ import annotations

from pathlib import Path

from overparam.record import record

RESULTS = Path(__file__).parents[2] / "results"
GOAL = 0.03


def main() -> int:
    """Print a line for each record that has the figure, and return 0 when every laptop study meets the goal."""
    missed = 0
    for profile in ("laptop", "reference"):
        folder = RESULTS / profile
        records = record.find(folder) if folder.is_dir() else []
        measured = [one for one in records if "proof_seconds" in one.provenance]
        if not measured:
            print(
                f"proofs, {profile}: no record has the figure yet; `make run` makes those of the laptop profile"
            )
        for one in measured:
            seconds = one.provenance["proof_seconds"]
            share = seconds / one.seconds
            missed += profile == "laptop" and share > GOAL
            print(
                f"proofs, {profile} {one.study}/{one.slug}: {seconds:.1f} of {one.seconds:.0f} s, {100 * share:.2f} %"
            )
    return int(missed > 0)
