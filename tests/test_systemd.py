from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from portico import systemd
from portico.systemd import Notifier, PassedSocket, take_sockets
from tests.support import PATIENCE

Environment = dict[str, str]


BEYOND: Final = 500
"""Descriptors from here on are nobody's: two of them can be had side by side."""


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """The two descriptors that are passed; inheritable, as they arrive from systemd."""
    with socket.socket() as made:
        numbers = [fcntl.fcntl(made, fcntl.F_DUPFD, BEYOND)]
        numbers.append(fcntl.fcntl(made, fcntl.F_DUPFD, numbers[0] + 1))
    yield numbers
    for number in numbers:
        os.close(number)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch, descriptors: list[int]) -> int:
    """Have passed descriptors begin where the two are."""
    assert descriptors[1] == descriptors[0] + 1
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", descriptors[0])
    return descriptors[0]


def passing(count: object, **more: str) -> Environment:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), **more}


# --- passed sockets -----------------------------------------------------------------------------


def test_passed_sockets_have_the_names_of_their_units(first: int) -> None:
    environment = passing(2, LISTEN_FDNAMES="web:admin", HOME="/")
    assert take_sockets(environment) == (
        PassedSocket(first, "web"),
        PassedSocket(first + 1, "admin"),
    )


@pytest.mark.parametrize("names", [{}, {"LISTEN_FDNAMES": ""}, {"LISTEN_FDNAMES": ":"}])
def test_a_passed_socket_without_a_name_is_called_unknown(first: int, names: Environment) -> None:
    """As sd_listen_fds_with_names(3) does, for systemd before 227 and other launchers."""
    assert [each.name for each in take_sockets(passing(2, **names))] == ["unknown", "unknown"]


def test_no_child_inherits_what_was_passed(first: int) -> None:
    """Neither the variables, nor the descriptors where it runs another program."""
    environment = passing(2, LISTEN_FDNAMES="a:b", LISTEN_PIDFDID="7", HOME="/")
    take_sockets(environment)
    assert environment == {"HOME": "/"}
    assert not os.get_inheritable(first)
    assert not os.get_inheritable(first + 1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_PID": "1"},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDS": "-1"},
        {"LISTEN_FDS": "two"},
        {"LISTEN_FDS": "9" * 30},
    ],
)
def test_where_nothing_is_passed_there_is_nothing(environment: Environment) -> None:
    assert take_sockets({"LISTEN_PID": str(os.getpid()), **environment}) == ()


@pytest.mark.parametrize("pid", ["1", "", None])
def test_what_is_passed_to_another_process_is_not_taken(
    caplog: pytest.LogCaptureFixture, pid: str | None
) -> None:
    """Which happens when a shell stands in between; the log says so."""
    environment = {"LISTEN_FDS": "1"} if pid is None else {"LISTEN_FDS": "1", "LISTEN_PID": pid}
    assert take_sockets(environment) == ()
    assert environment == {}
    assert "end a script that starts it with `exec`" in caplog.text


