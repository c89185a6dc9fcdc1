"""Stop requests: signals, all-or-nothing stages, a driver that has ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from distill_bench.store.stop import DRIVER, Stopped, StopRequest


@pytest.fixture
def stop():
    """A listening request; the previous handlers are restored afterwards."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield StopRequest().listen()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_sets_the_flag_and_sigusr2_wins_over_sigterm(stop):
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()
    assert stop.signal == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGUSR2


def test_a_request_ends_an_all_or_nothing_stage_and_a_second_ctrl_c_ends_the_process(stop):
    with pytest.raises(Stopped), stop.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with pytest.raises(Stopped), stop.at_once():
        pytest.fail("a stage begins after a stop request")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize("linux", [True, False])
def test_a_worker_whose_driver_has_ended_stops(linux, monkeypatch):
    if not linux:
        monkeypatch.delattr(os, "pidfd_open")
    driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(DRIVER, str(driver.pid))
    stop = StopRequest()
    assert not stop()
    driver.communicate(b"\n")
    assert stop()
    assert StopRequest()(), "it had ended before the worker started"
