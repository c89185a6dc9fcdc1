"""Process identity: ids of other hosts and containers, reused ids, suspended and dead processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_folders import HERE, write_attempt

from distill_bench.store.claims import STALE_SECONDS, attempts, try_claim
from distill_bench.store.files import read_json
from distill_bench.store.processes import is_running, process_identity

OLD = 2 * STALE_SECONDS  # seconds since the last heartbeat
NEW_PID_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
CLAIM = """
import sys, time
from pathlib import Path
from distill_bench.store.claims import try_claim
claim = try_claim(Path(sys.argv[1]), {})
print(claim is not None, flush=True)
time.sleep(60)
"""


def can_unshare() -> bool:
    try:
        return subprocess.run([*NEW_PID_NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def is_claimable(folder: Path) -> bool:
    claim = try_claim(folder, {})
    if claim is not None:
        claim.close("done")
    return claim is not None


@pytest.fixture
def sleeper():
    """The identity of another process, and the process."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        yield HERE | {"pid": process.pid, "began": int(stat[19])}, process
        process.kill()


@pytest.mark.parametrize(
    ("changes", "age", "claimable"),
    [
        ({}, OLD, False),  # suspended: its heartbeat stops, but it goes on later
        ({"began": HERE["began"] + 1}, 0.0, True),  # the process id was given to this process
        ({"pid": 2**22 + 1}, 0.0, True),
        # another container of the same hostname, in which the id belongs to a live process
        ({"pid": 2**22 + 1, "pid_space": "another container"}, 0.0, False),
        ({"pid_space": "another container"}, OLD, True),
        ({"pid": 2**22 + 1, "pid_space": None}, 0.0, False),  # no /proc
        ({"host": "renamed"}, OLD, False),
    ],
)
def test_an_attempt_is_dead_if_its_process_is_or_if_an_unseen_one_is_silent(
    changes, age, claimable, tmp_path
):
    write_attempt(tmp_path, 1, HERE | changes, heartbeat_age=age)
    assert is_claimable(tmp_path) == claimable


def test_a_process_runs_until_it_has_ended_whether_or_not_its_parent_reaps_it(sleeper):
    identity, process = sleeper
    assert is_running(process_identity())
    assert is_running(identity)
    process.send_signal(signal.SIGSTOP)
    assert is_running(identity)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert is_running(identity) is False
    process.wait()
    assert is_running(identity) is False


def test_a_clock_that_runs_ahead_of_the_file_server_s_does_not_end_a_live_attempt(
    tmp_path, monkeypatch
):
    write_attempt(tmp_path, 1, HERE | {"pid_space": "another boot"})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + OLD)
    assert not is_claimable(tmp_path)


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a PID namespace")
def test_a_container_that_shares_the_hostname_does_not_take_over_a_live_run(tmp_path):
    command = [*NEW_PID_NAMESPACE, sys.executable, "-c", CLAIM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "True\n"
        start = read_json(attempts(tmp_path)[-1] / "start.json")
        assert start["host"] == HERE["host"]
        assert start["pid"] == 1 or not is_running(HERE | {"pid": start["pid"]})
        assert not is_claimable(tmp_path), "seen from the host"
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout.readline() == "False\n", "seen from another container"
            second.kill()
        first.kill()
