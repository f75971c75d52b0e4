"""Steps of a longer job: time limits, failures that show the log, nothing left running."""

import os
import socket
import sys
import time

import pytest

from evals.processes import StepFailed, free_port, process, run_step

CHILD = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; "
CHILD += "time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_that_works(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import os; print(os.environ['SETTING'])"]
    run_step("one", command, log, limit=60, settings={"SETTING": "as given"})
    assert log.read_text() == "as given\n"
    assert "SETTING" not in os.environ


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    code = "import sys; [print('line', i) for i in range(99)]; sys.exit(3)"
    with pytest.raises(StepFailed) as raised:
        run_step("two", [sys.executable, "-c", code], tmp_path / "log", limit=60)
    message = str(raised.value)
    assert "step two failed with exit code 3" in message
    assert "line 98" in message and "line 1\n" not in message
    assert str(tmp_path / "log") in message


@pytest.mark.slow  # waits
def test_the_time_limit_ends_the_whole_group(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StepFailed, match="step three was not done after 2 s"):
        run_step("three", [sys.executable, "-c", CHILD], log, limit=2)
    assert gone(int(log.read_text()))


def test_the_group_ends_with_the_block(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), process([sys.executable, "-c", CHILD], log) as leader:
        while not log.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert gone(leader.pid)
    assert gone(int(log.read_text()))


def test_a_free_port_can_be_taken():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
