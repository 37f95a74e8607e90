"""How what the settings ask for goes together: places, time, children."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import portico
from portico import (
    BaseRequestHandler,
    ForkingTCPServer,
    GreenTCPServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    ThreadingUnixStreamServer,
    ThreadPoolTCPServer,
)
from portico.errors import PreambleError, SettingError
from portico.events import (
    CloseReason,
    ConnectionClosed,
    ConnectionRefused,
    DeadlineExpired,
    HandlerFailed,
    PreambleFailed,
    RefusalReason,
)
from portico.guard import Guard, check_timeout
from tests.support import (
    PATIENCE,
    Call,
    Journal,
    RunningServer,
    connect,
    eventually,
    goodbye,
    in_child,
    nothing_left_behind,
    recorded,
)
from tests.tls import Authority

LOOPBACK = ("127.0.0.1", 0)


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class Server(ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(LOOPBACK, Echo) as server:
        yield server


def exchange(client: socket.socket, words: bytes = b"hello\n") -> None:
    client.sendall(words)
    assert client.recv(100) == words


def is_awaited(server: TCPServer) -> bool:
    """Say whether an acceptor waits for a place."""
    gate = server._guard.gate
    return gate is not None and gate.is_awaited


def refused_or_told(running: RunningServer[Any]) -> bytes:
    with running.connect() as client:
        return goodbye(client)


# --- settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("when_full", "drop"),
        ("farewell", "busy"),
        ("drain_timeout", -1),
        ("drain_timeout", float("nan")),
        ("drain_timeout", "5"),
        ("max_connections", 0),
        ("idle_timeout", 0),
        ("idle_timeout", float("inf")),
        ("request_timeout", -1),
        ("minimum_rate", 0),
        ("accept_rate", 0),
        ("allowed_networks", ["nowhere"]),
    ],
)
def test_a_bad_setting_fails_when_the_server_is_made_and_when_it_serves(
    name: str, value: object
) -> None:
    kind: Any = type("Wrong", (TCPServer,), {name: value})
    with pytest.raises(SettingError, match=name):
        kind(LOOPBACK, Echo)
    with TCPServer(LOOPBACK, Echo) as server:
        setattr(server, name, value)
        with pytest.raises(SettingError, match=name):
            server.serve_forever()


@pytest.mark.parametrize("value", [None, 0, 0.5, 3600])
def test_a_timeout_may_be_nothing_or_none(value: float | None) -> None:
    check_timeout("timeout", value)


def test_settings_that_stay_build_nothing_anew(server: Server) -> None:
    server.max_connections, server.idle_timeout = 5, 60.0
    guard = server._guard
    guard.read_settings()
    gate, keeper = guard.gate, guard.keeper
    assert gate is not None
    assert keeper is not None
    guard.read_settings()
    assert (guard.gate, guard.keeper) == (gate, keeper)


def test_without_limits_there_is_neither_gate_nor_timekeeper(server: Server) -> None:
    guard = server._guard
    assert (guard.gate, guard.keeper, guard.await_room()) == (None, None, None)
    guard.close()


def test_a_server_that_was_never_initialised_has_no_limits() -> None:
    guard = Guard(None)
    guard.read_settings()
    assert guard.admit(object(), None) is None
    assert (guard.gate, guard.keeper) == (None, None)


def test_connections_that_are_open_count_by_rules_that_change(server: Server) -> None:
    """A server that serves again has not forgotten whom it serves still."""
    server.when_full = "refuse"
    server.max_connections = 2
    with RunningServer(server) as running, running.connect() as first, running.connect() as second:
        exchange(first)
        exchange(second)
        running.shutdown()
        server.max_connections, server.farewell = 3, b"full"
        with RunningServer(server) as again, again.connect() as third:
            exchange(third)
            assert refused_or_told(again) == b"full"
            first.close()
            gate = server._guard.gate
            assert gate is not None
            eventually(lambda: gate.active == 2)
            with again.connect() as fourth:
                exchange(fourth)
        second.close()


def by_attribute(server: Any, context: ssl.SSLContext) -> None:
    server.ssl_context = context


def by_wrapping(server: Any, context: ssl.SSLContext) -> None:
    server.socket = context.wrap_socket(server.socket, server_side=True)


def by_hand(server: Any, context: ssl.SSLContext) -> None:
    def get_request() -> Any:
        request, client_address = server.socket.accept()
        tls = context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return tls, client_address

    server.get_request = get_request


@pytest.mark.parametrize("idiom", [by_attribute, by_wrapping, by_hand])
def test_there_is_no_farewell_over_tls(
    server: Server, idiom: Callable[[Any, ssl.SSLContext], None], authority: Authority
) -> None:
    """A client would take it for a broken handshake, or for an attack."""
    server.max_connections, server.when_full, server.farewell = 1, "refuse", b"full"
    pair = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    idiom(server, context)
    with (
        recorded(ConnectionRefused, HandlerFailed) as told,
        RunningServer(server) as running,
        running.connect() as first,
    ):
        assert refused_or_told(running) == b""
        eventually(lambda: told)
        assert [type(event) for event in told] == [ConnectionRefused]
        first.close()


def test_a_farewell_waits_for_nothing_where_sockets_have_a_timeout(server: Server) -> None:
    """What the client says is read, but not waited for: it says nothing."""
    server.max_connections, server.when_full, server.farewell = 1, "refuse", b"full"
    with RunningServer(server) as running, running.connect() as first:
        exchange(first)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(2 * PATIENCE)
        try:
            assert refused_or_told(running) == b"full"
        finally:
            socket.setdefaulttimeout(before)


def test_connections_that_came_without_a_limit_are_counted_when_there_is_one(
    server: Server,
) -> None:
    with RunningServer(server) as running, running.connect() as first:
        exchange(first)
        running.shutdown()
        server.max_connections, server.when_full = 1, "refuse"
        with RunningServer(server) as again:
            assert refused_or_told(again) == b""
            first.close()
            gate = server._guard.gate
            assert gate is not None
            eventually(lambda: gate.active == 0)


def test_a_connection_that_closes_while_it_is_counted_anew_keeps_no_place(server: Server) -> None:
    server.max_connections = 5
    guard = server._guard
    guard.read_settings()
    gate = guard.gate
    assert gate is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert guard.admit(ours, "peer") is None
        connection = guard.note_closing(ours)
        assert connection is not None
        guard._take_place(gate, connection)
        assert gate.active == 0
        guard.note_closed(connection)
        assert gate.active == 0


def test_limits_in_time_that_change_hold_for_who_is_open(server: Server) -> None:
    server.request_timeout = 3600.0
    with RunningServer(server) as running, running.connect() as client:
        exchange(client)
        running.shutdown()
        server.request_timeout = 0.05
        with recorded(DeadlineExpired) as expired, RunningServer(server):
            assert client.recv(1) == b""
            eventually(lambda: expired)
        assert len(expired) == 1


def test_a_limit_that_is_taken_away_holds_for_nobody(server: Server) -> None:
    server.request_timeout = 3600.0
    with RunningServer(server) as running, running.connect() as client:
        exchange(client)
        running.shutdown()
        before = server._guard.keeper
        assert before is not None
        server.request_timeout = None
        with RunningServer(server):
            assert server._guard.keeper is None
            eventually(lambda: before._thread is None)
            exchange(client)


def test_a_pause_for_room_ends_with_the_rules_that_it_was_for(server: Server) -> None:
    server.max_connections = 1
    with RunningServer(server) as running, running.connect() as first, running.connect() as second:
        exchange(first)
        gate = server._guard.gate
        assert gate is not None
        second.sendall(b"hello\n")
        eventually(lambda: gate.is_awaited)
        running.shutdown()
        server.max_connections = 2
        with RunningServer(server):
            assert second.recv(100) == b"hello\n"


def test_what_tells_of_room_is_released_with_the_loop(server: Server) -> None:
    """And a loop that comes later waits for its own."""
    server.max_connections = 1
    for _ in range(2):
        with nothing_left_behind():
            loop = Call(server.serve_forever)
            with connect(server) as first, connect(server) as second:
                exchange(first)
                second.sendall(b"hello\n")
                eventually(partial(is_awaited, server))
                first.close()
                assert second.recv(100) == b"hello\n"
            server.shutdown()
            loop.result()


# --- places -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ThreadingTCPServer, ThreadPoolTCPServer, TCPServer])
def test_a_program_that_takes_connections_away_gives_their_places_back(kind: Any) -> None:
    """It overrides `process_request`, serves elsewhere, and closes without a word to the server."""
    taken: list[Any] = []

    class Taking(kind):  # type: ignore[misc]
        max_connections = 1
        when_full = "refuse"

        def process_request(self, request: Any, client_address: Any) -> None:
            del client_address
            taken.append(request)

    with RunningServer(Taking(LOOPBACK, BaseRequestHandler)) as running:
        for _ in range(3):
            with running.connect() as client:
                eventually(lambda: taken)
                request = taken.pop()
                request.sendall(b"elsewhere")
                request.close()
                del request
                assert goodbye(client) == b"elsewhere"
            eventually(lambda: running.server._guard.gate.active == 0)
        eventually(lambda: not len(running.server._guard.connections))


def test_an_override_that_lets_in_whom_the_rules_refuse_is_obeyed_and_leaves_nothing() -> None:
    class Lenient(Server):
        denied_networks = ("127.0.0.0/8",)

        def admit_request(self, request: Any, client_address: Any) -> bool:
            super().admit_request(request, client_address)
            return True

    with RunningServer(Lenient(LOOPBACK, Echo)) as running:
        with running.connect() as client:
            exchange(client)
        assert not running.server._guard.refusals


def test_an_override_that_refuses_whom_the_rules_let_in_takes_no_place() -> None:
    class Strict(Server):
        max_connections = 1

        def admit_request(self, request: Any, client_address: Any) -> bool:
            super().admit_request(request, client_address)
            return False

    with recorded(ConnectionRefused) as refused, RunningServer(Strict(LOOPBACK, Echo)) as running:
        for _ in range(3):
            assert refused_or_told(running) == b""
        gate = running.server._guard.gate
        assert gate is not None
        eventually(lambda: gate.active == 0)
    assert [event.reason for event in refused] == [RefusalReason.NOT_ADMITTED] * 3


def test_datagrams_keep_no_place_and_no_memory() -> None:
    guard = Guard(None)
    with TCPServer(LOOPBACK, Echo) as server:
        server.max_connections = 1
        guard = server._guard
        guard.read_settings()
        for _ in range(3):
            assert guard.admit((b"datagram", None), ("192.0.2.1", 4000)) is None
        assert not len(guard.connections)
        assert guard.gate is not None
        assert guard.gate.active == 0


def test_handle_request_waits_for_a_place_and_serves_then() -> None:
    class Taking(TCPServer):
        max_connections = 1
        taken: Any = None

        def process_request(self, request: Any, client_address: Any) -> None:
            if self.taken is None:
                self.taken = request
            else:
                super().process_request(request, client_address)

    with Taking(LOOPBACK, Echo) as server:
        server.timeout = 0.05
        with (
            socket.create_connection(server.server_address, PATIENCE) as first,
            socket.create_connection(server.server_address, PATIENCE) as second,
        ):
            server.handle_request()
            assert server.taken is not None
            second.sendall(b"hello\n")
            second.shutdown(socket.SHUT_WR)
            timeouts: list[None] = []
            server.handle_timeout = lambda: timeouts.append(None)  # type: ignore[method-assign]
            server.handle_request()
            assert timeouts == [None]
            server.timeout = PATIENCE
            server.shutdown_request(server.taken)
            server.handle_request()
            assert second.recv(100) == b"hello\n"
            assert goodbye(first) == b""


# --- children ---------------------------------------------------------------------------

PROXY_LINE = b"PROXY TCP4 192.0.2.1 192.0.2.9 4000 80\r\n"


def test_a_child_judges_whom_a_proxy_speaks_for() -> None:
    """Nobody else knows its name: the acceptor has seen the proxy's."""

    class Judging(ForkingTCPServer):
        proxy_protocol = ("127.0.0.0/8",)
        denied_networks = ("192.0.2.0/24",)
        max_connections = 5

    with RunningServer(Judging(LOOPBACK, Echo)) as running:
        with running.connect() as client:
            client.sendall(PROXY_LINE + b"hello\n")
            assert goodbye(client) == b""
        with running.connect() as client:
            client.sendall(PROXY_LINE.replace(b"192.0.2.1 ", b"198.51.100.1 ") + b"hello\n")
            assert client.recv(100) == b"hello\n"
        gate = running.server._guard.gate
        assert gate is not None
        # The loop looks for children now and then, as `service_actions` says.
        eventually(lambda: gate.active == 0)


