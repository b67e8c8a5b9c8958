"""Hooks on modules, for the time of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep registered hooks within the block, and remove them afterwards, also after an error."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
