"""How the texts of a study become embeddings, said and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from overparam.record import record
from overparam.support import progress

if TYPE_CHECKING:
    from overparam.models import Recipe

_PLAIN = "no recipe"  # of a model that is no sentence-transformers folder


def keep(
    recorder: record.Recorder,
    name: str,
    recipe: Recipe | None,
    here: Mapping[str, str],
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Record what a model's folder says of its embeddings beside what the study does; say where they differ.

    Args:
        recorder: Of the study; gets the table ``embeddings``.
        name: The model's name.
        recipe: Its recipe, None where it has none.
        here: What the study does, by part of `Recipe.describe`; the other parts are done as the folder says.
        known: The table so far, of other models.

    Returns:
        The table: a row a model and part.
    """
    says = recipe.describe() if recipe else {}
    parts = list(dict.fromkeys([*says, *here]))
    rows = [
        {
            "model": name,
            "part": part,
            "folder": says.get(part, _PLAIN),
            "here": here.get(part, says.get(part)),
        }
        for part in parts
    ]
    changed = [row for row in rows if row["folder"] not in (_PLAIN, row["here"])]
    for row in changed:
        progress.note(f"{name}: {row['part']} is {row['folder']} in its folder, here {row['here']}")
    table = pd.concat([*([] if known is None else [known]), pd.DataFrame(rows)], ignore_index=True)
    recorder.table("embeddings", table)
    return table
