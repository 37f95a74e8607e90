from __future__ import annotations

import array
import errno
import io
import socket
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from portico import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from portico.handlers import _SocketWriter
from tests.support import PATIENCE, Call, nothing_left_behind

ADDRESS = ("192.0.2.7", 40000)


# --- the order --------------------------------------------------------------------------


class Noting(BaseRequestHandler):
    """Note what is called, and fail where a test wants it."""

    fails_in: tuple[str, ...] = ()

    def note(self, hook: str) -> None:
        self.request.append(hook)
        if hook in self.fails_in:
            raise LookupError(hook)

    def setup(self) -> None:
        self.note("setup")

    def handle(self) -> None:
        self.note("handle")

    def finish(self) -> None:
        self.note("finish")


def failing(*hooks: str) -> type[Noting]:
    return type("Failing", (Noting,), {"fails_in": hooks})


def test_a_handler_does_all_its_work_in_its_constructor() -> None:
    request: list[str] = []
    handler = Noting(request, ADDRESS, "the server")
    assert request == ["setup", "handle", "finish"]
    assert handler.request is request
    assert (handler.client_address, handler.server) == (ADDRESS, "the server")


def test_the_hooks_of_the_base_do_nothing() -> None:
    assert vars(BaseRequestHandler(None, None, None)) == {
        "request": None,
        "client_address": None,
        "server": None,
    }


@pytest.mark.parametrize(
    ("hooks", "called", "raised"),
    [
        (("setup",), ["setup"], "setup"),
        (("handle",), ["setup", "handle", "finish"], "handle"),
        (("finish",), ["setup", "handle", "finish"], "finish"),
        (("handle", "finish"), ["setup", "handle", "finish"], "finish"),
    ],
)
def test_what_runs_after_a_hook_that_raised(
    hooks: tuple[str, ...], called: list[str], raised: str
) -> None:
    """Nothing after `setup`; `finish` after `handle`."""
    request: list[str] = []
    with pytest.raises(LookupError, match=raised):
        failing(*hooks)(request, ADDRESS, None)
    assert request == called


