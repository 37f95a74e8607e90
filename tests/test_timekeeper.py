from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from portico import (
    BaseRequestHandler,
    ForkingUnixStreamServer,
    GreenUnixStreamServer,
    ThreadingUnixStreamServer,
    ThreadPoolUnixStreamServer,
)
from portico.connection import Connection, Connections
from portico.deadlines import Memory, Rules
from portico.events import Deadline, DeadlineExpired
from portico.proxy import parse
from portico.timekeeper import RETRY, Timekeeper
from tests.support import (
    PATIENCE,
    Call,
    RunningServer,
    connect,
    eventually,
    nothing_left_behind,
    recorded,
)

SHORT = Rules(request_timeout=0.02)
LONG = Rules(request_timeout=3600.0)


class Server:
    """What a timekeeper asks of a server."""

    activity: int | None = None

    def _waits_to_read(self, connection: Connection) -> bool | None:
        del connection
        return None

    def _activity(self, connection: Connection) -> int | None:
        del connection
        return self.activity


class Scene:
    """A timekeeper, and connections for it to look at."""

    def __init__(self) -> None:
        self.server = Server()
        self.connections = Connections(lambda _: None)
        self.peers: list[socket.socket] = []
        self.ours: list[socket.socket] = []

    def keep(self, rules: Rules) -> Timekeeper:
        return Timekeeper(self.server, self.connections, rules)

    def add(self) -> Connection:
        ours, theirs = socket.socketpair()
        theirs.settimeout(PATIENCE)
        self.ours.append(ours)
        self.peers.append(theirs)
        return self.connections.add(ours, "peer")

    def close(self) -> None:
        for ours in self.ours:
            self.connections.remove(ours)
        for end in (*self.ours, *self.peers):
            end.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with nothing_left_behind():
        scene = Scene()
        yield scene
        scene.close()


def is_watching(keeper: Timekeeper) -> bool:
    return keeper._thread is not None


def test_a_connection_whose_time_is_over_is_ended_and_told(scene: Scene) -> None:
    keeper = scene.keep(SHORT)
    assert keeper.is_asleep
    assert not is_watching(keeper)  # nobody is there: no thread
    connection = scene.add()
    with recorded(DeadlineExpired) as expired:
        keeper.wake()
        assert scene.peers[0].recv(1) == b""
        eventually(lambda: expired)
    (event,) = expired
    assert (event.server, event.peer, event.deadline) == (scene.server, "peer", Deadline.REQUEST)
    assert event.duration >= 0.02
    assert connection.deadline is Deadline.REQUEST
    assert connection.was_cut
    keeper.stop()


def test_whose_time_is_over_is_told_as_its_proxy_has(scene: Scene) -> None:
    keeper = scene.keep(SHORT)
    connection = scene.add()
    connection.proxy_header = parse(b"PROXY TCP4 192.0.2.1 192.0.2.9 4000 80\r\n")
    with recorded(DeadlineExpired) as expired:
        keeper.wake()
        eventually(lambda: expired)
    assert [event.peer for event in expired] == [("192.0.2.1", 4000)]
    keeper.stop()


def test_a_limit_may_be_longer_than_a_thread_can_wait(scene: Scene) -> None:
    keeper = scene.keep(Rules(request_timeout=1e11))
    connection = scene.add()
    keeper.wake()
    eventually(lambda: connection.memory is not None, "it was looked at")
    scene.connections.remove(scene.ours[0])
    keeper.close()
    eventually(lambda: not is_watching(keeper))
    assert not connection.was_cut


def test_a_timekeeper_sleeps_while_no_connection_is_open_and_can_be_woken(scene: Scene) -> None:
    keeper = scene.keep(SHORT)
    for _ in range(2):
        scene.add()
        keeper.wake()
        assert not keeper.is_asleep
        assert scene.peers[-1].recv(1) == b""
        scene.connections.remove(scene.ours[-1])
        eventually(lambda: keeper.is_asleep)
        assert is_watching(keeper)
    keeper.stop()


def test_a_closed_timekeeper_goes_on_until_the_last_connection_has_ended(scene: Scene) -> None:
    """A server that is closed still has the handlers that are under way."""
    keeper = scene.keep(SHORT)
    scene.add()
    keeper.wake()
    keeper.close()
    assert scene.peers[0].recv(1) == b""
    assert is_watching(keeper)
    scene.connections.remove(scene.ours[0])
    eventually(lambda: not is_watching(keeper))
    assert keeper.is_asleep


def test_who_comes_after_the_close_is_looked_at_all_the_same(scene: Scene) -> None:
    """From the backlog in a drain, or because a program has given its server another listener."""
    keeper = scene.keep(SHORT)
    keeper.close()
    scene.add()
    keeper.wake()
    assert scene.peers[0].recv(1) == b""
    scene.connections.remove(scene.ours[0])
    eventually(lambda: not is_watching(keeper))


def test_a_timekeeper_that_is_stopped_leaves_at_once_and_does_not_come_back(scene: Scene) -> None:
    """Another one has taken its place, with other limits."""
    keeper = scene.keep(LONG)
    connection = scene.add()
    keeper.wake()
    eventually(lambda: connection.memory is not None)
    keeper.stop()
    eventually(lambda: not is_watching(keeper))
    keeper.wake()
    assert not is_watching(keeper)


def test_without_a_thread_to_be_had_the_next_connection_tries_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = scene.keep(SHORT)
    scene.add()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        keeper.wake()
    assert keeper.is_asleep
    keeper.wake()
    assert scene.peers[0].recv(1) == b""
    keeper.stop()


