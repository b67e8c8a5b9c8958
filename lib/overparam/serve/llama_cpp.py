"""A decoder in llama.cpp, by the optional package xllamacpp: weights stay as the GGUF file has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"


def reason_against(file: Path | None) -> str:
    """Return why a model does not run in llama.cpp here; empty if it does."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed: pip install {PACKAGE}"
    return "" if file else "the model is not a GGUF file"


class LlamaCpp:
    """A GGUF file, loaded for a number of threads; times are those that llama.cpp reports of itself."""

    def __init__(self, file: Path, *, threads: int, context: int = 1024) -> None:
        """Load it.

        Args:
            file: The GGUF file.
            threads: Of the processor.
            context: Tokens that it can hold.

        Raises:
            OSError: The file cannot be loaded.
        """
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.verbosity = context, 1, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(settings)
        except Exception as error:
            raise OSError(f"llama.cpp cannot load {file.name}: {error}") from error

    def prompt(self, ids: Sequence[int]) -> float:
        """Read a prompt from its beginning, and return the seconds."""
        return float(self._ask(ids, 1, keep=False)["timings"]["prompt_ms"]) / 1e3

    def tokens(self, ids: Sequence[int], count: int) -> float:
        """Write tokens after a prompt that may have been read before, and return the seconds of a token."""
        timings = self._ask(ids, count + 1, keep=True)["timings"]
        return float(timings["predicted_ms"]) / 1e3 / int(timings["predicted_n"])

    def likeliest(self, ids: Sequence[int]) -> int:
        """Return the likeliest token after a prompt."""
        answer = self._ask(ids, 1, keep=False, logprobs=1)
        return int(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["id"])

    def _ask(self, ids: Sequence[int], count: int, *, keep: bool, **more: Any) -> dict[str, Any]:
        asked = {
            "prompt": list(ids),
            "n_predict": count,
            "cache_prompt": keep,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer: dict[str, Any] = self._server.handle_completions({**asked, **more})
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp did not answer: {answer.get('message') or answer}")
        return answer


def held(file: str, ids: list[int]) -> LlamaCpp:
    """Load a file and read a text, in a process of its own whose memory is measured."""
    server = LlamaCpp(Path(file), threads=1, context=128)
    server.prompt(ids)
    return server
