"""Errors in the user's input, collected so that all are shown at once."""

from __future__ import annotations


class BadInput(ValueError):  # noqa: N818 - `raise BadInput(…)` reads well without "Error"
    """One readable line per problem; nothing was run."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems
