"""What programs do with the listener, the module's imports, and the classes themselves."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import selectors
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.compat.peers import (
    PATIENCE,
    POLL_INTERVAL,
    ask,
    connect,
    looping,
    read_all,
    serving,
    shout,
)

LOCALHOST = ("127.0.0.1", 0)
PEER = ("192.0.2.1", 4711)


def module() -> Any:
    """The module under test, with the names that typeshed does not know."""
    return socketserver


# ----------------------------------------------------------------------------- the module's imports


def test_the_imports_are_reached_through_the_module() -> None:
    assert module().socket is socket
    assert module().selectors is selectors
    assert module().threading is threading
    assert module().os is os
    assert module().sys is sys
    assert module().time is time.monotonic
    assert module().BufferedIOBase is io.BufferedIOBase


def test_a_patched_socket_module_makes_the_listener() -> None:
    with mock.patch.object(socketserver, "socket", wraps=socket) as patched:
        patched.socket = mock.Mock(return_value=mock.Mock())
        server = socketserver.TCPServer(PEER, shout)
        patched.socket.assert_called_once_with(socket.AF_INET, socket.SOCK_STREAM)
        assert server.socket is patched.socket.return_value
    assert module().socket is socket
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        assert isinstance(server.socket, socket.socket)


def test_a_socket_class_patched_through_the_module() -> None:
    with mock.patch.object(module().socket, "socket") as patched:
        server = socketserver.TCPServer(PEER, shout)
        assert server.socket is patched.return_value


def test_a_patched_threading_module_starts_the_threads() -> None:
    with (
        socketserver.ThreadingTCPServer(LOCALHOST, shout) as server,
        mock.patch.object(socketserver, "threading") as patched,
    ):
        request = mock.Mock()
        request.recv.return_value = b""
        server.process_request(request, PEER)
        patched.Thread.assert_called_once_with(
            target=server.process_request_thread, args=(request, PEER)
        )
        patched.Thread.return_value.start.assert_called_once_with()
        assert patched.Thread.return_value.daemon is False
    assert module().threading is threading


def test_a_thread_class_patched_through_the_module() -> None:
    """A count of a thread that cannot be mistaken: the step runs in the test's own."""
    with (
        socketserver.ThreadingTCPServer(LOCALHOST, shout) as server,
        connect(server) as client,
    ):
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        with mock.patch.object(module().threading, "Thread", wraps=threading.Thread) as patched:
            server.handle_request()
            assert patched.call_count == 1
        assert read_all(client) == b"HELLO"


def test_a_patched_time_measures_the_timeout() -> None:
    """A clock of the program's own makes a long wait short."""

    class Server(socketserver.TCPServer):
        timeout = 0.01
        timeouts = 0

        def handle_timeout(self) -> None:
            self.timeouts += 1

    clock = mock.Mock(side_effect=[100.0, 200.0, 300.0])
    with mock.patch.object(socketserver, "time", clock), Server(LOCALHOST, shout) as server:
        server.handle_request()
        assert server.timeouts == 1
    assert clock.call_count >= 2


def test_a_patched_sys_gets_the_report() -> None:
    stderr = io.StringIO()
    patched = mock.Mock(wraps=sys, stderr=stderr)
    with (
        mock.patch.object(socketserver, "sys", patched),
        socketserver.TCPServer(LOCALHOST, shout) as server,
    ):
        try:
            raise ValueError("said elsewhere")
        except ValueError:
            server.handle_error(mock.Mock(), PEER)
    lines = stderr.getvalue().splitlines()
    assert lines[0] == lines[-1] == "-" * 40
    assert lines[1] == f"Exception occurred during processing of request from {PEER}"


def test_a_patched_os_forks_the_child() -> None:
    with (
        mock.patch.object(socketserver, "os") as patched,
        socketserver.ForkingTCPServer(LOCALHOST, shout) as server,
    ):
        patched.fork.return_value = 4711
        server.process_request(mock.Mock(), PEER)
        assert server.active_children == {4711}
        server.active_children.clear()


