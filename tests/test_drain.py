"""How a drain sees connections to their end, in a server of each engine."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portico import (
    BaseRequestHandler,
    ForkingTCPServer,
    GreenTCPServer,
    GreenUDPServer,
    TCPServer,
    ThreadingTCPServer,
    ThreadingUDPServer,
    ThreadPoolTCPServer,
    ThreadPoolUDPServer,
)
from portico.connection import Connection, Connections
from portico.drain import Drain
from portico.errors import PhaseError, SettingError
from portico.events import CloseReason, ConnectionClosed, Drained, DrainStarted
from portico.lifecycle import DrainReport, Phase
from tests.support import (
    PATIENCE,
    Call,
    RunningServer,
    connect,
    eventually,
    goodbye,
    in_child,
    nothing_left_behind,
    recorded,
    reset,
    run_program,
)

if TYPE_CHECKING:
    from tests.tls import Authority

LOOPBACK = ("127.0.0.1", 0)
CONCURRENT = [ThreadingTCPServer, ThreadPoolTCPServer, GreenTCPServer]


class Handler(BaseRequestHandler):
    """Answers words; to "hold" only when the test says so, and to "deaf" never again."""

    def handle(self) -> None:
        while words := self.request.recv(100):
            self.request.sendall(words)
            if words == b"hold":
                self.server._wait_event(self.server.go_on, None)
                self.request.sendall(b"held")
                return
            if words == b"deaf":
                self.server._wait_event(self.server.go_on, None)
                return


@pytest.fixture(params=CONCURRENT, ids=lambda kind: kind.__name__)
def running(request: pytest.FixtureRequest) -> Iterator[RunningServer[Any]]:
    server = request.param(LOOPBACK, Handler)
    server.go_on = threading.Event()
    with RunningServer(server) as running:
        yield running
        server.go_on.set()


def say(running: RunningServer[Any], words: bytes) -> socket.socket:
    """Connect a client that has said something and got its answer."""
    client = running.connect()
    client.sendall(words)
    assert client.recv(100) == words
    return client


def sums(report: DrainReport | None) -> tuple[int, int, int, int]:
    assert report is not None
    return report.connections, report.finished, report.idle, report.forced


# --- one drain --------------------------------------------------------------------------


def test_idle_ones_end_busy_ones_finish_and_the_rest_is_closed(running: RunningServer[Any]) -> None:
    server = running.server
    with (
        say(running, b"idle") as idle,
        say(running, b"hold") as busy,
        recorded(DrainStarted, Drained) as told,
    ):
        draining = Call(server.drain, PATIENCE)
        assert goodbye(idle) == b""
        assert server.draining.is_set()
        assert server.phase is Phase.DRAINING
        server.go_on.set()
        assert goodbye(busy) == b"held"
        report = draining.result()
        assert sums(report) == (2, 1, 1, 0)
        assert report is server.drain_report
        assert [type(event) for event in told] == [DrainStarted, Drained]
        with pytest.raises(ConnectionRefusedError):
            running.connect()
    assert server.phase.value == "closed"
    assert not running.is_serving()


def test_what_is_open_at_the_deadline_is_closed_and_counted_as_forced(
    running: RunningServer[Any],
) -> None:
    with recorded(ConnectionClosed) as closed, say(running, b"hold") as busy:
        draining = Call(running.server.drain, 0.0)
        assert goodbye(busy) == b""
        running.server.go_on.set()
        assert sums(draining.result()) == (1, 0, 0, 1)
        eventually(lambda: closed)
    assert [event.reason for event in closed] == [CloseReason.CUT]


def test_a_handler_that_goes_on_is_not_waited_for(running: RunningServer[Any]) -> None:
    server = running.server
    server.drain_timeout = 0.0
    with say(running, b"deaf") as deaf:
        Call(server.server_close).result()
        assert not server.go_on.is_set()  # and so its handler waits still
        assert sums(server.drain_report) == (1, 0, 0, 1)
        assert server._has_stragglers
        assert goodbye(deaf) == b""
    server.go_on.set()


def test_later_calls_join_the_first(running: RunningServer[Any]) -> None:
    with say(running, b"hold"):
        first = Call(running.server.drain, PATIENCE)
        eventually(running.server.draining.is_set)
        others = [Call(running.server.drain, 0.0) for _ in range(3)]
        assert first.is_running()
        running.server.go_on.set()
        report = first.result()
        assert all(other.result() is report for other in others)
    assert running.server.drain() is report


def test_a_signal_handler_that_drains_as_a_drain_begins_does_not_wait_for_it(
    running: RunningServer[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = running.server._guard
    begin = guard.begin_drain

    def begin_and_be_interrupted(*args: Any) -> Drain:
        drain: Drain = begin(*args)
        assert running.server.drain(0.0) is None
        return drain

    monkeypatch.setattr(guard, "begin_drain", begin_and_be_interrupted)
    assert sums(Call(running.server.drain, PATIENCE).result()) == (0, 0, 0, 0)


def test_closing_joins_a_drain_that_is_under_way(running: RunningServer[Any]) -> None:
    running.server.drain_timeout = PATIENCE
    with say(running, b"hold"):
        draining = Call(running.server.drain)
        eventually(running.server.draining.is_set)
        closing = Call(running.server.server_close)
        running.server.go_on.set()
        closing.result()
        assert draining.result() is running.server.drain_report


def test_who_waits_in_the_backlog_for_a_place_gets_one_from_who_is_idle(
    running: RunningServer[Any],
) -> None:
    server = running.server
    running.shutdown()
    server.max_connections = 1
    with RunningServer(server), say(running, b"idle") as idle:
        with running.connect() as waiting:
            waiting.sendall(b"waiting")
            draining = Call(server.drain, PATIENCE)
            assert goodbye(idle) == b""
            assert waiting.recv(100) == b"waiting"
        report = draining.result()
        assert report is not None
        assert report.connections == 2
        assert report.forced == 0
    eventually(lambda: server._guard.gate.active == 0)


def test_a_stopped_server_can_be_drained(running: RunningServer[Any]) -> None:
    with say(running, b"idle"):
        running.shutdown()
        assert running.server.phase is Phase.STOPPED
        assert sums(running.server.drain(PATIENCE)) == (1, 0, 1, 0)


@pytest.mark.parametrize("kind", CONCURRENT)
@pytest.mark.parametrize("by_closing", [True, False])
def test_a_server_that_serves_single_requests_can_be_drained(kind: Any, by_closing: bool) -> None:
    with kind(LOOPBACK, Handler) as server, connect(server) as idle, connect(server) as waiting:
        server.drain_timeout = PATIENCE
        server.handle_request()
        idle.sendall(b"idle")
        assert idle.recv(100) == b"idle"
        assert server.phase is Phase.STOPPED
        waiting.sendall(b"in the backlog")
        Call(server.server_close if by_closing else server.drain).result()
        assert goodbye(idle) == b""
        assert goodbye(waiting) == b"in the backlog"
        assert sums(server.drain_report)[0] == 2
        assert sums(server.drain_report)[3] == 0
        assert server.phase.value == "closed"


def test_a_server_begins_anew_with_another_listener(running: RunningServer[Any]) -> None:
    server = running.server
    with say(running, b"idle"):
        server.drain(PATIENCE)
    running.wait_ended()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    with RunningServer(server) as again:
        assert server.phase is Phase.SERVING
        assert not server.draining.is_set()
        assert server.drain_report is None
        with say(again, b"idle"):
            assert sums(server.drain(PATIENCE)) == (1, 0, 1, 0)


@pytest.mark.parametrize("kind", [TCPServer, *CONCURRENT])
def test_a_server_that_served_single_requests_begins_anew(kind: Any) -> None:
    """There was no loop that the drain could end: none that comes later is meant."""
    server = kind(LOOPBACK, Handler)
    server.drain_timeout = PATIENCE
    with connect(server) as client:
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
    Call(server.server_close).result()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    with RunningServer(server) as again, say(again, b"idle"):
        assert sums(server.drain()) == (1, 0, 1, 0)


def test_a_handler_that_drains_does_not_wait_for_itself() -> None:
    """Nor does anything need to end it: it is on its way."""

    class Draining(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)
            reports.append(self.server.drain(PATIENCE))
            self.request.sendall(b"drained")

    reports: list[Any] = []
    with RunningServer(ThreadingTCPServer(LOOPBACK, Draining)) as running:
        with running.connect() as other, running.connect() as client:
            client.sendall(b"x")
            assert goodbye(client) == b"drained"
            assert goodbye(other) == b"drained"
        # The other handler, woken by end-of-file, drains as well.
        eventually(lambda: len(reports) == 2)
        assert {report.connections for report in reports} == {1}


@pytest.mark.parametrize("kind", [TCPServer, GreenTCPServer])
def test_in_the_thread_that_serves_the_loop_drains_before_it_returns(kind: Any) -> None:
    class Draining(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)
            assert self.server.drain(PATIENCE) is None
            self.request.sendall(b"soon")

    with RunningServer(kind(LOOPBACK, Draining)) as running:
        with running.connect() as client:
            client.sendall(b"x")
            assert goodbye(client) == b"soon"
        assert running.wait_ended() is None
        assert running.server.drain_report is not None
        assert running.server.phase is Phase.CLOSED


@pytest.mark.parametrize("timeout", [PATIENCE, 0.0])
def test_a_handler_that_holds_the_loop_is_drained_at_once(timeout: float) -> None:
    """Also when it was a signal handler that asked, which interrupted it in a wait."""

    class Waiting(BaseRequestHandler):
        def handle(self) -> None:
            assert self.server.drain(timeout) is None
            assert self.server.drain(PATIENCE) is None  # the first one counts
            assert self.server.phase is Phase.DRAINING
            assert self.server.draining.wait(PATIENCE)
            heard.append(self.request.recv(100))

    heard: list[bytes] = []
    with RunningServer(TCPServer(LOOPBACK, Waiting)) as running, running.connect() as silent:
        assert running.wait_ended() is None
        assert goodbye(silent) == b""
        assert heard == [b""]
        assert sums(running.server.drain_report)[:2] == (1, 0)  # idle, or forced


def test_a_drain_that_another_thread_joins_before_the_loop_ends_is_one() -> None:
    class Waiting(BaseRequestHandler):
        def handle(self) -> None:
            assert self.server.drain(PATIENCE) is None
            begun.set()
            assert go_on.wait(PATIENCE)

    begun, go_on = threading.Event(), threading.Event()
    with RunningServer(TCPServer(LOOPBACK, Waiting)) as running, running.connect():
        assert begun.wait(PATIENCE)
        joining = Call(running.server.drain, 0.0)
        go_on.set()
        report = joining.result()
        assert running.wait_ended() is None
        assert sums(report)[0] == 1
        assert running.server.drain_report is report


@pytest.mark.parametrize("first", ["the thread that serves", "another"])
def test_a_drain_that_is_asked_for_in_two_threads_ends_who_is_silent_in_the_backlog(
    first: str,
) -> None:
    """The other thread serves it, after the loop has ended that had something watched as well."""

    class Server(TCPServer):
        def shutdown(self) -> None:
            taken_over.set()
            super().shutdown()

    class Waiting(BaseRequestHandler):
        def handle(self) -> None:
            if holds.is_set():
                heard.append(self.request.recv(100))
                return
            if first == "the thread that serves":
                assert self.server.drain() is None
            holds.set()
            assert taken_over.wait(PATIENCE)
            if first == "another":
                assert self.server.drain() is None

    heard: list[bytes] = []
    holds, taken_over = threading.Event(), threading.Event()
    with RunningServer(Server(LOOPBACK, Waiting)) as running, running.connect():
        assert holds.wait(PATIENCE)
        with running.connect() as silent:
            report = Call(running.server.drain).result()
            assert goodbye(silent) == b""
        assert running.wait_ended() is None
        assert heard == [b""]
        assert sums(report)[0] == 2
        assert running.server.drain_report is report


def test_a_handler_that_takes_a_drain_over_does_not_wait_for_itself() -> None:
    """The thread that serves has begun it, and is not yet where it would see to its end."""

    class Server(ThreadingTCPServer):
        def service_actions(self) -> None:
            super().service_actions()
            if asks.is_set():
                assert self.drain() is None
                begun.set()
                assert taken_over.wait(PATIENCE)

        def shutdown(self) -> None:
            taken_over.set()
            super().shutdown()

    class Draining(BaseRequestHandler):
        def handle(self) -> None:
            asks.set()
            assert begun.wait(PATIENCE)
            reports.append(self.server.drain())

    reports: list[DrainReport | None] = []
    asks, begun, taken_over = threading.Event(), threading.Event(), threading.Event()
    with RunningServer(Server(LOOPBACK, Draining), 0.01) as running, running.connect() as client:
        assert goodbye(client) == b""
        assert running.wait_ended() is None
        assert [sums(report) for report in reports] == [(1, 1, 0, 0)]


AT_ANY_LINE = """
import faulthandler, sys, threading
import portico

