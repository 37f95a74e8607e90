"""What programs do with handlers, and with the two files of a stream."""

from __future__ import annotations

import array
import fcntl
import functools
import io
import os
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.compat.peers import PATIENCE, ask, background, connect, read_all, receive, serving, shout

LOCALHOST = ("127.0.0.1", 0)
PEER = ("192.0.2.1", 4711)


class FakeConnection:
    """What tests of programs give a stream handler: a question, and a record of the answer."""

    def __init__(self, question: bytes) -> None:
        self.question = question
        self.answer = b""

    def makefile(self, mode: str, bufsize: int = -1) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.question)

    def sendall(self, data: Any) -> None:
        self.answer += bytes(data)


# --------------------------------------------------------------------- any callable is a handler


def answer_hello(request: Any, client_address: Any, server: Any) -> Any:
    request.sendall(b"hello")


class Greeter:
    """An object of the program's own, whose method handles requests."""

    def __init__(self, greeting: bytes) -> None:
        self.greeting = greeting

    def greet(self, request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(self.greeting)

    __call__ = greet


def greet_with(greeting: bytes, request: Any, client_address: Any, server: Any) -> Any:
    request.sendall(greeting)


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(answer_hello, id="function"),
        pytest.param(functools.partial(greet_with, b"hello"), id="partial"),
        pytest.param(Greeter(b"hello").greet, id="bound method"),
        pytest.param(Greeter(b"hello"), id="object"),
        pytest.param(lambda *request: request[0].sendall(b"hello"), id="lambda"),
    ],
)
@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_any_callable_is_a_handler(kind: str, handler: Any) -> None:
    server = getattr(socketserver, kind)(LOCALHOST, handler)
    with serving(server):
        assert ask(server) == b"hello"
        assert server.RequestHandlerClass is handler


def test_the_handler_is_called_with_three_positions() -> None:
    handler = mock.Mock()
    with socketserver.TCPServer(LOCALHOST, handler) as server, connect(server) as client:
        server.handle_request()
        ((request, client_address, third), keywords) = handler.call_args
        assert isinstance(request, socket.socket)
        assert client_address == client.getsockname()
        assert third is server
        assert keywords == {}