def test_a_patched_writer_is_what_setup_makes() -> None:
    with mock.patch.object(socketserver, "_SocketWriter") as writer:
        request = mock.Mock()
        handler = socketserver.StreamRequestHandler(request, PEER, mock.Mock())
        writer.assert_called_once_with(request)
        assert handler.wfile is writer.return_value


def test_a_patched_list_of_threads_is_what_the_server_fills() -> None:
    with (
        mock.patch.object(socketserver, "_Threads") as threads,
        socketserver.ThreadingTCPServer(LOCALHOST, shout) as server,
        serving(server),
    ):
        assert ask(server, b"hello") == b"HELLO"
        server.shutdown()
        threads.assert_called_once_with()
        threads.return_value.append.assert_called_once()
        (thread,) = threads.return_value.append.call_args.args
        thread.join(PATIENCE)


def test_a_patched_server_class_is_what_others_find() -> None:
    with mock.patch.object(socketserver, "TCPServer") as patched:
        assert socketserver.TCPServer is patched
        assert module().TCPServer is patched
    assert isinstance(socketserver.TCPServer, type)


# ------------------------------------------------------------------------------ class attributes


def reuses_address(server: Any) -> bool:
    return bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR))


def test_an_attribute_changed_on_the_base_reaches_all_servers() -> None:
    with mock.patch.object(socketserver.TCPServer, "allow_reuse_address", new=True):
        with socketserver.TCPServer(LOCALHOST, shout) as server:
            assert reuses_address(server)
        with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
            assert reuses_address(server)
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        assert not reuses_address(server)


def test_an_attribute_changed_on_a_combination_reaches_no_other() -> None:
    with mock.patch.object(socketserver.ThreadingTCPServer, "allow_reuse_address", new=True):
        with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
            assert reuses_address(server)
        with socketserver.TCPServer(LOCALHOST, shout) as server:
            assert not reuses_address(server)


