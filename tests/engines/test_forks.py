from __future__ import annotations

import errno
import os
import signal
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from portico import Certificates, ForkingMixIn, ForkingTCPServer, StreamRequestHandler
from portico.engines import forks
from tests.support import (
    Call,
    Journal,
    RunningServer,
    ask,
    children,
    connect,
    eventually,
    goodbye,
    in_child,
    nothing_left_behind,
    received,
    run_program,
)
from tests.tls import Authority

LOOPBACK = ("127.0.0.1", 0)


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


class Echo(StreamRequestHandler):
    """Answer one line; the child lives until it comes."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


def with_settings(handler: Any = Echo, **settings: object) -> ForkingTCPServer:
    server: ForkingTCPServer = type("Server", (ForkingTCPServer,), settings)(LOOPBACK, handler)
    return server


def only_child(server: ForkingTCPServer) -> int:
    [child] = list(server.active_children or ())
    return child


@pytest.fixture(params=["pidfds", "no pidfds", "no descriptors for them"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways in which a system can tell that a child has ended, or cannot."""
    if request.param == "no pidfds":
        monkeypatch.delattr(os, "pidfd_open")
    elif request.param == "no descriptors for them":
        pidfd_open = os.pidfd_open
        opened = iter(range(1_000_000))

        def every_second(child: int, flags: int = 0) -> int:
            if next(opened) % 2:
                raise OSError(errno.EMFILE, "Too many open files")
            return pidfd_open(child, flags)

        monkeypatch.setattr(os, "pidfd_open", every_second)
    name: str = request.param
    return name


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How the children that were collected had ended."""
    seen: list[int] = []
    waitpid = os.waitpid

    def note(child: int, options: int) -> tuple[int, int]:
        ended, status = waitpid(child, options)
        if ended:
            seen.append(os.waitstatus_to_exitcode(status))
        return ended, status

    monkeypatch.setattr(os, "waitpid", note)
    return seen


@pytest.fixture
def journal() -> Iterator[Journal]:
    with Journal() as made:
        yield made


# --- where a request runs ---------------------------------------------------------------


def test_each_request_has_a_process_of_its_own(journal: Journal) -> None:
    def note(*_: object) -> None:
        journal.note(str(os.getpid()))

    with nothing_left_behind(), with_settings(note) as server:
        for _ in range(2):
            with connect(server) as client:
                server.handle_request()
                assert received(client) == b""
    assert len({*journal.entries(), str(os.getpid())}) == 3


def test_a_handler_cannot_change_its_server(journal: Journal) -> None:
    """It has a copy, which ends with it."""

    def change(request: object, client_address: object, server: ForkingTCPServer) -> None:
        server.RequestHandlerClass = do_nothing
        server.shutdown()
        journal.note("changed")

    with nothing_left_behind(), RunningServer(with_settings(change)) as running:
        for turn in (1, 2):
            with running.connect() as client:
                assert received(client) == b""
            assert journal.wait_for("changed", turn) == ["changed"] * turn


def test_the_parent_keeps_no_hold_on_the_connection() -> None:
    """The client sees the end when the child closes, though it did not shut down."""

    class Leaving(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"bye")
            os._exit(0)

    with nothing_left_behind(), RunningServer(with_settings(Leaving)) as running:
        with running.connect() as client:
            assert received(client) == b"bye"


NO_FLUSH = """
import atexit, socket
from portico import ForkingTCPServer

out = open(1, "w", closefd=False)  # buffered, whatever the environment says of sys.stdout
atexit.register(print, "the exit of the program", file=out, flush=True)
print("written before", end=" ", file=out)
handler = lambda *_: print("never flushed", file=out)
with ForkingTCPServer(("127.0.0.1", 0), handler) as server:
    with socket.create_connection(server.server_address):
        server.handle_request()
"""


def test_a_child_runs_no_exit_handler_and_flushes_no_buffer() -> None:
    """Both are its parent's: what was written before the fork would come out twice."""
    done = run_program(NO_FLUSH)
    assert (done.stdout, done.stderr) == ("written before the exit of the program\n", "")


@pytest.mark.parametrize(
    ("ending", "status"),
    [("return", 0), ("ValueError", 1), ("SystemExit", 1), ("KeyboardInterrupt", 1)],
)
def test_the_status_of_a_child_tells_how_the_handler_ended(
    ending: str, status: int, statuses: list[int]
) -> None:
    endings: dict[str, type[BaseException]] = {
        "ValueError": ValueError,
        "SystemExit": SystemExit,
        "KeyboardInterrupt": KeyboardInterrupt,
    }

    def end(*_: object) -> None:
        if ending in endings:
            raise endings[ending]

    server = with_settings(end, handle_error=lambda *_: None)
    with nothing_left_behind(), server, connect(server):
        server.handle_request()
    assert statuses == [status]


def test_a_process_that_cannot_be_forked_closes_the_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The failure is reported, and later requests are served."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with nothing_left_behind(), RunningServer(with_settings()) as running:
        with monkeypatch.context() as patches:
            patches.setattr(os, "fork", refuse)
            with running.connect() as client:
                assert goodbye(client) == b""
        assert running.ask(b"hello\n") == b"hello\n"
        assert "BlockingIOError" in capfd.readouterr().err


# --- collecting -------------------------------------------------------------------------


def test_there_is_no_set_of_children_before_the_first() -> None:
    before = children()
    with ForkingTCPServer(LOOPBACK, Echo) as server:
        assert vars(server).get("active_children") is None
        server.collect_children()
        server.collect_children(blocking=True)
        with connect(server) as client:
            server.handle_request()
            assert server.active_children == children() - before
            assert ask(client, b"hello\n") == b"hello\n"
        server.collect_children(blocking=True)
        assert server.active_children == set()
    assert ForkingMixIn.active_children is None


def test_a_serving_loop_leaves_no_zombie() -> None:
    """Though nobody comes any more after the last child has ended."""
    before = children()
    with RunningServer(with_settings(), 0.01) as running:
        for turn in range(5):
            assert running.ask(b"%d\n" % turn) == b"%d\n" % turn
        eventually(lambda: not children() - before, "every child is collected")
        assert running.server.active_children == set()


def test_handle_timeout_collects() -> None:
    with with_settings(do_nothing) as server, connect(server) as client:
        server.handle_request()
        assert received(client) == b""
        server.timeout = 0
        while server.active_children:
            server.handle_request()
        assert server.active_children == set()


def test_collecting_does_not_wait_for_who_is_busy() -> None:
    with with_settings() as server, connect(server) as client:
        server.handle_request()
        server.collect_children()
        assert len(server.active_children or ()) == 1
        assert ask(client, b"hello\n") == b"hello\n"
        server.collect_children(blocking=True)
        assert server.active_children == set()


def test_a_child_that_was_killed_is_collected(statuses: list[int]) -> None:
    """Its client sees the end, and the server goes on."""
    with nothing_left_behind(), RunningServer(with_settings(), 0.01) as running:
        with running.connect() as client:
            eventually(lambda: running.server.active_children, "the child is there")
            child = only_child(running.server)
            os.kill(child, signal.SIGKILL)
            assert goodbye(client) == b""
        eventually(lambda: not running.server.active_children, "it is collected")
        assert running.ask(b"hello\n") == b"hello\n"
    assert statuses == [-signal.SIGKILL, 0]


def test_a_child_that_somebody_else_collected_is_forgotten() -> None:
    """A program may wait for all its children."""
    with with_settings(do_nothing) as server, connect(server):
        server.handle_request()
        child = only_child(server)
        os.waitpid(child, 0)
        server.collect_children()
        assert server.active_children == set()


def test_children_of_the_program_are_left_to_it(system: str) -> None:
    """Whatever their number, and also at the limit."""
    foreign = os.fork()
    if foreign == 0:
        os._exit(7)
    os.waitid(os.P_PID, foreign, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    with RunningServer(with_settings(max_children=1), 0.01) as running:
        for turn in range(3):
            assert running.ask(b"%d\n" % turn) == b"%d\n" % turn
    _, status = os.waitpid(foreign, 0)
    assert os.waitstatus_to_exitcode(status) == 7


# --- the limit --------------------------------------------------------------------------


class Limited(ForkingTCPServer):
    """Notice how many children there were at most; let a test wait until it is at its limit."""

    def __init__(self) -> None:
        self.most = 0
        self.turns = 0
        super().__init__(LOOPBACK, Echo)

    def process_request(self, request: Any, client_address: Any) -> None:
        super().process_request(request, client_address)
        self.most = max(self.most, len(self.active_children or ()))

    def service_actions(self) -> None:
        super().service_actions()
        self.turns += 1

    def wait_limit(self) -> None:
        """Wait until there are as many children as allowed, and the loop has had its turns since.

        In these it would have forked one too many.
        """
        eventually(self.is_at_limit, "it is at its limit")
        turns = self.turns
        eventually(lambda: self.turns >= turns + 5, "the loop comes round")

    def is_at_limit(self) -> bool:
        return len(self.active_children or ()) >= self.max_children


@pytest.mark.parametrize("limit", [1, 3])
def test_there_are_never_more_children_than_allowed(system: str, limit: int) -> None:
    """The others wait in the backlog, and are all served."""
    server = Limited()
    server.max_children = limit
    questions = [b"client %d\n" % number for number in range(3 * limit + 2)]
    with nothing_left_behind(), RunningServer(server, 0.01) as running, ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in questions]
        server.wait_limit()
        assert len(server.active_children or ()) == limit
        for client, question in zip(clients, questions, strict=True):
            client.sendall(question)
        assert [client.recv(64) for client in clients] == questions
    assert server.most == limit