where, patience = sys.argv[1], float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)


class Server(portico.ThreadingTCPServer):
    def service_actions(self):
        super().service_actions()
        if where == "serving" and not self.draining.is_set():
            drain_twice(self)


def drain_twice(server):
    # A function that is called at each line is what a signal handler is, and comes everywhere.
    global left

    def at_line(frame, event, arg):
        global left
        if event == "line" and frame.f_code.co_filename.endswith(("server.py", "guard.py")):
            left -= 1
            if left == 0:
                server.drain()
        return at_line

    sys.settrace(at_line)
    try:
        server.drain()
    finally:
        sys.settrace(None)


def drain_at(number):
    # Say whether there were so many lines.
    global left
    left = number
    begun = []
    with Server(("127.0.0.1", 0), None) as server:
        begin = server._guard.begin_drain
        server._guard.begin_drain = lambda *args: begun.append(args) or begin(*args)
        serving = threading.Thread(target=server.serve_forever, args=(0,), daemon=True)
        serving.start()
        if where == "beside":
            while server.phase is portico.Phase.CREATED:
                pass
            drain_twice(server)
        serving.join()
        assert len(begun) == 1, (number, len(begun))
        assert server.drain_report is not None, number
        assert server.phase is portico.Phase.CLOSED, number
    return left <= 0


number = 1
while drain_at(number):
    number += 1
print("done", number > 10)
"""


@pytest.mark.parametrize("where", ["serving", "beside"])
def test_a_signal_handler_may_drain_at_any_moment_of_a_drain(where: str) -> None:
    """There is one, and it comes to its end."""
    done = run_program(AT_ANY_LINE, where, str(PATIENCE / 2))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done True\n", "")


def test_a_drain_whose_loop_was_left_is_seen_to_its_end_by_who_closes() -> None:
    class Leaving(BaseRequestHandler):
        def handle(self) -> None:
            assert self.server.drain() is None
            raise SystemExit

    server = TCPServer(LOOPBACK, Leaving)
    server.drain_timeout = PATIENCE
    with nothing_left_behind(), RunningServer(server) as running, running.connect() as client:
        assert isinstance(running.wait_ended(), SystemExit)
        assert goodbye(client) == b""
        assert server.drain_report is None
        Call(server.server_close).result()
        assert sums(server.drain_report) == (1, 1, 0, 0)


@pytest.mark.parametrize("kind", [TCPServer, ThreadingTCPServer, GreenTCPServer])
@pytest.mark.parametrize("is_drained", [True, False])
def test_the_thread_that_serves_may_close(kind: Any, is_drained: bool) -> None:
    """It ends the loop, and does not wait for itself; a drain that it asked for before comes."""

    class Closing(kind):  # type: ignore[misc]
        drain_timeout = PATIENCE
        block_on_close = False

        def service_actions(self) -> None:
            super().service_actions()
            if is_drained:
                assert self.drain() is None
            self.server_close()

    with RunningServer(Closing(LOOPBACK, Handler), 0.01) as running:
        assert running.wait_ended() is None
        assert running.server.phase is Phase.CLOSED
        assert (running.server.drain_report is not None) is is_drained


def test_a_server_that_never_served_cannot_be_drained() -> None:
    with TCPServer(LOOPBACK, Handler) as server:
        with pytest.raises(PhaseError, match="serving or stopped"):
            server.drain()
        with pytest.raises(SettingError, match="timeout"):
            server.drain(-1)
        assert server.phase is Phase.CREATED
    assert server.phase.value == "closed"
    with pytest.raises(PhaseError, match="'closed'"):
        server.drain()


def test_a_loop_that_begins_in_the_middle_of_a_drain_ends_at_once(
    running: RunningServer[Any],
) -> None:
    with say(running, b"hold"):
        draining = Call(running.server.drain, PATIENCE)
        eventually(running.server.draining.is_set)
        Call(running.server.serve_forever).result()
        assert draining.is_running()
        running.server.go_on.set()
        draining.result()


def test_a_loop_that_ends_leaves_another_alone(
    running: RunningServer[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both share a thread, as on a green hub."""
    has_ended = threading.Event()
    shutdown = running.server.shutdown

    def shutdown_later() -> None:
        assert has_ended.wait(PATIENCE)
        shutdown()

    monkeypatch.setattr(running.server, "shutdown", shutdown_later)
    draining = Call(running.server.drain, PATIENCE)
    eventually(running.server.draining.is_set)
    Call(running.server.serve_forever).result()
    has_ended.set()
    draining.result()
    running.wait_ended()


@pytest.mark.parametrize("kind", [ThreadingUDPServer, GreenUDPServer])
def test_a_datagram_whose_handler_goes_on_is_not_waited_for(kind: Any) -> None:
    class Deaf(BaseRequestHandler):
        def handle(self) -> None:
            begun.set()
            self.server._wait_event(go_on, None)

    begun, go_on = threading.Event(), threading.Event()
    server = kind(LOOPBACK, Deaf)
    server.drain_timeout = 0.05
    with RunningServer(server) as running, running.connect() as client:
        client.send(b"x")
        assert begun.wait(PATIENCE)
        Call(server.server_close).result()
        assert server._has_stragglers
        go_on.set()


@pytest.mark.parametrize("kind", [ThreadingUDPServer, ThreadPoolUDPServer])
@pytest.mark.parametrize("block_on_close", [True, False])
def test_handlers_of_datagrams_that_drain_do_not_wait_for_themselves(
    kind: Any, block_on_close: bool
) -> None:
    """Nor for each other."""

    class Draining(BaseRequestHandler):
        def handle(self) -> None:
            together.wait(PATIENCE)
            reports.append(self.server.drain(PATIENCE))

    together, reports = threading.Barrier(2), list[DrainReport | None]()
    server = kind(LOOPBACK, Draining)
    server.block_on_close = block_on_close
    with RunningServer(server) as running, running.connect() as client:
        client.send(b"x")
        client.send(b"y")
        eventually(lambda: len(reports) == 2)
        assert reports[0] is reports[1] is server.drain_report
        assert not server._has_stragglers


