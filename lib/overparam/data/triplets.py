"""What training and selection need of a triplet, wherever it comes from."""

from __future__ import annotations

from typing import Protocol


class Triplet(Protocol):
    """A query, a text that belongs with it, one that only looks as if it did, and the source of all three."""

    @property
    def query(self) -> str: ...  # noqa: D102
    @property
    def positive(self) -> str: ...  # noqa: D102
    @property
    def negative(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102
