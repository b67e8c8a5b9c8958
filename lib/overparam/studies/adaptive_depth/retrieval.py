"""The step about embeddings: queries leave early, the searched texts stay at full depth, in one space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.adaptive_depth.bounds import FIXED, ORACLE
from overparam.studies.adaptive_depth.study import RESAMPLES, Study, states

CALM = "adaptive"  # leaves where an embedding no longer moves
_POINTS = 12
_COLUMNS = ["encoder", "system", "depth", "recall", "recall_low", "recall_high", "gain", "gain_low", "gain_high",
            "layers", "queries"]  # fmt: skip


@step
def retrieval(study: Study, training: pd.DataFrame) -> pd.DataFrame:  # noqa: ARG001
    """Search the paraphrase of a verse by the query's embedding at any depth, among embeddings at full depth.

    A query leaves where the cosine of its embeddings at two successive depths reaches a threshold.

    Returns:
        A row an encoder (as it is, and trained for all depths), system and point: mean `depth` of the queries, `recall`
        of the first hit in percent with its interval; `gain` over a fixed depth of the same mean, paired by query.
        Without a second encoder, no rows.
    """
    from overparam.compress import exits
    from overparam.evaluate import samples

    params = study.params
    if params.small is None:
        return pd.DataFrame(columns=_COLUMNS)
    queries, corpus, answers = _verses(samples, params.queries, params.searched, params.seed)
    rows: list[dict[str, Any]] = []
    for encoder in (params.small, study.trained):
        asked = _unit(states(study, encoder, queries))[:, 1:]  # [queries, layers, hidden]
        hits = _hits(asked, _unit(states(study, encoder, corpus)[:, -1]), answers)  # [queries, layers]
        layers = hits.shape[1]
        moved = np.einsum("qlh,qlh->ql", asked[:, 1:], asked[:, :-1])
        sure = np.concatenate([np.full((len(asked), 1), -1.0), moved], axis=1)
        for k in range(layers):
            rows.append(_row(encoder, FIXED, k + 1.0, hits[:, k], hits[:, k], layers))
        best = exits.oracle(1 - hits)
        rows.append(_row(encoder, ORACLE, (best + 1).mean(), hits.max(1), hits[:, -1], layers))
        for threshold in np.quantile(sure[:, 1:], np.linspace(0, 1, _POINTS)):
            left = exits.leave(sure, float(threshold))
            own = hits[np.arange(len(left)), left]
            rows.append(_row(encoder, CALM, (left + 1).mean(), own, exits.fixed(hits, left.mean()), layers))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    study.recorder.table("retrieval", table)
    return table


def _verses(samples: Any, n: int, searched: int, seed: int) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Verses of one English version, verses of another to search, and the places of the answers among these."""
    found = samples.verses(n, seed)
    ids = list(dict.fromkeys([*found.aligned, *found.searched]))[: max(searched, n)]
    queries = [found.texts["web"][verse] for verse in found.aligned]
    return queries, [found.texts["bbe"][verse] for verse in ids], np.arange(len(found.aligned))


def _hits(
    asked: NDArray[np.float32], corpus: NDArray[np.float32], answers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Whether the nearest text is the right one, at each depth, [queries, layers]."""
    return np.stack(
        [((asked[:, k] @ corpus.T).argmax(1) == answers).astype(float) for k in range(asked.shape[1])], 1
    )


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float32)


def _row(
    encoder: str, system: str, depth: float, hits: NDArray[Any], other: NDArray[Any], layers: int
) -> dict[str, Any]:
    recall = stats.bootstrap(hits, n_resamples=RESAMPLES).scaled(100)
    gain = stats.difference(other, hits, n_resamples=RESAMPLES).scaled(100)
    named = {"encoder": encoder, "system": system, "depth": float(depth)}
    return named | recall.columns("recall") | gain.columns("gain") | {"layers": layers, "queries": len(hits)}
