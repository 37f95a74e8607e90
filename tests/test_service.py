from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import address, descriptors, events, service, signals
from portico.address import InternetAddress, UnixAddress
from portico.engines import ENGINES
from portico.errors import ListenerError, SettingError
from portico.lifecycle import DrainReport
from portico.listener import open_listener
from portico.service import Service
from portico.settings import Settings
from portico.tally import Tally
from tests.support import PATIENCE, Call, eventually, nothing_left_behind, replace
from tests.support import connect as connect_client
from tests.tls import Authority

LOOPBACK = "tcp://127.0.0.1:0"


class Echo(portico.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class TellProcess(portico.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"%d" % os.getpid())


def serving(*texts: str, handler: Any = Echo, **settings: Any) -> Service:
    addresses = [address.parse(text) for text in texts or [LOOPBACK]]
    shared = Settings(**settings)
    return Service([service.Assignment(handler, each, shared) for each in addresses])


def done(tally: Tally) -> tuple[address.BoundAddress, int, int, int]:
    """What a server did, without what became of the connections at its stop."""
    return tally.address, tally.served, tally.refused, tally.cut_off


def drained(tally: Tally) -> tuple[int, int, int]:
    """How many connections of the drain finished, were idle, were closed."""
    assert isinstance(tally.drained, DrainReport)
    return tally.drained.finished, tally.drained.idle, tally.drained.forced


@contextmanager
def running(made: Service) -> Iterator[Future[list[Tally]]]:
    """Run a service in a thread; it has stopped when the block ends."""
    started = threading.Event()
    unsubscribe = events.subscribe(lambda _: started.set(), events.ServerStarted)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(made.run)
        try:
            assert started.wait(PATIENCE)
            yield future
        finally:
            unsubscribe()
            made.stop()


def connect(where: address.BoundAddress) -> socket.socket:
    if isinstance(where, UnixAddress):
        client = socket.socket(socket.AF_UNIX)
        client.connect(where.socket_address)
    else:
        client = socket.create_connection((where.host or "127.0.0.1", where.port))
    client.settimeout(PATIENCE)
    return client


def echo(client: socket.socket) -> None:
    client.sendall(b"word\n")
    assert client.recv(64) == b"word\n"


@contextmanager
def closed(number: int) -> Iterator[None]:
    """Leave the block when so many connections were closed in it."""
    ended = threading.Semaphore(0)
    unsubscribe = events.subscribe(lambda _: ended.release(), events.ConnectionClosed)
    try:
        yield
        for _ in range(number):
            assert ended.acquire(timeout=PATIENCE)
    finally:
        unsubscribe()


# ---------------------------------------------------------------------------- making the servers


"""What the combinations of each engine are called by."""


def test_a_server_has_what_protects_it() -> None:
    with serving(drain_timeout=7, idle_timeout=8, denied_networks=["192.0.2.1"]) as made:
        (server,) = made._servers
        assert (server.drain_timeout, server.idle_timeout) == (7, 8)
        assert (server.request_queue_size, server.handshake_timeout) == (1024, 10)
        assert [str(network) for network in server.denied_networks] == ["192.0.2.1/32"]
        limit, of_peer = server.max_connections, server.max_connections_per_peer
        assert limit is not None
        assert 0 < limit < descriptors.descriptor_limit()
        assert of_peer == max(1, limit // 2)


def test_the_places_are_shared_between_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "descriptor_limit", lambda: 1024)
    with serving(LOOPBACK, LOOPBACK, LOOPBACK) as made:
        assert [server.max_connections for server in made._servers] == [256] * 3


def test_datagrams_are_not_limited_as_connections_are() -> None:
    """They keep no place and have no time; without rules they take the short path."""
    with serving("udp://127.0.0.1:0", handler=print) as made:
        (server,) = made._servers
        assert server._guard.gate is None
        assert server._guard.keeper is None


def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_bound(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.sock"
    with pytest.raises(portico.CertificateError, match="no such file"):
        serving(f"unix:{path}", "tls://127.0.0.1:0", cert=tmp_path / "none.pem")
    assert not path.exists()


@pytest.mark.parametrize(
    ("texts", "settings", "expected"),
    [
        (["tls://127.0.0.1:0"], {}, r"^cert=None: expected a certificate \(and key"),
        ([LOOPBACK], {"cert": "cert.pem"}, r"^cert='cert.pem': expected a tls://HOST:PORT address"),
    ],
)
def test_tls_and_certificates_go_together(
    texts: list[str], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingError, match=expected):
        serving(*texts, **settings)


def test_all_addresses_are_bound_or_none(tmp_path: Path) -> None:
    """What was bound before the one that fails is given back."""
    path = tmp_path / "a.sock"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenerError, match="in use by this very process"):
            serving(f"unix:{path}", taken)
    assert not path.exists()
    assert not events.ConnectionAccepted.subscribers


def test_a_socket_that_cannot_even_be_made_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(ListenerError, match=f"cannot listen on {LOOPBACK}: {os.strerror(24)}"):
        serving(LOOPBACK)


def test_a_closed_service_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with serving(f"unix:{path}", LOOPBACK) as made:
        assert path.is_socket()
        where = made.addresses[1]
    assert not path.exists()
    with pytest.raises(ConnectionRefusedError):
        connect(where)
    assert not events.ConnectionAccepted.subscribers
    made.close()


# ---------------------------------------------------------------------------- serving and stopping


def test_one_address_is_served_in_the_calling_thread() -> None:
    seen: list[tuple[threading.Thread, threading.Thread]] = []

    def handler(_: object, __: object, server: Any) -> None:
        seen.append((threading.current_thread(), caller))
        server.shutdown()

    caller = threading.current_thread()
    with serving(handler=handler, engine="serial") as made:
        with connect(made.addresses[0]):
            tallies = made.run()
        assert seen == [(caller, caller)]
        assert [done(tally) for tally in tallies] == [(made.addresses[0], 1, 0, 0)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [1, 2])
def test_each_request_is_counted_where_it_was_served(
    engine: str, number: int, tmp_path: Path
) -> None:
    texts = [LOOPBACK, f"unix:{tmp_path}/a.sock"][:number]
    made = serving(*texts, handler=TellProcess, engine=engine)
    first, *others = made.addresses
    # What a child of `forks` closes, it closes in its own process.
    closing = 0 if engine == "forks" else 2 + number
    with running(made) as future, closed(closing):
        for where in (first, first, first, *others):
            with connect(where) as client, client.makefile("rb") as replies:
                process = int(replies.read())
            if process != os.getpid():
                with suppress(ChildProcessError):  # the server was faster
                    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert [done(tally) for tally in future.result()] == [
        (where, 3 if where == first else 1, 0, 0) for where in (first, *others)
    ]


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "serial"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_idle_client_is_given_end_of_file(engine: str, number: int) -> None:
    """Its handler ends by itself, and the stop does not wait for its time to be over."""
    made = serving(*[LOOPBACK] * number, engine=engine, drain_timeout=PATIENCE)
    first, *others = made.addresses
    with connect(first) as client:
        with running(made) as future:
            echo(client)
        tallies = future.result(PATIENCE)
        assert client.recv(64) == b""
    assert [done(tally) for tally in tallies] == [
        (first, 1, 0, 0),
        *((where, 0, 0, 0) for where in others),
    ]
    assert [drained(tally) for tally in tallies] == [(0, 1, 0), *[(0, 0, 0)] * len(others)]


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "serial", "forks"])
def test_a_busy_client_is_answered_before_the_end(engine: str, tmp_path: Path) -> None:
    """The handler is at work when the stop comes, and finishes."""
    release = tmp_path / "release"

    class Work(portico.StreamRequestHandler):
        def handle(self) -> None:
            question = self.rfile.readline()
            pause = 0.01
            while not release.exists():
                portico.sleep(pause) if engine == "green" else threading.Event().wait(pause)
            self.wfile.write(question.upper())

    made = serving(handler=Work, engine=engine, drain_timeout=PATIENCE)
    with running(made) as future, connect(made.addresses[0]) as client:
        client.sendall(b"word\n")
        eventually(lambda: made._servers[0]._guard.connections or len(_children_of(made)))
        made.stop()
        (server,) = made._servers
        assert server.draining.wait(PATIENCE)
        release.touch()
        assert client.makefile("rb").read() == b"WORD\n"
        (tally,) = future.result(PATIENCE)
    assert done(tally) == (made.addresses[0], 1, 0, 0)
    assert drained(tally) == (1, 0, 0)


def _children_of(made: Service) -> Any:
    return getattr(made._servers[0], "active_children", None) or ()


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "serial", "forks"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_busy_client_is_cut_off_when_the_time_is_over(
    engine: str, number: int, tmp_path: Path
) -> None:
    """It is told at the end: as closed by the drain, and as a request that was not served."""
    has_read = tmp_path / "read"

    class Await(portico.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            has_read.touch()
            self.rfile.readline()  # the last word is the client's: it is the server's turn

    made = serving(*[LOOPBACK] * number, handler=Await, engine=engine, drain_timeout=0.3)
    first, *others = made.addresses
    with running(made) as future, connect(first) as client:
        client.sendall(b"word\n")
        eventually(has_read.exists)  # what nobody has read would make of the end a reset
        made.stop()
        tallies = future.result(PATIENCE)
        assert client.recv(64) == b""
    assert [done(tally) for tally in tallies] == [
        (first, 0, 0, 1),
        *((where, 0, 0, 0) for where in others),
    ]
    assert drained(tallies[0]) == (0, 0, 1)


def test_a_datagram_is_a_request() -> None:
    class Reply(portico.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.packet)

    made = serving("udp://127.0.0.1:0", handler=Reply)
    (where,) = made.addresses
    assert isinstance(where, InternetAddress)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        with running(made) as future, closed(1):
            client.sendto(b"word", (where.host, where.port))
            assert client.recv(64) == b"word"
    assert [done(tally) for tally in future.result()] == [(where, 1, 0, 0)]


def test_a_refused_request_was_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portico.TCPServer, "verify_request", lambda *_: False)
    made = serving()
    with running(made) as future, connect(made.addresses[0]) as client:
        assert client.recv(64) == b""
    assert [done(tally) for tally in future.result()] == [(made.addresses[0], 0, 1, 0)]


def test_requests_of_other_servers_are_not_counted() -> None:
    made, other = serving(), serving()
    where = other.addresses[0]
    with running(made) as future, running(other), closed(1), connect(where) as client:
        echo(client)
        client.shutdown(socket.SHUT_WR)
    assert [done(tally) for tally in future.result()] == [(made.addresses[0], 0, 0, 0)]


def test_a_loop_that_goes_round_is_not_overdue_and_one_that_is_held_is() -> None:
    """The serial engine's is held by each handler."""
    beats: queue.SimpleQueue[None] = queue.SimpleQueue()
    with serving(LOOPBACK, "udp://127.0.0.1:0", engine="serial") as made:
        assert made.overdue() == []  # nobody wants to know
        made.beat(lambda: beats.put(None), 0.02)
        with running(made):
            beats.get(timeout=PATIENCE)
            client = connect(made.addresses[0])
            echo(client)
            eventually(lambda: made.overdue() == [made.servers[0]], "its handler holds it")
            while not beats.empty():
                beats.get()
            client.close()
            beats.get(timeout=PATIENCE)


# Children that the test itself forks would keep its clients open.
@pytest.mark.parametrize("engine", [each for each in ENGINES if each != "forks"])
def test_a_loop_that_is_watched_beats_whether_anybody_comes_or_not(engine: str) -> None:
    beats: queue.SimpleQueue[None] = queue.SimpleQueue()
    with serving(engine=engine) as made:
        made.beat(lambda: beats.put(None), 0.02)
        assert "service_actions" not in vars(made.servers[0])  # which is the program's
        with running(made):
            for _ in range(3):
                beats.get(timeout=PATIENCE)
            is_over = threading.Event()
            clients = [Call(_come_and_go, made.addresses[0], is_over) for _ in range(4)]
            for _ in range(10):
                beats.get(timeout=PATIENCE)
            is_over.set()
            for client in clients:
                client.result()


def _come_and_go(where: address.BoundAddress, is_over: threading.Event) -> None:
    while not is_over.is_set():
        with connect(where) as client:
            echo(client)


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_a_drain_may_leave_those_in_the_backlog_to_others(engine: str) -> None:
    left = threading.Event()
    with closing(open_listener(address.parse(LOOPBACK))) as opened:
        assignment = service.Assignment(Echo, opened.address, Settings(engine=engine))
        made = Service([assignment], [opened.lend()])
        (server,) = made.servers
        assert server.shares_listener
        server.leaves_rest, server.on_left = True, left.set
        with running(made) as future:
            with connect(made.addresses[0]) as client:
                echo(client)
            server.shutdown()
            with connect(opened.address) as waiting:
                waiting.sendall(b"hello\n")
                made.stop()
                (tally,) = future.result()
                assert left.is_set()
                assert done(tally)[1:] == (1, 0, 0)
                with Service([assignment], [opened.lend()]) as other, running(other):
                    assert waiting.recv(64) == b"hello\n"


