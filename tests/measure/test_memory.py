import sys
from pathlib import Path

import numpy as np
import pytest

from overparam.measure.memory import peak_memories, peak_memory, resident_memories

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the high-water mark")


@pytest.fixture(autouse=True)
def _steps_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


@linux
@pytest.mark.parametrize("step", ["prepared", "generated"])
def test_peak_is_of_the_step_without_the_loading(step):
    memory = peak_memory(f"steps:{step}", {"loaded": 40, "megabytes": 60})
    assert memory.method == "VmHWM of the step"
    assert memory.step_bytes == pytest.approx(60 * MB, abs=4 * MB)
    assert memory.baseline_bytes > 40 * MB
    assert memory.peak_bytes == memory.baseline_bytes + memory.step_bytes


@linux
def test_memory_of_the_parent_does_not_count():
    held = np.ones(300 * MB, dtype=np.uint8)
    memory = peak_memory("steps:plain", {"megabytes": 50})
    assert memory.step_bytes == pytest.approx(50 * MB, abs=4 * MB)
    assert memory.peak_bytes < 250 * MB
    assert held.all()


def test_printing_does_not_disturb_the_answer(capfd):
    assert peak_memory("steps:noisy").peak_bytes > 0
    assert capfd.readouterr().out == ""


def test_an_error_of_the_step_arrives_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)steps:failing failed.*in failing.*KeyError: 'because'"):
        peak_memory("steps:failing", {"why": "because"})
    with pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
        peak_memory("steps:nothing")


def test_a_killed_process_is_reported():
    with pytest.raises(RuntimeError, match=r"killed, probably for lack of memory \(exit code -9\)"):
        peak_memory("steps:killed")


@linux
def test_several_steps_share_the_loading_of_libraries_but_not_memory():
    asked = []

    def jobs():
        for megabytes in (90, 30):
            asked.append(megabytes)
            yield {"megabytes": megabytes}

    found = []
    for memory in peak_memories("steps:plain", jobs()):
        found.append(memory.step_bytes)
        assert len(asked) == len(found)  # the next job is asked for when this one is answered
    assert found == pytest.approx([90 * MB, 30 * MB], abs=4 * MB)


@linux
def test_resident_is_what_the_result_needs():
    jobs = [{"megabytes": 20}, {"megabytes": 60}]
    found = list(resident_memories("steps:held", jobs))
    assert found == pytest.approx([20 * MB, 60 * MB], abs=MB)


def test_an_endless_step_is_ended():
    with pytest.raises(TimeoutError, match="steps:endless took longer than 2 s"):
        peak_memory("steps:endless", timeout=2)


@pytest.mark.parametrize(
    ("target", "kwargs", "message"),
    [
        ("steps.plain", {}, "target must look like 'package.module:function', got 'steps.plain'"),
        ("steps:", {}, "target must look like"),
        ("steps:plain", {"megabytes": np.int64(3)}, "kwargs must be valid JSON"),
    ],
)
def test_wrong_requests_are_refused(target, kwargs, message):
    with pytest.raises(ValueError, match=message):
        peak_memory(target, kwargs)
