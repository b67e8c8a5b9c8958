import gzip
import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import pytest
from torch import nn

from overparam.record import steps
from overparam.record.stats import Estimate

OWNER = object()


@dataclass
class Outcome:
    table: pd.DataFrame
    kept: dict[tuple[str, int], Estimate]
    model: object = None
    owner: object = None
    names: list[str] = field(default_factory=list)

    @cached_property
    def size(self) -> int:
        return len(self.table)


def again(value):
    return steps.load(steps.dump({"step": steps.encode(value, OWNER)}), OWNER)["step"]


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -0.1, float("inf"), "é", [1, [2.5]], (1, ("a",)), {"a": 1, ("b", 2): [None]}, {3, 1},
        {0.1 + 0.2: "not rounded"}, Estimate(1.0, 0.5, float("inf"), 3),
    ],
)  # fmt: skip
def test_plain_values_come_back_equal(value):
    found = again(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "<U3", "float16"])
def test_arrays_come_back_to_the_last_bit(dtype):
    array = (np.random.default_rng(0).normal(size=(3, 4)) * 3).astype(dtype)
    found = again(array)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    found[0] = found[1]  # and can be written to


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [0.1, np.nan], "b": ["x", None], "c": [True, False], "d": [1, 2]}),
        pd.DataFrame({"a": [0.1, 0.2]}, index=pd.Index(["p", "q"], name="part")),
        pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["x", "y"])),
        pd.DataFrame({"a": pd.Categorical(["x", "y", "x"]), "b": pd.array([1, None, 3], dtype="Int64")}),
        pd.DataFrame({"a": [[1, 2], [3]]}),
        pd.DataFrame({"a": []}),
        pd.DataFrame(),
    ],
)
def test_tables_come_back_equal(frame):
    pd.testing.assert_frame_equal(again(frame), frame)


def test_dataclasses_keep_what_was_worked_out_and_name_what_is_not_kept():
    made = Outcome(pd.DataFrame({"a": [1]}), {("x", 1): Estimate(1, 0, 2, 5)}, nn.Linear(1, 1), OWNER)
    assert made.size == 1
    found = again(made)
    assert found.kept == made.kept
    assert found.owner is OWNER
    assert vars(found)["size"] == 1
    with pytest.raises(ValueError, match="'weight' of a Linear is not available when redrawing"):
        _ = found.model.weight


def test_the_same_values_give_the_same_bytes():
    frame = pd.DataFrame({"a": [0.1, 0.2]})
    assert steps.dump({"s": steps.encode(frame, OWNER)}) == steps.dump({"s": steps.encode(frame, OWNER)})


@pytest.mark.parametrize(
    "data",
    [
        b"no archive",
        gzip.compress(b"no json"),
        gzip.compress(json.dumps({"dict": [["s", {"class": ["os", "path", {}]}]]}).encode()),
        gzip.compress(
            json.dumps({"dict": [["s", {"class": ["overparam.record.stats", "Gone", {}]}]]}).encode()
        ),
    ],
    ids=["no archive", "no json", "no dataclass", "a class that is gone"],
)
def test_what_cannot_be_read_is_a_clear_error(data):
    with pytest.raises(ValueError, match="cannot be read"):
        steps.load(data, OWNER)
