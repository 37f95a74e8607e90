"""What programs do with threads, processes, and the life of a request."""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import socketserver
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

from tests.compat.peers import (
    PATIENCE,
    POLL_INTERVAL,
    ask,
    background,
    connect,
    looping,
    read_all,
    receive,
    serving,
    shout,
)

LOCALHOST = ("127.0.0.1", 0)


class Refused(Exception):
    """What the programs of this module raise on purpose."""


def hold(request: Any, client_address: Any, server: Any) -> Any:
    """A handler that says hello, and then holds on until the client says something."""
    request.sendall(b"hello")
    request.recv(1)


def module() -> Any:
    """The module under test, with the names that typeshed does not know."""
    return socketserver


# ------------------------------------------------------------ _Threads, _NoThreads, server._threads


def idle_thread(release: threading.Event, *, daemon: bool = False) -> threading.Thread:
    thread = threading.Thread(target=release.wait, args=(PATIENCE,), daemon=daemon)
    thread.start()
    return thread


def test_the_list_of_threads_forgets_those_that_ended() -> None:
    threads: Any = module()._Threads()
    release = threading.Event()
    assert issubclass(module()._Threads, list)
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join(PATIENCE)
    alive = idle_thread(release)
    threads.append(alive)
    threads.extend([ended])
    threads.reap()
    assert list(threads) == [alive]
    release.set()
    threads.join()
    assert not alive.is_alive()
    assert list(threads) == []


def test_the_list_of_threads_keeps_no_daemon() -> None:
    threads: Any = module()._Threads()
    release = threading.Event()
    threads.append(idle_thread(release, daemon=True))
    assert list(threads) == []
    release.set()


def test_the_list_of_threads_gives_all_and_forgets_them() -> None:
    threads: Any = module()._Threads()
    release = threading.Event()
    two = [idle_thread(release), idle_thread(release)]
    for thread in two:
        threads.append(thread)
    assert threads.pop_all() == two
    assert list(threads) == []
    release.set()
    for thread in two:
        thread.join(PATIENCE)


def test_a_server_that_has_no_threads_yet() -> None:
    """The class has a list that takes nothing and waits for nothing."""
    assert isinstance(module().ThreadingMixIn._threads, module()._NoThreads)
    server: Any
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
        assert "_threads" not in vars(server)
        release = threading.Event()
        thread = idle_thread(release)
        server._threads.append(thread)
        server._threads.join()  # which does not wait for it
        assert thread.is_alive()
        release.set()
        thread.join(PATIENCE)


def test_a_server_lists_the_threads_that_live() -> None:
    server: Any
    with (
        socketserver.ThreadingTCPServer(LOCALHOST, hold) as server,
        serving(server),
        connect(server) as client,
    ):
        try:
            assert receive(client, 5) == b"hello"
            assert isinstance(vars(server)["_threads"], module()._Threads)
            (thread,) = server._threads
            assert isinstance(thread, threading.Thread)
            assert thread.is_alive()
        finally:
            client.sendall(b".")
        thread.join(PATIENCE)
        server._threads.reap()
        assert len(server._threads) == 0


def test_the_list_does_not_grow_with_the_requests() -> None:
    server: Any
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server, serving(server):
        for _ in range(100):
            ask(server)
        assert len(server._threads) < 50


@pytest.mark.parametrize("setting", [{"daemon_threads": True}, {"block_on_close": False}])
def test_a_server_that_waits_for_no_thread(setting: dict[str, bool]) -> None:
    kind = type("Server", (socketserver.ThreadingTCPServer,), setting)
    server: Any = kind(LOCALHOST, hold)
    with looping(server), connect(server) as client:
        assert receive(client, 5) == b"hello"
        server.shutdown()
        server.server_close()  # returns though the handler has not
        assert list(vars(server).get("_threads", [])) == []
        client.sendall(b".")
        assert read_all(client) == b""