def test_a_process_that_was_forked_begins_without_the_connections_of_its_parent(
    server: Server,
) -> None:
    server.max_connections, server.idle_timeout = 1, 60.0
    guard = server._guard
    guard.read_settings()
    ours, theirs = socket.socketpair()
    with ours, theirs, Journal() as journal:
        assert guard.admit(ours, "peer") is None
        parents = guard.gate

        def look() -> None:
            guard.read_settings()
            assert guard.gate is not None
            assert guard.gate is not parents
            journal.note(f"{guard.open} {guard.gate.active}")

        assert in_child(look) == 0
        assert journal.entries() == ["0 0"]
        assert guard.open == 1
        assert os.getpid() == guard._process
        guard.note_closing(ours)
        assert guard.keeper is not None
        guard.keeper.stop()


def test_a_process_that_was_forked_waits_for_no_lock_of_its_parent(server: Server) -> None:
    """A thread that is only there may have held it; and what it guards is as at the beginning."""
    guard = server._guard
    guard._row, guard._next_look = 3, inf

    def look() -> None:
        guard.read_settings()
        for lock in (guard._choosing, guard._shedding):
            assert lock.acquire(blocking=False)
        assert guard._row is None
        assert not guard._next_look

    with guard._choosing, guard._shedding:
        assert in_child(look) == 0