def test_the_handler_is_exchanged_while_serving() -> None:
    def repeat(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(read_all(request))

    with socketserver.TCPServer(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"quiet") == b"QUIET"
        server.RequestHandlerClass = repeat
        assert ask(server, b"quiet") == b"quiet"


def test_a_handler_that_takes_more_through_a_partial() -> None:
    """The way to give a handler class arguments of its own, as in `http.server`."""

    class Handler(socketserver.StreamRequestHandler):
        def __init__(self, *args: Any, greeting: bytes, **kwargs: Any) -> None:
            self.greeting = greeting
            super().__init__(*args, **kwargs)

        def handle(self) -> None:
            self.wfile.write(self.greeting)

    handler = functools.partial(Handler, greeting=b"servus")
    with socketserver.TCPServer(LOCALHOST, handler) as server, serving(server):
        assert ask(server) == b"servus"


def test_a_class_attribute_as_the_handler() -> None:
    """A subclass that knows its own handler and takes none."""

    class Server(socketserver.ThreadingTCPServer):
        def __init__(self) -> None:
            super().__init__(LOCALHOST, shout)

    with Server() as server, serving(server):
        assert ask(server, b"own") == b"OWN"


def test_finish_request_makes_the_handler_with_something_more() -> None:
    class Server(socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            self.RequestHandlerClass(request, client_address, SimpleNamespace(greeting=b"moin"))  # type: ignore[arg-type]

    def greet(request: Any, client_address: Any, context: Any) -> Any:
        request.sendall(context.greeting)

    with Server(LOCALHOST, greet) as server, serving(server):
        assert ask(server) == b"moin"


# ------------------------------------------------------------------- handlers without a connection


def test_a_stream_handler_on_a_fake_connection() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line.upper())

    connection = FakeConnection(b"one\ntwo\n")
    handler = Handler(connection, PEER, None)  # type: ignore[arg-type]  # programs pass None
    assert connection.answer == b"ONE\nTWO\n"
    assert handler.request is connection
    assert handler.connection is connection
    assert handler.client_address == PEER
    assert handler.server is None


def test_a_base_handler_on_mocks() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(self.request.recv(1024))

    request = mock.Mock()
    request.recv.return_value = b"ping"
    Handler(request, PEER, mock.Mock())
    request.sendall.assert_called_once_with(b"ping")


def test_a_stream_handler_on_a_mock() -> None:
    class Handler(socketserver.StreamRequestHandler):
        timeout = 3
        disable_nagle_algorithm = True

        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    request = mock.Mock()
    rfile = request.makefile.return_value
    rfile.readline.return_value = b"ping\n"
    Handler(request, PEER, mock.Mock())
    request.settimeout.assert_called_once_with(3)
    request.setsockopt.assert_called_once_with(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    request.makefile.assert_called_once_with("rb", -1)
    request.sendall.assert_called_once_with(b"ping\n")
    rfile.close.assert_called_once_with()


def test_a_buffered_stream_handler_on_a_mock() -> None:
    class Handler(socketserver.StreamRequestHandler):
        rbufsize = 0
        wbufsize = 4096

    request = mock.Mock()
    files = {"rb": mock.Mock(), "wb": mock.Mock(closed=False)}
    request.makefile.side_effect = lambda mode, bufsize: files[mode]
    Handler(request, PEER, mock.Mock())
    assert request.makefile.call_args_list == [mock.call("rb", 0), mock.call("wb", 4096)]
    assert files["wb"].mock_calls == [mock.call.flush(), mock.call.close()]
    assert files["rb"].mock_calls == [mock.call.close()]


def test_a_datagram_handler_on_a_mock() -> None:
    class Handler(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    listener = mock.Mock()
    handler = Handler((b"ping", listener), PEER, None)  # type: ignore[arg-type]
    assert handler.packet == b"ping"
    assert handler.socket is listener
    listener.sendto.assert_called_once_with(b"PING", PEER)


def test_a_handler_whose_init_never_ran() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    handler = Handler.__new__(Handler)
    handler.rfile = io.BytesIO(b"copied")
    handler.wfile = io.BytesIO()
    handler.handle()
    assert handler.wfile.getvalue() == b"copied"


def test_a_handler_with_an_init_of_its_own() -> None:
    """It does nothing by itself; the program calls what it wants to."""

    class Handler(socketserver.BaseRequestHandler):
        def __init__(self, request: Any) -> None:
            self.request = request

        def handle(self) -> None:
            self.request.append("handled")

    record: list[str] = []
    handler = Handler(record)
    assert record == []
    handler.handle()
    handler.finish()
    assert record == ["handled"]


def test_the_steps_of_a_handler_called_one_by_one() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def __init__(self, request: Any) -> None:
            self.request = request

    connection = FakeConnection(b"hello\n")
    handler = Handler(connection)
    handler.setup()
    assert handler.rfile.readline() == b"hello\n"
    handler.wfile.write(b"bye\n")
    handler.finish()
    assert connection.answer == b"bye\n"
    assert handler.rfile.closed
    assert handler.wfile.closed


def test_a_setup_that_replaces_the_connection() -> None:
    """The idiom of handlers that speak TLS or log what passes: wrap, then go on as usual."""

    class Upper:
        def __init__(self, sock: Any) -> None:
            self.sock = sock

        def sendall(self, data: bytes) -> None:
            self.sock.sendall(bytes(data).upper())

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    class Handler(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            self.request = Upper(self.request)
            super().setup()

        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    with socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"quiet") == b"QUIET"


def test_a_finish_that_says_more() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"work ")

        def finish(self) -> None:
            self.wfile.write(b"done")
            super().finish()

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"work done"


def test_a_handler_that_closes_its_files_itself() -> None:
    reported = []

    class Server(socketserver.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            reported.append(sys.exc_info()[1])

    class Handler(socketserver.StreamRequestHandler):
        wbufsize = -1

        def handle(self) -> None:
            self.wfile.write(b"bye")
            self.wfile.close()
            self.rfile.close()

    with Server(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"bye"
    assert reported == []


# -------------------------------------------------------------------------- wfile: _SocketWriter


def socket_writer() -> Any:
    """The class, which typeshed does not know."""
    return socketserver._SocketWriter  # type: ignore[attr-defined]


def test_wfile_is_a_socket_writer() -> None:
    handlers = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            handlers.append(self)
            wfile: Any = self.wfile
            assert type(wfile) is socket_writer()
            assert isinstance(self.wfile, io.BufferedIOBase)
            assert wfile._sock is self.connection
            assert self.wfile.fileno() == self.connection.fileno()
            assert self.wfile.writable()
            assert not self.wfile.readable()
            assert not self.wfile.seekable()
            self.wfile.write(b"checked")

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"checked"
    assert handlers[0].wfile.closed


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"12345678", id="bytes"),
        pytest.param(bytearray(b"12345678"), id="bytearray"),
        pytest.param(memoryview(b"012345678")[1:], id="memoryview"),
        pytest.param(memoryview(b"12345678").cast("H"), id="memoryview of shorts"),
        pytest.param(memoryview(b"12345678").cast("B", (2, 4)), id="memoryview of two dimensions"),
        pytest.param(array.array("I", b"12345678"), id="array"),
    ],
)
def test_write_takes_any_buffer_and_returns_its_bytes(data: Any) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            returned.append(self.wfile.write(data))

    returned: list[int] = []
    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"12345678"
    assert returned == [8]


def test_write_refuses_text() -> None:
    with pytest.raises(TypeError):
        socket_writer()(FakeConnection(b"")).write("text")


def test_write_sends_all_of_much() -> None:
    """More than the socket takes at once, to a client that starts to read late."""
    much = bytes(range(256)) * 32_768
    written = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert self.wfile.write(much) == len(much)
            written.set()

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
    ):
        assert select.select([client], [], [], PATIENCE)[0] == [client]
        assert not written.is_set()
        assert read_all(client) == much