def test_a_server_that_waits_for_its_threads() -> None:
    server = socketserver.ThreadingTCPServer(LOCALHOST, hold)
    with looping(server), connect(server) as client:
        assert receive(client, 5) == b"hello"
        server.shutdown()
        closing = background(server.server_close)
        assert not closing.done()
        client.sendall(b".")
        assert read_all(client) == b""
        closing.result(PATIENCE)


def test_joining_the_threads_by_hand() -> None:
    server: Any
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server, serving(server):
        ask(server, b"hello")
        for thread in list(server._threads):
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in server._threads)


# ------------------------------------------------------------------ process_request of the program


def test_a_process_request_that_names_its_threads() -> None:
    """Overridden to give threads a name, and otherwise as in the module."""

    class Server(socketserver.ThreadingTCPServer):
        def process_request(self: Any, request: Any, client_address: Any) -> None:
            if self.block_on_close:
                vars(self).setdefault("_threads", module()._Threads())
            thread = threading.Thread(
                target=self.process_request_thread,
                args=(request, client_address),
                name="worker",
            )
            thread.daemon = self.daemon_threads
            self._threads.append(thread)
            thread.start()

    def name(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(threading.current_thread().name.encode())

    with Server(LOCALHOST, name) as server, serving(server):
        assert ask(server) == b"worker"


def test_a_process_request_that_remembers_threads_by_itself() -> None:
    """As written for Python 3.7, with the names of its ``server_close``."""

    class Server(socketserver.ThreadingTCPServer):
        def process_request(self: Any, request: Any, client_address: Any) -> None:
            thread = threading.Thread(
                target=self.process_request_thread, args=(request, client_address)
            )
            thread.daemon = self.daemon_threads
            if not thread.daemon and self.block_on_close:
                self._threads.append(thread)
            thread.start()

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_requests_given_to_an_executor() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def __init__(self, *args: Any) -> None:
            self.executor = ThreadPoolExecutor(2)
            super().__init__(*args)

        def process_request(self, request: Any, client_address: Any) -> None:
            self.executor.submit(self.process_request_thread, request, client_address)

        def server_close(self) -> None:
            super().server_close()
            self.executor.shutdown()

    with Server(LOCALHOST, shout) as server, serving(server):
        asking = [background(ask, server, b"hello") for _ in range(5)]
        assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 5


def test_requests_given_to_an_executor_and_finished_by_hand() -> None:
    """A mix-in of the program's own, beside a server that has no threads."""

    class PoolMixIn:
        def process_request(self: Any, request: Any, client_address: Any) -> None:
            self.pool.submit(self.work, request, client_address)

        def work(self: Any, request: Any, client_address: Any) -> None:
            try:
                self.finish_request(request, client_address)
            except Exception:
                self.handle_error(request, client_address)
            finally:
                self.shutdown_request(request)

    with ThreadPoolExecutor(2) as executor:

        class Server(PoolMixIn, socketserver.TCPServer):
            pool = executor

        with Server(LOCALHOST, shout) as server, serving(server):
            asking = [background(ask, server, b"hello") for _ in range(5)]
            assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 5


def test_requests_given_to_a_queue_and_finished_elsewhere() -> None:
    class Server(socketserver.ThreadingTCPServer):
        requests: queue.Queue[Any] = queue.Queue()

        def process_request(self, request: Any, client_address: Any) -> None:
            self.requests.put((request, client_address))

        def process_request_thread(self) -> None:  # type: ignore[override]  # another signature
            while (accepted := self.requests.get(timeout=PATIENCE)) is not None:
                super().process_request_thread(*accepted)

    with Server(LOCALHOST, shout) as server:
        workers = [background(server.process_request_thread) for _ in range(2)]
        with serving(server):
            asking = [background(ask, server, b"hello") for _ in range(5)]
            assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 5
        for _ in workers:
            server.requests.put(None)
        for worker in workers:
            worker.result(PATIENCE)


def test_a_process_request_that_drops_the_request() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            self.shutdown_request(request)

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server) == b""