def test_a_descriptor_that_is_counted_and_not_open_is_left_out(
    first: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = os.dup(first)
    os.close(closed)
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", closed)
    assert take_sockets(passing(1)) == ()
    assert f"descriptor {closed}, which LISTEN_FDS counts, is not open" in caplog.text


def test_the_environment_is_read_once(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd.passed_sockets.cache_clear()
    try:
        for name, value in passing(1, LISTEN_FDNAMES="web").items():
            monkeypatch.setenv(name, value)
        taken = systemd.passed_sockets()
        assert taken == (PassedSocket(first, "web"),)
        assert "LISTEN_FDS" not in os.environ
        assert systemd.passed_sockets() is taken
    finally:
        systemd.passed_sockets.cache_clear()


# --- notifications ------------------------------------------------------------------------------


class Systemd:
    """A socket that stands in for systemd's, at a path or an abstract name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        name = address.encode()
        self.socket.bind(b"\0" + name[1:] if address.startswith("@") else name)

    def told(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self.socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = f"{tmp_path}/notify" if request.param == "path" else f"@portico test {os.getpid()}"
    with closing(Systemd(address)) as made:
        yield made


def test_systemd_is_told_how_the_service_is(manager: Systemd) -> None:
    notifier = Notifier(manager.address, watchdog=1.0)
    assert notifier.is_connected
    assert notifier.ready("ready on tcp://:80")
    assert manager.told() == ["READY=1", "STATUS=ready on tcp://:80"]
    assert notifier.status("three workers")
    assert manager.told() == ["STATUS=three workers"]
    assert notifier.keep_alive()
    assert manager.told() == ["WATCHDOG=1"]
    assert notifier.stopping()
    assert manager.told() == ["STOPPING=1"]
    assert notifier.stopping("draining", within=18.5)
    assert manager.told() == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=18500000", "STATUS=draining"]


def test_who_is_not_the_main_process_any_more_tells_nothing(manager: Systemd) -> None:
    """It would be taken for what the other tells."""
    notifier = Notifier(manager.address, watchdog=1.0)
    assert notifier.main_process(812)
    assert manager.told() == ["MAINPID=812"]
    assert not notifier.stopping()
    assert not notifier.keep_alive()
    assert not notifier.is_connected
    assert notifier.watchdog_interval is None
    assert Notifier(manager.address).ready()
    assert manager.told() == ["READY=1"]


def test_who_is_not_watched_gives_no_sign_of_life(manager: Systemd) -> None:
    notifier = Notifier(manager.address)
    assert not notifier.keep_alive()
    assert notifier.status("quiet")
    assert manager.told() == ["STATUS=quiet"]


def test_a_reload_is_told_with_the_time_at_which_it_began(manager: Systemd) -> None:
    """By the clock that systemd reads: ``Type=notify-reload`` waits for a READY after it."""
    before = time.monotonic_ns() // 1000
    assert Notifier(manager.address).reloading("reading settings")
    kind, began, status = manager.told()
    assert (kind, status) == ("RELOADING=1", "STATUS=reading settings")
    assert before <= int(began.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_status_is_one_line(manager: Systemd) -> None:
    """What an error says may not become an assignment of its own."""
    Notifier(manager.address).status("bad\nMAINPID=1\r\nREADY=1")
    assert manager.told() == ["STATUS=bad MAINPID=1 READY=1"]


def test_without_systemd_nothing_is_told_and_nothing_fails() -> None:
    notifier = Notifier.take({})
    assert not notifier.is_connected
    assert not notifier.ready("ready")
    assert notifier.watchdog_interval is None
    assert notifier.variables(1) == {}


def test_where_to_tell_is_taken_from_the_environment_once(
    manager: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier.take()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert notifier.watchdog_interval == 15.0
    assert notifier.keep_alive()
    assert manager.told() == ["WATCHDOG=1"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "4000000"}, 2.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_told_twice_in_its_time_if_it_means_this_process(
    variables: Environment, expected: float | None
) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": "/run/notify", **variables})
    assert notifier.watchdog_interval == expected


def test_who_takes_over_gets_the_variables_with_its_own_number() -> None:
    given = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "500000"}
    handed = Notifier.take(dict(given)).variables(812)
    assert handed == {**given, "WATCHDOG_PID": "812"}
    assert Notifier.take({"NOTIFY_SOCKET": "@x"}).variables(812) == {"NOTIFY_SOCKET": "@x"}


def test_an_address_of_another_kind_is_said_and_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not Notifier.take({"NOTIFY_SOCKET": "vsock:2:1234"}).is_connected
    assert "NOTIFY_SOCKET='vsock:2:1234': expected a path, or @ and a name" in caplog.text


def test_systemd_that_is_gone_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(f"{tmp_path}/notify", watchdog=1.0)
    assert not notifier.keep_alive()
    assert not notifier.keep_alive()
    assert caplog.text.count("systemd cannot be told at") == 1
    with closing(Systemd(f"{tmp_path}/notify")):
        assert notifier.keep_alive()


def test_systemd_that_does_not_read_holds_nobody_for_long(
    manager: Systemd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(systemd, "NOTIFY_PATIENCE", 0.01)
    notifier = Notifier(manager.address)
    for _ in range(100_000):
        if not notifier.status("x" * 1000):
            break
    assert "systemd cannot be told at" in caplog.text
