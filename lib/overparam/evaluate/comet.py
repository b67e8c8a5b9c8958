"""COMET and xCOMET, run by the command `comet-score` of a separate environment.

unbabel-comet 2.2 needs transformers below 5 and NumPy below 2, so it cannot be installed in this project's
environment. Its checkpoints are PyTorch pickles, which are read only by its own process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_INSTALL = (
    "install it in a separate environment, `pipx install unbabel-comet` or `uv tool install unbabel-comet`, "
    "so that the command comet-score is found, or give its path in OVERPARAM_COMET"
)


def comet(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    failures: Sequence[str | None],
    model: str = "Unbabel/XCOMET-XL",
    batch_size: int = 8,
) -> NDArray[np.float64]:
    """Score translations by a learned metric (Rei et al. 2020; xCOMET: Guerreiro et al. 2024).

    A failed generation scores 0 and is not passed to the metric, as in arXiv 2605.28042.

    Args:
        sources: Texts that were translated.
        hypotheses: Translations.
        references: Human translations.
        failures: From `translation.failures`.
        model: Hub name or path of a checkpoint. "Unbabel/XCOMET-XL" (3.5 B parameters) and the larger
            "Unbabel/XCOMET-XXL" need an account that accepted their licence; "Unbabel/wmt22-comet-da" is open.
        batch_size: Sentences per batch.

    Returns:
        float64 [n, 1], mostly 0..1; their mean is the score of the corpus.

    Raises:
        ValueError: No texts, or unequal numbers.
        RuntimeError: `comet-score` is not installed, or failed.
    """
    sizes = {len(sources), len(hypotheses), len(references), len(failures)}
    if len(sizes) > 1 or not sources:
        raise ValueError(
            "sources, hypotheses, references and failures must be equal in number, at least 1, got "
            f"{len(sources)}, {len(hypotheses)}, {len(references)} and {len(failures)}"
        )
    items = np.zeros((len(sources), 1))
    good = [index for index, reason in enumerate(failures) if reason is None]
    if good:
        columns = [[texts[index] for index in good] for texts in (sources, hypotheses, references)]
        items[good, 0] = _run(columns, model, batch_size)
    return items


def comet_command() -> str:
    """Return the path of `comet-score`.

    Raises:
        RuntimeError: It is not installed.
    """
    command = os.environ.get("OVERPARAM_COMET") or shutil.which("comet-score")
    if command is None or shutil.which(command) is None:
        raise RuntimeError(f"COMET scores need the command comet-score of unbabel-comet: {_INSTALL}")
    return command


def _run(columns: list[list[str]], model: str, batch_size: int) -> list[float]:
    """Scores of the rows of [sources, hypotheses, references]."""
    import torch

    command = comet_command()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / "sources", folder / "translations", folder / "references"]
        for file, texts in zip(files, columns, strict=True):
            # one text per line
            file.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
        out = folder / "scores.json"
        arguments = ["-s", files[0], "-t", files[1], "-r", files[2], "--model", model, "--to_json", out]
        arguments += ["--batch_size", batch_size, "--gpus", min(1, torch.cuda.device_count())]
        done = subprocess.run(
            [command, *map(str, arguments), "--quiet", "--only_system"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode or not out.exists():
            last = next(
                iter((done.stderr or done.stdout).strip().splitlines()[-1:]), f"exit {done.returncode}"
            )
            raise RuntimeError(
                f"comet-score failed with {model}: {last} Without a network, load the model once where there is "
                "one; for xCOMET, accept its licence on the hub and log in."
            )
        (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    return [float(row["COMET"]) for row in rows]