@pytest.mark.parametrize("limit", ["max_children", "max_connections"])
def test_room_for_one_child_is_noticed_without_polling(system: str, limit: str) -> None:
    """The end of a child wakes the loop, however long the poll interval."""
    server = Limited()
    setattr(server, limit, 1)
    with nothing_left_behind(), RunningServer(server, 3600) as running, running.connect() as first:
        eventually(lambda: server.turns, "the first has a child")
        with running.connect() as second:
            second.sendall(b"second\n")
            assert ask(first, b"first\n") == b"first\n"
            assert second.recv(64) == b"second\n"


@pytest.mark.parametrize("limit", ["max_children", "max_connections"])
def test_a_full_server_does_not_come_round_for_who_waits(system: str, limit: str) -> None:
    """Only the end of a child, or of a poll interval, would bring news."""
    spinning = threading.Event()

    class Watched(Limited):
        def service_actions(self) -> None:
            super().service_actions()
            if self.turns == 100:
                spinning.set()

    server = Watched()
    setattr(server, limit, 1)
    with nothing_left_behind(), RunningServer(server, 3600) as running, running.connect() as first:
        eventually(lambda: server.turns, "the first has a child")
        with running.connect() as second:
            second.sendall(b"second\n")
            assert not spinning.wait(0.2)
            assert ask(first, b"first\n") == b"first\n"
            assert second.recv(64) == b"second\n"


@pytest.mark.parametrize("served", [0, 1])
def test_the_end_of_a_child_forked_while_another_waits_is_noticed(system: str, served: int) -> None:
    """Who had a place already, and speaks only now, makes room as who was served before."""
    server = Limited()
    server.proxy_protocol, server.max_connections = ["127.0.0.0/8"], 1 + served
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    with nothing_left_behind(), RunningServer(server, 3600) as running, ExitStack() as stack:
        for _ in range(served):
            stack.enter_context(running.connect()).sendall(header)
        eventually(lambda: len(server.active_children or ()) == served, "these have children")
        with running.connect() as silent, running.connect() as waiting:
            gate: Any = server._guard.gate
            eventually(lambda: gate.is_awaited, "a client waits for a place")
            waiting.sendall(header + b"waiting\n")
            silent.sendall(header)
            assert ask(silent, b"silent\n") == b"silent\n"
            assert waiting.recv(64) == b"waiting\n"


def test_a_server_at_its_limit_can_be_shut_down(system: str) -> None:
    """It waits for no child to end."""
    server = Limited()
    server.max_children = 1
    with nothing_left_behind(), RunningServer(server, 0.01) as running:
        with running.connect() as first, running.connect():
            server.wait_limit()
            running.shutdown()
            assert running.wait_ended() is None
            assert len(server.active_children or ()) == 1
            assert ask(first, b"last words\n") == b"last words\n"


def test_a_server_at_its_limit_can_be_closed(system: str) -> None:
    server = Limited()
    server.max_children = 1
    with nothing_left_behind(), RunningServer(server, 0.01) as running:
        with running.connect() as first:
            server.wait_limit()
            closing = Call(server.server_close)
            assert running.wait_ended() is None
            assert ask(first, b"last words\n") == b"last words\n"
            closing.result()


def test_a_server_that_was_at_its_limit_serves_again(system: str) -> None:
    server = Limited()
    server.max_children = 1
    with nothing_left_behind():
        with RunningServer(server, 0.01) as running:
            with running.connect() as first:
                server.wait_limit()
                running.shutdown()
                running.wait_ended()
                again = Call(server.serve_forever, 0.01)
                assert ask(first, b"first\n") == b"first\n"
            assert running.ask(b"second\n") == b"second\n"
            running.shutdown()
            again.result()


def test_a_limit_can_be_raised_while_children_wait() -> None:
    """The next look at the children finds room."""
    server = Limited()
    server.max_children = 1
    with nothing_left_behind(), RunningServer(server, 0.01) as running:
        with running.connect() as first, running.connect() as second:
            server.wait_limit()
            server.max_children = 2
            assert ask(second, b"second\n") == b"second\n"
            assert ask(first, b"first\n") == b"first\n"


@pytest.mark.parametrize("limit", ["max_children", "max_connections"])
def test_single_requests_keep_to_the_limit(system: str, limit: str) -> None:
    """`handle_request` waits for a child to end as it waits for a client."""
    with nothing_left_behind(), with_settings(**{limit: 1}) as server:
        with connect(server) as first, connect(server) as second:
            server.handle_request()
            handling = Call(server.handle_request)
            assert handling.is_running()
            assert ask(first, b"first\n") == b"first\n"
            handling.result()
            assert ask(second, b"second\n") == b"second\n"


