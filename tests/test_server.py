from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import pytest

from portico import (
    BaseRequestHandler,
    BaseServer,
    ListenerError,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    UDPServer,
)
from portico.events import AcceptPaused, ServerStarted, subscribe
from portico.lifecycle import Phase
from tests.support import (
    PATIENCE,
    Call,
    Journal,
    RunningServer,
    ask,
    connect,
    descriptors,
    eventually,
    in_child,
    nothing_left_behind,
    received,
    recorded,
    replace,
    run_program,
    running_program,
)

LOOPBACK = ("127.0.0.1", 0)

Handler = Callable[[Any, Any, Any], Any]


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


@pytest.fixture
def server() -> Iterator[TCPServer]:
    with nothing_left_behind(), TCPServer(LOOPBACK, Echo) as made:
        yield made


# --- the hooks and their order ----------------------------------------------------------


def noting(name: str) -> Any:
    """Make a method that notes its call and passes it on."""

    def method(self: Any, *args: Any) -> Any:
        self.called.append(name)
        return getattr(super(Noting, self), name)(*args)

    return method


class Noting(TCPServer):
    """Note each hook when it is called."""

    server_bind = noting("server_bind")
    server_activate = noting("server_activate")
    get_request = noting("get_request")
    admit_request = noting("admit_request")
    verify_request = noting("verify_request")
    process_request = noting("process_request")
    serve_request = noting("serve_request")
    prepare_request = noting("prepare_request")
    finish_request = noting("finish_request")
    shutdown_request = noting("shutdown_request")
    close_request = noting("close_request")
    handle_error = noting("handle_error")
    handle_timeout = noting("handle_timeout")
    service_actions = noting("service_actions")
    server_close = noting("server_close")

    def __init__(self, handler: Handler) -> None:
        self.called: list[str] = []
        super().__init__(LOOPBACK, handler)


class NotingHandler(BaseRequestHandler):
    server: Noting

    def setup(self) -> None:
        self.server.called.append("setup")

    def handle(self) -> None:
        self.server.called.append("handle")
        self.server.shutdown()

    def finish(self) -> None:
        self.server.called.append("finish")


STEPS = [
    "get_request",
    "admit_request",
    "verify_request",
    "process_request",
    "serve_request",
    "prepare_request",
    "finish_request",
]
"""What comes before the handler."""


def test_the_hooks_of_a_request_come_in_their_order() -> None:
    """The names of `socketserver` in the order that it documents, ours between them."""
    with Noting(NotingHandler) as server, connect(server):
        server.serve_forever()
    assert server.called == [
        "server_bind",
        "server_activate",
        *STEPS,
        "setup",
        "handle",
        "finish",
        "shutdown_request",
        "close_request",
        "service_actions",
        "server_close",
    ]


def test_a_single_request_takes_the_same_way() -> None:
    """Only the loop calls `service_actions`."""
    with Noting(do_nothing) as server, connect(server):
        server.handle_request()
    assert server.called[2:] == [*STEPS, "shutdown_request", "close_request", "server_close"]


def test_a_request_that_failed_is_reported_before_it_is_closed() -> None:
    with Noting(fail) as server, connect(server):
        server.called.clear()
        server.handle_request()
    assert server.called == [
        *STEPS,
        "handle_error",
        "shutdown_request",
        "close_request",
        "server_close",
    ]


@pytest.mark.parametrize(
    ("hook", "asked"),
    [
        ("admit_request", ["get_request"]),
        ("verify_request", ["get_request", "admit_request"]),
    ],
)
def test_a_request_that_is_refused_is_closed_and_never_handled(hook: str, asked: list[str]) -> None:
    with Noting(fail) as server, connect(server) as client:
        server.called.clear()
        setattr(server, hook, lambda *_: False)
        server.handle_request()
        assert server.called == [*asked, "shutdown_request", "close_request"]
        assert received(client) == b""