# --- streams ----------------------------------------------------------------------------

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A request as the server has it, and its client."""
    if request.param == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
    with ours, theirs:
        theirs.settimeout(PATIENCE)
        yield ours, theirs


class Open(StreamRequestHandler):
    """A handler that a test looks at between `setup` and `finish`."""

    def __init__(self, request: Any) -> None:
        self.request, self.client_address, self.server = request, ADDRESS, None
        self.setup()


def with_settings(**settings: object) -> type[Open]:
    return type("Set", (Open,), settings)


def test_a_stream_handler_echoes_lines(pair: Pair) -> None:
    class Echo(StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line)

    request, client = pair
    client.sendall(b"one\ntwo\n")
    client.shutdown(socket.SHUT_WR)
    Echo(request, ADDRESS, None)
    request.close()
    assert client.makefile("rb").read() == b"one\ntwo\n"


def test_the_connection_is_the_request(pair: Pair) -> None:
    handler = Open(pair[0])
    assert handler.connection is handler.request is pair[0]
    handler.finish()


def test_the_reader_is_buffered(pair: Pair) -> None:
    request, client = pair
    handler = Open(request)
    client.sendall(b"hello, reader")
    assert isinstance(handler.rfile, io.BufferedReader)
    assert handler.rfile.peek(5)[:5] == b"hello"
    assert handler.rfile.read(7) == b"hello, "
    handler.finish()


def test_an_unbuffered_reader_reads_what_is_there(pair: Pair) -> None:
    request, client = pair
    handler = with_settings(rbufsize=0)(request)
    client.sendall(b"hello")
    assert isinstance(handler.rfile, socket.SocketIO)
    assert handler.rfile.read(64) == b"hello"
    handler.finish()


def test_the_writer_sends_at_once(pair: Pair) -> None:
    request, client = pair
    handler = Open(request)
    assert type(handler.wfile) is _SocketWriter
    handler.wfile.write(b"at once")
    assert client.recv(64) == b"at once"
    handler.finish()


def test_a_socket_may_bring_a_writer_of_its_own() -> None:
    """Asked of its class: a mock, which has an answer to everything, is given the usual one."""

    class Special(Fake):
        def make_writer(self) -> io.BytesIO:
            return io.BytesIO(b"special")

    assert with_settings()(Special(b"")).wfile.getvalue() == b"special"
    assert type(with_settings()(Mock()).wfile) is _SocketWriter


def test_a_buffered_writer_sends_at_the_end(pair: Pair) -> None:
    request, client = pair
    handler = with_settings(wbufsize=1024)(request)
    assert isinstance(handler.wfile, io.BufferedWriter)
    handler.wfile.write(b"one, ")
    handler.wfile.write(b"two")
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(64)
    handler.finish()
    assert client.recv(64) == b"one, two"


def test_finish_closes_both_files_and_leaves_the_socket_to_the_server(pair: Pair) -> None:
    request, _ = pair
    handler = Open(request)
    handler.finish()
    assert handler.rfile.closed
    assert handler.wfile.closed
    assert request.fileno() >= 0


def test_a_handler_may_close_its_files_itself(pair: Pair) -> None:
    handler = with_settings(wbufsize=-1)(pair[0])
    handler.wfile.close()
    handler.rfile.close()
    handler.finish()
    assert handler.wfile.closed


def test_a_connection_has_no_time_limit_by_default(pair: Pair) -> None:
    handler = Open(pair[0])
    assert pair[0].gettimeout() is None
    handler.finish()


def test_a_time_limit_holds_for_one_operation(pair: Pair) -> None:
    """A reader that has timed out once cannot be read from any more."""
    request, client = pair
    handler = with_settings(timeout=0.01)(request)
    with pytest.raises(TimeoutError):
        handler.rfile.readline()
    client.sendall(b"too late\n")
    with pytest.raises(OSError, match="cannot read from timed out object"):
        handler.rfile.readline()
    handler.finish()


@pytest.mark.parametrize("disabled", [False, True])
def test_nagles_algorithm_is_disabled_when_asked_for(disabled: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            request, _ = listener.accept()
    with request:
        handler = with_settings(disable_nagle_algorithm=disabled)(request)
        assert bool(request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is disabled
        handler.finish()


def test_where_there_is_no_nagle_nothing_is_disabled() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handler = with_settings(disable_nagle_algorithm=True)(ours)
        handler.wfile.write(b"prompt")
        assert theirs.recv(64) == b"prompt"
        handler.finish()


def test_another_error_of_the_socket_is_not_hidden() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        with_settings(disable_nagle_algorithm=True)(ours)


class Broken(io.BufferedIOBase):
    """A writer that cannot be flushed, for a reason that a test chooses, or closed."""

    def __init__(self, flushing: Exception | None = None, closing: Exception | None = None) -> None:
        self.flushing, self.closing = flushing, closing

    def flush(self) -> None:
        if self.flushing is not None:
            raise self.flushing

    def close(self) -> None:
        if self.closing is not None:
            raise self.closing


def test_a_last_flush_to_nobody_is_no_error(pair: Pair) -> None:
    handler = Open(pair[0])
    handler.wfile = Broken(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    handler.finish()
    assert handler.rfile.closed


@pytest.mark.parametrize(
    "wfile", [Broken(flushing=ValueError("broken")), Broken(closing=ValueError("broken"))]
)
def test_a_writer_that_cannot_be_closed_does_not_keep_the_reader_open(
    pair: Pair, wfile: Broken
) -> None:
    handler = Open(pair[0])
    handler.wfile = wfile
    with pytest.raises(ValueError, match="broken"):
        handler.finish()
    assert handler.rfile.closed


def test_unsent_bytes_for_a_client_that_is_gone_leave_no_descriptor() -> None:
    """Closing the buffered writer fails, and closes all the same."""
    with nothing_left_behind():
        ours, theirs = socket.socketpair()
        with ours:
            handler = with_settings(wbufsize=1024)(ours)
            handler.wfile.write(b"nobody reads this")
            theirs.close()
            with pytest.raises(BrokenPipeError):
                handler.finish()
            assert handler.wfile.closed
            assert handler.rfile.closed


class Fake:
    """All that a handler needs of a socket."""

    def __init__(self, received: bytes) -> None:
        self.received, self.sent = received, b""

    def makefile(self, mode: str, size: int) -> io.BufferedIOBase:
        return io.BytesIO(self.received)

    def sendall(self, data: bytes) -> None:
        self.sent += data


def test_a_handler_needs_little_of_its_socket() -> None:
    """So a program can test its own with a fake one, and without a server."""

    class Shout(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    request = Fake(b"hello\n")
    Shout(request, ADDRESS, None)
    assert request.sent == b"HELLO\n"


# --- the unbuffered writer --------------------------------------------------------------


def test_a_writer_is_a_binary_file_that_can_only_be_written(pair: Pair) -> None:
    writer = _SocketWriter(pair[0])
    assert isinstance(writer, io.BufferedIOBase)
    assert writer.writable()
    assert not writer.readable()
    assert not writer.seekable()
    assert writer.fileno() == pair[0].fileno()


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"memoryview"),
        array.array("I", [1, 2, 3]),
        memoryview(array.array("d", [1.5, 2.5])),
        b"",
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "memoryview of an array", "nothing"],
)
def test_a_write_returns_its_size_in_bytes(pair: Pair, data: Any) -> None:
    """Whatever the size of the items of the buffer."""
    request, client = pair
    expected = bytes(memoryview(data).cast("B")) if data else b""
    assert _SocketWriter(request).write(data) == len(expected)
    request.shutdown(socket.SHUT_WR)
    assert client.makefile("rb").read() == expected


def test_a_large_write_is_sent_whole(pair: Pair) -> None:
    """More than a socket buffer holds, so it waits for the reader."""
    request, client = pair
    data = b"x" * (4 << 20)
    writing = Call(_SocketWriter(request).write, data)
    with client.makefile("rb") as reader:
        assert reader.read(len(data)) == data
    assert writing.result() == len(data)


def test_lines_can_be_written_together(pair: Pair) -> None:
    request, client = pair
    _SocketWriter(request).writelines([b"one\n", b"two\n"])
    request.shutdown(socket.SHUT_WR)
    assert client.makefile("rb").read() == b"one\ntwo\n"


def test_text_is_no_buffer(pair: Pair) -> None:
    text: Any = "text"
    with pytest.raises(TypeError):
        _SocketWriter(pair[0]).write(text)


def test_a_closed_writer_leaves_the_socket_open(pair: Pair) -> None:
    with _SocketWriter(pair[0]) as writer:
        pass
    assert writer.closed
    assert pair[0].fileno() >= 0


# --- datagrams --------------------------------------------------------------------------


class Listener:
    """Keep what a handler sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []

    def sendto(self, data: bytes, address: Any) -> None:
        self.sent.append((data, address))


