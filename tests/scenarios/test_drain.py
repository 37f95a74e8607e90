"""A drain ends the idle, waits for the busy, cuts the rest, and its report adds up."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import socket
import socketserver
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest

import portico
from portico import BaseRequestHandler, PhaseError, TCPServer
from portico.lifecycle import DrainReport
from tests.scenarios.served import CHUNK, CONCURRENT, ENGINES, Served, served
from tests.support import (
    PATIENCE,
    Call,
    RunningServer,
    eventually,
    goodbye,
    nothing_left_behind,
    received,
    running_program,
)

pytestmark = pytest.mark.long

IDLE = 1000
BUSY = 200
TIMEOUT = 5.0
"""Seconds that the busy ones have: far more than they need."""

SOON = 0.5
"""Seconds in which the idle ones are to end."""

ROUNDS = 4
"""Rounds at most of what is measured: a busy machine delays anybody.  The first that is within the
limit is enough."""

TICK = 0.05
"""Seconds after which the kernel's clock, in ticks of up to 10 ms, shows which byte was the last:
one that comes in the same tick as the reply before it may be part of what that replies to."""

LARGE = 16 * len(CHUNK)
"""Bytes of an answer that is more than all buffers hold."""

DESCRIPTORS = IDLE + BUSY + 200


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Allow this process, and the server, as many descriptors as there are clients."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < DESCRIPTORS:
        pytest.skip(f"{DESCRIPTORS} descriptors are needed, {before[1]} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], DESCRIPTORS), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Listening:
    """What clients hear until their connections end, and when that is."""

    def __init__(self, clients: dict[str, list[socket.socket]]) -> None:
        self.heard: dict[socket.socket, bytes] = {}
        self.ended: dict[socket.socket, float] = {}
        self._selector = selectors.DefaultSelector()
        for kind, sockets in clients.items():
            for client in sockets:
                client.setblocking(False)
                self.heard[client] = b""
                if kind != "deaf":
                    self._selector.register(client, selectors.EVENT_READ)

    def listen(self, until: float) -> None:
        """Hear what comes until an instant, or until nobody is left."""
        while self._selector.get_map() and (remaining := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(remaining):
                client: Any = key.fileobj
                try:
                    data = client.recv(1 << 20)
                except ConnectionResetError:
                    data = b""
                self.heard[client] += data
                if not data:
                    self._selector.unregister(client)
                    self.ended[client] = time.monotonic()


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_drain_gives_each_connection_what_it_is_due(engine: str) -> None:
    """A thousand are idle; two hundred are busy, in four ways.

    ``prompt`` complete their request in time and are answered; ``slow`` read a large answer, which
    is under way when the drain begins, to its end in time; ``mute`` never complete theirs; ``deaf``
    do not read the large answer, so their handlers are cut in the middle of it.

    On the pool an idle connection holds a worker, so that there is a worker for each.
    """
    delays: list[float] = []
    while not delays or (delays[-1] >= SOON and len(delays) < ROUNDS):
        delays.append(drain_all(engine))
    assert delays[-1] < SOON


def drain_all(engine: str) -> float:
    """Drain them all; return after how many seconds the idle ones saw the end.

    Not the last tenth: on a machine with other work, some ends are seen late.
    """
    settings: dict[str, Any] = {"max_workers": IDLE + BUSY + 10} if engine == "pool" else {}
    kinds = {"idle": IDLE, "prompt": 80, "slow": 40, "mute": 40, "deaf": 40}
    assert sum(kinds.values()) == IDLE + BUSY
    with (
        served(engine, request_queue_size=1024, send_buffer=65536, **settings) as server,
        ExitStack() as stack,
    ):
        clients = {kind: connect_many(stack, server, count) for kind, count in kinds.items()}
        time.sleep(TICK)
        for client in clients["prompt"] + clients["mute"]:
            client.sendall(b"take 10\n12345")
        for client in clients["slow"] + clients["deaf"]:
            client.sendall(b"give %d\n" % LARGE)
        listening = Listening(clients)
        time.sleep(1)  # until nothing moves any more, as it is between two requests
        server.say(f"drain {TIMEOUT}")
        began = server.hear()["began"]
        listening_to_all = Call(listening.listen, began + PATIENCE)
        time.sleep(1)  # the busy ones take their time
        for client in clients["prompt"]:
            client.sendall(b"67890")
        report = DrainReport(**server.hear())
        print(f"{engine}: {report}")
        listening_to_all.result()
        delays: dict[str, list[float]] = {
            kind: [listening.ended[client] - began for client in clients[kind]]
            for kind in clients
            if kind != "deaf"
        }
        for kind, values in delays.items():
            print(f"    {kind}: {min(values):.2f}-{max(values):.2f} s")
        assert all(listening.heard[client] == b"hello\n" for client in clients["idle"])
        assert all(listening.heard[client] == b"hello\ntaken\n" for client in clients["prompt"])
        assert all(len(listening.heard[client]) == 6 + LARGE for client in clients["slow"])
        assert all(listening.heard[client] == b"hello\n" for client in clients["mute"])
        assert min(delays["mute"]) >= TIMEOUT - 0.01
        for client in clients["deaf"]:
            client.setblocking(True)
            assert len(goodbye(client)) < LARGE
        finished = kinds["prompt"] + kinds["slow"]
        assert (report.connections, report.idle) == (IDLE + BUSY, IDLE)
        assert (report.finished, report.forced) == (finished, kinds["mute"] + kinds["deaf"])
        assert report.seconds >= TIMEOUT
        assert server.end() == ""
    soon: float = quantiles(delays["idle"], n=10)[-1]
    return soon


def connect_many(stack: ExitStack, server: Served, count: int) -> list[socket.socket]:
    """Connect clients that have been answered once, so that their handlers run."""
    sources = cycle(f"127.0.0.{host}" for host in range(1, 20))
    clients = []
    for _ in range(count):
        client = stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.settimeout(PATIENCE)
        client.bind((next(sources), 0))
        client.connect(server.address)
        client.sendall(b"hello\n")
        clients.append(client)
    for client in clients:
        client.recv(6, socket.MSG_PEEK)
    return clients


# --- from where a drain is asked for ----------------------------------------------------


class LineServer(TCPServer):
    """Hands every line that a client says, and what answers it, to the test."""

    at_once = 1
    """How many handlers have to be asked to drain before the first of them does."""

    def __init__(self, handler: type[BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.reports: list[DrainReport | None] = []
        self.asked: list[BaseRequestHandler] = []


class Drainer(BaseRequestHandler):
    """Drain at the word, then answer; echo everything else."""

    def handle(self) -> None:
        while line := self.request.recv(64):
            if line == b"drain\n":
                self.server.asked.append(self)
                while len(self.server.asked) < self.server.at_once:
                    portico.sleep(0.01)
                self.server.reports.append(self.server.drain(PATIENCE))
            self.request.sendall(line)
            if line == b"drain\n":
                return


def running(engine: str) -> RunningServer[LineServer]:
    server_class: Any = type("Server", (*ENGINES[engine], LineServer), {})
    return RunningServer(server_class(Drainer))


@pytest.mark.parametrize("engine", [*CONCURRENT, "serial"])
def test_a_handler_that_drains_its_server_answers_its_client(engine: str) -> None:
    """Its own connection is no reason for it to wait.

    Where it runs in the thread that serves, it goes on at once, and the loop drains afterwards.
    """
    with nothing_left_behind(), running(engine) as echo:
        with ExitStack() as stack:
            others = [stack.enter_context(echo.connect()) for _ in range(3)]
            if engine != "serial":  # which serves one after the other
                for other in others:
                    other.sendall(b"hello\n")
                    assert other.recv(64) == b"hello\n"
            else:
                for other in others:
                    other.close()
            with echo.connect() as client:
                client.sendall(b"drain\n")
                assert received(client) == b"drain\n"
            if engine != "serial":
                assert [received(other) for other in others] == [b""] * 3
        assert echo.wait_ended() is None
        eventually(lambda: echo.server.drain_report, "the drain is over")
        report = echo.server.drain_report
        assert report is not None
        assert report.forced == 0
        if engine in ("threads", "pool"):
            assert echo.server.reports == [report]
            assert (report.connections, report.idle) == (3, 3)
        else:
            assert echo.server.reports == [None]


@pytest.mark.parametrize("engine", CONCURRENT)
def test_handlers_that_drain_at_once_do_not_wait_for_each_other(engine: str) -> None:
    """The later ones join the first, whose drain must not wait for them in turn.

    Before each has its word, none begins: a client that has said nothing would be given its end.
    """
    with nothing_left_behind(), running(engine) as echo, ExitStack() as stack:
        echo.server.at_once = 5
        clients = [stack.enter_context(echo.connect()) for _ in range(5)]
        for client in clients:
            client.sendall(b"drain\n")
        began = time.monotonic()
        draining = Call(echo.server.drain, PATIENCE)
        assert [received(client) for client in clients] == [b"drain\n"] * 5
        report = draining.result()
        assert time.monotonic() - began < PATIENCE / 2
        assert report is not None
        assert report.forced == 0


@pytest.mark.parametrize("engine", CONCURRENT)
def test_later_calls_of_drain_join_the_first(engine: str) -> None:
    """Whatever time they ask for themselves, they get the report of the one drain."""
    with nothing_left_behind(), running(engine) as echo, echo.connect() as busy:
        busy.sendall(b"hello\n")
        assert busy.recv(64) == b"hello\n"
        calls = [Call(echo.server.drain, timeout) for timeout in (PATIENCE, PATIENCE, PATIENCE)]
        assert received(busy) == b""
        reports = [call.result() for call in calls]
        assert reports == [echo.server.drain_report] * 3
        assert echo.server.drain(0) is echo.server.drain_report
        report = echo.server.drain_report
        assert report is not None
        assert (report.connections, report.forced) == (1, 0)


@pytest.mark.parametrize("engine", [*CONCURRENT, "serial", "forks"])
def test_a_server_that_never_served_does_not_drain(engine: str) -> None:
    """The error names the phase."""
    server_class: Any = type("Server", (*ENGINES[engine], LineServer), {})
    with (
        nothing_left_behind(),
        server_class(Drainer) as server,
        pytest.raises(PhaseError, match="created"),
    ):
        server.drain(1)


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_drain_without_time_closes_all_at_once(engine: str) -> None:
    """Idle ones too: there is no time to find out who is."""
    with nothing_left_behind(), running(engine) as echo, ExitStack() as stack:
        clients = [stack.enter_context(echo.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
        report = Call(echo.server.drain, 0).result()
        assert [goodbye(client) for client in clients] == [b""] * 20
        assert report is not None
        assert report.connections == report.forced + report.idle == 20


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_drain_after_a_shutdown_serves_who_is_in_the_backlog(engine: str) -> None:
    """They are connected, as far as they can tell."""
    with nothing_left_behind(), running(engine) as echo, ExitStack() as stack:
        first = stack.enter_context(echo.connect())
        first.sendall(b"hello\n")
        assert first.recv(64) == b"hello\n"
        echo.shutdown()
        late = [stack.enter_context(echo.connect()) for _ in range(5)]
        for client in late:
            client.sendall(b"I am here\n")
        draining = Call(echo.server.drain, PATIENCE)
        assert [received(client) for client in late] == [b"I am here\n"] * 5
        assert received(first) == b""
        report = draining.result()
        assert report is not None
        assert (report.connections, report.forced) == (6, 0)
        with pytest.raises(ConnectionRefusedError):
            echo.connect()


SIGNALLED = """
import os, signal, socket, sys, threading
import portico
from tests.scenarios.served import ENGINES