# --- what a program made something else of ----------------------------------------------


@pytest.mark.parametrize("kind", CONCURRENT)
@pytest.mark.parametrize("where", ["handle", "finish_request"])
def test_a_connection_over_which_the_program_speaks_tls_is_closed_at_the_deadline(
    authority: Authority, kind: Any, where: str
) -> None:
    """The object that was accepted has no descriptor any more."""
    pair = authority.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)

    def over_tls(request: Any, *, is_here: bool) -> Any:
        return context.wrap_socket(request, server_side=True) if is_here else nullcontext(request)

    class Secure(kind):  # type: ignore[misc]
        def finish_request(self, request: Any, client_address: Any) -> None:
            with over_tls(request, is_here=where == "finish_request") as prepared:
                super().finish_request(prepared, client_address)

    class StartTLS(BaseRequestHandler):
        def handle(self) -> None:
            with over_tls(self.request, is_here=where == "handle") as secure:
                secure.sendall(b"x")
                with suppress(OSError):  # the peer says nothing of the end
                    secure.recv(1)
            ended.set()

    ended = threading.Event()
    with RunningServer(Secure(LOOPBACK, StartTLS)) as running, running.connect() as bare:
        with authority.client().wrap_socket(bare, server_hostname="localhost") as client:
            assert client.recv(1) == b"x"
            assert sums(Call(running.server.drain, 0.0).result()) == (1, 0, 0, 1)
            assert ended.wait(PATIENCE)


