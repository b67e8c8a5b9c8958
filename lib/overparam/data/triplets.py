"""The interface of triplets that training and selection use."""

from __future__ import annotations

from typing import Protocol


class Triplet(Protocol):
    """A query, a text that matches it, one that only seems to match, and the source of all three."""

    @property
    def query(self) -> str: ...  # noqa: D102
    @property
    def positive(self) -> str: ...  # noqa: D102
    @property
    def negative(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102