def test_a_process_request_that_serves_some_requests_itself() -> None:
    """Threads for the rest."""

    class Server(socketserver.ThreadingTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            if request.recv(1, socket.MSG_PEEK) == b"s":
                socketserver.TCPServer.process_request(self, request, client_address)
            else:
                super().process_request(request, client_address)

    def where(request: Any, client_address: Any, server: Any) -> Any:
        read_all(request)
        is_serving = threading.current_thread() is serving_thread[0]
        request.sendall(b"here" if is_serving else b"elsewhere")

    serving_thread = []
    with Server(LOCALHOST, where) as server:

        def serve() -> None:
            serving_thread.append(threading.current_thread())
            server.serve_forever(POLL_INTERVAL)

        loop = background(serve)
        assert ask(server, b"serial") == b"here"
        assert ask(server, b"threaded") == b"elsewhere"
        server.shutdown()
        loop.result(PATIENCE)


def test_a_process_request_that_sees_what_a_serial_handler_raised() -> None:
    """Without an engine, the handler runs inside it."""

    class Server(socketserver.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request(request, client_address)
            except Refused:
                request.sendall(b"refused")
                self.shutdown_request(request)

    def refuse(request: Any, client_address: Any, server: Any) -> Any:
        raise Refused

    with Server(LOCALHOST, refuse) as server, serving(server):
        assert ask(server) == b"refused"


def test_a_process_request_thread_around_the_modules_own() -> None:
    seen: list[object] = []

    class Server(socketserver.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            seen.append(threading.current_thread())
            super().process_request_thread(request, client_address)
            seen.append(request.fileno())

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"
    assert seen[0] is not threading.current_thread()
    assert seen[1] == -1


def test_a_finish_request_around_the_modules_own() -> None:
    """Runs where the handler runs; what it raises is an error of the request."""
    errors = []

    class Server(socketserver.ThreadingTCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            super().finish_request(request, client_address)
            raise Refused

        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((threading.current_thread(), sys.exc_info()[1]))

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"
    ((thread, error),) = errors
    assert thread is not threading.current_thread()
    assert isinstance(error, Refused)


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_handle_error_is_called_while_the_error_is_handled(kind: str) -> None:
    base: Any = getattr(socketserver, kind)
    errors = []

    class Server(base):  # type: ignore[misc]  # a value as a base
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((sys.exc_info()[1], request.fileno() >= 0, client_address))

    def refuse(request: Any, client_address: Any, server: Any) -> Any:
        raise Refused

    with Server(LOCALHOST, refuse) as server, serving(server), connect(server) as client:
        address = client.getsockname()
        assert read_all(client) == b""
    ((error, was_open, client_address),) = errors
    assert isinstance(error, Refused)
    assert was_open
    assert client_address == address


def test_handle_error_prints_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: Any, client_address: Any, server: Any) -> Any:
        raise Refused("no service today")

    with (
        socketserver.TCPServer(LOCALHOST, refuse) as server,
        serving(server),
        connect(server) as client,
    ):
        address = client.getsockname()
        assert read_all(client) == b""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == lines[-1] == "-" * 40
    assert lines[1] == f"Exception occurred during processing of request from {address}"
    assert lines[2] == "Traceback (most recent call last):"
    assert lines[-2].endswith("Refused: no service today")


# ------------------------------------------------------------------------- the life of a request


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_kept_open_after_its_handler(kind: str) -> None:
    base: Any = getattr(socketserver, kind)
    kept: queue.Queue[socket.socket] = queue.Queue()

    class Server(base):  # type: ignore[misc]
        def shutdown_request(self, request: Any) -> None:
            kept.put(request)

    def nothing(request: Any, client_address: Any, server: Any) -> Any:
        """Leave the connection to the program."""

    with (
        Server(LOCALHOST, nothing) as server,
        serving(server),
        connect(server) as client,
        kept.get(timeout=PATIENCE) as request,
    ):
        request.sendall(b"still here")
        assert receive(client, 10) == b"still here"
        client.sendall(b"so am I")
        assert receive(request, 7) == b"so am I"


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_detached_by_its_handler(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    detached: queue.Queue[int] = queue.Queue()

    def detach(request: Any, client_address: Any, server: Any) -> Any:
        detached.put(request.detach())

    server = getattr(socketserver, kind)(LOCALHOST, detach)
    with (
        serving(server),
        connect(server) as client,
        socket.socket(fileno=detached.get(timeout=PATIENCE)) as request,
    ):
        request.sendall(b"still here")
        assert receive(client, 10) == b"still here"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_closed_by_its_handler(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def close(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(read_all(request).upper())
        request.close()

    server = getattr(socketserver, kind)(LOCALHOST, close)
    with serving(server):
        assert ask(server, b"one") == b"ONE"
        assert ask(server, b"two") == b"TWO"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_shut_down_by_its_handler(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def shut_down(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(read_all(request).upper())
        request.shutdown(socket.SHUT_RDWR)

    server = getattr(socketserver, kind)(LOCALHOST, shut_down)
    with serving(server):
        assert ask(server, b"one") == b"ONE"
    assert capsys.readouterr().err == ""


def test_a_request_duplicated_by_its_handler_sees_end_of_file() -> None:
    """The server shuts the connection down before it closes its own descriptor."""
    copies = []

    def duplicate(request: Any, client_address: Any, server: Any) -> Any:
        copies.append(request.dup())

    with socketserver.TCPServer(LOCALHOST, duplicate) as server, serving(server):
        assert ask(server) == b""
        with copies[0] as copy, pytest.raises(BrokenPipeError):
            copy.send(b"too late")


def test_a_file_that_outlives_its_handler() -> None:
    """A file made of the socket keeps the descriptor, not the connection."""
    files = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            files.append(self.request.makefile("rb"))

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"left") == b""
        with files[0] as file:
            assert file.read() == b"left"


def test_a_request_refused_by_verify_request_is_closed() -> None:
    closed = []

    class Server(socketserver.ThreadingTCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(client_address[0] != "127.0.0.1")

        def shutdown_request(self, request: Any) -> None:
            closed.append(request)
            super().shutdown_request(request)

    with Server(LOCALHOST, shout) as server, serving(server), connect(server) as client:
        assert read_all(client) == b""
    assert len(closed) == 1


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_is_closed_once_whether_its_handler_fails_or_not(kind: str) -> None:
    base: Any = getattr(socketserver, kind)
    calls: dict[Any, list[str]] = {}

    class Server(base):  # type: ignore[misc]
        def shutdown_request(self, request: Any) -> None:
            calls.setdefault(request, []).append("shutdown_request")
            super().shutdown_request(request)

        def close_request(self, request: Any) -> None:
            calls.setdefault(request, []).append("close_request")
            super().close_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            calls.setdefault(request, []).append("handle_error")

    def fail_on_demand(request: Any, client_address: Any, server: Any) -> Any:
        if read_all(request) == b"fail":
            raise Refused

    with Server(LOCALHOST, fail_on_demand) as server, serving(server):
        ask(server, b"work")
        ask(server, b"fail")
    ending = ["shutdown_request", "close_request"]
    assert list(calls.values()) == [ending, ["handle_error", *ending]]


# --------------------------------------------------------------------------------------- processes


def forked(function: Any, *args: Any) -> int:
    """Call a function in a child process; its status is 0 if it returned."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def tell_pid(request: Any, client_address: Any, server: Any) -> Any:
    request.sendall(str(os.getpid()).encode())


def status_of(child: int) -> int:
    ended, status = os.waitpid(child, 0)
    assert ended == child
    return os.waitstatus_to_exitcode(status)


def test_a_listener_shared_by_children_that_each_serve() -> None:
    with socketserver.TCPServer(LOCALHOST, tell_pid) as server:
        server.socket.setblocking(False)  # the ones that lose the race for a client go on
        children = [forked(server.serve_forever, POLL_INTERVAL) for _ in range(3)]
        try:
            answers = [int(ask(server)) for _ in range(30)]
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        for child in children:
            assert status_of(child) == -signal.SIGKILL
    assert set(answers) <= set(children)


def test_a_listener_shared_by_children_that_each_serve_one_request() -> None:
    with socketserver.TCPServer(LOCALHOST, tell_pid) as server:
        children = [forked(server.handle_request) for _ in range(3)]
        answers = [int(ask(server)) for _ in range(3)]
        assert [status_of(child) for child in children] == [0, 0, 0]
    assert sorted(answers) == sorted(children)


def test_a_server_made_in_the_parent_and_served_in_the_child() -> None:
    """The parent goes on without it."""

    def serve_until_told(server: Any) -> None:
        loop = background(server.serve_forever, POLL_INTERVAL)
        signal.sigwait({signal.SIGTERM})
        server.shutdown()
        loop.result(PATIENCE)
        server.server_close()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        server = socketserver.ThreadingTCPServer(LOCALHOST, tell_pid)
        with server:
            child = forked(serve_until_told, server)
            address = server.server_address
        with socket.create_connection(address, PATIENCE) as client:  # type: ignore[arg-type]
            assert int(read_all(client)) == child
        os.kill(child, signal.SIGTERM)
        assert status_of(child) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def test_a_server_that_served_in_the_parent_serves_in_the_child() -> None:
    with socketserver.TCPServer(LOCALHOST, tell_pid) as server:
        with looping(server):
            assert int(ask(server)) == os.getpid()
            server.shutdown()
        child = forked(server.serve_forever, POLL_INTERVAL)
        try:
            assert int(ask(server)) == child
        finally:
            os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL


def test_the_children_are_listed_and_collected() -> None:
    with socketserver.ForkingTCPServer(LOCALHOST, tell_pid) as server:
        children: Any = server.active_children
        assert children is None
        server.collect_children()
        asking = background(ask, server)
        server.handle_request()
        child = int(asking.result(PATIENCE))
        assert server.active_children == {child}
        server.collect_children(blocking=True)
        assert server.active_children == set()
        with pytest.raises(ChildProcessError):
            os.waitpid(child, 0)


def test_the_children_are_collected_by_an_own_loop() -> None:
    with socketserver.ForkingTCPServer(LOCALHOST, tell_pid) as server:
        for _ in range(3):
            asking = background(ask, server)
            server.handle_request()
            child = int(asking.result(PATIENCE))
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            server.collect_children()
            assert server.active_children == set()


def test_children_collected_by_somebody_else() -> None:
    with socketserver.ForkingTCPServer(LOCALHOST, tell_pid) as server:
        asking = background(ask, server)
        server.handle_request()
        child = int(asking.result(PATIENCE))
        assert status_of(child) == 0
        server.collect_children(blocking=True)
        assert server.active_children == set()


def test_children_that_a_program_adds_to_the_list() -> None:
    """It forks by itself, and has the server collect."""
    with socketserver.ForkingTCPServer(LOCALHOST, tell_pid) as server:
        child = forked(lambda: None)
        server.active_children = {child}
    assert server.active_children == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)


def test_the_status_of_a_child_tells_whether_its_handler_failed() -> None:
    def fail(request: Any, client_address: Any, server: Any) -> Any:
        raise Refused

    class Server(socketserver.ForkingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing."""

    for handler, expected in ((tell_pid, 0), (fail, 1)):
        with Server(LOCALHOST, handler) as server:
            asking = background(ask, server)
            server.handle_request()
            asking.result(PATIENCE)
            assert server.active_children is not None
            (child,) = server.active_children
            assert status_of(child) == expected


def test_the_parent_closes_the_request_without_shutting_it_down() -> None:
    calls = []

    class Server(socketserver.ForkingTCPServer):
        def shutdown_request(self, request: Any) -> None:
            calls.append("shutdown_request")
            super().shutdown_request(request)

        def close_request(self, request: Any) -> None:
            calls.append("close_request")
            super().close_request(request)

    with Server(LOCALHOST, tell_pid) as server:
        asking = background(ask, server)
        server.handle_request()
        asking.result(PATIENCE)
    assert calls == ["close_request"]


def test_a_patched_fork() -> None:
    """Tests of programs let the parent's half run alone."""
    with (
        mock.patch.object(module().os, "fork", return_value=4711),
        socketserver.ForkingTCPServer(LOCALHOST, tell_pid) as server,
    ):
        request = mock.Mock()
        server.process_request(request, ("192.0.2.1", 4711))
        request.close.assert_called_once_with()
        request.shutdown.assert_not_called()
        assert server.active_children == {4711}
        server.active_children.clear()


def test_a_forking_server_serves_many_clients_at_once() -> None:
    with socketserver.ForkingTCPServer(LOCALHOST, shout) as server, serving(server):
        server.socket.listen(100)
        asking = [background(ask, server, b"hello") for _ in range(20)]
        assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 20


# -------------------------------------------------------------------------------- handle_request


def test_handle_request_in_a_loop_of_ones_own() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        asking = [background(ask, server, b"hello") for _ in range(5)]
        for _ in range(5):
            server.handle_request()
        assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 5


def test_handle_request_by_several_threads_on_one_listener() -> None:
    """All of them see the client; the ones that lose the race for it come back."""
    done = threading.Event()

    class Server(socketserver.TCPServer):
        def handle_timeout(self) -> None:
            done.wait(POLL_INTERVAL)

    with Server(LOCALHOST, shout) as server:
        server.socket.listen(100)  # more than the default of the standard library
        server.socket.setblocking(False)

        def work() -> None:
            while not done.is_set():
                server.handle_request()

        workers = [background(work) for _ in range(4)]
        try:
            asking = [background(ask, server, b"hello") for _ in range(40)]
            assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 40
        finally:
            done.set()
        for worker in workers:
            worker.result(PATIENCE)


@pytest.mark.parametrize(
    ("of_the_socket", "of_the_server"),
    [(None, 0.01), (0.01, None), (0.01, 60), (60, 0.01), (0, 60)],
)
def test_handle_request_waits_for_the_smaller_timeout(
    of_the_socket: float | None, of_the_server: float | None
) -> None:
    class Server(socketserver.TCPServer):
        timeout = of_the_server
        timeouts = 0

        def handle_timeout(self) -> None:
            self.timeouts += 1

    with Server(LOCALHOST, shout) as server:
        server.socket.settimeout(of_the_socket)
        background(server.handle_request).result(PATIENCE)
        assert server.timeouts == 1


def test_handle_timeout_that_raises() -> None:
    """The way out of a loop around handle_request."""

    class Server(socketserver.TCPServer):
        timeout = 0.01

        def handle_timeout(self) -> None:
            raise Refused

    def loop(server: Any) -> None:
        while True:
            server.handle_request()

    with Server(LOCALHOST, shout) as server, pytest.raises(Refused):
        loop(server)


def test_a_timeout_set_on_the_instance_between_two_requests() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        server.handle_request()
        assert asking.result(PATIENCE) == b"HELLO"
        server.timeout = 0
        with mock.patch.object(server, "handle_timeout") as handle_timeout:
            server.handle_request()
            handle_timeout.assert_called_once_with()


def test_handle_request_does_not_time_out_while_a_client_waits() -> None:
    class Server(socketserver.TCPServer):
        timeout = 0

        def handle_timeout(self) -> None:
            raise AssertionError("there is a client")

    with Server(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        select.select([server], [], [], PATIENCE)
        server.handle_request()
        assert asking.result(PATIENCE) == b"HELLO"


def test_serve_forever_ignores_the_timeout() -> None:
    class Server(socketserver.TCPServer):
        timeout = 0
        turns = 0

        def service_actions(self) -> None:
            self.turns += 1

        def handle_timeout(self) -> None:
            raise AssertionError("only handle_request calls it")

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"
