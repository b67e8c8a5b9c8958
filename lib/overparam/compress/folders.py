"""Folders of saved models that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to write to, which takes its place at the end; on any error nothing is left.

    Args:
        path: A folder that does not exist yet, or is empty.
        replace: Take the place of a folder that is there.

    Raises:
        FileExistsError: If something is there, and is not to be replaced.
    """
    folder = Path(path)
    if (
        folder.exists()
        and not (replace and folder.is_dir())
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise FileExistsError(f"{folder} exists already; a model is saved to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if replace and folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