def test_a_patched_write() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"hello")

    with mock.patch.object(socket_writer(), "write") as write:
        connection = FakeConnection(b"")
        Handler(connection, PEER, None)  # type: ignore[arg-type]
        write.assert_called_once_with(b"hello")
    assert connection.answer == b""


def test_a_patched_write_that_calls_the_real_one() -> None:
    write = socket_writer().write
    written = []

    def counting(self: Any, data: Any) -> int:
        written.append(data)
        size: int = write(self, data)
        return size

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line)

    with (
        mock.patch.object(socket_writer(), "write", counting),
        socketserver.TCPServer(LOCALHOST, Handler) as server,
        serving(server),
    ):
        assert ask(server, b"a\nb\n") == b"a\nb\n"
    assert written == [b"a\n", b"b\n"]


def test_a_writer_that_a_setup_makes_itself() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def setup(self) -> None:
            self.out = socket_writer()(self.request)

        def handle(self) -> None:
            self.out.write(b"hello")
            self.out.flush()

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"hello"


def test_a_subclassed_writer() -> None:
    class Loud(socket_writer()):  # type: ignore[misc]  # a value as a base
        def write(self, data: Any) -> Any:
            return super().write(bytes(data).upper())

    class Handler(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            super().setup()
            self.wfile = Loud(self.connection)

        def handle(self) -> None:
            self.wfile.write(b"hello")

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"HELLO"


def test_text_through_a_wrapper_around_wfile() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            wfile: Any = self.wfile
            out = io.TextIOWrapper(wfile, "utf-8", write_through=True)
            print("grüß", "dich", file=out)
            out.detach()

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server).decode() == "grüß dich\n"