def test_certificates_are_read_again_when_they_are_asked_to(authority: Authority) -> None:
    pair = authority.issue()
    made = serving("tls://127.0.0.1:0", cert=pair.certificate, key=pair.key)
    with made:
        assert made.reload_certificates()
        pair.certificate.write_text("nothing of the kind")
        assert not made.reload_certificates()


def test_stop_comes_before_run_or_after_it() -> None:
    for number in (1, 2):
        made = serving(*[LOOPBACK] * number)
        made.stop()
        assert [tally.served for tally in made.run()] == [0] * number
        made.stop()


def test_several_servers_that_end_by_themselves_end_the_service() -> None:
    """A handler may call its server's `shutdown`; the service goes on with the others."""

    def handler(request: Any, _: object, server: Any) -> None:
        server.shutdown()
        request.sendall(b"down")

    made = serving(LOOPBACK, LOOPBACK, handler=handler)
    with running(made) as future:
        for where in made.addresses:
            with connect(where) as client:
                assert client.recv(64) == b"down"
        assert [tally.served + tally.cut_off for tally in future.result(PATIENCE)] == [1, 1]


@pytest.mark.parametrize("number", [1, 2])
def test_what_ends_a_loop_is_raised_when_the_others_have_stopped(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(portico.TCPServer, "service_actions", fail)
    made = serving(*[LOOPBACK] * number)
    # Who connects later may come too late: the loop also ends when it has nothing else to do.
    with connect(made.addresses[0]), running(made) as future:
        assert isinstance(future.exception(PATIENCE), ZeroDivisionError)
    made.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_before_the_loop_has_begun_drains_what_has_come(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whoever has connected is served, although the loop ends at once."""
    asked = threading.Event()
    drain, serve_forever = portico.TCPServer.drain, portico.TCPServer.serve_forever

    def note(server: portico.TCPServer, timeout: float | None = None) -> object:
        try:
            return drain(server, timeout)
        except portico.PhaseError:
            asked.set()
            raise

    def wait(server: portico.TCPServer, poll_interval: float = 0.5) -> None:
        assert asked.wait(PATIENCE)
        serve_forever(server, poll_interval)

    monkeypatch.setattr(portico.TCPServer, "drain", note)
    monkeypatch.setattr(portico.TCPServer, "serve_forever", wait)
    made = serving(*[LOOPBACK] * number)
    with connect(made.addresses[0]) as client:
        client.sendall(b"word\n")
        made.stop()
        tallies = made.run()
        assert client.makefile("rb").read() == b"word\n"
    assert [tally.served for tally in tallies] == [1, 0][:number]


@pytest.mark.parametrize("number", [1, 2])
def test_what_ends_a_drain_is_raised(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(server: portico.TCPServer, *_: object) -> None:
        server.shutdown()
        raise ZeroDivisionError

    monkeypatch.setattr(portico.TCPServer, "drain", fail)
    made = serving(*[LOOPBACK] * number)
    with made, running(made) as future:
        made.stop()
        assert isinstance(future.exception(PATIENCE), ZeroDivisionError)


def test_a_loop_that_fails_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with nothing_left_behind():
        monkeypatch.setattr(portico.TCPServer, "serve_forever", fail)
        with serving() as made, pytest.raises(ZeroDivisionError):
            made.run()


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_service(number: int, signum: signal.Signals) -> None:
    """It comes while the loops wait; the handlers of before are back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(_: events.Event) -> None:
        if next(started) == number:
            signal.pthread_kill(main, signum)

    started = iter(range(1, 10))
    unsubscribe = events.subscribe(interrupt, events.ServerStarted)
    try:
        with serving(*[LOOPBACK] * number) as made, made.stopped_by_signals():
            assert [tally.served for tally in made.run()] == [0] * number
            # Too late to interrupt anything.
            signal.raise_signal(signum)
    finally:
        unsubscribe()
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("again", [True, False])
def test_a_handler_that_holds_the_loop_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """At the second signal, or else when its time is up."""
    monkeypatch.setattr(service, "STOP_PATIENCE", 0.1)
    monkeypatch.setattr(signals, "SAME_WISH", 0)
    ended: list[BaseException] = []

    def handler(_: object, __: object, ___: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            if again:
                signal.raise_signal(signal.SIGTERM)
            threading.Event().wait(PATIENCE)
        except BaseException as error:
            ended.append(error)
            raise

    made = serving(handler=handler, engine="serial", drain_timeout=3600 if again else 0.1)
    with made.stopped_by_signals(), connect(made.addresses[0]) as client:
        (tally,) = made.run()
        assert client.recv(64) == b""
    assert [type(error) for error in ended] == [KeyboardInterrupt]
    assert done(tally) == (made.addresses[0], 0, 0, 1)
    assert again or drained(tally) == (0, 0, 1)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("after_its_own", [True, False])
def test_a_second_signal_ends_the_drain_at_once(
    monkeypatch: pytest.MonkeyPatch, number: int, after_its_own: bool
) -> None:
    """Who waits for a handler in another thread is told by the count.

    One that the service has sent itself is none of the two.
    """
    monkeypatch.setattr(signals, "SAME_WISH", 0)
    comes_again, heard = signals.Wish.comes_again, threading.Semaphore(0)

    def note(wish: signals.Wish) -> bool:
        heard.release()
        return comes_again(wish)

    monkeypatch.setattr(signals.Wish, "comes_again", note)
    release, entered = threading.Event(), threading.Event()

    def handler(_: object, __: object, ___: object) -> None:
        entered.set()
        release.wait(PATIENCE)

    made = serving(*[LOOPBACK] * number, handler=handler, drain_timeout=None)
    first = made.addresses[0]
    main = threading.main_thread().ident
    assert main is not None

    def stop_twice() -> None:
        with connect(first):
            assert entered.wait(PATIENCE)
            if after_its_own:
                made.stop_by_signal()
                assert heard.acquire(timeout=PATIENCE)
            signal.pthread_kill(main, signal.SIGTERM)
            assert heard.acquire(timeout=PATIENCE)
            assert made._servers[0].draining.wait(PATIENCE)
            assert not release.is_set()
            signal.pthread_kill(main, signal.SIGTERM)
            assert release.wait(PATIENCE)

    with made.stopped_by_signals():
        stopping = Call(stop_twice)
        try:
            tally, *_ = made.run()
            assert made.has_left_handlers
        finally:
            release.set()
        stopping.result()
    assert (done(tally), tally.drained) == ((first, 0, 0, 1), None)


def test_children_are_ended_though_another_thread_collects_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread of a drain does, which a second signal does not wait for."""
    made = serving(engine="forks")
    (server,) = made.servers
    children, told = {1 << 30, (1 << 30) + 1}, []

    def kill(child: int, number: int) -> None:
        told.append((child, number))
        children.discard(child)  # it has ended, and is collected before the next one is told

    replace(server, active_children=children, collect_children=lambda **_: None)
    monkeypatch.setattr(os, "kill", kill)
    made.close()
    assert sorted(told) == [(1 << 30, signal.SIGTERM), ((1 << 30) + 1, signal.SIGTERM)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_second_signal_that_comes_with_the_first_is_the_same(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(signals, "SAME_WISH", 1e9)
    entered = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def handler(_: object, __: object, ___: object) -> None:
        entered.set()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.pthread_kill(main, signum)
        assert made.servers[0].draining.wait(PATIENCE)

    made = serving(*[LOOPBACK] * number, handler=handler, drain_timeout=None)
    with made.stopped_by_signals(), connect(made.addresses[0]):
        tally, *_ = made.run()
    assert entered.is_set()
    assert done(tally) == (made.addresses[0], 1, 0, 0)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("is_told_first", [True, False])
def test_where_one_signal_ends_at_once_the_others_only_drain(
    number: int, is_told_first: bool
) -> None:
    release, entered = threading.Event(), threading.Event()

    def handler(_: object, __: object, ___: object) -> None:
        entered.set()
        release.wait(PATIENCE)

    made = serving(*[LOOPBACK] * number, handler=handler, drain_timeout=None)
    first = made.addresses[0]
    main = threading.main_thread().ident
    assert main is not None

    def stop() -> None:
        with connect(first):
            assert entered.wait(PATIENCE)
            if is_told_first:
                signal.pthread_kill(main, signal.SIGTERM)
                assert made.servers[0].draining.wait(PATIENCE)
                assert made.is_stopping
                signal.pthread_kill(main, signal.SIGTERM)
            signal.pthread_kill(main, signal.SIGUSR1)
            assert release.wait(PATIENCE)

    before = signal.getsignal(signal.SIGUSR1)
    with made.stopped_by_signals([signal.SIGTERM], at_once=[signal.SIGUSR1]):
        stopping = Call(stop)
        try:
            tally, *_ = made.run()
        finally:
            release.set()
        stopping.result()
    assert (done(tally), tally.drained) == ((first, 0, 0, 1), None)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_ends_at_once_before_it_serves_has_it_not_serve() -> None:
    with serving() as made, made.stopped_by_signals([], at_once=[signal.SIGUSR1]):
        signal.raise_signal(signal.SIGUSR1)
        assert [tally.served for tally in made.run()] == [0]


def test_handlers_that_hold_their_loops_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are no main thread cannot be interrupted; they end with the program."""
    monkeypatch.setattr(service, "STOP_PATIENCE", 0.1)
    release, entered = threading.Event(), threading.Event()

    def handler(_: object, __: object, ___: object) -> None:
        entered.set()
        release.wait(PATIENCE)

    made = serving(LOOPBACK, LOOPBACK, handler=handler, engine="serial", drain_timeout=0.1)
    first, second = made.addresses
    try:
        with running(made) as future, connect(first):
            assert entered.wait(PATIENCE)
            made.stop()
            assert [done(tally) for tally in future.result(PATIENCE)] == [
                (first, 0, 0, 1),
                (second, 0, 0, 0),
            ]
    finally:
        release.set()


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_of_the_program_stops_nothing(number: int) -> None:
    """Nor does an idle service wake now and then to look for signals."""
    main = threading.main_thread().ident
    assert main is not None
    noticed = threading.Event()
    made = serving(*[LOOPBACK] * number)

    def talk() -> None:
        try:
            with connect(made.addresses[0]) as client:
                echo(client)
                signal.pthread_kill(main, signal.SIGUSR1)
                assert noticed.wait(PATIENCE)
                echo(client)
            with connect(made.addresses[0]) as client:
                echo(client)
        finally:
            signal.pthread_kill(main, signal.SIGTERM)

    before = signal.signal(signal.SIGUSR1, lambda *_: noticed.set())
    try:
        with made.stopped_by_signals():
            talking = Call(talk)
            tally, *_ = made.run()
        talking.result()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert tally.served == 2


def test_a_signal_is_noticed_where_the_program_hears_of_signals_itself() -> None:
    """Its descriptor stays; the service looks from time to time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    main = threading.main_thread().ident
    assert main is not None

    is_first = threading.Lock()

    def stop(_: events.Event) -> None:
        if is_first.acquire(blocking=False):  # a second signal would end everything at once
            signal.pthread_kill(main, signal.SIGTERM)

    unsubscribe = events.subscribe(stop, events.ServerStarted)
    try:
        with serving(LOOPBACK, LOOPBACK) as made, made.stopped_by_signals():
            assert [tally.served for tally in made.run()] == [0, 0]
    finally:
        unsubscribe()
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("timeout", [30 * 86400.0, 1e300])
def test_a_drain_may_take_longer_than_the_system_can_wait_at_once(
    number: int, timeout: float
) -> None:
    made = serving(*[LOOPBACK] * number, drain_timeout=timeout)
    main = threading.main_thread().ident
    assert main is not None

    def talk() -> None:
        with connect(made.addresses[0]) as client:
            client.sendall(b"half ")  # so it is not idle
            signal.pthread_kill(main, signal.SIGTERM)
            assert made.servers[0].draining.wait(PATIENCE)
            client.sendall(b"and half\n")
            assert client.recv(64) == b"half and half\n"

    with made.stopped_by_signals():
        talking = Call(talk)
        tally, *_ = made.run()
        talking.result()
    assert drained(tally) == (1, 0, 0)


def test_an_alarm_of_the_program_goes_on() -> None:
    remaining, _ = signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3600)
        with serving() as made, made.stopped_by_signals():
            signal.raise_signal(signal.SIGTERM)
            made.run()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1800
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)


# ---------------------------------------------------------------------------------- portico.serve


@contextmanager
def served(*arguments: Any, number: int = 1, **settings: Any) -> Iterator[list[Any]]:
    """Call `portico.serve` in a thread; gives the servers, which are drained at the end."""
    ready = threading.Semaphore(0)
    servers: list[Any] = []

    def note(event: events.Event) -> None:
        servers.append(event.server)
        ready.release()

    unsubscribe = events.subscribe(note, events.ServerStarted)
    with nothing_left_behind():
        call = Call(lambda: portico.serve(*arguments, **settings))
        try:
            for _ in range(number):
                assert ready.acquire(timeout=PATIENCE)
            yield servers
        finally:
            unsubscribe()
            for server in servers:
                server.drain()
            assert len(call.result()) == number


@pytest.mark.parametrize("engine", ENGINES)
def test_serve_serves_in_any_thread_until_its_servers_are_drained(engine: str) -> None:
    with served(Echo, LOOPBACK, "tcp://localhost:0", number=2, engine=engine) as servers:
        for server in servers:
            with connect_client(server) as client:  # of which a child gets no copy
                echo(client)


def test_serve_takes_parsed_addresses_and_settings() -> None:
    where = address.parse(LOOPBACK)
    with served(Echo, where, max_connections=1, when_full="refuse", farewell=b"full\n") as servers:
        (server,) = servers
        with connect(server.address) as client:
            echo(client)
            with connect(server.address) as other:
                assert other.recv(64) == b"full\n"


def test_serve_speaks_tls(authority: Authority) -> None:
    pair = authority.issue()
    files: dict[str, Any] = {"cert": pair.certificate, "key": pair.key}
    with served(Echo, "tls://127.0.0.1:0", **files) as (server,):
        assert str(server.address).startswith("tls://127.0.0.1:")
        with authority.client().wrap_socket(
            connect(server.address), server_hostname="localhost"
        ) as client:
            echo(client)


@pytest.mark.parametrize(
    ("wanted", "is_refused"), [(None, True), ("required", True), ("optional", False)]
)
def test_serve_asks_clients_for_certificates(
    authority: Authority, wanted: str | None, is_refused: bool
) -> None:
    pair = authority.issue()
    settings: dict[str, Any] = {
        "cert": pair.certificate,
        "key": pair.key,
        "client_ca": authority.certificate,
        "client_certificates": wanted,
    }
    with served(Echo, "tls://127.0.0.1:0", **settings) as (server,):
        context = authority.client(authority.issue("client"))
        with context.wrap_socket(connect(server.address), server_hostname="localhost") as client:
            echo(client)
        with authority.client().wrap_socket(
            connect(server.address), server_hostname="localhost"
        ) as client:
            if is_refused:  # in TLS 1.3 the client learns of it when it reads
                with pytest.raises(OSError, match=r"(?i)certificate required|reset"):
                    client.recv(64)
            else:
                echo(client)


def test_serve_in_the_main_thread_is_stopped_by_a_signal() -> None:
    unsubscribe = events.subscribe(
        lambda _: signal.raise_signal(signal.SIGINT), events.ServerStarted
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        (tally,) = portico.serve(Echo, LOOPBACK)
    finally:
        unsubscribe()
    assert drained(tally) == (0, 0, 0)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "settings", "kind", "expected"),
    [
        ([], {}, SettingError, r"addresses=\(\): expected at least one"),
        (["9000"], {}, portico.AddressError, "expected tcp://:9000"),
        ([LOOPBACK], {"idel_timeout": 5}, SettingError, "the name of a setting: 'idle_timeout'"),
        ([LOOPBACK], {"engine": "thread"}, SettingError, "engine='thread': expected 'threads'"),
        (["udp://:0"], {}, portico.PorticoError, "cannot serve 'Echo': it handles streams"),
    ],
)
def test_what_serve_is_told_wrongly_is_named(
    arguments: list[str], settings: dict[str, Any], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match=expected):
        portico.serve(Echo, *arguments, **settings)