class Echo(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)

engine = sys.argv[1]
server_class = type("Server", (*ENGINES[engine], portico.TCPServer), {})
with server_class(("127.0.0.1", 0), Echo) as server:
    signal.signal(signal.SIGTERM, lambda *_: server.drain(float(sys.argv[2])))
    print(server.server_address[1], flush=True)
    server.serve_forever()
    print(server.drain_report.forced, flush=True)
"""


@pytest.mark.parametrize("engine", [*CONCURRENT, "serial", "forks"])
def test_a_signal_handler_in_the_main_thread_may_drain(engine: str) -> None:
    """Where that is the thread that serves, the loop does it when the signal handler is over."""
    with running_program(SIGNALLED, engine, "30") as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
            process.send_signal(signal.SIGTERM)
            if engine in ("serial", "forks"):  # nobody can tell whether it is idle
                client.shutdown(socket.SHUT_WR)
            assert received(client) == b""
        output, errors = process.communicate(timeout=PATIENCE)
        assert (output, errors, process.returncode) == ("0\n", "", 0)


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_second_signal_does_not_wait_for_the_drain_that_it_interrupts(engine: str) -> None:
    """It comes in the middle of that drain, in the same thread."""
    with running_program(SIGNALLED, engine, "30") as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
            time.sleep(TICK)
            client.sendall(b"hel")  # so that it is busy, however long it takes for the rest
            process.send_signal(signal.SIGTERM)
            eventually(lambda: _is_refused(address), "it drains")
            process.send_signal(signal.SIGTERM)
            client.sendall(b"lo\n")
            assert received(client) == b"hello\n"
        output, errors = process.communicate(timeout=PATIENCE)
        assert (output, errors, process.returncode) == ("0\n", "", 0)


def _is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, PATIENCE).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def test_forked_children_finish_or_are_killed_at_the_deadline() -> None:
    """Of those that do not finish, the kernel closes the connection with the process."""
    with nothing_left_behind(), running("forks") as echo, ExitStack() as stack:
        clients = [stack.enter_context(echo.connect()) for _ in range(6)]
        for client in clients:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
        draining = Call(echo.server.drain, 5.0)  # far more than three of them need
        assert echo.server.draining.wait(PATIENCE)
        for client in clients[:3]:
            client.sendall(b"last words\n")
            client.shutdown(socket.SHUT_WR)
            assert received(client) == b"last words\n"
        report = draining.result()
        assert [goodbye(client) for client in clients[3:]] == [b""] * 3
        assert report is not None
        assert (report.connections, report.finished, report.forced) == (6, 3, 3)


def test_forked_children_that_drain_on_the_same_signal_do_not_outlive_the_deadline() -> None:
    """They have the parent's signal handler, and accept nobody from the listener they inherit.

    A service manager sends the signal to parent and children at once; so may the drain itself.
    """
    with running_program(SIGNALLED, "forks", "1") as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
            (child,) = _children_of(process.pid)
            os.kill(child, signal.SIGTERM)
            client.sendall(b"still here\n")
            assert client.recv(64) == b"still here\n"
            process.send_signal(signal.SIGTERM)
            assert goodbye(client) == b""
        output, errors = process.communicate(timeout=PATIENCE)
        assert (output, errors, process.returncode) == ("1\n", "", 0)


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- beside it, the standard library ----------------------------------------------------


def test_the_standard_library_waits_for_an_idle_client_or_leaves_it_hanging() -> None:
    """It has no drain: `server_close` waits without limit, or not at all."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(64):
                self.request.sendall(data)

    class Daemons(socketserver.ThreadingTCPServer):
        daemon_threads = True

    for kind in (socketserver.ThreadingTCPServer, Daemons):
        server = kind(("127.0.0.1", 0), Echo)
        serving = Call(server.serve_forever)
        address = ("127.0.0.1", server.server_address[1])
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
            server.shutdown()
            serving.result()
            closing = Call(server.server_close)
            client.settimeout(1)
            with pytest.raises(TimeoutError):
                client.recv(64)
            assert closing.is_running() is not server.daemon_threads
        closing.result()
