"""Steps that test_memory.py runs in processes of their own."""

import os
import signal

import numpy as np

MB = 2**20


def plain(megabytes):
    np.ones(megabytes * MB, dtype=np.uint8)


def prepared(loaded, megabytes):
    """A function that loads, and the step it returns; a peak while loading does not count."""
    np.ones(4 * megabytes * MB, dtype=np.uint8)
    model = np.ones(loaded * MB, dtype=np.uint8)

    def step():
        np.ones(megabytes * MB, dtype=np.uint8)
        return model

    return step


def generated(loaded, megabytes):
    np.ones(4 * megabytes * MB, dtype=np.uint8)
    model = np.ones(loaded * MB, dtype=np.uint8)
    yield
    np.ones(megabytes * MB, dtype=np.uint8)
    del model


def held(megabytes):
    """Makes more than it returns, in small pieces that the allocator would keep."""
    pieces = [bytes(1000) for _ in range(50_000)]
    parts = [np.ones(MB // 8, dtype=np.uint8) for _ in range(8 * megabytes)]
    del pieces
    return parts


def noisy():
    print("a line on standard output")


def failing(why):
    raise KeyError(why)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def endless():
    while True:
        pass
