"""'Did you mean' hints for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: object, valid: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ``did you mean 'x'?`` with the valid name closest to the given one, or a list of all valid names.

    Args:
        name: What was typed; case is ignored.
        valid: All valid names.
        cutoff: Required similarity, from 0 to 1.
    """
    names = {each.lower(): each for each in sorted(valid)}
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=cutoff)
    if close:
        return f"did you mean {names[close[0]]!r}?"
    return f"valid: {', '.join(names.values())}" if names else "there is none"
