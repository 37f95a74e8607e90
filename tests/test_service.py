from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import address, events, service
from portico.address import InternetAddress, Scheme, UnixAddress
from portico.engines import ENGINES
from portico.errors import ListenerError, SettingError
from portico.listener import resolve
from portico.service import FAMILIES, Service, Tally, server_class

LOOPBACK = "tcp://127.0.0.1:0"


class Echo(portico.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class TellProcess(portico.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"%d" % os.getpid())


def serving(*texts: str, handler: Any = Echo, engine: str = "threads") -> Service:
    return Service(handler, [address.parse(text) for text in texts or [LOOPBACK]], engine)


@contextmanager
def running(made: Service) -> Iterator[Future[list[Tally]]]:
    """Run a service in a thread; it has stopped when the block ends."""
    started = threading.Event()
    unsubscribe = events.subscribe(lambda _: started.set(), events.ServerStarted)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(made.run)
        try:
            assert started.wait(10)
            yield future
        finally:
            unsubscribe()
            made.stop()


def connect(where: address.Address) -> socket.socket:
    if isinstance(where, UnixAddress):
        client = socket.socket(socket.AF_UNIX)
        client.connect(where.socket_address)
    else:
        client = socket.create_connection((where.host or "127.0.0.1", where.port))
    client.settimeout(10)
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
            assert ended.acquire(timeout=10)
    finally:
        unsubscribe()


# ---------------------------------------------------------------------------- making the servers


PREFIXES = {
    "threads": "Threading",
    "forks": "Forking",
    "pool": "ThreadPool",
    "green": "Green",
    "serial": "",
}
"""What the combinations of each engine are called by."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("scheme", "family"), FAMILIES.items())
def test_a_server_is_an_engine_before_a_family(
    engine: str, scheme: Scheme, family: type[portico.TCPServer], tmp_path: Path
) -> None:
    """And is called like the combination of that name, where there is one."""
    text = f"{scheme}:{tmp_path}/a" if scheme.is_unix else f"{scheme}://127.0.0.1:0"
    made = server_class(engine, resolve(address.parse(text)))
    assert issubclass(made, family)
    prefix = PREFIXES[engine]
    assert made.__name__ == f"{prefix}{family.__name__}"
    assert issubclass(made, getattr(portico, f"{prefix}MixIn", portico.BaseServer))
    assert made.allow_reuse_address is (scheme == Scheme.TCP)


def test_the_green_engine_may_have_several_hubs() -> None:
    place = resolve(address.parse(LOOPBACK))
    assert vars(server_class("green", place, hubs=4))["max_hubs"] == 4
    assert "max_hubs" not in vars(server_class("green", place))


@pytest.mark.parametrize(("engine", "hubs"), [("threads", 1), ("serial", 2), ("green", 0)])
def test_other_numbers_of_hubs_are_refused(engine: str, hubs: int) -> None:
    with pytest.raises(SettingError, match=f"^hubs={hubs}: expected ") as caught:
        Service(Echo, [address.parse(LOOPBACK)], engine, hubs=hubs)
    assert (caught.value.name, caught.value.value) == ("hubs", hubs)


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
        assert tallies == [Tally(made.addresses[0], served=1, refused=0, cut_off=0)]


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
    assert future.result() == [
        Tally(where, served=3 if where == first else 1, refused=0, cut_off=0)
        for where in (first, *others)
    ]


@pytest.mark.parametrize("engine", ["threads", "forks", "pool"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_client_that_stays_is_cut_off(engine: str, number: int) -> None:
    """It is told at the end, and nobody waits for it."""
    made = serving(*[LOOPBACK] * number, engine=engine)
    first, *others = made.addresses
    with connect(first) as client:
        with running(made) as future:
            echo(client)
        assert future.result() == [
            Tally(first, served=0, refused=0, cut_off=1),
            *(Tally(where, served=0, refused=0, cut_off=0) for where in others),
        ]
        if engine == "forks":  # a thread ends with the program, a process has to be told
            assert client.recv(64) == b""


def test_a_datagram_is_a_request() -> None:
    class Reply(portico.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.packet)

    made = serving("udp://127.0.0.1:0", handler=Reply)
    (where,) = made.addresses
    assert isinstance(where, InternetAddress)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        with running(made) as future, closed(1):
            client.sendto(b"word", (where.host, where.port))
            assert client.recv(64) == b"word"
    assert future.result() == [Tally(where, served=1, refused=0, cut_off=0)]


def test_a_refused_request_was_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portico.TCPServer, "verify_request", lambda *_: False)
    made = serving()
    with running(made) as future, connect(made.addresses[0]) as client:
        assert client.recv(64) == b""
    assert future.result() == [Tally(made.addresses[0], served=0, refused=1, cut_off=0)]


def test_requests_of_other_servers_are_not_counted() -> None:
    made, other = serving(), serving()
    where = other.addresses[0]
    with running(made) as future, running(other), closed(1), connect(where) as client:
        echo(client)
        client.shutdown(socket.SHUT_WR)
    assert future.result() == [Tally(made.addresses[0], served=0, refused=0, cut_off=0)]


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
        assert [tally.served + tally.cut_off for tally in future.result(10)] == [1, 1]


@pytest.mark.parametrize("number", [1, 2])
def test_what_ends_a_loop_is_raised_when_the_others_have_stopped(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(portico.TCPServer, "service_actions", fail)
    made = serving(*[LOOPBACK] * number)
    with running(made) as future, connect(made.addresses[0]):
        assert isinstance(future.exception(10), ZeroDivisionError)
    made.close()


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
    monkeypatch.setattr(service, "STOP_PATIENCE", 3600 if again else 0.01)
    ended: list[BaseException] = []

    def handler(_: object, __: object, ___: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            if again:
                signal.raise_signal(signal.SIGTERM)
            threading.Event().wait(10)
        except BaseException as error:
            ended.append(error)
            raise

    made = serving(handler=handler, engine="serial")
    with made.stopped_by_signals(), connect(made.addresses[0]) as client:
        tallies = made.run()
        assert client.recv(64) == b""
    assert [type(error) for error in ended] == [KeyboardInterrupt]
    assert tallies == [Tally(made.addresses[0], served=0, refused=0, cut_off=1)]


def test_handlers_that_hold_their_loops_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are no main thread cannot be interrupted; they end with the program."""
    monkeypatch.setattr(service, "STOP_PATIENCE", 0.01)
    release, entered = threading.Event(), threading.Event()

    def handler(_: object, __: object, ___: object) -> None:
        entered.set()
        release.wait(10)

    made = serving(LOOPBACK, LOOPBACK, handler=handler, engine="serial")
    first, second = made.addresses
    try:
        with running(made) as future, connect(first):
            assert entered.wait(10)
        assert future.result() == [
            Tally(first, served=0, refused=0, cut_off=1),
            Tally(second, served=0, refused=0, cut_off=0),
        ]
    finally:
        release.set()


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