@pytest.mark.parametrize("limit", ["max_children", "max_connections"])
def test_a_single_request_at_the_limit_times_out(limit: str) -> None:
    with nothing_left_behind(), with_settings(**{limit: 1}) as server:
        with connect(server) as first, connect(server) as second:
            server.handle_request()
            server.timeout = 0.01
            for _ in range(3):
                server.handle_request()
            assert len(server.active_children or ()) == 1
            assert ask(first, b"first\n") == b"first\n"
            server.timeout = None
            server.handle_request()
            assert ask(second, b"second\n") == b"second\n"


def test_a_server_that_cannot_rest_waits_at_its_limit(system: str) -> None:
    """One that is not ours: the next request waits in the acceptor for a child to end."""

    class Foreign(ForkingMixIn, socketserver.TCPServer):
        max_children = 1

    with nothing_left_behind():
        handler: Any = Echo
        server: Any = Foreign(LOOPBACK, handler)
        serving = Call(server.serve_forever, 0.01)
        with connect(server) as first, connect(server) as second:
            eventually(lambda: server.active_children, "the first has a child")
            assert ask(first, b"first\n") == b"first\n"
            assert ask(second, b"second\n") == b"second\n"
        Call(server.shutdown).result()
        serving.result()
        Call(server.server_close).result()


# --- closing ----------------------------------------------------------------------------


def test_closing_waits_for_the_children(statuses: list[int]) -> None:
    with nothing_left_behind(), with_settings() as server, connect(server) as client:
        server.handle_request()
        closing = Call(server.server_close)
        client.sendall(b"last words\n")
        assert client.recv(64) == b"last words\n"
        closing.result()
        assert statuses == [0]


def test_closing_does_not_wait_when_asked_not_to() -> None:
    with nothing_left_behind(), with_settings(block_on_close=False, max_children=1) as server:
        with connect(server) as client:
            server.handle_request()
            Call(server.server_close).result()
            assert len(server.active_children or ()) == 1
            assert ask(client, b"last words\n") == b"last words\n"
        server.collect_children(blocking=True)


# --- on systems with fewer means --------------------------------------------------------


def test_nothing_is_opened_for_children_that_are_gone() -> None:
    """A pidfd cannot be had for a process that was collected."""
    with nothing_left_behind():
        assert forks._open_exits({1 << 22}) == ()
        assert forks._open_exits(()) == ()


def test_the_descriptors_of_the_limit_are_closed_in_the_end() -> None:
    with nothing_left_behind(), with_settings(max_children=1) as server:
        with connect(server) as client:
            server.handle_request()
            (exit_of_child,) = server._exits
            assert os.get_inheritable(exit_of_child) is False
            assert ask(client, b"hello\n") == b"hello\n"
        Call(server.server_close).result()
        assert server._exits == ()


def test_the_descriptors_of_the_limit_are_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loop looks for children while another thread closes the server."""
    closed: list[int] = []
    close = os.close

    def close_beside(descriptor: int) -> None:
        closed.append(descriptor)
        if len(closed) == 1:  # in the middle of it, the other thread comes
            server._close_exits()
        close(descriptor)

    with nothing_left_behind(), with_settings(max_children=1) as server:
        with connect(server) as client:
            server.handle_request()
            exits = list(server._exits)
            with monkeypatch.context() as patches:
                patches.setattr(os, "close", close_beside)
                server._close_exits()
            assert closed == exits
            assert ask(client, b"hello\n") == b"hello\n"


def test_a_server_made_before_a_fork_serves_after_it() -> None:
    """In the child, with children of its own."""

    def serve_two() -> None:
        for _ in range(2):
            server.handle_request()
        server.server_close()

    with with_settings() as server:
        serving = Call(in_child, serve_two)
        for turn in range(2):
            with connect(server) as client:
                assert ask(client, b"%d\n" % turn) == b"%d\n" % turn
        assert serving.result() == 0


def test_certificates_are_looked_at_before_the_fork(authority: Authority) -> None:
    """Each child would load the same files again, or tell again that they are wrong."""
    pair, parent = authority.issue(), os.getpid()
    with Journal() as journal:

        class Noted(Certificates):
            def refresh(self, server: Any = None, *, now: float | None = None) -> ssl.SSLContext:
                journal.note("parent" if os.getpid() == parent else "child")
                return super().refresh(server, now=now)

        certificates = Noted(pair.certificate, pair.key)
        with RunningServer(with_settings(ssl_context=certificates)) as running:
            for _ in range(2):
                plain = running.connect()
                with authority.client().wrap_socket(plain, server_hostname="localhost") as client:
                    client.sendall(b"hello\n")
                    assert received(client) == b"hello\n"
        assert journal.entries() == ["parent", "parent"]
