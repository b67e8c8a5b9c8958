"""Errors in what the user asked for, collected so that all are seen at once."""

from __future__ import annotations


class BadInput(ValueError):  # noqa: N818 - read as a sentence where it is raised
    """One readable line for each problem; nothing was run."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems
