from __future__ import annotations

import contextvars
import errno
import os
import signal
import socket
import socketserver
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portico import (
    SettingError,
    StreamRequestHandler,
    TCPServer,
    ThreadPoolMixIn,
    ThreadPoolTCPServer,
    ThreadPoolUDPServer,
    events,
)
from portico.engines import pool
from portico.engines.pool import Pool
from portico.events import ConnectionAccepted, ConnectionClosed, RequestStarted
from tests.support import (
    PATIENCE,
    Call,
    Client,
    RunningServer,
    ask,
    connect,
    eventually,
    in_child,
    nothing_left_behind,
    received,
    recorded,
    run_program,
    running_program,
)

LOOPBACK = ("127.0.0.1", 0)

Running = RunningServer[ThreadPoolTCPServer]


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


class Gate:
    """A handler that stays until it is let go, and answers then."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, request: Any, client_address: object, server: object) -> Any:
        self.threads.append(threading.current_thread())
        self.entered.release()
        assert self.go.acquire(timeout=PATIENCE)
        if isinstance(request, socket.socket):
            request.sendall(b"done")

    def wait_entered(self) -> threading.Thread:
        assert self.entered.acquire(timeout=PATIENCE)
        return self.threads[-1]

    def open(self) -> None:
        """Let everybody go, from now on."""
        self.go.release(1000)


def with_settings(handler: Callable[..., object], **settings: object) -> ThreadPoolTCPServer:
    made: ThreadPoolTCPServer = type("Server", (ThreadPoolTCPServer,), settings)(LOOPBACK, handler)
    return made


@contextmanager
def serving(handler: Callable[..., object], **settings: object) -> Iterator[Running]:
    with nothing_left_behind(), RunningServer(with_settings(handler, **settings)) as running:
        yield running


def pool_of(server: ThreadPoolMixIn) -> Pool:
    found = server._pool
    assert found is not None
    return found


def wait_full(server: ThreadPoolMixIn) -> None:
    eventually(lambda: server._pool and server._pool._is_full, "the pool is full")


def wait_queued(server: ThreadPoolMixIn, number: int = 1) -> None:
    eventually(lambda: server._pool and server._pool.queued == number, f"{number} wait")


def wait_idle(server: ThreadPoolMixIn, number: int = 1) -> None:
    eventually(lambda: server._pool and len(server._pool._idle) == number, f"{number} are idle")


# --- where a request runs ---------------------------------------------------------------


def test_an_idle_worker_serves_the_next_request() -> None:
    gate = Gate()
    gate.open()
    with serving(gate) as running:
        for _ in range(5):
            assert running.ask() == b"done"
            wait_idle(running.server)
    assert len(set(gate.threads)) == 1
    assert gate.threads[0].ident != running.thread


def test_workers_are_started_when_none_is_idle_and_not_beyond_the_limit() -> None:
    gate = Gate()
    with serving(gate, max_workers=2) as running, ExitStack() as clients:
        for number in range(1, 3):
            clients.enter_context(running.connect())
            gate.wait_entered()
            assert pool_of(running.server).workers == number
        third = clients.enter_context(running.connect())
        wait_queued(running.server)
        assert pool_of(running.server).workers == 2
        gate.open()
        assert received(third) == b"done"
    assert len(set(gate.threads)) == 2


def test_the_worker_that_served_last_is_taken_first() -> None:
    """So that the others stay idle until they retire."""
    gate = Gate()
    with serving(gate) as running:
        with running.connect() as one, running.connect() as other:
            gate.wait_entered(), gate.wait_entered()
            gate.go.release()
            wait_idle(running.server)
            gate.go.release()
            assert received(one) == received(other) == b"done"
            wait_idle(running.server, 2)
        last = pool_of(running.server)._idle[-1].thread
        gate.open()
        assert running.ask() == b"done"
        assert gate.threads[-1] is last


def test_an_idle_worker_retires_and_another_is_started_when_needed() -> None:
    gate = Gate()
    gate.open()
    with serving(gate, worker_idle_timeout=0.01) as running:
        for _ in range(2):
            assert running.ask() == b"done"
            eventually(lambda: not pool_of(running.server).workers, "it has retired")
    one, other = gate.threads
    assert one is not other


def test_a_worker_that_is_taken_in_the_last_moment_does_not_retire() -> None:
    """Its time is over, and it was given a request just before it could say so."""
    taken = threading.Event()

    class Late:
        def __init__(self, gate: Any) -> None:
            self.gate = gate

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            if timeout == -1:
                return bool(self.gate.acquire(blocking))
            assert taken.wait(PATIENCE)
            return False

        def release(self) -> None:
            self.gate.release()
            taken.set()

        def locked(self) -> bool:
            return bool(self.gate.locked())

    gate = Gate()
    with serving(gate) as running:
        with running.connect():
            gate.wait_entered()
            (worker,) = pool_of(running.server)._workers
            real, worker.gate = worker.gate, Late(worker.gate)  # type: ignore[assignment]
            gate.open()
        wait_idle(running.server)
        with running.connect() as client:
            gate.wait_entered()
            assert real.locked(), "it will wait again when it is idle"
            worker.gate = real
            assert received(client) == b"done"
    assert gate.threads[0] is gate.threads[1]


def test_a_worker_has_the_name_of_its_server() -> None:
    gate = Gate()
    gate.open()
    with serving(gate) as running:
        assert running.ask() == b"done"
    assert gate.threads[0].name == "Server worker"


def test_an_idle_worker_holds_nothing_of_the_last_request() -> None:
    """Neither its socket nor what the handler kept there."""

    class Server(ThreadPoolTCPServer):
        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            left.append(request)

    left: list[Any] = []
    with nothing_left_behind(), RunningServer(Server(LOOPBACK, do_nothing)) as running:
        with running.connect():
            eventually(lambda: left, "it was served")
            reference = weakref.ref(left.pop())
            eventually(lambda: reference() is None, "nobody has it")


def test_each_request_has_a_context_of_its_own() -> None:
    variable = contextvars.ContextVar("variable", default="nobody")
    variable.set("the test")
    threads = set()

    def tell(request: Any, client_address: object, server: object) -> None:
        threads.add(threading.get_ident())
        request.sendall(variable.get().encode())
        variable.set("an earlier request")

    with serving(tell, max_workers=1) as running:
        assert [running.ask() for _ in range(3)] == [b"nobody"] * 3
    assert len(threads) == 1


def test_the_worker_runs_the_programs_process_request_thread() -> None:
    called: list[Any] = []

    class Server(ThreadPoolTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            called.append(threading.current_thread())
            super().process_request_thread(request, client_address)
            called.append(request.fileno())

    with nothing_left_behind(), Server(LOOPBACK, do_nothing) as server, connect(server) as client:
        server.handle_request()
        assert received(client) == b""
    thread, descriptor = called
    assert thread is not threading.current_thread()
    assert descriptor == -1


def test_several_threads_may_hand_over_at_once() -> None:
    """No request is lost, and none is served twice."""
    served: list[object] = []
    together = threading.Barrier(4)

    class Server(ThreadPoolMixIn):
        max_workers = 3
        max_queued = 2
        lock = threading.Lock()

        def process_request_thread(self, request: object, client_address: object) -> None:
            served.append(request)

    server = Server()

    def hand_over(first: int) -> None:
        together.wait()
        for number in range(first, first + 500):
            server.process_request(number, None)

    with nothing_left_behind():
        for call in [Call(hand_over, first * 500) for first in range(4)]:
            call.result()
        pool_of(server).close()
        Call(pool_of(server).wait_ended).result()
    assert sorted(served, key=str) == sorted(range(2000), key=str)


# --- settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_workers", 0, "max_workers=0: expected 1 or more"),
        ("max_queued", -1, "max_queued=-1: expected 0 or more"),
        ("worker_idle_timeout", 0.0, "worker_idle_timeout=0.0: expected more than 0"),
    ],
)
def test_a_bad_setting_fails_when_the_server_is_built(
    name: str, value: float, expected: str
) -> None:
    with nothing_left_behind(), pytest.raises(SettingError) as caught:
        with_settings(do_nothing, **{name: value})
    assert str(caught.value) == expected


def test_a_setting_may_change_while_the_server_serves() -> None:
    gate = Gate()
    with serving(gate, max_workers=1) as running:
        with running.connect():
            gate.wait_entered()
            running.server.max_workers = 2
            with running.connect():
                gate.wait_entered()
                gate.open()


def test_idle_workers_may_wait_without_limit() -> None:
    with serving(do_nothing, worker_idle_timeout=float("inf")) as running:
        assert running.ask() == b""
        wait_idle(running.server)


# --- being full -------------------------------------------------------------------------


@pytest.mark.parametrize("max_queued", [0, 1, 4])
def test_clients_beyond_workers_and_queue_wait_in_the_backlog(max_queued: int) -> None:
    gate = Gate()
    limits = {"max_workers": 2, "max_queued": max_queued}
    with recorded(ConnectionAccepted) as accepted, serving(gate, **limits) as run:
        with ExitStack() as clients:
            connected = [clients.enter_context(run.connect()) for _ in range(10)]
            wait_full(run.server)
            assert pool_of(run.server).queued == max_queued
            assert len(accepted) == 2 + max_queued
            for _ in connected:
                gate.wait_entered()
                assert pool_of(run.server).queued <= max_queued
                assert pool_of(run.server).workers <= 2
                gate.go.release()
            assert [received(client) for client in connected] == [b"done"] * 10
    assert len(set(gate.threads)) <= 2


def test_a_full_server_does_not_look_at_its_listener() -> None:
    """It waits for one descriptor, which is readable when there is room: no polling."""
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=0) as running:
        with running.connect(), running.connect():
            wait_full(running.server)
            before = time.process_time()
            threading.Event().wait(0.3)
            assert time.process_time() - before < 0.15
            gate.open()


def test_a_full_server_can_be_shut_down_at_once() -> None:
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=0) as running, running.connect() as client:
        gate.wait_entered()
        with running.connect():
            wait_full(running.server)
            running.shutdown()
            assert running.wait_ended() is None
        gate.open()
        assert received(client) == b"done"


def test_a_full_server_can_be_closed_by_another_thread() -> None:
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=1) as running:
        with running.connect() as one, running.connect() as other:
            wait_full(running.server)
            closing = Call(running.server.server_close)
            assert running.wait_ended() is None
            assert closing.is_running()
            gate.open()
            closing.result()
            assert received(one) == received(other) == b"done"


def test_handle_request_waits_for_room_within_its_timeout() -> None:
    gate = Gate()
    timeouts: list[None] = []

    class Server(ThreadPoolTCPServer):
        max_workers = 1
        max_queued = 0

        def handle_timeout(self) -> None:
            timeouts.append(None)

    with nothing_left_behind(), Server(LOOPBACK, gate) as server:
        with connect(server) as one, connect(server) as other:
            Call(server.handle_request).result()
            gate.wait_entered()
            server.timeout = 0.01
            Call(server.handle_request).result()
            assert timeouts == [None]
            gate.open()
            server.timeout = PATIENCE
            Call(server.handle_request).result()
            assert received(one) == received(other) == b"done"


def test_datagrams_beyond_workers_and_queue_wait_in_the_kernel() -> None:
    gate = Gate()

    class Server(ThreadPoolUDPServer):
        max_workers = 1
        max_queued = 1

    with nothing_left_behind(), RunningServer(Server(LOOPBACK, gate)) as running:
        with running.connect() as client:
            for _ in range(5):
                client.send(b"datagram")
            gate.wait_entered()
            wait_full(running.server)
            assert pool_of(running.server).queued == 1
            assert len(gate.threads) == 1
            gate.open()
            for _ in range(4):
                gate.wait_entered()
    assert len(gate.threads) == 5


def no_pipe() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_without_a_descriptor_for_it_the_acceptor_takes_one_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond what the queue holds, instead of waiting where no shutdown reaches it."""
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=0) as running:
        with monkeypatch.context() as patches:
            patches.setattr(os, "pipe", no_pipe)
            with running.connect() as one, running.connect() as other, running.connect() as third:
                gate.wait_entered()
                wait_queued(running.server, 2)
                running.shutdown()
                gate.open()
                assert received(one) == received(other) == received(third) == b"done"


def test_a_pause_that_no_descriptor_ends_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is ended by a descriptor, if there are some again."""
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=0) as running, running.connect() as one:
        with monkeypatch.context() as patches:
            patches.setattr(os, "pipe", no_pipe)
            gate.wait_entered()
            eventually(lambda: pool_of(running.server)._is_blind)
        with running.connect() as other, running.connect() as third:
            wait_queued(running.server)
            eventually(lambda: pool_of(running.server)._room is not None)
            gate.open()
            assert received(one) == received(other) == received(third) == b"done"


def test_a_foreign_server_waits_for_room() -> None:
    class Server(ThreadPoolMixIn, socketserver.TCPServer):
        max_workers = 1
        max_queued = 1

    gate = Gate()
    with nothing_left_behind(), Server(LOOPBACK, gate) as server:
        clients = [Client(socket.AF_INET, socket.SOCK_STREAM) for _ in range(3)]
        for client in clients:
            client.connect(server.server_address)
        for _ in range(2):
            Call(server.handle_request).result()
        gate.wait_entered()
        third = Call(server.handle_request)
        wait_full(server)
        assert third.is_running()
        gate.open()
        third.result()
        assert [received(client) for client in clients] == [b"done"] * 3
        for client in clients:
            client.close()


def test_closing_a_foreign_server_lets_in_who_waits_for_room() -> None:
    """It was accepted, so it is served, and the acceptor is free."""

    class Server(ThreadPoolMixIn, socketserver.TCPServer):
        max_workers = 1
        max_queued = 0

    gate = Gate()
    with nothing_left_behind():
        server = Server(LOOPBACK, gate)
        one, other = (Client(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2))
        one.connect(server.server_address)
        other.connect(server.server_address)
        Call(server.handle_request).result()
        gate.wait_entered()
        second = Call(server.handle_request)
        eventually(lambda: pool_of(server)._changed._waiters, "it waits for room")  # type: ignore[attr-defined]  # threading: private
        closing = Call(server.server_close)
        second.result()
        assert closing.is_running()
        gate.open()
        closing.result()
        assert received(one) == received(other) == b"done"
        one.close()
        other.close()


# --- the queue time ---------------------------------------------------------------------


def test_the_time_in_the_queue_is_told() -> None:
    gate = Gate()
    with recorded(RequestStarted) as seen, serving(gate, max_workers=1) as running:
        with running.connect(), running.connect() as queued:
            gate.wait_entered()
            wait_queued(running.server)
            began = time.monotonic()
            gate.go.release()
            gate.wait_entered()
            waited = time.monotonic() - began
            address = queued.getsockname()
            gate.open()
        eventually(lambda: len(seen) == 2, "both were told")
    first, second = seen
    assert first.server is second.server is running.server
    assert second.peer == address
    assert first.queued >= 0
    assert second.queued > 0
    assert waited >= 0


def test_a_subscriber_sees_the_context_of_the_request() -> None:
    """It may leave there what the handler finds."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

    def tell(request: Any, client_address: object, server: object) -> None:
        request.sendall(variable.get().encode())

    unsubscribe = events.subscribe(lambda _: variable.set("of this request"), RequestStarted)
    try:
        with serving(tell) as running:
            assert running.ask() == b"of this request"
    finally:
        unsubscribe()


# --- workers that a handler ends --------------------------------------------------------


class Kill(BaseException):
    """What is no Exception."""


@contextmanager
def ended_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect what `threading.excepthook` is told."""
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    yield told


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, Kill])
def test_a_worker_that_a_handler_ends_is_replaced(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is closed, and the queue goes on."""
    go = threading.Event()
    threads = []

    def end(request: Any, client_address: object, server: object) -> None:
        threads.append(threading.current_thread())
        word = request.recv(64)
        assert go.wait(PATIENCE)
        if word == b"end":
            raise error("by a handler")
        request.sendall(word)

    with ended_threads(monkeypatch) as told, serving(end, max_workers=1) as running:
        with running.connect() as one, running.connect() as other:
            one.sendall(b"end")
            eventually(lambda: threads, "the first is served")
            other.sendall(b"go on")
            wait_queued(running.server)
            go.set()
            assert received(one) == b""
            assert received(other) == b"go on"
        assert pool_of(running.server).workers == 1
    one_thread, other_thread = threads
    assert one_thread is not other_thread
    (arguments,) = told
    assert arguments.exc_type is error
    assert arguments.thread is one_thread


def test_system_exit_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # instead of pytest's

    def leave(request: Any, client_address: object, server: object) -> None:
        raise SystemExit

    with serving(leave) as running:
        assert running.ask() == b""
    assert capfd.readouterr().err == ""


def test_an_exhausted_stack_is_an_error_of_the_handler(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def recurse(request: Any, client_address: object, server: object) -> None:
        recurse(request, client_address, server)

    with serving(recurse, max_workers=1) as running:
        assert [running.ask() for _ in range(3)] == [b""] * 3
        assert pool_of(running.server).workers == 1
    assert capfd.readouterr().err.count("RecursionError: ") == 3


def test_many_ended_workers_leave_the_pool_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(request: Any, client_address: object, server: object) -> None:
        if request.recv(64) == b"end":
            raise Kill
        request.sendall(b"served")

    with ended_threads(monkeypatch) as told, serving(leave, max_workers=4, max_queued=0) as running:
        for _ in range(30):
            assert running.ask(b"end") == b""
        calls = [Call(running.ask, b"serve") for _ in range(20)]
        assert [call.result() for call in calls] == [b"served"] * 20
        assert pool_of(running.server).workers <= 4
        eventually(lambda: len(told) == 30, "all have left")
        for arguments in told:
            arguments.thread.join(PATIENCE)
        assert running.ask(b"end") == b""
        eventually(lambda: len(told) == 31, "one more has left")
        assert len(pool_of(running.server)._left) <= 1, "what has ended is forgotten"


class Raising:
    """A gate at which something from outside is raised in the worker that waits."""

    def __init__(self, gate: Any, passed: threading.Event) -> None:
        self.gate = gate
        self.passed = passed

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self.gate.acquire(timeout=PATIENCE)
        raise Kill

    def release(self) -> None:
        self.gate.release()
        self.passed.set()

    def locked(self) -> bool:
        return bool(self.gate.locked())


def test_a_request_is_not_lost_with_an_idle_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a thread from outside may come just when the worker was taken."""
    gate = Gate()
    with ended_threads(monkeypatch) as told, serving(gate) as running:
        with running.connect():
            gate.wait_entered()
            (worker,) = pool_of(running.server)._workers
            worker.gate = Raising(worker.gate, threading.Event())  # type: ignore[assignment]
            gate.open()
        wait_idle(running.server)
        assert running.ask() == b"done"
        eventually(lambda: told, "the first worker has ended")
    assert gate.threads[0] is not gate.threads[1]


def test_an_idle_worker_that_is_ended_leaves_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with ended_threads(monkeypatch) as told, serving(gate) as running:
        with running.connect():
            gate.wait_entered()
            (worker,) = pool_of(running.server)._workers
            real = worker.gate
            worker.gate = Raising(real, threading.Event())  # type: ignore[assignment]
            gate.open()
        wait_idle(running.server)
        real.release()
        eventually(lambda: told, "it has ended")
        assert pool_of(running.server).workers == 0
        assert running.ask() == b"done"


# --- a thread that cannot start ---------------------------------------------------------


class Unstartable(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_without_a_thread_and_without_a_worker_the_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(do_nothing) as running:
        with monkeypatch.context() as patches:
            patches.setattr(threading, "Thread", Unstartable)
            with connect(running.server) as client:
                assert received(client) == b""
            assert pool_of(running.server).workers == 0
        assert running.ask() == b""
    assert capfd.readouterr().err.count("RuntimeError: can't start new thread") == 1


def test_without_a_thread_the_request_waits_for_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the pool is full when the queue is."""
    gate = Gate()
    with serving(gate, max_queued=2) as running, ExitStack() as clients:
        connected = [clients.enter_context(running.connect())]
        gate.wait_entered()
        with monkeypatch.context() as patches:
            # Not threading.Thread, of which the test's own calls are made.
            patches.setattr(pool_of(running.server), "_start", cannot_start)
            connected += [clients.enter_context(running.connect()) for _ in range(4)]
            wait_full(running.server)
            assert (pool_of(running.server).workers, pool_of(running.server).queued) == (1, 2)
            gate.open()
            assert [received(client) for client in connected] == [b"done"] * 5
    assert len(set(gate.threads)) == 1


def cannot_start(task: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_thread_and_without_a_queue_the_acceptor_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    with serving(gate, max_queued=0) as running, running.connect() as one:
        gate.wait_entered()
        monkeypatch.setattr(pool_of(running.server), "_start", cannot_start)
        with running.connect() as other:
            wait_full(running.server)
            gate.open()
            assert received(one) == received(other) == b"done"
    assert len(set(gate.threads)) == 1


@pytest.mark.parametrize("hook_fails", [False, True])
def test_a_worker_that_cannot_be_replaced_serves_the_queue(
    hook_fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def hook(arguments: Any) -> None:
        told.append(arguments)
        if hook_fails:
            raise ValueError("of the hook")

    go = threading.Event()
    threads = []

    def end_first(request: Any, client_address: object, server: object) -> None:
        threads.append(threading.current_thread())
        assert go.wait(PATIENCE)
        if len(threads) == 1:
            raise Kill
        request.sendall(b"served")

    monkeypatch.setattr(threading, "excepthook", hook)
    with serving(end_first, max_workers=1) as running:
        with running.connect() as one, running.connect() as other:
            wait_queued(running.server)
            with monkeypatch.context() as patches:
                patches.setattr(pool_of(running.server), "_start", cannot_start)
                go.set()
                assert received(one) == b""
                assert received(other) == b"served"
    assert threads[0] is threads[1]
    assert [(each.exc_type, each.thread) for each in told] == [(Kill, threads[0])]


def test_a_replacement_that_cannot_start_is_not_needed_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, entered = threading.Semaphore(0), threading.Semaphore(0)

    def end(request: Any, client_address: object, server: object) -> None:
        word = request.recv(64)
        entered.release()
        if word == b"end":
            assert go.acquire(timeout=PATIENCE)
            raise Kill
        assert stay.wait(PATIENCE)
        request.sendall(b"served")

    stay = threading.Event()
    with ended_threads(monkeypatch) as told, serving(end, max_workers=2) as running:
        calls = [Call(running.ask, word) for word in (b"end", b"stay")]
        for _ in calls:
            assert entered.acquire(timeout=PATIENCE)
        third = Call(running.ask, b"stay")
        wait_queued(running.server)
        with monkeypatch.context() as patches:
            patches.setattr(pool_of(running.server), "_start", cannot_start)
            go.release()
            assert calls[0].result() == b""
            eventually(lambda: told, "its worker has ended")
            stay.set()
            assert calls[1].result() == third.result() == b"served"


# --- closing ----------------------------------------------------------------------------


def test_closing_waits_for_what_is_served_and_what_is_queued() -> None:
    gate = Gate()
    with serving(gate, max_workers=1) as running:
        with running.connect() as one, running.connect() as other:
            gate.wait_entered()
            wait_queued(running.server)
            running.shutdown()
            closing = Call(running.server.server_close)
            eventually(lambda: running.server.socket.fileno() == -1, "the listener is closed")
            gate.go.release()
            gate.wait_entered()
            assert closing.is_running()
            gate.go.release()
            closing.result()
            assert not gate.threads[0].is_alive()
            assert received(one) == received(other) == b"done"


def test_closing_ends_idle_workers_at_once_and_leaves_no_thread() -> None:
    gate = Gate()
    before = set(threading.enumerate())
    with ThreadPoolTCPServer(LOOPBACK, gate) as server, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(connect(server))
            server.handle_request()
        gate.open()
        wait_idle(server, 3)
        Call(server.server_close).result()
        # Not eventually: they have been waited for.
        assert not {thread for thread in gate.threads if thread.is_alive()}
    assert not set(gate.threads) & (set(threading.enumerate()) - before)


@pytest.mark.parametrize("setting", [{"daemon_threads": True}, {"block_on_close": False}])
def test_closing_does_not_wait_when_asked_not_to(setting: dict[str, bool]) -> None:
    """What was accepted is served all the same."""
    gate = Gate()
    with serving(gate, max_workers=1, **setting) as running:
        with running.connect() as one, running.connect() as other:
            gate.wait_entered()
            wait_queued(running.server)
            running.shutdown()
            Call(running.server.server_close).result()
            gate.open()
            assert received(one) == received(other) == b"done"


@pytest.mark.parametrize("block_on_close", [False, True])
def test_a_handler_may_close_the_server(block_on_close: bool) -> None:
    """Two at once do not wait for each other."""
    together = threading.Barrier(2)
    closed = threading.Semaphore(0)

    def close(request: object, client_address: object, server: TCPServer) -> None:
        together.wait(PATIENCE)
        server.shutdown()
        server.server_close()
        closed.release()

    with serving(close, block_on_close=block_on_close) as running:
        with running.connect(), running.connect():
            assert closed.acquire(timeout=PATIENCE)
            assert closed.acquire(timeout=PATIENCE)


def test_a_server_that_served_nobody_has_nothing_to_wait_for() -> None:
    with ThreadPoolTCPServer(LOOPBACK, do_nothing) as server:
        assert server._pool is None
        Call(server.server_close).result()
        Call(server.server_close).result()


def test_a_request_that_comes_while_the_server_is_closed_is_served() -> None:
    """The acceptor may be in the middle of it."""
    gate = Gate()
    gate.open()
    with nothing_left_behind(), ThreadPoolTCPServer(LOOPBACK, gate) as server:
        for _ in range(2):
            with connect(server) as client:
                request, address = server.get_request()
                pool_of_any(server).close()
                server.process_request(request, address)
                assert received(client) == b"done"


def test_a_request_that_comes_when_closing_has_just_woken_a_worker_is_served_once() -> None:
    served = threading.Semaphore(0)

    def handle(request: Any, client_address: object, server: object) -> None:
        request.sendall(b"done")
        served.release()

    with nothing_left_behind(), ThreadPoolTCPServer(LOOPBACK, handle) as server:
        with connect(server) as client:
            server.process_request(*server.get_request())
            assert received(client) == b"done"
        pool = pool_of_any(server)
        eventually(lambda: pool._idle)
        (worker,) = pool._idle
        asleep, worker.gate = worker.gate, threading.Lock()  # it will not see that it was woken
        worker.gate.acquire()
        pool.close()
        with connect(server) as client:
            server.process_request(*server.get_request())
            asleep.release()
            assert received(client) == b"done"
    assert served.acquire(timeout=PATIENCE)
    assert served.acquire(timeout=PATIENCE)
    assert not served.acquire(blocking=False)


def pool_of_any(server: ThreadPoolTCPServer) -> Pool:
    return server._pool or pool._pools.of(server)


# --- the end of the program -------------------------------------------------------------

PROGRAM = """
import sys, threading, portico

class Server(portico.ThreadPoolTCPServer):
    max_workers = 1
    worker_idle_timeout = 3600
    daemon_threads = {daemon}

entered, go = threading.Event(), threading.Event()

def handle(request, client_address, server):
    word = request.recv(64)
    entered.set()
    if word == b"stay":
        go.wait()
    print("answered", flush=True)
    request.sendall(b"answer")

server = Server(("127.0.0.1", 0), handle)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
"""


BOTH_ARE_TAKEN = """
import time

while server._pool is None or server._pool.under_way < 2:
    time.sleep(0.01)
"""
"""What keeps the main program from its end until one request is served and the other queued."""


def test_idle_workers_do_not_keep_a_program_alive() -> None:
    source = PROGRAM.format(daemon=False) + "\nsys.stdin.readline()\n"
    with running_program(source) as process:
        assert process.stdout
        assert process.stdin
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            assert ask(client, b"word") == b"answer"
        assert process.stdout.readline() == "answered\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("daemon", [False, True])
def test_a_program_ends_after_its_requests_unless_they_are_daemons(daemon: bool) -> None:
    """Those in the queue included."""
    source = PROGRAM.format(daemon=daemon) + "\nsys.stdin.readline()\n" + BOTH_ARE_TAKEN
    if not daemon:  # the handler is let go when the main program has ended
        source += "threading.Thread(target=lambda: (threading.main_thread().join(), go.set()),"
        source += " daemon=True).start()\n"
    with running_program(source) as process:
        assert process.stdout
        assert process.stdin
        port = int(process.stdout.readline())
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as one,
            socket.create_connection(("127.0.0.1", port), PATIENCE) as other,
        ):
            one.sendall(b"stay")
            other.sendall(b"word")
            process.stdin.write("\n")
            process.stdin.flush()
            answers = [received_or_reset(client) for client in (one, other)]
        assert process.wait(PATIENCE) == 0
        said = process.stdout.read().split()
    assert answers == ([b"", b""] if daemon else [b"answer", b"answer"])
    assert said.count("answered") == (0 if daemon else 2)


def unaccepted(port: int) -> int:
    """Connections in the backlog of a listener of this machine."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            return int(fields[4].rpartition(":")[2], 16)
    raise AssertionError("nobody listens")


def received_or_reset(client: socket.socket) -> bytes:
    try:
        return received(client)
    except ConnectionResetError:
        return b""


def test_no_request_is_taken_while_the_interpreter_ends() -> None:
    source = """
import portico, threading
from portico.engines import pool

def handle(request, client_address, server):
    request.sendall(b"answer")

server = portico.ThreadPoolTCPServer(("127.0.0.1", 0), handle)
import socket, atexit

def late():
    with socket.create_connection(server.server_address) as client:
        server.handle_request()
        print(client.recv(64))

atexit.register(late)
with socket.create_connection(server.server_address) as client:
    server.handle_request()
    print(client.recv(64))
"""
    done = run_program(source)
    assert done.stdout == "b'answer'\nb''\n"
    assert "RuntimeError: no request can be served while the interpreter ends" in done.stderr


# --- forks ------------------------------------------------------------------------------


def test_a_forked_child_begins_with_an_empty_pool() -> None:
    gate = Gate()
    gate.open()
    with nothing_left_behind(), ThreadPoolTCPServer(LOOPBACK, gate) as server:
        with connect(server) as client:
            server.handle_request()
            assert received(client) == b"done"

        def serve_on() -> None:
            assert server._pool is None
            with connect(server) as client:
                server.handle_request()
                assert received(client) == b"done"
            assert pool_of(server).workers == 1
            server.server_close()

        assert in_child(serve_on) == 0
        with connect(server) as client:
            server.handle_request()
            assert received(client) == b"done"


def test_a_forked_child_does_not_wait_for_room_in_its_parent() -> None:
    gate = Gate()
    with serving(gate, max_workers=1, max_queued=0) as running:
        with running.connect():
            gate.wait_entered()
            wait_full(running.server)

            def serve_on() -> None:
                gate.go = threading.Semaphore(1)  # a worker may have held the lock of the other
                with connect(running.server) as client:
                    running.server.handle_request()
                    assert received(client) == b"done"
                running.server.server_close()

            # Another client first, who would be waiting in the shared backlog.
            assert in_child(serve_on) == 0
            gate.open()


def test_a_worker_that_forked_ends_in_the_child() -> None:
    """After its handler, when the handler returns there."""
    reader, writer = os.pipe()

    def fork(request: Any, client_address: object, server: ThreadPoolTCPServer) -> None:
        child = os.fork()
        if child == 0:
            signal.alarm(int(PATIENCE))
            return
        _, status = os.waitpid(child, 0)
        os.write(writer, str(status).encode())

    with serving(fork) as running:
        running.ask()
        assert os.read(reader, 64) == b"0"
    os.close(reader)
    os.close(writer)


# --- many clients -----------------------------------------------------------------------


def test_five_hundred_clients_share_eight_workers() -> None:
    """Everybody is answered, nothing grows beyond its limit, and the rest is in the backlog."""
    lock = threading.Lock()
    now, most, longest = 0, 0, 0
    go = threading.Event()

    class Echo(StreamRequestHandler):
        def handle(self) -> None:
            nonlocal now, most, longest
            assert go.wait(PATIENCE)
            with lock:
                now += 1
                most = max(most, now)
                longest = max(longest, pool_of(self.server).queued)
            self.wfile.write(self.rfile.readline())
            with lock:
                now -= 1

    accepted = 0

    class Server(ThreadPoolTCPServer):
        max_workers = 8
        max_queued = 16

        def process_request(self, request: Any, client_address: Any) -> None:
            nonlocal accepted, longest
            accepted += 1
            super().process_request(request, client_address)
            longest = max(longest, pool_of(self).queued)

    with nothing_left_behind(), RunningServer(Server(LOOPBACK, Echo)) as running:
        clients = [running.connect() for _ in range(500)]
        for number, client in enumerate(clients):
            client.sendall(b"%d\n" % number)
        wait_full(running.server)
        assert (accepted, pool_of(running.server).queued) == (24, 16)
        port = running.server.server_address[1]
        eventually(lambda: unaccepted(port) == 476, "the others are in the backlog")
        go.set()
        for number, client in enumerate(clients):
            assert received(client) == b"%d\n" % number
            client.close()
        assert pool_of(running.server).workers <= 8
    assert most <= 8
    assert longest <= 16
    assert accepted == 500


def test_nothing_is_built_for_events_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RequestStarted.subscribers == ConnectionClosed.subscribers == ()

    def refuse(*_: object) -> None:
        raise AssertionError("nobody listens")

    monkeypatch.setattr(pool, "time", refuse)
    monkeypatch.setattr(pool, "RequestStarted", type("Kind", (), {"subscribers": ()}))
    with serving(do_nothing) as running:
        assert running.ask() == b""
