from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from portico import TCPServer, ThreadingMixIn, ThreadingTCPServer, ThreadingUDPServer
from portico.engines.threads import _NoThreads, _Threads
from tests.support import (
    PATIENCE,
    Call,
    RunningServer,
    ask,
    connect,
    eventually,
    nothing_left_behind,
    received,
)

LOOPBACK = ("127.0.0.1", 0)


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


class Gate:
    """A handler that stays until it is let go."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, request: object, client_address: object, server: object) -> None:
        self.threads.append(threading.current_thread())
        self.entered.release()
        assert self.open.wait(PATIENCE)

    def wait_entered(self) -> threading.Thread:
        assert self.entered.acquire(timeout=PATIENCE)
        return self.threads[-1]


def with_settings(handler: Callable[..., object], **settings: object) -> ThreadingTCPServer:
    server: ThreadingTCPServer = type("Server", (ThreadingTCPServer,), settings)(LOOPBACK, handler)
    return server


# --- where a request runs ---------------------------------------------------------------


def test_each_request_has_a_thread_of_its_own() -> None:
    gate = Gate()
    with nothing_left_behind(), RunningServer(ThreadingTCPServer(LOOPBACK, gate)) as running:
        with running.connect(), running.connect():
            one, other = gate.wait_entered(), gate.wait_entered()
            gate.open.set()
        assert len({one, other} | set(gate.threads)) == 2
        assert running.thread not in {thread.ident for thread in gate.threads}


@pytest.mark.parametrize("daemon", [False, True])
def test_a_thread_is_a_daemon_when_asked_for(daemon: bool) -> None:
    gate = Gate()
    server = with_settings(gate, daemon_threads=daemon)
    with nothing_left_behind(), RunningServer(server) as running, running.connect():
        assert gate.wait_entered().daemon is daemon
        gate.open.set()


def test_the_thread_runs_the_programs_process_request_thread() -> None:
    """Programs extend it, to prepare what belongs to a thread, and have other names for it."""
    called: list[Any] = []

    class Server(ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            called.append(threading.current_thread())
            super().process_request_thread(request, client_address)
            called.append(request.fileno())

    with Server(LOOPBACK, do_nothing) as server, connect(server) as client:
        server.handle_request()
        assert received(client) == b""
    thread, descriptor = called
    assert thread is not threading.current_thread()
    assert descriptor == -1, "the request is closed when the base is done"


# --- closing ----------------------------------------------------------------------------


def test_closing_waits_for_the_threads() -> None:
    gate = Gate()
    with nothing_left_behind(), RunningServer(ThreadingTCPServer(LOOPBACK, gate)) as running:
        with running.connect():
            thread = gate.wait_entered()
            running.shutdown()
            closing = Call(running.server.server_close)
            eventually(lambda: running.server.socket.fileno() == -1, "the listener is closed")
            assert closing.is_running()
            gate.open.set()
            closing.result()
            assert not thread.is_alive()


def test_closing_waits_for_a_thread_that_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The acceptor is in the middle of it when another thread closes the server."""
    starting, joining, go = threading.Event(), threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def start(self) -> None:
            starting.set()
            assert go.wait(PATIENCE)
            super().start()

    class Noting(_Threads):
        def join(self) -> None:
            joining.set()
            super().join()

    gate = Gate()
    with nothing_left_behind(), ThreadingTCPServer(LOOPBACK, gate) as server:
        server._threads = Noting()
        handling = Call(server.handle_request)
        with monkeypatch.context() as patches:
            patches.setattr(threading, "Thread", Slow)
            with connect(server):
                assert starting.wait(PATIENCE)
        closing = Call(server.server_close)
        assert joining.wait(PATIENCE)
        go.set()
        thread = gate.wait_entered()
        assert closing.is_running()
        gate.open.set()
        handling.result()
        closing.result()
        assert not thread.is_alive()


@pytest.mark.parametrize("setting", [{"daemon_threads": True}, {"block_on_close": False}])
def test_closing_does_not_wait_when_asked_not_to(setting: dict[str, bool]) -> None:
    gate = Gate()
    with nothing_left_behind(), RunningServer(with_settings(gate, **setting)) as running:
        with running.connect() as client:
            thread = gate.wait_entered()
            running.shutdown()
            Call(running.server.server_close).result()
            assert thread.is_alive()
            gate.open.set()
            assert received(client) == b""


@pytest.mark.parametrize("block_on_close", [False, True])
def test_a_handler_may_close_the_server(block_on_close: bool) -> None:
    """It waits for all threads but its own."""
    closed = threading.Event()

    def close(request: object, client_address: object, server: TCPServer) -> None:
        server.shutdown()
        server.server_close()
        closed.set()

    server = with_settings(close, block_on_close=block_on_close)
    with nothing_left_behind(), RunningServer(server) as running, running.connect():
        assert closed.wait(PATIENCE)


def test_a_server_that_served_nobody_has_nothing_to_wait_for() -> None:
    with ThreadingTCPServer(LOOPBACK, do_nothing) as server:
        assert isinstance(server._threads, _NoThreads)
        Call(server.server_close).result()
        Call(server.server_close).result()


# --- the threads that are remembered ----------------------------------------------------


def test_only_threads_to_wait_for_are_remembered() -> None:
    for setting, remembered in (
        ({}, 1),
        ({"daemon_threads": True}, 0),
        ({"block_on_close": False}, 0),
    ):
        gate = Gate()
        with with_settings(gate, **setting) as server, connect(server) as client:
            server.handle_request()
            thread = gate.wait_entered()
            assert len(server._threads.pop_all()) == remembered
            gate.open.set()
            assert received(client) == b""
        thread.join(PATIENCE)


def test_servers_do_not_share_their_threads() -> None:
    """The class has an object that remembers nothing; each server makes its own list."""
    with ThreadingTCPServer(LOOPBACK, do_nothing) as one, connect(one) as client:
        one.handle_request()
        assert received(client) == b""
        assert isinstance(vars(one)["_threads"], _Threads)
        assert isinstance(ThreadingMixIn._threads, _NoThreads)
        with ThreadingTCPServer(LOOPBACK, do_nothing) as other:
            assert "_threads" not in vars(other)


def test_threads_that_ended_are_forgotten() -> None:
    """However many requests there are, the list stays short."""
    with RunningServer(ThreadingTCPServer(LOOPBACK, do_nothing)) as running:
        for _ in range(100):
            with running.connect() as client:
                assert received(client) == b""
        threads = running.server._threads
        assert isinstance(threads, _Threads)

        def is_empty() -> bool:
            threads.reap()
            return not threads

        # A thread ends a moment after its client has seen the end.
        eventually(is_empty, "none is remembered")


def test_the_list_of_a_busy_server_does_not_grow() -> None:
    with RunningServer(ThreadingTCPServer(LOOPBACK, do_nothing)) as running:
        longest, before = 0, threading.active_count()
        for _ in range(300):
            with running.connect() as client:
                assert received(client) == b""
            eventually(lambda: threading.active_count() < before + 7, "most threads have ended")
            threads = running.server._threads
            longest = max(longest, len(threads) if isinstance(threads, _Threads) else 0)
    assert longest <= 16


class Ended(threading.Thread):
    """A thread that has run."""

    def __init__(self) -> None:
        super().__init__()
        self.start()
        self.join()


class Alive(threading.Thread):
    """A thread that counts as running, and takes note of who joins it."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = False

    def is_alive(self) -> bool:
        return True

    def join(self, timeout: float | None = None) -> None:
        self.joined = True


def test_a_daemon_is_not_remembered() -> None:
    threads = _Threads()
    threads.append(threading.Thread(daemon=True))
    assert list(threads) == []


def test_a_list_is_looked_through_when_it_has_doubled() -> None:
    """Looking at every thread for every request would cost more the busier a server is."""
    threads = _Threads()
    alive = [Alive() for _ in range(5)]
    for thread in (*alive, *(Ended() for _ in range(3))):
        threads.append(thread)
    assert len(threads) == 8
    threads.append(Ended())
    assert len(threads) == 6, "the three that had ended are forgotten"
    for _ in range(4):
        threads.append(Ended())
    assert len(threads) == 10, "the next look is at twice as many"
    threads.append(Ended())
    assert threads[:5] == alive
    assert len(threads) == 6


def test_a_thread_that_has_not_started_is_not_forgotten() -> None:
    """Programs that override `process_request` remember it before they start it."""
    threads = _Threads()
    thread = threading.Thread()
    threads.append(thread)
    threads.reap()
    assert list(threads) == [thread]


def test_a_thread_that_has_ended_is_forgotten() -> None:
    threads = _Threads([Ended(), Ended()])
    threads.reap()
    assert list(threads) == []


def test_all_threads_can_be_taken() -> None:
    alive = Alive()
    threads = _Threads([alive])
    assert threads.pop_all() == [alive]
    assert list(threads) == []


def test_joining_waits_for_each_and_forgets_it() -> None:
    alive = [Alive(), Alive()]
    threads = _Threads(alive)
    threads.join()
    assert [thread.joined for thread in alive] == [True, True]
    assert list(threads) == []


def test_a_thread_that_has_not_begun_is_not_waited_for() -> None:
    """Who was about to start it is interrupted by the signal handler that waits."""
    threads = _Threads([threading.Thread()])
    threads.join()
    assert list(threads) == []


def test_a_thread_does_not_wait_for_itself() -> None:
    alive = Alive()
    threads = _Threads([threading.current_thread(), alive])
    threads.join()
    assert alive.joined
    assert list(threads) == []


def test_remembering_and_forgetting_is_safe_in_many_threads() -> None:
    threads = _Threads()
    together = threading.Barrier(4)
    alive = Alive()

    def come_and_go() -> None:
        together.wait()
        for _ in range(500):
            threads.append(alive)
            threads.reap()

    for call in [Call(come_and_go) for _ in range(4)]:
        call.result()
    assert len(threads.pop_all()) == 2000


def test_no_threads_remembers_nothing() -> None:
    nothing = _NoThreads()
    nothing.append(Alive())
    nothing.reap()
    nothing.join()
    assert nothing.pop_all() == []


# --- a thread that cannot start ---------------------------------------------------------


def test_a_request_without_a_thread_is_closed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The failure is reported, later requests are served, and nothing is waited for in the end."""

    class Unstartable(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    def answer(request: Any, client_address: object, server: object) -> None:
        request.sendall(request.recv(64))

    with nothing_left_behind(), ThreadingTCPServer(LOOPBACK, answer) as server:
        with monkeypatch.context() as patches, connect(server) as client:
            patches.setattr(threading, "Thread", Unstartable)
            server.handle_request()
            assert received(client) == b""
        with connect(server) as client:
            server.handle_request()
            assert ask(client, b"hello") == b"hello"
    assert "RuntimeError: can't start new thread" in capfd.readouterr().err


# --- draining ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"daemon_threads": True}, {"block_on_close": False}], ids=str
)
def test_a_drain_waits_for_the_handlers_of_datagrams(settings: dict[str, object]) -> None:
    """They answer by the listener, so it stays open for them whatever kind their thread is."""
    gate = Gate()

    def answer(request: Any, client_address: Any, server: Any) -> None:
        gate(request, client_address, server)
        packet, listener = request
        listener.sendto(packet, client_address)

    server = type("Server", (ThreadingUDPServer,), settings)(LOOPBACK, answer)
    with nothing_left_behind(), RunningServer(server) as running, running.connect() as client:
        client.send(b"word")
        gate.wait_entered()
        draining = Call(server.drain)
        assert server.draining.wait(PATIENCE)
        assert draining.is_running()
        gate.open.set()
        assert client.recv(64) == b"word"
        draining.result()


def test_a_datagram_whose_thread_cannot_start_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ThreadingUDPServer(LOOPBACK, do_nothing)
    server.daemon_threads = True

    def fail(_: object) -> None:
        raise RuntimeError("no thread left")

    with server:
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            server.process_request((b"", server.socket), None)
        assert server._requests_under_way() == 0
