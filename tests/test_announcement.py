"""What systemd is told of a service; a Unix datagram socket of the test's stands in for systemd."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import portico
from portico import address
from portico.announcement import Announcement, failure_told
from portico.errors import ListenerError
from portico.service import STOP_PATIENCE, Assignment, Service
from portico.settings import Settings
from portico.systemd import Notifier
from tests.support import PATIENCE, Call

LOOPBACK = "tcp://127.0.0.1:0"


class Systemd:
    """Hears what is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(str(path))

    def told(self) -> str:
        return self.socket.recv(4096).decode()

    def told_until(self, begin: str) -> list[str]:
        """All messages up to the first that begins so."""
        seen = [self.told()]
        while not seen[-1].startswith(begin):
            seen.append(self.told())
        return seen

    def has_nothing_left(self) -> bool:
        self.socket.setblocking(False)
        try:
            return not self.told()
        except BlockingIOError:
            return True


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(tmp_path / "notify")
    yield made
    made.socket.close()


class Echo(portico.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


@contextmanager
def announced(
    notifier: Notifier,
    *texts: str,
    handler: type[portico.BaseRequestHandler] = Echo,
    **more: object,
) -> Iterator[Service]:
    """A service that runs in a thread, and is stopped at the end of the block."""
    settings = Settings.read(more)
    assignments = [Assignment(handler, address.parse(text), settings) for text in texts]
    with Service(assignments) as service, Announcement(notifier, service):
        running = Call(service.run)
        try:
            yield service
        finally:
            service.stop()
            running.result()


@pytest.mark.parametrize(
    "texts", [[LOOPBACK], [LOOPBACK, LOOPBACK, f"unix:@portico announced {os.getpid()}"]]
)
@pytest.mark.parametrize("engine", ["threads", "green"])
def test_ready_and_stopping_are_told_once_with_the_addresses(
    manager: Systemd, texts: list[str], engine: str
) -> None:
    with announced(Notifier(str(manager.path)), *texts, engine=engine) as service:
        where = ", ".join(map(str, service.addresses))
        assert manager.told() == f"READY=1\nSTATUS=ready on {where}"
    within = round((15 + STOP_PATIENCE) * 1_000_000)
    assert manager.told() == f"STOPPING=1\nEXTEND_TIMEOUT_USEC={within}\nSTATUS=draining"
    assert manager.has_nothing_left()


def test_a_drain_without_a_limit_asks_for_no_time(manager: Systemd) -> None:
    with announced(Notifier(str(manager.path)), LOOPBACK, drain_timeout=None):
        manager.told()
    assert manager.told() == "STOPPING=1\nSTATUS=draining"


def test_the_servers_of_a_handler_are_not_announced(manager: Systemd) -> None:
    with announced(Notifier(str(manager.path)), LOOPBACK):
        manager.told()
        with portico.TCPServer(("127.0.0.1", 0), Echo) as own:
            running = Call(own.serve_forever)
            own.shutdown()
            running.result()
            own.drain()
        assert manager.has_nothing_left()


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks", "serial"])
def test_a_watched_service_tells_that_every_loop_goes_round(manager: Systemd, engine: str) -> None:
    """Without a client, too."""
    notifier = Notifier(str(manager.path), watchdog=0.02)
    with announced(notifier, LOOPBACK, LOOPBACK, engine=engine):
        manager.told_until("READY=1")
        assert [manager.told() for _ in range(5)] == ["WATCHDOG=1"] * 5


def test_a_watched_service_whose_loop_is_held_tells_nothing(manager: Systemd) -> None:
    """Though the other one goes on: systemd restarts what does not serve all of its addresses."""
    entered, leave = threading.Event(), threading.Event()

    class Hold(portico.BaseRequestHandler):
        def handle(self) -> None:
            entered.set()
            assert leave.wait(PATIENCE)

    notifier = Notifier(str(manager.path), watchdog=0.02)
    with ExitStack() as leaving:
        leaving.callback(leave.set)
        service = leaving.enter_context(
            announced(notifier, LOOPBACK, LOOPBACK, engine="serial", handler=Hold)
        )
        leaving.callback(leave.set)  # before the service stops
        where = service.addresses[0]
        assert isinstance(where, address.InternetAddress)
        with socket.create_connection((where.host, where.port)):
            assert entered.wait(PATIENCE)
            manager.socket.settimeout(0.5)  # many times the interval
            with pytest.raises(TimeoutError):  # what was told before comes first
                while True:
                    manager.told()
            leave.set()
            manager.socket.settimeout(PATIENCE)
            assert manager.told_until("WATCHDOG=1")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ListenerError("cannot listen on tcp://:80: in use"), "cannot listen on tcp://:80: in use"),
        (ValueError("what a peer has sent"), "ValueError"),
    ],
)
def test_why_a_service_failed_is_told(manager: Systemd, error: Exception, expected: str) -> None:
    """Of portico's errors the words, of others the kind: these may say anything."""
    with pytest.raises(type(error)), failure_told(Notifier(str(manager.path))):
        raise error
    assert manager.told() == f"STATUS=failed: {expected}"


def test_without_systemd_nobody_listens_to_events() -> None:
    with Service([Assignment(Echo, address.parse(LOOPBACK), Settings())]) as service:
        before = portico.events.ServerStarted.subscribers
        with Announcement(Notifier(), service):
            assert portico.events.ServerStarted.subscribers == before
            assert service.servers[0]._on_round is None
