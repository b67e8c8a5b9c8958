import math
import re
import socket
import time

import psutil
import pytest

from overparam.measure.energy import energy


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield
    assert not attempts


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.3])
def test_short_blocks_are_counted(seconds, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with energy() as used:
        assert math.isnan(used.kwh)
        burn(seconds)
    assert used.kwh > 0
    assert used.kwh == pytest.approx(used.cpu_kwh + used.memory_kwh + used.gpu_kwh)
    assert seconds <= used.seconds < seconds + 1
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_method_says_what_was_measured_and_what_estimated():
    with energy() as used:
        burn(0.1)
    cpu, *others = used.method.split("; ")
    assert cpu.startswith(("CPU measured with", "CPU estimated from", "CPU estimated as"))
    assert "memory estimated from its size" in others


def test_estimate_is_cpu_time_by_rated_power():
    with energy() as used:
        start = time.process_time()
        burn(0.5)
        spent = time.process_time() - start
    if "estimated from CPU time" not in used.method:
        pytest.skip("this machine's energy is measured")
    watts = float(re.search(r"TDP \((\d+) W", used.method)[1])
    expected = spent / psutil.cpu_count() * watts / 3.6e6  # kWh
    assert used.cpu_kwh == pytest.approx(expected, rel=0.35)


def test_blocks_can_be_nested():
    with energy() as outer:
        burn(0.2)
        with energy() as inner:
            burn(0.2)
    assert outer.seconds > inner.seconds
    assert outer.kwh > inner.kwh > 0


def test_a_failing_block_is_counted_and_its_error_kept():
    def fail():
        burn(0.1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), energy() as used:
        fail()
    assert used.kwh > 0
    assert used.seconds > 0
    with energy() as again:
        burn(0.1)
    assert again.kwh > 0


def test_settings_of_the_user_cannot_turn_the_network_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "localhost:9")
    monkeypatch.setenv("CODECARBON_SAVE_TO_API", "true")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    with energy() as used:
        burn(0.1)
    assert used.kwh > 0


@pytest.mark.parametrize("place", ["home", "here"])
def test_settings_of_the_user_change_nothing_that_is_counted(place, tmp_path, monkeypatch):
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nforce_cpu_power=100000\noutput_dir=/nowhere\nsave_to_file=true\npue=50\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path if place == "home" else tmp_path / "other"))
    monkeypatch.chdir(tmp_path if place == "here" else tmp_path.parent)
    with energy() as used:
        burn(0.1)
    assert used.kwh > 0
    assert "100000" not in used.method
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
