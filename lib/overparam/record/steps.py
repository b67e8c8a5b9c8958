"""The values that a study's steps returned, stored with its record, so that figures can be redrawn without measuring.

Plain values, tables, arrays and the suite's dataclasses are restored bit for bit. Other objects, such as models, are
restored as `NotKept`, which raises an error when used.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import importlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

_PACKAGE = __name__.partition(".")[0]


class NotKept:
    """Stands for an object that records do not store; using it is an error that names it."""

    def __init__(self, kind: str):
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            f"{name!r} of a {self._kind} is not available when redrawing: records store only numbers, tables, arrays "
            "and dataclasses that steps return"
        )


def dump(encoded: Mapping[str, Any]) -> bytes:
    """Return encoded values of steps as bytes for `load`; equal values give equal bytes."""
    return gzip.compress(json.dumps({"dict": list(encoded.items())}).encode(), mtime=0)


def load(data: bytes, owner: object) -> dict[str, Any]:
    """Return the steps' values by name; references to the owner (see `encode`) become `owner`.

    Raises:
        ValueError: for invalid bytes, or values of a class that no longer exists.
    """
    try:
        values: dict[str, Any] = _decode(json.loads(gzip.decompress(data)), owner)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the recorded values of the steps cannot be read: {error!r}") from error
    return values


def encode(value: Any, owner: object) -> Any:
    """Return a value as plain JSON values.

    Args:
        value: Return value of a step.
        owner: An object stored as a reference only, such as the recorder; `load` puts its own in that place.
    """
    if value is owner:
        return {"owner": 1}
    if value is None or (isinstance(value, bool | int | str) and type(value) in (bool, int, str)):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(each, owner) for each in value]
    if type(value) is tuple:
        return {"tuple": [encode(each, owner) for each in value]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(each, owner) for each in sorted(value, key=repr)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, owner), encode(v, owner)] for k, v in value.items()]}
    if isinstance(value, np.generic):
        return {"scalar": [value.dtype.str, _text(value.tobytes())]}
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return {"array": [value.dtype.str, list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}
    if isinstance(value, np.ndarray):
        return {"objects": [list(value.shape), [encode(each, owner) for each in value.ravel()]]}
    if isinstance(value, pd.DataFrame):
        columns = [encode(value.iloc[:, i], owner) for i in range(value.shape[1])]
        return {"frame": [encode(value.columns, owner), encode(value.index, owner), columns]}
    if isinstance(value, pd.RangeIndex) and value.name is None:
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, pd.MultiIndex):
        return {"levels": [encode(list(value.names), owner), encode(list(value), owner)]}
    if isinstance(value, pd.Index | pd.Series):
        index = None if isinstance(value, pd.Index) else encode(value.index, owner)
        return {"series": [encode(value.name, owner), str(value.dtype), index, _column(value, owner)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # vars() instead of fields(), to include computed cached properties
        fields = {name: encode(each, owner) for name, each in vars(value).items()}
        return {"class": [type(value).__module__, type(value).__qualname__, fields]}
    if hasattr(value, "model_dump_json") and hasattr(type(value), "model_validate_json"):  # a study's Params
        return {"params": [type(value).__module__, type(value).__qualname__, value.model_dump_json()]}
    return {"not kept": type(value).__name__}


def _column(values: pd.Series[Any] | pd.Index[Any], owner: object) -> Any:
    kind = values.dtype
    if isinstance(kind, np.dtype) and kind.kind != "O":
        return encode(values.to_numpy(), owner)
    return [encode(None if each is pd.NA else each, owner) for each in values.astype(object)]


def _decode(value: Any, owner: object) -> Any:
    if isinstance(value, list):
        return [_decode(each, owner) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "owner":
            return owner
        case "float":
            return float(content)
        case "tuple":
            return tuple(_decode(each, owner) for each in content)
        case "set":
            return {_decode(each, owner) for each in content}
        case "dict":
            return {_decode(k, owner): _decode(v, owner) for k, v in content}
        case "scalar":
            return np.frombuffer(base64.b64decode(content[1]), content[0])[0]
        case "array":
            return np.frombuffer(base64.b64decode(content[2]), content[0]).reshape(content[1]).copy()
        case "objects":
            array = np.empty(len(content[1]), object)
            array[:] = [_decode(each, owner) for each in content[1]]
            return array.reshape(content[0])
        case "range":
            return pd.RangeIndex(*content)
        case "levels":
            return pd.MultiIndex.from_tuples(_decode(content[1], owner), names=_decode(content[0], owner))
        case "series":
            name, dtype, index, values = content
            data = pd.Series(_decode(values, owner), dtype=dtype, name=_decode(name, owner))
            return pd.Index(data, name=data.name) if index is None else data.set_axis(_decode(index, owner))
        case "frame":
            names, index, columns = content
            frame = (
                pd.concat([_decode(each, owner) for each in columns], axis=1) if columns else pd.DataFrame()
            )
            frame.index, frame.columns = _decode(index, owner), _decode(names, owner)
            return frame
        case "class":
            module, name, fields = content
            made = object.__new__(_class(module, name))
            for field, each in fields.items():
                object.__setattr__(made, field, _decode(each, owner))
            return made
        case "params":
            return _class(content[0], content[1]).model_validate_json(content[2])
        case "not kept":
            return NotKept(content)
    raise ValueError(f"unknown kind of value {kind!r}")


def _class(module: str, name: str) -> Any:
    if module.partition(".")[0] == _PACKAGE:
        importlib.import_module(module)
    cls = getattr(sys.modules[module], name)  # other packages: only modules that the notebook imported itself
    if not (dataclasses.is_dataclass(cls) or hasattr(cls, "model_validate_json")):
        raise ValueError(f"{module}.{name} is not a dataclass")
    return cls


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