def test_one_that_is_not_due_is_not_looked_at(scene: Scene) -> None:
    keeper = scene.keep(SHORT)
    early, late = scene.add(), scene.add()
    late.next_look = early.accepted + 1000
    assert keeper.look_at_all(early.accepted + 1) == late.next_look
    assert early.was_cut
    assert not late.was_cut
    assert late.memory is None


def test_the_first_look_at_one_that_has_just_come_is_later(scene: Scene) -> None:
    keeper = scene.keep(LONG)
    connection = scene.add()
    assert keeper.look_at_all(connection.accepted) == connection.accepted + 3600
    assert isinstance(connection.memory, Memory)
    assert connection.memory.before is None


def test_one_whose_socket_is_changing_hands_is_ended_a_moment_later(scene: Scene) -> None:
    """Its deadline is not lost because nobody had its socket just then."""
    keeper = scene.keep(SHORT)
    connection = scene.add()
    now = connection.accepted + 1
    ours = socket.socket(fileno=scene.ours[0].detach())
    with recorded(DeadlineExpired) as expired, ours:
        assert keeper.look_at_all(now) == now + RETRY
        assert not expired
        scene.connections.exchange(scene.ours[0], ours)
        keeper.look_at_all(now + RETRY)
        assert len(expired) == 1
        assert scene.peers[0].recv(1) == b""
        scene.connections.remove(ours)


@pytest.mark.parametrize(("activity", "is_ended"), [((5, 5), True), ((5, 6), False)])
def test_what_the_engine_knows_stands_for_bytes_that_the_kernel_does_not_count(
    scene: Scene, activity: tuple[int, int], is_ended: bool
) -> None:
    keeper = scene.keep(Rules(idle_timeout=10.0))
    connection = scene.add()
    for look in range(1, 11):
        scene.server.activity = activity[look > 4]
        keeper.look_at_all(connection.accepted + 1.25 * look)
    assert connection.was_cut is is_ended
    assert connection.deadline is (Deadline.IDLE if is_ended else None)


def test_where_nobody_knows_nobody_is_idle(scene: Scene) -> None:
    keeper = scene.keep(Rules(idle_timeout=1.0))
    connection = scene.add()
    for seconds in range(1, 100):
        keeper.look_at_all(connection.accepted + seconds)
    assert not connection.was_cut


def test_many_threads_that_wake_it_start_one(scene: Scene) -> None:
    keeper = scene.keep(LONG)
    scene.add()
    before = set(threading.enumerate())
    calls = [Call(keeper.wake) for _ in range(50)]
    for call in calls:
        call.result()
    started = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name == "Server timekeeper"
    ]
    assert len(started) == 1
    keeper.stop()


# --- Unix sockets -----------------------------------------------------------------------


class Echo(BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(100):
            self.request.sendall(data)


class Pushing(BaseRequestHandler):
    """Sends without being asked, to a client that reads: more than the kernel holds."""

    def handle(self) -> None:
        while True:
            self.request.sendall(bytes(65536))


ENGINES = [
    ThreadingUnixStreamServer,
    ThreadPoolUnixStreamServer,
    GreenUnixStreamServer,
    ForkingUnixStreamServer,
]


@pytest.fixture(params=ENGINES, ids=lambda kind: kind.__name__)
def unix_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    kind = type("Server", (request.param,), {"idle_timeout": 0.8})
    with RunningServer(kind(str(tmp_path / "socket"), Echo)) as running:
        yield running.server


def test_an_idle_client_of_a_unix_socket_is_closed_by_its_deadline(unix_server: Any) -> None:
    with recorded(DeadlineExpired) as expired, connect(unix_server) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        assert client.recv(100) == b""
        if hasattr(unix_server, "active_children"):  # it is the child that tells
            return
        eventually(lambda: expired)
        assert [event.deadline for event in expired] == [Deadline.IDLE]


def is_closed_although_it_talks(server: Any, says: bytes, pause: float) -> bool:
    """Say whether a client is closed that goes on for longer than an idle one may.

    A client that is held up for most of that time begins anew: it may have been idle.
    """
    for _ in range(20):
        longest, is_closed = 0.0, False
        with connect(server) as client:
            began = before = monotonic()
            while before < began + 1.75 * server.idle_timeout and not is_closed:
                try:
                    client.sendall(says)
                    is_closed = not client.recv(100)
                except ConnectionError:
                    is_closed = True
                time.sleep(pause)
                now = monotonic()
                longest, before = max(longest, now - before), now
        if not is_closed:
            return False
        if longest < server.idle_timeout / 2:
            return True
    raise AssertionError("this machine holds up every client")


def test_a_client_of_a_unix_socket_that_talks_is_not(unix_server: Any) -> None:
    assert not is_closed_although_it_talks(unix_server, b"hello", 0.12)


@pytest.mark.parametrize("handler", [Echo, Pushing])
def test_a_client_of_a_unix_socket_that_never_rests_is_not(
    unix_server: Any, handler: type[BaseRequestHandler]
) -> None:
    """The handler hardly ever waits for it, or only for room."""
    unix_server.RequestHandlerClass = handler
    says = bytes(100) if handler is Echo else b""
    assert not is_closed_although_it_talks(unix_server, says, 0)


def test_a_client_of_a_unix_socket_that_reads_nothing_is_closed(unix_server: Any) -> None:
    unix_server.RequestHandlerClass = Pushing
    with connect(unix_server) as client:
        eventually(lambda: is_hung_up(client))


def is_hung_up(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(0))