@pytest.mark.parametrize("raised", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize(
    "hook",
    [
        "admit_request",
        "verify_request",
        "process_request",
        "prepare_request",
        "finish_request",
        "RequestHandlerClass",
        "handle_error",
    ],
)
def test_a_request_is_closed_once_whatever_raises(hook: str, raised: type[BaseException]) -> None:
    """Programs count these calls, and mocks of sockets insist on them."""

    def raising(*_: object) -> None:
        raise raised

    with Noting(fail) as server, connect(server):
        server.called.clear()
        setattr(server, hook, raising)
        try:
            server.handle_request()
        except raised:
            pass
    assert server.called.count("shutdown_request") == 1
    assert server.called.count("close_request") == 1


def test_one_request_is_accepted_in_each_turn_of_the_loop() -> None:
    """`service_actions` comes between any two."""
    with Noting(do_nothing) as server:
        clients = [connect(server) for _ in range(3)]
        server.RequestHandlerClass = last_of(server, 3)
        server.called.clear()
        server.serve_forever()
        for client in clients:
            client.close()
        turns = [name for name in server.called if name in {"get_request", "service_actions"}]
    assert turns == ["get_request", "service_actions"] * 3


def last_of(server: TCPServer, number: int) -> Handler:
    """Make a handler that ends the loop at its last request."""
    left = iter(range(number - 1))

    def count(request: object, client_address: object, server: TCPServer) -> None:
        if next(left, None) is None:
            server.shutdown()

    return count


def fail(*_: object) -> Any:
    raise ValueError("the handler fails")


# --- the constructor and the with block -------------------------------------------------


def test_the_base_keeps_its_arguments_and_opens_nothing() -> None:
    with nothing_left_behind():
        server = BaseServer("somewhere", do_nothing)
        assert (server.server_address, server.RequestHandlerClass) == ("somewhere", do_nothing)
        assert server.timeout is None
        assert not hasattr(server, "socket")


def test_a_with_block_closes_the_server_and_shuts_nothing_down() -> None:
    with Noting(do_nothing) as server:
        server.called.clear()
    assert server.called == ["server_close"]


def test_a_server_may_be_made_anew_in_the_same_place() -> None:
    """A program may call `__init__` again; nothing of the first life is left."""
    server = TCPServer(LOOPBACK, Echo)
    with RunningServer(server):
        pass
    server.__init__(LOOPBACK, Echo)  # type: ignore[misc]  # what the test is about
    with nothing_left_behind(), server:
        server.shutdown()
        Call(server.serve_forever).result()


def keep_in(kept: list[str], name: str, *_: object) -> None:
    kept.append(name)


def test_the_handler_is_looked_up_for_each_request(server: TCPServer) -> None:
    handled: list[str] = []
    for name in ("first", "second"):
        server.RequestHandlerClass = partial(keep_in, handled, name)
        with connect(server):
            server.handle_request()
    assert handled == ["first", "second"]


def test_the_handler_is_called_with_the_request_the_client_and_the_server(
    server: TCPServer,
) -> None:
    seen: list[Any] = []
    server.RequestHandlerClass = lambda *args: seen.extend(args)
    with connect(server) as client:
        server.handle_request()
        request, client_address, of_server = seen
        assert client_address == client.getsockname()
    assert isinstance(request, socket.socket)
    assert of_server is server


# --- one request ------------------------------------------------------------------------


def test_handle_request_waits_for_a_client(server: TCPServer) -> None:
    handling = Call(server.handle_request)
    with connect(server) as client:
        assert ask(client, b"hello\n") == b"hello\n"
    handling.result()


@pytest.mark.parametrize(
    ("own", "listeners"), [(0.01, None), (None, 0.01), (0.01, 1e6), (1e6, 0.01), (0, None)]
)
def test_handle_request_waits_as_long_as_the_smaller_limit_says(
    own: float | None, listeners: float | None
) -> None:
    with Noting(do_nothing) as server:
        server.timeout = own
        server.socket.settimeout(listeners)
        server.called.clear()
        server.handle_request()
        assert server.called == ["handle_timeout"]


def test_a_request_that_is_there_is_handled_though_there_is_no_time() -> None:
    with Noting(do_nothing) as server, connect(server):
        # The client knows of the connection a moment before the listener does.
        assert select.select([server], [], [], PATIENCE)[0]
        server.timeout = 0
        server.called.clear()
        server.handle_request()
        assert server.called[0] == "get_request"


def test_what_handle_timeout_raises_reaches_the_caller(server: TCPServer) -> None:
    server.timeout = 0
    replace(server, handle_timeout=fail)
    with pytest.raises(ValueError, match="the handler fails"):
        server.handle_request()


def test_a_closed_server_handles_no_request(server: TCPServer) -> None:
    server.server_close()
    with pytest.raises(ValueError, match="-1"):
        server.handle_request()


def test_several_threads_may_handle_requests_of_one_listener(server: TCPServer) -> None:
    """All of them wake up; whoever finds nothing returns."""
    server.socket.setblocking(False)
    server.timeout = None
    together = threading.Barrier(4)

    def handle() -> None:
        together.wait()
        while not done.is_set():
            server.timeout = 0.01
            server.handle_request()

    done = threading.Event()
    handling = [Call(handle) for _ in range(4)]
    answers = []
    for turn in range(10):
        with connect(server) as client:
            answers.append(ask(client, b"%d\n" % turn))
    done.set()
    for call in handling:
        call.result()
    assert answers == [b"%d\n" % turn for turn in range(10)]


def test_a_client_that_left_the_backlog_is_skipped(server: TCPServer) -> None:
    """What accepting raises for one peer is not the caller's concern."""
    numbers = iter([errno.ECONNABORTED, errno.EPERM, errno.EAGAIN, errno.EINVAL, errno.EBADF])

    def aborted() -> Any:
        number = next(numbers)
        raise OSError(number, os.strerror(number))

    replace(server, get_request=aborted)
    with connect(server):
        for _ in range(5):
            server.handle_request()
    assert next(numbers, None) is None


def test_serve_request_says_whether_the_handler_finished(
    server: TCPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """It may be called in any thread, with any request of this server."""
    for handler, finished in ((Echo, True), (fail, False)):
        replace(server, RequestHandlerClass=handler)
        with connect(server) as client:
            request, client_address = server.get_request()
            serving = Call(server.serve_request, request, client_address)
            client.sendall(b"hello\n")
            assert serving.result() is finished
            assert request.fileno() == -1
    assert "ValueError: the handler fails" in capfd.readouterr().err


def test_the_handler_gets_what_prepare_request_returns(server: TCPServer) -> None:
    """And that is what is closed in the end."""
    seen: list[Any] = []
    closed: list[Any] = []

    def close(request: tuple[socket.socket, str]) -> None:
        closed.append(request)
        request[0].close()

    replace(
        server,
        prepare_request=lambda request, _: ((request, "prepared"), "address"),
        handle_error=lambda *args: seen.extend(args),
        shutdown_request=close,
    )
    for handler in (lambda *args: seen.extend(args[:2]), fail):
        server.RequestHandlerClass = handler
        with connect(server):
            server.handle_request()
    (request, word), address, (again, _), address_again = seen
    assert (word, address, address_again) == ("prepared", "address", "address")
    assert [held for held, _ in closed] == [request, again]


def test_a_handler_may_serve_another_server(server: TCPServer) -> None:
    """In its own thread; each of both requests is closed as it was prepared."""
    closed: list[Any] = []

    def close(request: tuple[socket.socket, str]) -> None:
        closed.append(request[1])
        request[0].close()

    def serve_the_other(*_: object) -> None:
        other.handle_request()
        raise ValueError("the handler fails")

    with TCPServer(LOOPBACK, do_nothing) as other, connect(other), connect(server):
        for which, name in ((server, "outer"), (other, "inner")):
            replace(
                which,
                prepare_request=partial(named, name),
                handle_error=lambda *_: None,
                shutdown_request=close,
            )
        server.RequestHandlerClass = serve_the_other
        server.handle_request()
    assert closed == ["inner", "outer"]


def named(name: str, request: Any, client_address: Any) -> Any:
    return (request, name), client_address


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_process_request_that_swallows_a_failure_lets_go_of_the_connection() -> None:
    """Nobody shuts it down then, but nobody keeps it either."""

    class Swallowing(TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request(request, client_address)
            except ValueError:
                pass

    with Swallowing(LOOPBACK, fail) as server, connect(server):
        before = descriptors()
        server.handle_request()
        gc.collect()
        assert set(descriptors()) == set(before)


# --- what is reported -------------------------------------------------------------------


def test_an_error_is_reported_as_socketserver_reports_it(
    server: TCPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.RequestHandlerClass = fail
    with connect(server) as client:
        server.handle_request()
        address = client.getsockname()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == [
        "-" * 40,
        f"Exception occurred during processing of request from {address}",
        "Traceback (most recent call last):",
    ]
    assert lines[-2:] == ["ValueError: the handler fails", "-" * 40]


def test_handle_error_may_be_asked_outside_of_an_error(
    server: TCPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Programs that have workers of their own do."""
    server.handle_error(None, ("192.0.2.7", 40000))
    assert "request from ('192.0.2.7', 40000)" in capfd.readouterr().err


@pytest.mark.parametrize("hook", ["admit_request", "verify_request", "process_request"])
def test_what_a_hook_of_the_acceptor_raises_is_reported(
    server: TCPServer, hook: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The connection is closed, and the server goes on."""
    setattr(server, hook, fail)
    with connect(server) as client:
        server.handle_request()
        assert received(client) == b""
    assert "ValueError: the handler fails" in capfd.readouterr().err


# --- the loop ---------------------------------------------------------------------------


def test_the_loop_serves_who_was_there_before_it(server: TCPServer) -> None:
    with connect(server) as early:
        early.sendall(b"early\n")
        with RunningServer(server):
            assert early.recv(64) == b"early\n"


def test_the_loop_does_not_look_at_timeout() -> None:
    class Server(Noting):
        timeout = 0

    with Server(Echo) as server, RunningServer(server) as running:
        assert running.ask(b"hello\n") == b"hello\n"
    assert "handle_timeout" not in server.called


class Counting(TCPServer):
    """Let a test wait for the turns of the loop."""

    def __init__(self, handler: Handler = Echo) -> None:
        self.turns = threading.Semaphore(0)
        super().__init__(LOOPBACK, handler)

    def service_actions(self) -> None:
        self.turns.release()

    def wait_turns(self, number: int) -> None:
        for _ in range(number):
            assert self.turns.acquire(timeout=PATIENCE)


def test_service_actions_are_called_again_and_again() -> None:
    with RunningServer(Counting(), poll_interval=0.01) as running:
        running.server.wait_turns(5)


def test_service_actions_of_an_instance_are_called_too(server: TCPServer) -> None:
    """It may get them while it serves; the loop then needs one turn to notice."""
    turns = threading.Semaphore(0)
    with RunningServer(server, poll_interval=0.01) as running:
        replace(server, service_actions=turns.release)
        assert running.ask(b"hello\n") == b"hello\n"
        for _ in range(5):
            assert turns.acquire(timeout=PATIENCE)


def test_service_actions_patched_in_the_base_are_called_too(
    server: TCPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = threading.Semaphore(0)
    monkeypatch.setattr(BaseServer, "service_actions", lambda _: turns.release())
    with RunningServer(server, poll_interval=0.01):
        for _ in range(5):
            assert turns.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("error", [ValueError, OSError, SystemExit])
def test_what_service_actions_raise_ends_the_loop(error: type[BaseException]) -> None:
    class Failing(TCPServer):
        def service_actions(self) -> None:
            raise error

    with nothing_left_behind(), Failing(LOOPBACK, do_nothing) as server:
        with pytest.raises(error):
            server.serve_forever(0.01)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_get_request_raises_ends_the_loop(error: type[BaseException]) -> None:
    class Failing(TCPServer):
        def get_request(self) -> Any:
            raise error

    with nothing_left_behind(), Failing(LOOPBACK, do_nothing) as server, connect(server):
        with pytest.raises(error):
            server.serve_forever()


@pytest.mark.parametrize(
    "number", [None, errno.ECONNABORTED, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOTSOCK]
)
def test_an_oserror_of_get_request_leaves_the_loop_alone(number: int | None) -> None:
    """Also one that would mean a closed listener, for as long as the listener is open."""

    class Failing(TCPServer):
        failures = 3

        def get_request(self) -> Any:
            if self.failures:
                self.failures -= 1
                raise OSError("no number") if number is None else OSError(number, "a number")
            return super().get_request()

    with nothing_left_behind(), RunningServer(Failing(LOOPBACK, Echo)) as running:
        assert running.ask(b"hello\n") == b"hello\n"


def test_a_loop_that_is_left_while_it_starts_leaves_nothing(server: TCPServer) -> None:
    """Ctrl-C can come in the middle of a subscriber."""

    def leave(event: ServerStarted) -> None:
        raise KeyboardInterrupt

    end = subscribe(leave, ServerStarted)
    try:
        with nothing_left_behind(), pytest.raises(KeyboardInterrupt):
            server.serve_forever()
    finally:
        end()
    Call(server.shutdown).result()
    with RunningServer(server) as running:
        assert running.ask(b"hello\n") == b"hello\n"


def test_ctrl_c_as_the_loop_begins_ends_it(
    server: TCPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come when a lock of the standard library's has just been taken, which stays so."""
    enter = threading.Condition.__enter__

    def interrupt(_: object = None) -> None:
        monkeypatch.setattr(threading.Condition, "__enter__", enter)
        raise KeyboardInterrupt

    def enter_and_interrupt(condition: threading.Condition) -> None:
        enter(condition)
        interrupt()

    monkeypatch.setattr(server, "service_actions", interrupt)  # it comes here at the latest
    monkeypatch.setattr(threading.Condition, "__enter__", enter_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.serve_forever(0.01)
    Call(server.shutdown).result()


def test_a_closed_server_cannot_serve(server: TCPServer) -> None:
    server.server_close()
    with pytest.raises(ValueError, match="-1"):
        server.serve_forever()


def test_a_server_that_does_not_listen_cannot_serve() -> None:
    """A program that catches OSError catches this, too."""
    with nothing_left_behind(), TCPServer(LOOPBACK, Echo, bind_and_activate=False) as server:
        with pytest.raises(ListenerError, match=r"server_activate\(\)") as failed:
            server.serve_forever()
        assert isinstance(failed.value, OSError)
        server.server_bind()
        server.server_activate()
        with RunningServer(server) as running:
            assert running.ask(b"hello\n") == b"hello\n"


def test_the_step_of_the_loop_is_the_programs_to_replace() -> None:
    """One that does not accept is called again, for as long as somebody waits."""

    class Choosy(TCPServer):
        calls = 0

        def _handle_request_noblock(self) -> None:
            self.calls += 1
            if self.calls > 3:
                super()._handle_request_noblock()

    with RunningServer(Choosy(LOOPBACK, Echo)) as running:
        assert running.ask(b"hello\n") == b"hello\n"
    assert running.server.calls == 4


class PipeServer(BaseServer):
    """A server whose requests come out of a pipe; it has no socket."""

    def __init__(self, handler: Handler) -> None:
        super().__init__("a pipe", handler)
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        return self.reader

    def get_request(self) -> tuple[Any, Any]:
        return os.read(self.reader, 64), "a pipe"

    def server_close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
        super().server_close()


def test_a_server_needs_no_socket() -> None:
    """Only a descriptor to wait for, and a way to get a request."""
    seen: list[Any] = []

    def keep(request: bytes, client_address: str, server: PipeServer) -> None:
        seen.append((request, client_address))
        server.shutdown()

    with nothing_left_behind(), PipeServer(keep) as server:
        os.write(server.writer, b"hello")
        Call(server.serve_forever).result()
    assert seen == [(b"hello", "a pipe")]


def test_a_connection_can_be_a_listener() -> None:
    """Messages on a stream are requests, if `get_request` says so."""
    seen: list[bytes] = []
    ours, theirs = socket.socketpair()

    class Messages(TCPServer):
        def get_request(self) -> tuple[Any, Any]:
            return self.socket.recv(64), "the other end"

        def shutdown_request(self, request: bytes) -> None:
            self.shutdown()

    with theirs, Messages(LOOPBACK, do_nothing, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = ours
        server.RequestHandlerClass = lambda request, *_: seen.append(request)
        theirs.sendall(b"hello")
        Call(server.serve_forever).result()
    assert seen == [b"hello"]


def test_a_child_process_closes_its_own_copy_of_the_server(server: TCPServer) -> None:
    """The loop of its parent goes on."""
    with RunningServer(server) as running:
        assert in_child(server.server_close) == 0
        assert running.ask(b"hello\n") == b"hello\n"


# --- shutdown ---------------------------------------------------------------------------


def test_shutdown_before_the_loop_is_remembered(server: TCPServer) -> None:
    """`serve_forever` returns at once, and a later one serves."""
    Call(server.shutdown).result()
    Call(server.serve_forever).result()
    with RunningServer(server) as running:
        assert running.ask(b"hello\n") == b"hello\n"


def test_shutdown_before_the_loop_may_be_asked_for_often(server: TCPServer) -> None:
    for _ in range(3):
        Call(server.shutdown).result()
    Call(server.serve_forever).result()
    with RunningServer(server) as running:
        assert running.ask(b"hello\n") == b"hello\n"


def test_shutdown_of_an_idle_server_waits_for_the_end_of_the_loop(server: TCPServer) -> None:
    with RunningServer(server) as running:
        Call(server.shutdown).result()
        assert vars(server)["_BaseServer__is_shut_down"].is_set()
        assert running.wait_ended() is None


def test_shutdown_during_a_request_waits_for_its_end() -> None:
    """The loop serves that request itself; it is not cut off."""
    entered, leave = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        entered.set()
        assert leave.wait(PATIENCE)

    with RunningServer(TCPServer(LOOPBACK, wait)) as running, running.connect():
        assert entered.wait(PATIENCE)
        call = Call(running.server.shutdown)
        assert running.is_serving()
        leave.set()
        call.result()
        assert running.wait_ended() is None


def test_shutdown_in_the_serving_thread_returns_at_once() -> None:
    """From a handler of the serial engine, from hooks, from `service_actions`."""
    called: list[str] = []

    class Server(TCPServer):
        def verify_request(self, request: object, client_address: object) -> bool:
            self.shutdown()
            called.append("verify_request")
            return True

        def service_actions(self) -> None:
            self.shutdown()
            called.append("service_actions")

    def handle(request: object, client_address: object, server: TCPServer) -> None:
        server.shutdown()
        server.shutdown()
        called.append("handle")

    with nothing_left_behind(), Server(LOOPBACK, handle) as server, connect(server):
        Call(server.serve_forever).result()
    assert called == ["verify_request", "handle", "service_actions"]


def test_shutdown_in_a_worker_waits_for_the_loop() -> None:
    ended: list[bool] = []

    def handle(request: object, client_address: object, server: TCPServer) -> None:
        server.shutdown()
        ended.append(vars(server)["_BaseServer__is_shut_down"].is_set())

    with RunningServer(ThreadingTCPServer(LOOPBACK, handle)) as running, running.connect():
        assert running.wait_ended() is None
        running.server.server_close()
    assert ended == [True]


def test_shutdown_while_the_loop_is_starting_ends_it() -> None:
    """A signal handler can come between any two steps of the start; `fileno` is one of them."""

    class Starting(TCPServer):
        def fileno(self) -> int:
            self.shutdown()
            return super().fileno()

    with nothing_left_behind(), Starting(LOOPBACK, do_nothing) as server:
        for _ in range(3):
            Call(server.serve_forever).result()


def test_shutdown_after_the_loop_does_nothing(server: TCPServer) -> None:
    """It returns, and the next loop serves."""
    for _ in range(3):
        serving = Call(server.serve_forever)
        with connect(server) as client:
            assert ask(client, b"hello\n") == b"hello\n"
        Call(server.shutdown).result()
        serving.result()
        Call(server.shutdown).result()


def test_many_threads_may_shut_one_server_down(server: TCPServer) -> None:
    with RunningServer(server) as running:
        calls = [Call(server.shutdown) for _ in range(10)]
        for call in calls:
            call.result()
        assert running.wait_ended() is None


def test_shutdown_at_any_moment_ends_the_first_loop() -> None:
    """Before it, while it starts, or when it serves: never too early and never lost."""
    with nothing_left_behind():
        for _ in range(100):
            with TCPServer(LOOPBACK, do_nothing) as server:
                serving, ending = Call(server.serve_forever), Call(server.shutdown)
                serving.result()
                ending.result()


def test_a_connection_that_comes_with_the_shutdown_stays_in_the_backlog() -> None:
    """It is the next loop's."""
    with Noting(NotingHandler) as server, connect(server), connect(server):
        server.serve_forever()
        assert server.called.count("get_request") == 1
        server.serve_forever()
        assert server.called.count("get_request") == 2


def test_one_shutdown_ends_all_loops_of_a_server(server: TCPServer) -> None:
    """And waits for the last of them."""
    server.socket.setblocking(False)  # both wake up for the client; one of them comes too late
    with RunningServer(server) as one, RunningServer(server) as other:
        assert one.ask(b"hello\n") == b"hello\n"
        Call(server.shutdown).result()
        assert one.wait_ended() is None
        assert other.wait_ended() is None


def test_a_handler_of_one_loop_may_shut_down_both() -> None:
    def handle(request: object, client_address: object, server: TCPServer) -> None:
        server.shutdown()

    server = TCPServer(LOOPBACK, handle)
    server.socket.setblocking(False)
    with RunningServer(server) as one, RunningServer(server) as other, connect(server):
        assert one.wait_ended() is None
        assert other.wait_ended() is None


def test_two_loops_share_what_comes(server: TCPServer) -> None:
    """Both wake up for a client; whoever is second finds nothing, and waits on."""
    server.socket.setblocking(False)
    with RunningServer(server) as one, RunningServer(server):
        answers = [one.ask(b"%d\n" % turn) for turn in range(20)]
    assert answers == [b"%d\n" % turn for turn in range(20)]


def test_closing_the_server_ends_all_its_loops(server: TCPServer) -> None:
    with RunningServer(server) as one, RunningServer(server) as other:
        server.server_close()
        assert one.wait_ended() is None
        assert other.wait_ended() is None


def test_a_loop_that_ends_by_an_error_releases_who_shuts_it_down() -> None:
    """Otherwise they would wait for ever."""
    entered, leave = threading.Event(), threading.Event()

    class Failing(TCPServer):
        def service_actions(self) -> None:
            entered.set()
            assert leave.wait(PATIENCE)
            raise LookupError("the program ends the loop")

    with RunningServer(Failing(LOOPBACK, do_nothing), poll_interval=0.01) as running:
        assert entered.wait(PATIENCE)
        call = Call(running.server.shutdown)
        leave.set()
        call.result()
        assert isinstance(running.wait_ended(), LookupError)


def test_the_flag_that_programs_set_ends_the_loop(server: TCPServer) -> None:
    """It is in the instance's dictionary, False while the loop runs, and wakes the loop."""
    name = "_BaseServer__shutdown_request"
    with RunningServer(server) as running:
        assert vars(server)[name] is False
        setattr(server, name, True)
        assert running.wait_ended() is None
    assert vars(server)[name] is False


# --- shutdown in forked processes -------------------------------------------------------


def test_shutdown_in_a_child_of_a_serving_process_returns(server: TCPServer) -> None:
    """The loop is its parent's, and goes on."""
    with RunningServer(server) as running:
        assert in_child(server.shutdown) == 0
        assert running.ask(b"hello\n") == b"hello\n"


def test_a_child_of_a_serving_process_serves_for_itself(server: TCPServer) -> None:
    """What it inherited of the parent's loop is neither woken nor waited for."""
    with Journal() as journal:

        def serve_and_stop() -> None:
            serving = Call(server.serve_forever)
            journal.wait_for("stop")
            server.shutdown()
            serving.result()

        server.socket.setblocking(False)  # both wake up for a client, and only one gets it
        with RunningServer(server) as running:
            call = Call(in_child, serve_and_stop)
            assert running.ask(b"hello\n") == b"hello\n"  # of one of both
            journal.note("stop")
            assert call.result() == 0
            assert running.ask(b"hello\n") == b"hello\n"


# --- signals ----------------------------------------------------------------------------


def test_a_signal_handler_may_shut_down_a_loop_of_another_thread(server: TCPServer) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.shutdown())
    try:
        with RunningServer(server) as running:
            signal.raise_signal(signal.SIGUSR1)
            assert running.wait_ended() is None
    finally:
        signal.signal(signal.SIGUSR1, previous)


IN_THE_MAIN_THREAD = """
import signal, sys
from portico import TCPServer, events

signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
events.subscribe(lambda _: print("serving", flush=True), events.ServerStarted)
with TCPServer(("127.0.0.1", 0), None) as server:
    for _ in range(2):
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        else:
            print("shut down", flush=True)
assert signal.set_wakeup_fd(-1) == -1
"""


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "shut down")]
)
def test_a_signal_ends_an_idle_loop_in_the_main_thread(number: int, outcome: str) -> None:
    """Nothing else would wake it.  It can serve again."""
    with running_program(IN_THE_MAIN_THREAD) as program:
        assert program.stdout is not None
        for _ in range(2):
            assert program.stdout.readline() == "serving\n"
            program.send_signal(number)
            assert program.stdout.readline() == f"{outcome}\n"
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out, err) == (0, "", "")


AT_ANY_MOMENT = """
import signal
from portico import TCPServer

signal.signal(signal.SIGALRM, lambda *_: server.shutdown())
for turn in range(2000):
    with TCPServer(("127.0.0.1", 0), None) as server:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + turn % 250))
        server.serve_forever()
print("done")
"""


def test_a_signal_handler_may_call_shutdown_at_any_moment() -> None:
    """Before the loop, at every step of its start, and when it waits: it always ends."""
    done = run_program(AT_ANY_MOMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


AT_ANY_LINE = """
import faulthandler, socket, sys, threading
import portico

name, settings, patience = sys.argv[1], eval(sys.argv[2]), float(sys.argv[3])
faulthandler.dump_traceback_later(patience, exit=True)


def answer(request, client_address, server):
    request.sendall(b"x")


class Server(getattr(portico, name)):
    vars().update(settings)

    def service_actions(self):
        super().service_actions()
        self.has_served = self.has_served or self.served > 0
        if self.has_served:
            self.shutdown()

    has_served, served = False, 0

    def process_request(self, request, client_address):
        self.served += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # it was closed in the middle of a hook


def close_at(number):
    '''Serve one client, and close the server at a line; say whether there were so many.'''
    left = number

    def at_line(frame, event, arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                server.server_close()
        return at_line

    def at_call(frame, event, arg):
        file = frame.f_code.co_filename
        if "portico" in file or file == threading.__file__:
            return at_line(frame, event, arg)

    with Server(("127.0.0.1", 0), answer) as server:
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"PROXY UNKNOWN\\r\\n")
            sys.settrace(at_call)
            try:
                server.serve_forever(0)
            except (ValueError, portico.PorticoError):
                pass  # it was closed before it served
            finally:
                sys.settrace(None)
    if server._guard.keeper is not None:
        server._guard.keeper.stop()
    return left <= 0


number = 1
while close_at(number):
    number += 1
print("done", number > 100)
"""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("TCPServer", {"max_connections": 5}),
        ("ThreadingTCPServer", {"idle_timeout": PATIENCE}),
        ("ThreadPoolTCPServer", {"max_connections": 5}),
        ("ThreadPoolTCPServer", {"proxy_protocol": ["127.0.0.0/8"]}),
    ],
)
def test_a_signal_handler_may_close_the_server_at_any_moment(
    name: str, settings: dict[str, object]
) -> None:
    """It interrupts the acceptor, which goes on after it, whatever lock that holds.

    A function that is called at each line is what a signal handler is, and comes everywhere.
    """
    done = run_program(AT_ANY_LINE, name, repr(settings), str(PATIENCE / 2))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done True\n", "")


BESIDE_AN_EVENT_LOOP = """
import signal, socket
from portico import TCPServer, events

ours, theirs = socket.socketpair()
ours.setblocking(False)
signal.set_wakeup_fd(ours.fileno())
events.subscribe(lambda _: print("serving", flush=True), events.ServerStarted)
with TCPServer(("127.0.0.1", 0), None) as server:
    try:
        server.serve_forever(0.01)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
assert signal.set_wakeup_fd(-1) == ours.fileno()
assert theirs.recv(64) == bytes([signal.SIGINT])
ours.close()
theirs.close()
"""


@pytest.mark.usefixtures("unmeasured")
def test_a_loop_leaves_the_signals_of_an_event_loop_alone() -> None:
    """Then it comes round every `poll_interval`, so as not to miss one for long."""
    with running_program(BESIDE_AN_EVENT_LOOP) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "serving\n"
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out, err) == (0, "interrupted\n", "")


# --- pauses -----------------------------------------------------------------------------


class Pausing(Counting):
    """Pause after the first request, as a test says; notice which requests were accepted."""

    def __init__(self, pause: Callable[[TCPServer], object]) -> None:
        super().__init__()
        self.accepted: list[Any] = []
        self.resume = threading.Event()
        self._first_pause = pause

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.accepted.append(client_address)
        if len(self.accepted) == 1:
            self._first_pause(self)
        return True

    def service_actions(self) -> None:
        super().service_actions()
        if self.resume.is_set():
            self.resume_accepting()


def paused(running: RunningServer[Pausing]) -> socket.socket:
    """Have the server pause; return a client that came later and is left in the backlog."""
    assert running.ask(b"first\n") == b"first\n"
    client = running.connect()
    client.sendall(b"second\n")
    running.server.wait_turns(5)
    assert len(running.server.accepted) == 1
    return client


def test_a_paused_server_leaves_clients_in_the_backlog_until_it_resumes() -> None:
    with RunningServer(Pausing(lambda server: server.pause_accepting()), 0.01) as running:
        with paused(running) as client:
            running.server.resume.set()
            assert client.recv(64) == b"second\n"


def test_a_pause_ends_when_a_descriptor_is_readable() -> None:
    """At once; a later client does not wait for the next turn."""
    reader, writer = os.pipe()
    with open(reader), open(writer, "wb", 0) as pipe:  # noqa: PTH123 - descriptors, not paths
        server = Pausing(lambda server: server.pause_accepting(until=(reader,)))
        with RunningServer(server, 0.01) as running, paused(running) as client:
            pipe.write(b"x")
            assert client.recv(64) == b"second\n"


def test_a_pause_ends_when_its_time_is_over() -> None:
    server = Pausing(lambda server: server.pause_accepting(0.05))
    with RunningServer(server) as running:
        assert running.ask(b"first\n") == b"first\n"
        assert running.ask(b"second\n") == b"second\n"


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_pause_of_no_time_is_none(seconds: float) -> None:
    server = Pausing(lambda server: server.pause_accepting(seconds))
    with RunningServer(server) as running:
        assert running.ask(b"first\n") == b"first\n"
        assert running.ask(b"second\n") == b"second\n"


def test_a_later_pause_replaces_an_earlier_one() -> None:
    def pause(server: TCPServer) -> None:
        server.pause_accepting()
        server.pause_accepting(0)

    with RunningServer(Pausing(pause)) as running:
        assert running.ask(b"first\n") == b"first\n"
        assert running.ask(b"second\n") == b"second\n"


def test_a_paused_server_can_be_shut_down() -> None:
    with RunningServer(Pausing(lambda server: server.pause_accepting()), 0.01) as running:
        with paused(running):
            running.shutdown()
            assert running.wait_ended() is None


def test_a_paused_server_can_be_closed() -> None:
    """Though it does not look at its listener."""
    with RunningServer(Pausing(lambda server: server.pause_accepting()), 0.01) as running:
        with paused(running):
            running.server.server_close()
            assert running.wait_ended() is None


def test_handle_request_leaves_a_paused_servers_clients_in_the_backlog() -> None:
    with Noting(do_nothing) as server, connect(server):
        server.timeout = 0.01
        server.pause_accepting()
        server.called.clear()
        server.handle_request()
        assert server.called == ["handle_timeout"]
        server.resume_accepting()
        server.handle_request()
        assert "get_request" in server.called


def test_handle_request_waits_for_the_end_of_a_pause() -> None:
    with Noting(do_nothing) as server, connect(server):
        server.pause_accepting(0.01)
        server.called.clear()
        server.handle_request()
        assert server.called[0] == "get_request"


# --- nothing is kept --------------------------------------------------------------------


@pytest.mark.parametrize("handler", [do_nothing, fail])
def test_a_request_is_not_kept_alive_after_its_end(server: TCPServer, handler: Handler) -> None:
    """Neither by the server nor by a traceback: what a handler held is free with it."""

    class Held:
        pass

    kept: list[Any] = []

    def hold(request: Any, client_address: Any, server: Any) -> None:
        held = Held()
        kept.append(ref(held))
        handler(held, client_address, server)

    server.RequestHandlerClass = hold
    replace(server, handle_error=lambda *_: None)
    with connect(server):
        server.handle_request()
    gc.collect()
    assert kept[0]() is None


def test_datagrams_are_served_by_the_same_loop() -> None:
    def answer(request: Any, client_address: Any, server: UDPServer) -> None:
        packet, sock = request
        sock.sendto(packet, client_address)

    with RunningServer(UDPServer(LOOPBACK, answer)) as running:
        assert running.ask(b"hello") == b"hello"


def test_ten_clients_at_a_time_leave_nothing_behind() -> None:
    with nothing_left_behind(), RunningServer(ThreadingTCPServer(LOOPBACK, Echo)) as running:
        calls = [Call(running.ask, b"%d\n" % number) for number in range(10)]
        assert [call.result() for call in calls] == [b"%d\n" % number for number in range(10)]


# --- phases -----------------------------------------------------------------------------


def test_a_server_says_where_it_is_in_its_life(server: TCPServer) -> None:
    phases = [server.phase]
    for _ in range(2):
        loop = Call(server.serve_forever)
        eventually(lambda: server.phase is Phase.SERVING)
        phases.append(server.phase)
        server.shutdown()
        loop.result()
        phases.append(server.phase)
    for _ in range(2):
        server.server_close()
        phases.append(server.phase)
    assert [phase.value for phase in phases] == [
        "created",
        "serving",
        "stopped",
        "serving",
        "stopped",
        "closed",
        "closed",
    ]


def test_a_server_serves_until_its_last_loop_has_ended(server: TCPServer) -> None:
    with RunningServer(server) as running:
        other = Call(server.serve_forever)
        eventually(lambda: len(server._BaseServer__loops) == 2)  # type: ignore[attr-defined]
        assert server.phase is Phase.SERVING
        running.shutdown()
        other.result()
        assert server.phase.value == "stopped"


def test_a_server_that_is_closed_while_it_serves_is_closed(server: TCPServer) -> None:
    with RunningServer(server) as running:
        server.server_close()
        assert running.wait_ended() is None
        assert server.phase is Phase.CLOSED


def test_a_server_that_cannot_serve_is_in_no_other_phase_than_before() -> None:
    with TCPServer(("127.0.0.1", 0), None, bind_and_activate=False) as server:  # type: ignore[arg-type]
        with pytest.raises(ListenerError):
            server.serve_forever()
        assert server.phase is Phase.CREATED


def test_a_client_that_would_exhaust_the_system_to_wait_for_a_place_is_left_in_the_backlog(
    server: TCPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To wait for a place takes a descriptor, too."""
    server.max_connections = 1
    server._guard.read_settings()
    gate = server._guard.gate
    assert gate is not None
    gate.take_over(("192.0.2.1", 4000))

    def refuse() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with recorded(AcceptPaused) as paused, connect(server):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pipe", refuse)
            server._handle_request_noblock()
        assert len(paused) == 1
        assert gate.active == 1
