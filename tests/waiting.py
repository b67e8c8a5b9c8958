"""Waiting for what another process does."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = 500) -> T:
    """The first true value of a condition; an assertion error when none came in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing came in {seconds} seconds"
        time.sleep(0.02)
    return value


def complete_json(path: Path) -> dict | None:
    """The contents of a JSON file, or None while it is missing or half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