# --- making room ------------------------------------------------------------------------

SHEDDING = [ThreadingTCPServer, GreenTCPServer]


@pytest.mark.parametrize("kind", SHEDDING)
@pytest.mark.parametrize("idle", [0, 1])
def test_who_has_been_idle_for_longest_makes_room_for_who_comes(kind: Any, idle: int) -> None:
    attributes = {"max_connections": 2, "when_full": "shed"}
    server = type("Server", (kind,), attributes)(LOOPBACK, Echo)
    with (
        recorded(ConnectionClosed) as closed,
        RunningServer(server) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        clients = first, second
        for client in clients:
            exchange(client)
        threading.Event().wait(0.05)  # some ticks of the kernel's clock
        exchange(clients[1 - idle])
        with running.connect() as third:
            exchange(third)
            assert goodbye(clients[idle]) == b""
            eventually(lambda: closed)
            assert closed[0].reason is CloseReason.CUT
            exchange(clients[1 - idle])


def test_one_that_has_moved_since_it_was_found_idle_is_spared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One look finds several; each is looked at again when its turn comes."""
    attributes = {"max_connections": 16, "when_full": "shed"}
    server: Any = type("Server", (Server,), attributes)(LOOPBACK, Echo)
    idle: dict[int, float] = {}
    with RunningServer(server) as running, ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(16)]
        for client in clients:
            exchange(client)
            idle[client.getsockname()[1]] = 1.0 + len(idle)
        wait_until_idle(server, 16)
        now = monotonic()
        monkeypatch.setattr("portico.guard.monotonic", lambda: now)
        monkeypatch.setattr("portico.guard.idle_seconds", lambda sock: idle[sock.getpeername()[1]])
        guard = server._guard
        guard._idle = guard._by_idleness(now)[-3:]
        longest, next_one = clients[-1], clients[-2]
        idle[longest.getsockname()[1]] = 0.5  # it has said something since then
        guard.shed()
        assert goodbye(next_one) == b""
        exchange(longest)


def test_how_long_one_has_been_idle_is_asked_of_the_system() -> None:
    """From the last byte on."""
    attributes = {"max_connections": 16, "when_full": "shed"}
    server: Any = type("Server", (Server,), attributes)(LOOPBACK, Echo)
    with RunningServer(server) as running, running.connect() as client:
        before = monotonic()
        exchange(client)
        eventually(lambda: monotonic() > before + 0.2)
        exchange(client)
        # One that is held up in the middle of a look takes it for idle a little longer.
        eventually(lambda: server._guard._by_idleness(monotonic())[0][0] > before + 0.1)


class Worker(StreamRequestHandler):
    """Answer lines; to ``work``, only when the test has released it; and stay, if one is to."""

    def handle(self) -> None:
        server: Any = self.server
        for line in self.rfile:
            if line == b"work\n":
                self.wait()
            self.wfile.write(line)
        if server.staying:
            server.staying.pop()
            self.wait()

    def wait(self) -> None:
        server: Any = self.server
        server.journal.note("waits")
        while not server.release.is_set():
            portico.sleep(0.01)


@contextmanager
def working(kind: Any, **attributes: Any) -> Iterator[RunningServer[Any]]:
    """Run a server with two places, whose handlers can be held."""
    attributes |= {"when_full": "shed", "release": threading.Event(), "daemon_threads": True}
    attributes.setdefault("max_connections", 2)
    attributes.setdefault("staying", [])
    with Journal() as journal:
        server = type("Server", (kind,), attributes | {"journal": journal})(LOOPBACK, Worker)
        with RunningServer(server) as running:
            try:
                yield running
            finally:
                server.release.set()
        eventually(lambda: not server._guard.open)


def wait_until_idle(server: Any, connections: int) -> None:
    """Wait until so many handlers wait for their peers."""
    guard = server._guard
    eventually(lambda: sum(map(guard._notices_end, guard.connections)) == connections)


@pytest.mark.parametrize("kind", [*SHEDDING, ThreadPoolTCPServer])
def test_one_whose_handler_is_at_work_is_spared_for_one_that_waits(kind: Any) -> None:
    with (
        working(kind) as running,
        running.connect() as busy,
        running.connect() as idle,
    ):
        busy.sendall(b"work\n")
        running.server.journal.wait_for("waits")
        threading.Event().wait(0.05)  # some ticks of the kernel's clock
        exchange(idle)
        wait_until_idle(running.server, 1)
        with running.connect() as third:
            exchange(third)
            assert goodbye(idle) == b""
            running.server.release.set()
            assert busy.recv(100) == b"work\n"


@pytest.mark.parametrize("kind", [*SHEDDING, ThreadPoolTCPServer])
def test_of_those_that_are_at_work_one_at_a_time_is_ended(kind: Any) -> None:
    with (
        working(kind) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        for number, client in enumerate((first, second), 1):
            client.sendall(b"work\n")
            running.server.journal.wait_for("waits", times=number)
        guard = running.server._guard
        for _ in range(3):
            guard.shed()
            assert [each.was_cut for each in guard.connections].count(True) == 1
        with running.connect() as third:
            third.sendall(b"hello\n")
            eventually(partial(is_awaited, running.server))
            assert [each.was_cut for each in guard.connections].count(True) == 1
            running.server.release.set()
            assert third.recv(100) == b"hello\n"
        answers = {client.recv(100) for client in (first, second)}
        assert answers == {b"", b"work\n"}


@pytest.mark.parametrize("kind", [*SHEDDING, ThreadPoolTCPServer])
def test_another_one_makes_room_if_the_first_does_not_come_to_its_end(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portico.server, "SHED_AGAIN", 0.05)
    with (
        working(kind, staying=[True]) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        for client in (first, second):
            exchange(client)
        wait_until_idle(running.server, 2)
        with running.connect() as third:
            third.sendall(b"hello\n")
            running.server.journal.wait_for("waits")  # so the place is not free
            assert third.recv(100) == b"hello\n"


@pytest.mark.parametrize("kind", SHEDDING)
def test_one_whose_peer_reads_nothing_ends_at_once(kind: Any) -> None:
    def flood(request: Any, client_address: object, server: object) -> None:
        with suppress(OSError):
            while True:
                request.sendall(bytes(65536))

    server = type("Server", (kind,), {"daemon_threads": True})(LOOPBACK, flood)
    with RunningServer(server) as running, running.connect() as client:
        wait_until_idle(server, 1)
        assert client.recv(1) == b"\0"


@pytest.mark.parametrize("kind", SHEDDING)
def test_who_is_refused_in_the_end_costs_no_more_than_one_connection(kind: Any) -> None:
    """Who comes is known when it has been accepted; the place that was made stays free then."""
    attributes = {"max_connections": 3, "when_full": "shed", "denied_networks": ["127.0.0.2"]}
    server = type("Server", (kind,), attributes)(LOOPBACK, Echo)
    with RunningServer(server) as running, ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(3)]
        for client in clients:
            exchange(client)
        wait_until_idle(server, 3)
        for _ in range(10):
            with socket.create_connection(
                server.server_address, PATIENCE, source_address=("127.0.0.2", 0)
            ) as denied:
                assert goodbye(denied) == b""
        eventually(lambda: server._guard.open == 2)
        answers = []
        for client in clients:
            with suppress(OSError):
                client.sendall(b"hello\n")
            answers.append(goodbye_or_line(client))
        assert sorted(answers) == [b"", b"hello\n", b"hello\n"]


def goodbye_or_line(client: socket.socket) -> bytes:
    try:
        return client.recv(100)
    except ConnectionResetError:
        return b""


def test_where_the_kernel_does_not_tell_the_oldest_makes_room(tmp_path: Path) -> None:
    attributes = {"max_connections": 2, "when_full": "shed"}
    kind: Any = type("Server", (ThreadingUnixStreamServer,), attributes)
    with (
        RunningServer(kind(str(tmp_path / "socket"), Echo)) as running,
        running.connect() as first,
        running.connect() as second,
        running.connect() as third,
    ):
        exchange(third)
        assert goodbye(first) == b""
        exchange(second)


def test_nobody_can_be_shed_where_nobody_is_known() -> None:
    with Server(LOOPBACK, Echo) as server:
        server._guard.shed()
        assert not server._guard._idle


# --- whom a proxy speaks for ------------------------------------------------------------


@pytest.mark.parametrize("kind", [ThreadingTCPServer, GreenTCPServer, ThreadPoolTCPServer])
def test_the_places_of_whom_a_proxy_speaks_for_are_given_back(kind: Any) -> None:
    attributes = {"proxy_protocol": ("127.0.0.0/8",), "max_connections_per_peer": 1}
    with RunningServer(type("Server", (kind,), attributes)(LOOPBACK, Echo)) as running:
        gate = running.server._guard.gate
        for _ in range(2):
            with recorded(ConnectionRefused) as refused:
                with running.connect() as first, running.connect() as second:
                    exchange_behind_proxy(first)
                    second.sendall(PROXY_LINE)
                    assert goodbye(second) == b""
                eventually(lambda: gate.active == 0 and refused)  # told when it is closed
            (event,) = refused
            assert event.peer == ("192.0.2.1", 4000)
            assert event.reason is RefusalReason.TOO_MANY_OF_PEER


@pytest.mark.parametrize("kind", [ThreadingTCPServer, TCPServer])
@pytest.mark.parametrize("raises", [False, True])
def test_a_program_is_asked_about_whom_a_proxy_speaks_for(kind: Any, raises: bool) -> None:
    asked: list[Any] = []

    class Asking(kind):  # type: ignore[misc]
        proxy_protocol = ("127.0.0.0/8",)
        max_connections = 5

        def verify_request(self, request: Any, client_address: Any) -> bool:
            asked.append(client_address)
            if raises:
                raise ValueError("on purpose")
            return False

        def handle_error(self, request: Any, client_address: Any) -> None:
            asked.append("error")

    with RunningServer(Asking(LOOPBACK, Echo)) as running:
        with running.connect() as client:
            client.sendall(PROXY_LINE)
            assert goodbye(client) == b""
        guard = running.server._guard
        eventually(lambda: guard.gate.active == 0 and not guard.open)
    assert asked == [("192.0.2.1", 4000), "error"][: 1 + raises]


def exchange_behind_proxy(client: socket.socket) -> None:
    client.sendall(PROXY_LINE + b"hello\n")
    assert client.recv(100) == b"hello\n"


def test_rules_that_change_count_whom_a_proxy_speaks_for() -> None:
    server: Any = type("Server", (Server,), {"proxy_protocol": ("127.0.0.0/8",)})(LOOPBACK, Echo)
    server.max_connections_per_peer = 5
    with RunningServer(server) as running, running.connect() as first:
        exchange_behind_proxy(first)
        running.shutdown()
        server.max_connections_per_peer = 1
        with RunningServer(server) as again, again.connect() as second:
            second.sendall(PROXY_LINE)
            assert goodbye(second) == b""
            exchange(first)


@pytest.mark.parametrize(
    "engine",
    [
        portico.TCPServer,
        portico.ThreadingTCPServer,
        portico.ForkingTCPServer,
        portico.ThreadPoolTCPServer,
        portico.GreenTCPServer,
    ],
)
def test_connections_are_held_weakly_only_where_a_program_may_lose_them(engine: Any) -> None:
    """A hook of its own may take a connection away and say nothing of its end."""

    class Taking(engine):  # type: ignore[misc]
        def process_request(self, request: Any, client_address: Any) -> None:
            request.close()

    class Handling(engine):  # type: ignore[misc]
        def finish_request(self, request: Any, client_address: Any) -> None:
            """Come back to the hook that ends the connection."""

    for kind, is_weak in ((engine, False), (Taking, True), (Handling, False)):
        with kind(("127.0.0.1", 0), None) as made:
            assert made._guard.connections.holds_weakly is is_weak
            assert made._guard.tracks_plainly is not is_weak
            made.close_request = portico.TCPServer.close_request.__get__(made)
            made._guard.read_settings()
            assert made._guard.connections.holds_weakly is is_weak
            made.close_request = lambda request: None
            made._guard.read_settings()
            assert made._guard.connections.holds_weakly


@pytest.mark.parametrize(("is_late", "kind"), [(False, PreambleFailed), (True, DeadlineExpired)])
def test_events_name_the_client_once_its_proxy_has(
    is_late: bool, kind: Any, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever blocks those that misbehave would block the proxy otherwise."""

    def fail(*_: object, **__: object) -> None:
        raise PreambleError("TLS handshake", "on purpose", is_late)

    monkeypatch.setattr("portico.preamble.shake_hands", fail)
    pair = authority.issue()
    attributes = {
        "proxy_protocol": ("127.0.0.0/8",),
        "ssl_context": (pair.certificate, pair.key),
    }
    server: Any = type("Server", (Server,), attributes)(LOOPBACK, Echo)
    with (
        recorded(kind, ConnectionClosed) as told,
        RunningServer(server) as running,
        running.connect() as client,
    ):
        client.sendall(PROXY_LINE)
        assert goodbye(client) == b""
        eventually(lambda: len(told) == 2)
    assert [type(event) for event in told] == [kind, ConnectionClosed]
    assert [event.peer for event in told] == [("192.0.2.1", 4000)] * 2