class Reverse(DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read()[::-1])


def test_what_was_written_is_sent_back_as_one_datagram() -> None:
    class Slowly(DatagramRequestHandler):
        def handle(self) -> None:
            for byte in self.rfile.read():
                self.wfile.write(bytes([byte, byte]))

    listener = Listener()
    Slowly((b"abc", listener), ADDRESS, None)
    assert listener.sent == [(b"aabbcc", ADDRESS)]


def test_a_datagram_handler_has_the_packet_and_the_listener() -> None:
    listener = Listener()
    handler = Reverse((b"abc", listener), ADDRESS, None)
    assert handler.packet == b"abc"
    assert handler.socket is listener
    assert listener.sent == [(b"cba", ADDRESS)]


def test_an_empty_reply_is_sent_too() -> None:
    listener = Listener()
    DatagramRequestHandler((b"abc", listener), ADDRESS, None)
    assert listener.sent == [(b"", ADDRESS)]


def test_a_sender_without_an_address_gets_no_reply() -> None:
    listener = Listener()
    Reverse((b"abc", listener), None, None)
    assert listener.sent == []


def test_a_reply_that_cannot_be_sent_is_the_servers_to_know() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, pytest.raises(FileNotFoundError):
        Reverse((b"abc", ours), "/nowhere/at/all", None)