@pytest.mark.parametrize("kind", [ThreadingTCPServer, ThreadPoolTCPServer])
def test_one_that_another_object_took_over_is_given_end_of_file_when_idle(kind: Any) -> None:
    class Exchanging(BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(fileno=self.request.detach()) as other:
                other.sendall(b"x")
                other.recv(1)

    with RunningServer(kind(LOOPBACK, Exchanging)) as running, running.connect() as client:
        assert client.recv(1) == b"x"
        draining = Call(running.server.drain, PATIENCE)
        assert goodbye(client) == b""
        assert sums(draining.result()) == (1, 0, 1, 0)


# --- children ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["server_close", "drain"])
def test_a_child_that_a_program_forks_leaves_the_connections_to_its_parent(
    running: RunningServer[Any], name: str
) -> None:
    """Closing what was inherited is hygiene, and shuts nothing down that both have."""
    server = running.server
    server.drain_timeout = PATIENCE

    def end_twice() -> None:
        end: Callable[[], object] = getattr(server, name)
        end()
        end()
        assert server.draining.is_set() is (name == "drain")
        assert (server.socket.fileno() < 0) is (name == "server_close")

    with say(running, b"idle") as client:
        assert in_child(end_twice) == 0
        client.sendall(b"again")
        assert client.recv(100) == b"again"
        assert not server.draining.is_set()
        with say(running, b"later"):
            assert running.is_serving()


class Stubborn(BaseRequestHandler):
    """Is not ended by SIGTERM."""

    def handle(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.request.sendall(b"x")
        while True:
            time.sleep(PATIENCE)


def test_a_child_that_does_not_end_is_ended() -> None:
    server = ForkingTCPServer(LOOPBACK, Stubborn)
    server.drain_timeout = 0.0
    with RunningServer(server) as running, running.connect() as client:
        assert client.recv(1) == b"x"
        Call(server.server_close).result()
        assert goodbye(client) == b""
        assert sums(server.drain_report) == (1, 0, 0, 1)
        assert not server._has_stragglers


# --- without a server -------------------------------------------------------------------


def make(connections: Connections) -> Drain:
    return Drain(connections, {}, lambda _: True, 0.0)


def test_one_that_was_lost_is_counted_at_the_next_look() -> None:
    lost: list[Connection] = []
    connections = Connections(lost.append)
    ours, theirs = socket.socketpair()
    with theirs:
        connections.add(ours, "peer")
        drain = make(connections)
        assert drain.look() == 1
        ours.close()
        del ours
        drain.note_lost(lost.pop())
        assert drain.look() == 0
    assert sums(drain.run(lambda event, seconds: event.wait(seconds))) == (1, 1, 0, 0)


def test_a_child_that_has_gone_already_is_no_reason_to_fail() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    connection = Connection(None, "peer")
    connection.process = child
    children = {child: connection}
    drain = Drain(Connections(lambda _: None), children, lambda _: None, 0.0)

    def wait(event: threading.Event, seconds: float) -> None:
        del event, seconds
        if children.pop(child, None):
            drain.note_end(connection)

    assert sums(drain.run(wait)) == (1, 0, 0, 1)


# --- the law ----------------------------------------------------------------------------

STEPS = st.lists(
    st.sampled_from(["idle", "talk", "hold", "leave", "reset", "silent", "free"]), max_size=12
)


class Crowd:
    """Clients that come, talk and go."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.clients: list[socket.socket] = []

    def act(self, step: str) -> None:
        try:
            if step in {"idle", "hold", "silent"}:
                self.come(step)
            elif step == "free":
                self.server.go_on.set()
            elif self.clients:
                self.go_on(self.clients[len(self.clients) // 2], step)
        except OSError:  # refused, or closed by the drain
            pass

    def come(self, step: str) -> None:
        self.clients.append(connect(self.server))
        if step != "silent":
            self.clients[-1].sendall(step.encode())

    def go_on(self, client: socket.socket, step: str) -> None:
        if step == "talk":
            client.sendall(b"talk")
            return
        self.clients.remove(client)
        if step == "reset":
            reset(client)
        client.close()

    def close(self) -> None:
        for client in self.clients:
            client.close()


@pytest.mark.parametrize("kind", [ThreadingTCPServer, GreenTCPServer])
@given(before=STEPS, during=STEPS, timeout=st.sampled_from([0.0, 0.15]))
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
def test_every_connection_is_counted_once_whatever_clients_do(
    kind: Any, before: list[str], during: list[str], timeout: float
) -> None:
    """``finished + idle + forced == connections``, and none is open, counted or has a place."""
    server = kind(LOOPBACK, Handler)
    server.go_on = threading.Event()
    server.max_connections = 50
    crowd = Crowd(server)
    with RunningServer(server):
        try:
            for step in before:
                crowd.act(step)
            draining = Call(server.drain, timeout)
            for step in during:
                crowd.act(step)
            report = draining.result()
        finally:
            server.go_on.set()
            crowd.close()
        assert report is not None
        assert report.finished + report.idle + report.forced == report.connections
        opened = sum(step in {"idle", "hold", "silent"} for step in (*before, *during))
        assert report.connections <= opened
        eventually(lambda: server._guard.gate.active == 0 and server._guard.open == 0)