def test_a_buffer_around_wfile() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            out = io.BufferedWriter(self.wfile)
            out.write(b"kept ")
            out.write(b"back")
            out.flush()
            out.detach()

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"kept back"


def test_lines_and_files_into_wfile() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.writelines([b"one\n", b"two\n"])
            shutil.copyfileobj(io.BytesIO(b"three\n"), self.wfile)

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"one\ntwo\nthree\n"


def test_a_child_process_between_the_two_files() -> None:
    """The way of inetd: the child reads and writes the connection itself."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            stdin: Any = self.rfile
            stdout: Any = self.wfile
            program = "import sys; sys.stdout.write(sys.stdin.read().upper())"
            subprocess.run(
                [sys.executable, "-c", program],
                stdin=stdin,
                stdout=stdout,
                check=True,
                timeout=PATIENCE,
            )

    with socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"


# ------------------------------------------------------------------------ rfile, and what it holds


def test_rfile_is_a_buffered_reader_over_a_socket_io() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert type(self.rfile) is io.BufferedReader
            assert type(self.rfile.raw) is socket.SocketIO
            assert self.rfile.fileno() == self.connection.fileno()
            assert self.rfile.peek(1)[:1] == b"a"
            assert self.rfile.read(1) == b"a"
            buffer = bytearray(2)
            assert self.rfile.readinto(buffer) == 2
            assert buffer == b"bc"
            assert self.rfile.read1(100) == b"defgh\n"
            assert self.rfile.readline(3) == b""
            self.wfile.write(b"checked")

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"abcdefgh\n") == b"checked"


def test_rfile_without_a_buffer_is_a_socket_io() -> None:
    """So nothing is read ahead, and the rest can be received from the socket."""

    class Handler(socketserver.StreamRequestHandler):
        rbufsize = 0

        def handle(self) -> None:
            rfile: Any = self.rfile
            assert type(rfile) is socket.SocketIO
            line = rfile.readline()
            rest = self.request.recv(100, socket.MSG_WAITALL)
            self.wfile.write(line.upper() + rest)

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"line\nrest") == b"LINE\nrest"


def test_lines_of_a_limited_length() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while piece := self.rfile.readline(4):
                self.wfile.write(piece + b"|")

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"abcdefg\nhi") == b"abcd|efg\n|hi|"


def test_a_buffered_wfile_is_sent_at_the_end() -> None:
    class Handler(socketserver.StreamRequestHandler):
        wbufsize = 65536

        def handle(self) -> None:
            assert isinstance(self.wfile, io.BufferedWriter)
            self.wfile.write(b"early ")
            self.request.sendall(b"late ")

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"late early "


def test_a_buffered_wfile_is_sent_by_flush() -> None:
    flushed, seen = threading.Event(), threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        wbufsize = -1

        def handle(self) -> None:
            self.wfile.write(b"now")
            self.wfile.flush()
            flushed.set()
            assert seen.wait(PATIENCE)

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
    ):
        assert receive(client, 3) == b"now"
        assert flushed.wait(PATIENCE)
        seen.set()


def test_what_was_written_arrives_though_the_handler_waits_for_something_else() -> None:
    seen = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"are you there?")
            assert seen.wait(PATIENCE)
            self.wfile.write(b" yes")

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
    ):
        assert receive(client, 14) == b"are you there?"
        seen.set()
        assert read_all(client) == b" yes"


def test_o_nonblock_set_behind_the_files_back() -> None:
    """A handler that watches several descriptors sets the flag on the descriptor itself."""

    class Handler(socketserver.StreamRequestHandler):
        rbufsize = 0

        def handle(self) -> None:
            descriptor = self.request.fileno()
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)
            try:
                self.request.recv(100)
            except BlockingIOError:
                self.wfile.write(b"nothing")
            assert self.rfile.read(100) is None
            self.wfile.write(b" yet")
            select.select([descriptor], [], [], PATIENCE)
            self.wfile.write(self.request.recv(100).upper())

    reported = []

    class Server(socketserver.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            reported.append(sys.exc_info()[1])

    with Server(LOCALHOST, Handler) as server, serving(server), connect(server) as client:
        client.settimeout(PATIENCE / 12)
        assert receive(client, 11) == b"nothing yet"
        client.sendall(b"hello")
        client.settimeout(PATIENCE)
        assert read_all(client) == b"HELLO"
    assert reported == []


def test_a_handler_that_forwards_with_select() -> None:
    """A proxy: it waits on two sockets at once, and moves what comes."""

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with connect(origin) as upstream:
                other = {self.request: upstream, upstream: self.request}
                while other:
                    for ready in select.select(list(other), [], [], PATIENCE)[0]:
                        if data := ready.recv(4096):
                            other[ready].sendall(data)
                        else:
                            other.pop(ready).shutdown(socket.SHUT_WR)

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, shout) as origin,
        serving(origin),
        socketserver.ThreadingTCPServer(LOCALHOST, Proxy) as server,
        serving(server),
    ):
        assert ask(server, b"hello") == b"HELLO"


def test_a_handler_that_sets_its_socket_non_blocking() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.setblocking(False)
            with pytest.raises(BlockingIOError):
                self.request.recv(100)
            self.request.setblocking(True)
            self.request.sendall(b"ready")
            self.request.sendall(self.request.recv(100).upper())

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
    ):
        assert receive(client, 5) == b"ready"
        client.sendall(b"hello")
        assert read_all(client) == b"HELLO"


def test_the_timeout_of_a_stream_handler() -> None:
    """It limits one operation; a reader that has timed out cannot be used again."""
    errors: list[BaseException] = []

    class Handler(socketserver.StreamRequestHandler):
        timeout = 0.05

        def handle(self) -> None:
            assert self.connection.gettimeout() == 0.05
            for _ in range(2):
                try:
                    self.rfile.readline()
                except OSError as error:
                    errors.append(error)
            self.wfile.write(b"too late")

    with (
        socketserver.TCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
    ):
        assert read_all(client) == b"too late"
    first, second = errors
    assert isinstance(first, TimeoutError)
    assert str(second) == "cannot read from timed out object"


def test_no_delay_is_set_when_it_is_asked_for() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            delay = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            self.wfile.write(str(bool(delay)).encode())

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == b"False"
        Handler.disable_nagle_algorithm = True
        assert ask(server) == b"True"


def test_files_that_a_handler_makes_itself() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            lines = self.request.makefile("r", encoding="utf-8")
            out = self.request.makefile("w", encoding="utf-8", newline="\n")
            with lines, out:
                for line in lines:
                    out.write(line.upper())

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server, b"one\ntwo\n") == b"ONE\nTWO\n"


def test_a_handler_sends_a_file() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with Path(__file__).open("rb") as file:
                self.connection.sendfile(file)

    with socketserver.TCPServer(LOCALHOST, Handler) as server, serving(server):
        assert ask(server) == Path(__file__).read_bytes()


def test_a_handler_that_pushes_while_another_thread_reads() -> None:
    """One connection, two directions, each with a thread of its own."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            heard = background(self.rfile.readline)
            for number in range(100):
                self.wfile.write(b"%d\n" % number)
            assert heard.result(PATIENCE) == b"enough\n"

    with (
        socketserver.ThreadingTCPServer(LOCALHOST, Handler) as server,
        serving(server),
        connect(server) as client,
        client.makefile("rb") as lines,
    ):
        assert [lines.readline() for _ in range(100)] == [b"%d\n" % n for n in range(100)]
        client.sendall(b"enough\n")
        assert lines.read() == b""
