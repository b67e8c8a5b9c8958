"""Size of files on disk."""

from __future__ import annotations

import os
from pathlib import Path


def disk_bytes(path: Path | str) -> int:
    """Return the size of a file, or of all files in a folder; a file with several links counts once.

    Args:
        path: File or folder. Symbolic links to files are followed, because hub caches consist of them.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}")
    files = (
        [path]
        if path.is_file()
        else [Path(root) / name for root, _, names in os.walk(path) for name in names]
    )
    sizes = {}
    for file in files:
        if file.exists():  # a dangling link has no bytes
            status = file.stat()
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