@pytest.mark.parametrize("owner", ["ThreadingMixIn", "ThreadingTCPServer", "instance"])
def test_daemon_threads_changed_while_the_program_runs(owner: str) -> None:
    def tell(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(str(threading.current_thread().daemon).encode())

    server: Any = socketserver.ThreadingTCPServer(LOCALHOST, tell)
    target = server if owner == "instance" else getattr(socketserver, owner)
    with serving(server):
        assert ask(server) == b"False"
        with mock.patch.object(target, "daemon_threads", new=True):
            assert ask(server) == b"True"
        assert ask(server) == b"False"


def test_the_backlog_is_read_when_the_server_listens() -> None:
    class Server(socketserver.TCPServer):
        request_queue_size = 17

    with mock.patch("socket.socket") as patched:
        Server(PEER, shout)
        patched.return_value.listen.assert_called_once_with(17)


def test_the_address_family_is_read_when_the_server_is_made() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python was built without IPv6")
    with (
        mock.patch.object(socketserver.TCPServer, "address_family", socket.AF_INET6),
        socketserver.TCPServer(("::1", 0), shout) as server,
        serving(server),
    ):
        assert server.server_address[0] == "::1"
        assert ask(server, b"hello") == b"HELLO"


def test_attributes_set_on_the_instance_before_init() -> None:
    class Server(socketserver.TCPServer):
        def __init__(self, path: Any) -> None:
            self.address_family = socket.AF_UNIX
            self.request_queue_size = 3
            self.allow_reuse_address = True
            self.timeout = 1.5
            super().__init__(path, shout)

    with mock.patch("socket.socket") as patched:
        server = Server("/nowhere")
        patched.assert_called_once_with(socket.AF_UNIX, socket.SOCK_STREAM)
        patched.return_value.listen.assert_called_once_with(3)
        patched.return_value.setsockopt.assert_called_once_with(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )
        assert server.timeout == 1.5


def test_attributes_of_the_programs_own_before_init() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def __init__(self, greeting: bytes) -> None:
            self.greeting = greeting
            super().__init__(LOCALHOST, self.greet)

        def greet(self, request: Any, client_address: Any, server: Any) -> Any:
            request.sendall(self.greeting)

    with Server(b"hello") as server, serving(server):
        assert ask(server) == b"hello"


def test_init_called_again_on_the_same_object() -> None:
    """Programs come back to life like this after the address was lost."""
    server = socketserver.ThreadingTCPServer(LOCALHOST, shout)
    with looping(server):
        assert ask(server, b"one") == b"ONE"
        server.shutdown()
    server.server_close()
    server.__init__(LOCALHOST, shout)  # type: ignore[misc]
    with serving(server):
        assert ask(server, b"two") == b"TWO"


def test_classes_made_with_type() -> None:
    assert type(socketserver.TCPServer) is type
    assert type(socketserver.StreamRequestHandler) is type
    kind = type("Server", (socketserver.ThreadingMixIn, socketserver.TCPServer), {"timeout": 2})
    server: Any = kind(LOCALHOST, shout)
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_classes_with_a_metaclass_of_the_programs_own() -> None:
    class Server(socketserver.ThreadingTCPServer, abc.ABC):
        @abc.abstractmethod
        def greeting(self) -> bytes: ...

        def finish_request(self, request: Any, client_address: Any) -> None:
            request.sendall(self.greeting())

    class Polite(Server):
        def greeting(self) -> bytes:
            return b"good day"

    with pytest.raises(TypeError, match="abstract"):
        Server(LOCALHOST, shout)  # type: ignore[abstract]
    with Polite(LOCALHOST, shout) as server, serving(server):
        assert ask(server) == b"good day"


def test_mix_ins_around_a_server_and_a_handler() -> None:
    calls = []

    class CountingMixIn:
        def get_request(self) -> Any:
            calls.append("get_request")
            return super().get_request()  # type: ignore[misc]

    class GreetingMixIn:
        def setup(self: Any) -> None:
            super().setup()  # type: ignore[misc]
            self.wfile.write(b"hello ")

    class Handler(GreetingMixIn, socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"world")

    class Server(CountingMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer):
        """The order of the documentation: mix-ins first."""

    with Server(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"hello world"
    assert calls == ["get_request"]


def test_a_server_that_is_a_thread_too() -> None:
    class Server(socketserver.TCPServer, threading.Thread):
        def __init__(self) -> None:
            threading.Thread.__init__(self, daemon=True)
            socketserver.TCPServer.__init__(self, LOCALHOST, shout)

        def run(self) -> None:
            self.serve_forever(POLL_INTERVAL)

    with Server() as server:
        server.start()
        assert ask(server, b"hello") == b"HELLO"
        server.shutdown()
        server.join(PATIENCE)
        assert not server.is_alive()


def test_what_is_a_kind_of_what() -> None:
    assert socketserver.UDPServer.__mro__[1:3] == (socketserver.TCPServer, socketserver.BaseServer)
    assert issubclass(socketserver.UnixDatagramServer, socketserver.UDPServer)
    assert not issubclass(socketserver.UnixDatagramServer, socketserver.UnixStreamServer)
    assert socketserver.ThreadingTCPServer.__bases__ == (
        socketserver.ThreadingMixIn,
        socketserver.TCPServer,
    )
    assert not issubclass(socketserver.ThreadingMixIn, socketserver.BaseServer)


# ---------------------------------------------------------------------- what is asked of a socket

LISTENER = ("bind", "listen", "getsockname", "accept", "close", "fileno", "gettimeout")
"""What servers may use of a listener."""


@contextlib.contextmanager
def mocked_listener(*names: str) -> Iterator[mock.Mock]:
    """Replace the sockets of servers by one that has these methods, and nothing else."""
    listener = mock.Mock(spec_set=names)
    if "getsockname" in names:
        listener.getsockname.return_value = ("203.0.113.1", 99)
    with mock.patch("socket.socket", return_value=listener):
        yield listener


def test_the_calls_that_make_a_listener() -> None:
    with mocked_listener(*LISTENER) as listener:
        server = socketserver.TCPServer(PEER, shout)
        assert sorted(listener.mock_calls) == sorted(
            [
                mock.call.bind(PEER),
                mock.call.getsockname(),
                mock.call.listen(server.request_queue_size),
            ]
        )
        assert server.server_address == ("203.0.113.1", 99)


def test_the_calls_that_make_and_read_a_datagram_socket() -> None:
    with mocked_listener("bind", "getsockname", "recvfrom", "sendto", "close") as listener:
        server: Any = socketserver.UDPServer(PEER, socketserver.DatagramRequestHandler)
        assert listener.mock_calls == [mock.call.bind(PEER), mock.call.getsockname()]
        listener.recvfrom.return_value = (b"ping", PEER)
        server._handle_request_noblock()
        listener.recvfrom.assert_called_once()
        listener.sendto.assert_called_once_with(b"", PEER)
        server.server_close()
        listener.close.assert_called_once_with()


def test_the_calls_on_a_request() -> None:
    """Ends with shutdown, then close, each once."""
    request = mock.Mock(spec_set=["shutdown", "close"])
    handler = mock.Mock()
    with mocked_listener(*LISTENER) as listener:
        listener.accept.return_value = (request, PEER)
        server: Any = socketserver.TCPServer(PEER, handler)
        server._handle_request_noblock()
        listener.accept.assert_called_once_with()
        handler.assert_called_once_with(request, PEER, server)
    assert request.mock_calls == [mock.call.shutdown(socket.SHUT_WR), mock.call.close()]


def test_the_calls_on_a_request_whose_handler_fails() -> None:
    request = mock.Mock(spec_set=["shutdown", "close"])
    with mocked_listener(*LISTENER) as listener:
        listener.accept.return_value = (request, PEER)
        server: Any = socketserver.TCPServer(PEER, mock.Mock(side_effect=ValueError))
        with mock.patch.object(server, "handle_error") as handle_error:
            server._handle_request_noblock()
            handle_error.assert_called_once_with(request, PEER)
    assert request.mock_calls == [mock.call.shutdown(socket.SHUT_WR), mock.call.close()]


@pytest.mark.parametrize("exit_", [SystemExit, KeyboardInterrupt])
def test_the_calls_on_a_request_whose_handler_exits(exit_: type[BaseException]) -> None:
    request = mock.Mock(spec_set=["shutdown", "close"])
    with mocked_listener(*LISTENER) as listener:
        listener.accept.return_value = (request, PEER)
        server: Any = socketserver.TCPServer(PEER, mock.Mock(side_effect=exit_))
        with pytest.raises(exit_):
            server._handle_request_noblock()
    assert request.mock_calls == [mock.call.shutdown(socket.SHUT_WR), mock.call.close()]


def test_the_calls_on_a_request_that_is_refused() -> None:
    request = mock.Mock(spec_set=["shutdown", "close"])
    handler = mock.Mock()
    with mocked_listener(*LISTENER) as listener:
        listener.accept.return_value = (request, PEER)
        server: Any = socketserver.TCPServer(PEER, handler)
        with mock.patch.object(server, "verify_request", return_value=False):
            server._handle_request_noblock()
    handler.assert_not_called()
    assert request.mock_calls == [mock.call.shutdown(socket.SHUT_WR), mock.call.close()]


def test_a_request_that_cannot_be_shut_down_is_closed() -> None:
    request = mock.Mock(spec_set=["shutdown", "close"])
    request.shutdown.side_effect = OSError("not connected")
    with mocked_listener(*LISTENER):
        socketserver.TCPServer(PEER, shout).shutdown_request(request)
    request.close.assert_called_once_with()


@pytest.mark.parametrize("step", ["bind", "getsockname", "listen"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_listener_that_cannot_be_made_is_closed(step: str, error: type[BaseException]) -> None:
    with mocked_listener(*LISTENER) as listener:
        getattr(listener, step).side_effect = error
        with pytest.raises(error):
            socketserver.TCPServer(PEER, shout)
        listener.close.assert_called_once_with()


def test_a_server_that_is_not_to_be_bound_asks_nothing() -> None:
    with mocked_listener() as listener:
        server = socketserver.TCPServer(PEER, shout, bind_and_activate=False)
        assert listener.mock_calls == []
        assert server.server_address == PEER
        assert server.socket is listener


# ------------------------------------------------------------------------ self.socket, exchanged


def contexts_without_certificate() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make the two ends of a TLS connection that nobody has to prove anything for."""
    ends = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in ends:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("aNULL:@SECLEVEL=0")
    return ends


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_the_listener_wrapped_in_tls(kind: str) -> None:
    """The idiom of programs: ``server.socket = context.wrap_socket(server.socket, ...)``."""
    server_context, client_context = contexts_without_certificate()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.request, ssl.SSLSocket)
            self.wfile.write(self.rfile.readline().upper())

    server = getattr(socketserver, kind)(LOCALHOST, Handler)
    server.socket = server_context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        for question, answer in ((b"one\n", b"ONE\n"), (b"two\n", b"TWO\n")):
            with client_context.wrap_socket(connect(server)) as client:
                client.sendall(question)
                assert client.recv(100) == answer


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer"])
def test_a_client_that_does_not_speak_tls_stops_nothing(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server_context, client_context = contexts_without_certificate()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    server = getattr(socketserver, kind)(LOCALHOST, Handler)
    server.socket = server_context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        with connect(server) as plain, contextlib.suppress(ConnectionError):
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            read_all(plain)
        with client_context.wrap_socket(connect(server)) as client:
            client.sendall(b"one\n")
            assert client.recv(100) == b"ONE\n"
    assert capsys.readouterr().err == ""


def test_each_request_wrapped_in_tls_by_get_request() -> None:
    server_context, client_context = contexts_without_certificate()

    class Server(socketserver.ThreadingTCPServer):
        def get_request(self) -> Any:
            request, client_address = super().get_request()
            return server_context.wrap_socket(request, server_side=True), client_address

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    with (
        Server(LOCALHOST, Handler) as server,
        serving(server),
        client_context.wrap_socket(connect(server)) as client,
    ):
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HELLO\n"


def test_a_listener_inherited_by_descriptor() -> None:
    """As from systemd: it is bound and listens already."""
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        server = socketserver.ThreadingTCPServer(LOCALHOST, shout, bind_and_activate=False)
        server.socket.close()
        server.socket = socket.fromfd(inherited.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        server.server_address = server.socket.getsockname()
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_a_server_bind_that_takes_an_inherited_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as inherited:

        class Server(socketserver.TCPServer):
            def server_bind(self) -> None:
                self.socket.close()
                self.socket = socket.socket(fileno=os.dup(inherited.fileno()))
                self.server_address = self.socket.getsockname()

            def server_activate(self) -> None:
                """It listens already."""

        server = Server(LOCALHOST, shout)
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_a_listener_detached_and_put_back() -> None:
    server = socketserver.TCPServer(LOCALHOST, shout)
    descriptor = server.socket.detach()
    server.socket = socket.socket(fileno=descriptor)
    assert server.fileno() == descriptor
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_a_listener_bound_by_hand() -> None:
    server = socketserver.TCPServer(LOCALHOST, shout, bind_and_activate=False)
    with server:
        server.allow_reuse_address = True
        server.server_bind()
        server.server_activate()
        assert server.server_address[1] != 0
        assert reuses_address(server)
        with serving(server):
            assert ask(server, b"hello") == b"HELLO"


def test_a_listener_bound_without_the_server() -> None:
    server = socketserver.TCPServer(("", 0), shout, bind_and_activate=False)
    server.socket.bind(("127.0.0.1", 0))
    server.socket.listen(5)
    server.server_address = server.socket.getsockname()
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_a_listener_exchanged_between_two_loops() -> None:
    """As after a change of the address in the configuration."""
    server = socketserver.TCPServer(LOCALHOST, shout)
    with looping(server):
        assert ask(server, b"one") == b"ONE"
        server.shutdown()
    server.socket.close()
    server.socket = socket.create_server(("127.0.0.1", 0))
    server.server_address = server.socket.getsockname()
    with serving(server):
        assert ask(server, b"two") == b"TWO"


def test_the_listeners_timeout_set_by_the_program() -> None:
    """It was the only way out of handle_request once; accepted sockets do not inherit it."""

    def tell(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(str(request.gettimeout()).encode())

    with socketserver.TCPServer(LOCALHOST, tell) as server:
        server.socket.settimeout(PATIENCE)
        with serving(server):
            assert ask(server) == b"None"


def test_two_servers_on_one_listener() -> None:
    with (
        socketserver.TCPServer(LOCALHOST, shout) as first,
        socketserver.TCPServer(LOCALHOST, shout, bind_and_activate=False) as second,
    ):
        second.socket.close()
        second.socket = first.socket.dup()
        second.server_address = first.server_address
        with looping(first):
            assert ask(first, b"one") == b"ONE"
            first.shutdown()
        with looping(second):
            assert ask(second, b"two") == b"TWO"
            second.shutdown()


def test_server_address_says_where_the_server_is(tmp_path: Path) -> None:
    with socketserver.TCPServer(("", 0), shout) as server:
        host, port = server.server_address[:2]
        assert host == "0.0.0.0"
        assert port > 0
    path = str(tmp_path / "socket")
    with socketserver.UnixStreamServer(path, shout) as unix_server:
        assert unix_server.server_address == path
    with socketserver.UnixStreamServer(f"\0{path}", shout) as unix_server:
        assert unix_server.server_address == f"\0{path}".encode()


@pytest.mark.parametrize("kind", ["UnixStreamServer", "ThreadingUnixStreamServer"])
def test_a_unix_server_leaves_its_path_to_the_program(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for _ in range(2):
        server = getattr(socketserver, kind)(str(path), shout)
        with serving(server):
            assert ask(server, b"hello") == b"HELLO"
        assert path.is_socket()
        path.unlink()


# ------------------------------------------------------------- fileno, get_request, other requests


def test_a_server_over_a_pipe() -> None:
    class Server(socketserver.BaseServer):
        def __init__(self, descriptor: int, handler: Any) -> None:
            super().__init__("a pipe", handler)
            self.descriptor = descriptor

        def fileno(self) -> int:
            return self.descriptor

        def get_request(self) -> Any:
            return os.read(self.descriptor, 1), "the other end"

    handled = []
    done = threading.Event()

    def handle(request: Any, client_address: Any, server: Any) -> Any:
        handled.append((request, client_address))
        if request == b"c":
            done.set()

    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb", buffering=0) as out:  # noqa: PTH123
        server = Server(reader, handle)
        with serving(server):
            out.write(b"abc")
            assert done.wait(PATIENCE)
    assert handled == [(letter, "the other end") for letter in (b"a", b"b", b"c")]


def test_a_threading_server_over_a_pipe() -> None:
    class Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
        def fileno(self) -> int:
            descriptor: int = self.server_address  # type: ignore[assignment]
            return descriptor

        def get_request(self) -> Any:
            return os.read(self.fileno(), 1), None

    done = threading.Event()
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb", buffering=0) as out:  # noqa: PTH123
        server = Server(reader, lambda request, *others: done.set())  # type: ignore[arg-type]
        with serving(server):
            out.write(b"x")
            assert done.wait(PATIENCE)


def test_requests_that_are_dictionaries() -> None:
    """A server in front of a queue: the descriptor only tells that there is something."""

    class Server(socketserver.TCPServer):
        closed: list[Any] = []  # noqa: RUF012  # as programs write it

        def __init__(self, handler: Any) -> None:
            super().__init__(LOCALHOST, handler, bind_and_activate=False)
            self.bell, self.ring = socket.socketpair()

        def fileno(self) -> int:
            return self.bell.fileno()

        def get_request(self) -> Any:
            return {"job": self.bell.recv(1)}, ("queue", 0)

        def shutdown_request(self, request: Any) -> None:
            self.closed.append(request)

        def server_close(self) -> None:
            super().server_close()
            self.bell.close()
            self.ring.close()

    done = threading.Event()
    with Server(lambda request, *others: done.set()) as server:
        with looping(server):
            server.ring.send(b"1")
            assert done.wait(PATIENCE)
            server.shutdown()
        assert server.closed == [{"job": b"1"}]


def test_a_request_of_another_librarys_tls() -> None:
    """An object with the methods of a socket, which is none."""

    class Connection:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.calls: list[str] = []

        def makefile(self, mode: str, bufsize: int = -1) -> Any:
            return self.sock.makefile(mode, bufsize)  # type: ignore[call-overload]

        def sendall(self, data: Any) -> None:
            self.sock.sendall(bytes(data).swapcase())

        def shutdown(self, how: int) -> None:
            self.calls.append("shutdown")
            self.sock.shutdown(how)

        def close(self) -> None:
            self.calls.append("close")
            self.sock.close()

    class Server(socketserver.ThreadingTCPServer):
        connections: list[Connection] = []  # noqa: RUF012

        def get_request(self) -> Any:
            sock, client_address = super().get_request()
            self.connections.append(Connection(sock))
            return self.connections[-1], client_address

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    with Server(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"Hello\n") == b"hELLO\n"
    assert [connection.calls for connection in server.connections] == [["shutdown", "close"]]


def test_a_request_whose_shutdown_takes_no_argument() -> None:
    """As in pyOpenSSL; programs override `shutdown_request` for it."""

    class Connection:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def shutdown(self) -> None:
            self.sock.shutdown(socket.SHUT_WR)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    class Server(socketserver.ThreadingTCPServer):
        def get_request(self) -> Any:
            sock, client_address = super().get_request()
            return Connection(sock), client_address

        def shutdown_request(self, request: Any) -> None:
            request.shutdown()
            self.close_request(request)

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_datagrams_that_get_request_decodes() -> None:
    class Server(socketserver.UDPServer):
        def get_request(self) -> Any:
            (packet, sock), client_address = super().get_request()
            return (packet.decode().upper(), sock), client_address

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            text, sock = self.request
            sock.sendto(text.encode(), self.client_address)

    with Server(LOCALHOST, Handler) as server, serving(server):
        assert ask_datagram(server, "grüß".encode()) == "GRÜSS".encode()


@pytest.mark.parametrize("kind", ["UDPServer", "ThreadingUDPServer", "ForkingUDPServer"])
def test_a_datagram_request_is_bytes_and_the_listener(kind: str) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> Any:
        packet, sock = request
        assert type(packet) is bytes
        assert sock.fileno() == server.fileno()
        sock.sendto(packet.upper(), client_address)

    server = getattr(socketserver, kind)(LOCALHOST, handle)
    with serving(server):
        assert ask_datagram(server, b"hello") == b"HELLO"
        assert ask_datagram(server, b"x" * 8192) == b"X" * 8192


def test_the_socket_of_a_datagram_request_is_the_listener_itself() -> None:
    """Programs keep things in a dictionary by it."""

    def handle(request: Any, client_address: Any, server: Any) -> Any:
        _, sock = request
        sock.sendto(str(sock is server.socket).encode(), client_address)

    with socketserver.ThreadingUDPServer(LOCALHOST, handle) as server, serving(server):
        assert ask_datagram(server, b"is it?") == b"True"


def test_the_packet_size_set_on_the_instance() -> None:
    def handle(request: Any, client_address: Any, server: Any) -> Any:
        packet, sock = request
        sock.sendto(packet, client_address)

    server: Any
    with socketserver.UDPServer(LOCALHOST, handle) as server, serving(server):
        server.max_packet_size = 4
        assert ask_datagram(server, b"1234") == b"1234"
        assert ask_datagram(server, b"123456") == b"1234"


def test_a_datagram_handler_always_answers() -> None:
    """Programs count on the empty answer as a sign of life."""
    with (
        socketserver.UDPServer(LOCALHOST, socketserver.DatagramRequestHandler) as server,
        serving(server),
    ):
        assert ask_datagram(server, b"anybody?") == b""


def test_a_broadcasting_udp_server() -> None:
    """It sets options on its listener, and sends when nobody asked."""

    class Server(socketserver.ThreadingUDPServer):
        allow_reuse_address = True

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            super().server_bind()

    with (
        Server(LOCALHOST, shout) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener,
    ):
        listener.settimeout(PATIENCE)
        listener.bind(("127.0.0.1", 0))
        server.socket.sendto(b"hear", listener.getsockname())
        assert listener.recvfrom(100) == (b"hear", server.server_address)
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)


def ask_datagram(server: Any, question: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(question, server.server_address)
        return client.recv(65536)
