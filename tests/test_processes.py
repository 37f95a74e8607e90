"""What is told of another process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from portico import processes
from portico.processes import birth, command, is_alive, start_time


def test_this_process_lives_and_has_a_name_and_a_beginning() -> None:
    assert is_alive(os.getpid())
    began = start_time(os.getpid())
    assert began is not None
    assert began <= time.time()
    assert command(os.getpid()) == Path("/proc/self/comm").read_text().strip()


def test_a_process_that_was_collected_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        other.wait()
    assert not is_alive(other.pid)
    assert start_time(other.pid) is None
    assert command(other.pid) == "unknown"


def test_a_process_that_has_ended_is_not_alive_though_nobody_has_collected_it() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(other.pid)


def test_a_process_that_began_at_another_time_is_another_one() -> None:
    began = birth(os.getpid())
    assert is_alive(os.getpid(), began)
    assert not is_alive(os.getpid(), began - 1)


@pytest.mark.parametrize("number", [0, -1, 10**10])
def test_a_number_that_no_process_has_is_not_alive(number: int) -> None:
    """The first two would be groups of processes to the system, and the last is none to Python."""
    assert not is_alive(number)


def test_a_process_of_somebody_else_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", deny)
    assert is_alive(1)


def test_what_the_system_does_not_show_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "Path", lambda _: Path("/no/such"))
    assert start_time(os.getpid()) is None
    assert command(os.getpid()) == "unknown"
