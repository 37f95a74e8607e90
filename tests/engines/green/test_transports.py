"""Handlers of coroutines on connections that are TLS already, with real TLS clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

import portico
from portico import AsyncStreamRequestHandler
from portico.engines.green import transports
from portico.engines.green.transports import TLSTransport, open_tls_stream
from portico.events import ConnectionClosed, HandlerFailed, PeerGone
from tests.support import (
    PATIENCE,
    Call,
    eventually,
    nothing_left_behind,
    recorded,
    reset,
    run_program,
)

SOON = 0.05

ENGINES = (
    portico.TCPServer,
    portico.ThreadingTCPServer,
    portico.GreenTCPServer,
    portico.ForkingTCPServer,
)
IN_PROCESS = ENGINES[:3]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def context(authority: trustme.CA) -> ssl.SSLContext:
    """A server's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """That of a client who trusts it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def connect(trusting: ssl.SSLContext) -> Callable[[Any], ssl.SSLSocket]:
    def connect(server: Any) -> ssl.SSLSocket:
        plain = socket.create_connection(server.server_address, PATIENCE)
        return trusting.wrap_socket(plain, server_hostname="localhost")

    return connect


Connect = Callable[[Any], ssl.SSLSocket]
Serve = Callable[..., Any]


@pytest.fixture(params=IN_PROCESS, ids=lambda kind: kind.__name__)
def serve(request: pytest.FixtureRequest, context: ssl.SSLContext) -> Serve:
    """Serve TLS on each engine that keeps requests in this process; shake hands in the worker."""
    return lambda handler, **hooks: serving(request.param, context, handler, **hooks)


@contextmanager
def serving(
    kind: Any, context: ssl.SSLContext, handler: Any, *, in_acceptor: bool = False, **hooks: Any
) -> Iterator[Any]:
    """Serve in a thread until the block ends."""

    def get_request(self: Any) -> tuple[ssl.SSLSocket, Any]:
        request, client_address = kind.get_request(self)
        request.settimeout(PATIENCE)
        wrapped = context.wrap_socket(
            request, server_side=True, do_handshake_on_connect=in_acceptor
        )
        return wrapped, client_address

    server_class = type("Server", (kind,), {"get_request": get_request, **hooks})
    with nothing_left_behind(), server_class(("127.0.0.1", 0), handler) as server:
        loop = Call(server.serve_forever)
        try:
            yield server
        finally:
            server.shutdown()
            failure = loop.failure()
            assert failure is None, failure


def take(client: ssl.SSLSocket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        assert piece, "the stream ended too soon"
        data += piece
    return data


def last_words(client: ssl.SSLSocket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


class Shout(AsyncStreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            self.writer.write(line.upper())
            await self.writer.drain()


# --- every engine -----------------------------------------------------------------------


TALK = """
import socket, ssl, sys

port, authority = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
for _ in range(3):
    plain = socket.create_connection(("127.0.0.1", int(port)))
    with (
        context.wrap_socket(plain, server_hostname="localhost") as client,
        client.makefile("r") as file,
    ):
        client.sendall(b"one\\ntwo\\n")
        answers = [file.readline(), file.readline()]
        client.sendall(b"three\\n")
        answers.append(file.readline())
        with client.unwrap():  # the handler ends, and its goodbye is waited for
            print(*map(str.strip, answers))
"""
"""A client in a process of its own: a child that is forked while another thread of its parent is
inside of OpenSSL may find a lock of it taken, for ever.  A server has no such threads beside it."""


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("in_acceptor", [True, False])
def test_streams_on_a_tls_connection(
    kind: Any, in_acceptor: bool, context: ssl.SSLContext, authority: trustme.CA, tmp_path: Path
) -> None:
    """Whether the program shook hands when it wrapped the socket, or left that to the worker."""
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    with serving(kind, context, Shout, in_acceptor=in_acceptor) as server:
        port = str(server.server_address[1])
        done = run_program(TALK, port, str(tmp_path / "authority.pem"))
    assert (done.stdout, done.stderr) == ("ONE TWO THREE\n" * 3, "")


def test_many_connections_at_once(context: ssl.SSLContext, connect: Connect) -> None:
    with serving(portico.GreenTCPServer, context, Shout) as server, contextlib.ExitStack() as open_:
        clients = [open_.enter_context(connect(server)) for _ in range(30)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"line %d of %d\n" % (turn, number))
            for number, client in enumerate(clients):
                expected = b"LINE %d OF %d\n" % (turn, number)
                assert take(client, len(expected)) == expected


def test_large_messages_pass_in_both_directions_at_once(serve: Serve, connect: Connect) -> None:
    size = 4 << 20

    class Exchange(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            await asyncio.gather(self.read(), self.write())

        async def read(self) -> None:
            received.append(await self.reader.readexactly(size))

        async def write(self) -> None:
            for _ in range(size // 100_000):
                self.writer.write(b"o" * 100_000)
                await self.writer.drain()
                transport = self.writer.transport
                assert transport.get_write_buffer_size() <= 2 * 100_000
            self.writer.write(b"o" * (size % 100_000))

    received: list[bytes] = []
    with serve(Exchange) as server, connect(server) as client:
        client.setblocking(False)
        unsent, count = memoryview(b"p" * size), 0
        while unsent or count < size:
            with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                data = client.recv(65536)
                assert data == b"o" * len(data) != b""
                count += len(data)
            if unsent:
                with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    unsent = unsent[client.send(unsent[:65536]) :]
            if not client.pending():
                select.select([client], [client] if unsent else [], [], PATIENCE)
    assert received == [b"p" * size]


def test_what_openssl_holds_already_is_read(serve: Serve, connect: Connect) -> None:
    """A hook has read a part of the first record; the rest makes no event."""

    def prepare_request(self: Any, request: Any, client_address: Any) -> Any:
        request.do_handshake()
        assert request.recv(4) == b"half"
        assert request.pending() == 7
        return request, client_address

    with serve(Shout, prepare_request=prepare_request) as server, connect(server) as client:
        client.sendall(b"half a line")
        client.sendall(b"\n")
        assert take(client, 8) == b" A LINE\n"


def test_a_reader_that_is_full_makes_the_peer_wait(serve: Serve, connect: Connect) -> None:
    """What a peer can make us keep is bounded, and nothing of it is lost."""

    class Late(AsyncStreamRequestHandler):
        limit = 1024

        async def handle(self) -> None:
            await asyncio.to_thread(may_read.wait, PATIENCE)
            kept: Any = self.reader
            most.append(len(kept._buffer))
            count = 0
            while data := await self.reader.read(10_000):
                count += len(data)
                if data.endswith(b"!"):
                    break
            self.writer.write(b"%d" % count)

    may_read, most = threading.Event(), list[int]()
    with serve(Late) as server, connect(server) as client:
        client.setblocking(False)
        sent = 0
        with suppress(ssl.SSLWantWriteError):
            while True:
                sent += client.send(b"x" * 16384)
        client.setblocking(True)
        may_read.set()
        # The call that found no room is repeated, as OpenSSL demands.
        client.sendall(b"x" * 16384 + b"!")
        assert last_words(client) == b"%d" % (sent + 16384 + 1)
    assert most[0] <= 2 * 1024 + 16384


def test_a_slow_reader_gets_everything(serve: Serve, connect: Connect) -> None:
    """What the handler wrote without waiting is sent after it has returned."""
    size = 8 << 20

    class Pour(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"x" * size)

    with serve(Pour) as server, connect(server) as client:
        assert len(last_words(client)) == size


def test_a_peer_that_takes_nothing_is_given_up(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "CLOSE_TIMEOUT", SOON)

    class Pour(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"x" * (32 << 20))

    with recorded(ConnectionClosed) as closed, serve(Pour) as server, connect(server):
        eventually(lambda: closed, "the connection is closed")


def test_a_finish_that_closes_nothing_is_made_up_for(serve: Serve, connect: Connect) -> None:
    class Careless(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"hello")

        async def finish(self) -> None:
            pass

    with serve(Careless) as server, connect(server) as client:
        assert last_words(client) == b"hello"


def test_closing_more_than_once_and_writing_afterwards_is_harmless(
    serve: Serve, connect: Connect
) -> None:
    class Hasty(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"hello")
            self.writer.close()
            self.writer.close()
            self.writer.write(b"lost")
            assert self.writer.is_closing()
            await self.writer.wait_closed()
            assert self.writer.get_extra_info("peername", "gone") == "gone"
            self.writer.transport.abort()

    with serve(Hasty) as server, connect(server) as client:
        assert last_words(client) == b"hello"


# --- ends and errors --------------------------------------------------------------------


def test_a_peer_that_said_goodbye_is_still_answered(serve: Serve, trusting: ssl.SSLContext) -> None:
    """TLS 1.3 lets one side end first, as TCP does."""

    class Count(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            data = await self.reader.read()
            await asyncio.sleep(0)
            self.writer.write(b"%d" % len(data))

    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = trusting.wrap_bio(coming, going, server_hostname="localhost")
    with serve(Count) as server, socket.create_connection(server.server_address) as client:
        client.settimeout(PATIENCE)

        def until_done(operation: Callable[..., Any], *args: Any) -> Any:
            while True:
                try:
                    result = operation(*args)
                except ssl.SSLWantReadError:
                    client.sendall(going.read())
                    coming.write(client.recv(65536))
                else:
                    client.sendall(going.read())
                    return result

        until_done(session.do_handshake)
        session.write(b"12345")
        with suppress(ssl.SSLWantReadError):
            session.unwrap()
        assert until_done(session.read, 100) == b"5"


@pytest.mark.parametrize("goes", ["closing", "resetting"])
def test_a_peer_that_vanishes_ends_a_read(serve: Serve, connect: Connect, goes: str) -> None:
    """Without a goodbye: the stream ends, or says that it was reset."""

    class Wait(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"!")
            outcome.append(await self.reader.read())

    outcome: list[bytes] = []
    with (
        recorded(PeerGone) as gone,
        recorded(ConnectionClosed) as closed,
        serve(Wait) as server,
    ):
        client = connect(server)
        assert client.recv(1) == b"!"
        if goes == "closing":
            client.close()
        else:
            reset(client)
        eventually(lambda: closed, "the connection is closed")
    # OpenSSL does not always tell a reset from an end; a blocking socket says the same then.
    assert outcome == [b""] or (goes, type(gone[0].error)) == ("resetting", ConnectionResetError)


def test_a_peer_that_vanishes_ends_a_write(serve: Serve, connect: Connect) -> None:
    class Pour(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            while True:
                self.writer.write(b"x" * 65536)
                await self.writer.drain()

    hooks = {"handle_error": lambda *_: None}
    with recorded(PeerGone, HandlerFailed) as failed, serve(Pour, **hooks) as server:
        client = connect(server)
        take(client, 100)
        reset(client)
        eventually(lambda: failed, "the handler is told")
    assert len(failed) == 1


@pytest.mark.parametrize("kind", IN_PROCESS, ids=lambda kind: kind.__name__)
def test_a_plain_peer_that_vanishes_is_told_as_such(
    kind: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """By an event, and without a traceback, as where a sequential handler waits for it."""

    class Wait(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"!")
            await self.reader.read()

    with (
        recorded(PeerGone) as gone,
        nothing_left_behind(),
        kind(("127.0.0.1", 0), Wait) as server,
    ):
        loop = Call(server.serve_forever)
        client = socket.create_connection(server.server_address, PATIENCE)
        assert client.recv(1) == b"!"
        reset(client)
        eventually(lambda: gone, "the event is told")
        server.shutdown()
        loop.result()
    assert capfd.readouterr().err == ""


def test_a_connection_elsewhere_that_vanishes_is_a_failure(serve: Serve, connect: Connect) -> None:
    class Broken(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            raise ConnectionResetError(errno.ECONNRESET, "of the database")

    hooks = {"handle_error": lambda *_: None}
    with recorded(HandlerFailed) as failed, serve(Broken, **hooks) as server:
        with connect(server) as client:
            assert last_words(client) == b""
    assert len(failed) == 1


def test_a_timeout_of_asyncio_leaves_the_connection_usable(serve: Serve, connect: Connect) -> None:
    class Impatient(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SOON):
                    await self.reader.readline()
            self.writer.write(b"go on\n")
            self.writer.write(await self.reader.readline())

    with serve(Impatient) as server, connect(server) as client:
        client.sendall(b"half ")
        assert take(client, 6) == b"go on\n"
        client.sendall(b"line\n")
        assert last_words(client) == b"half line\n"


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.0\r\n\r\n"], ids=["nothing", "no TLS"])
def test_a_handshake_that_fails_ends_its_own_request(
    serve: Serve, connect: Connect, said: bytes
) -> None:
    """A silent peer has as long as the socket's timeout says."""

    def prepare_request(self: Any, request: Any, client_address: Any) -> Any:
        requests.append(request)
        is_silent = request is requests[0] and not said
        request.settimeout(SOON if is_silent else PATIENCE)
        return request, client_address

    requests: list[Any] = []
    hooks = {"prepare_request": prepare_request, "handle_error": lambda *_: None}
    with recorded(HandlerFailed) as failed, serve(Shout, **hooks) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(said)
            with suppress(ConnectionResetError):
                while client.recv(1024):
                    pass
        with connect(server) as next_client:
            next_client.sendall(b"next\n")
            assert take(next_client, 5) == b"NEXT\n"
    assert [type(event.error) for event in failed] == [TimeoutError if not said else ssl.SSLError]


def test_a_session_that_is_taken_away_ends_the_connection(serve: Serve, connect: Connect) -> None:
    """Nothing is read or written in the clear."""

    class Interrupted(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.request.shutdown(socket.SHUT_RD)
            with pytest.raises(ConnectionError):
                while True:
                    self.writer.write(b"in the clear")
                    await self.writer.drain()
            self.writer.write(b"in the clear")

    with recorded(HandlerFailed) as failed, serve(Interrupted) as server:
        client = connect(server)
        with client, suppress(ConnectionResetError):
            assert last_words(client) == b""
    assert failed == []


def test_a_connection_that_was_unwrapped_is_plain(serve: Serve, connect: Connect) -> None:
    def prepare_request(self: Any, request: Any, client_address: Any) -> Any:
        request.do_handshake()
        return request.unwrap(), client_address

    with serve(Shout, prepare_request=prepare_request) as server:
        client = connect(server)
        assert client.recv(1) == b""
        with client.unwrap() as plain:
            plain.sendall(b"plain\n")
            assert plain.recv(100) == b"PLAIN\n"


def test_openssls_own_client(
    context: ssl.SSLContext, authority: trustme.CA, tmp_path: Path
) -> None:
    program = shutil.which("openssl")
    assert program is not None, "openssl is not installed"
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with serving(portico.GreenTCPServer, context, Shout) as server:
        host, port = server.server_address
        done = subprocess.run(
            [
                *(program, "s_client", "-connect", f"{host}:{port}", "-servername", "localhost"),
                *("-CAfile", str(tmp_path / "ca.pem"), "-verify_return_error", "-quiet"),
                *("-verify_quiet", "-no_ign_eof"),
            ],
            input=b"hello\nworld\n",
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    # Its standard input ends at once; what came before that is answered.
    assert done.returncode == 0, done.stderr
    assert b"HELLO\nWORLD\n".startswith(done.stdout)


# --- the transport ----------------------------------------------------------------------


def test_the_transport_tells_what_asyncios_would(serve: Serve, connect: Connect) -> None:
    class Ask(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            told = self.writer.get_extra_info
            assert told("socket") is told("ssl_object") is self.request
            assert told("sslcontext") is self.request.context
            assert (told("sockname"), told("peername")) == (
                self.server.server_address,
                self.client_address,
            )
            assert told("cipher") == self.request.cipher() is not None
            assert (told("compression"), told("peercert")) == (None, None)
            assert told("no such thing", "default") == "default"
            transport: Any = self.writer.transport
            assert isinstance(transport, TLSTransport)
            assert transport.is_reading()
            assert transport.get_write_buffer_limits() == (16384, 65536)
            transport.set_write_buffer_limits(high=100)
            assert transport.get_write_buffer_limits() == (25, 100)
            transport.set_write_buffer_limits(low=100)
            assert transport.get_write_buffer_limits() == (100, 400)
            with pytest.raises(ValueError, match="high >= low"):
                transport.set_write_buffer_limits(high=1, low=2)
            assert not self.writer.can_write_eof()
            with pytest.raises(NotImplementedError):
                self.writer.write_eof()
            with pytest.raises(TypeError):
                self.writer.write("text")  # type: ignore[arg-type]  # on purpose
            with pytest.raises(TypeError, match="not supported"):
                await self.writer.start_tls(self.request.context)
            transport.set_protocol(transport.get_protocol())
            transport.resume_reading()
            self.writer.write(b"fine")

    with serve(Ask) as server, connect(server) as client:
        assert last_words(client) == b"fine"


class Scripted:
    """Stands for a TLS socket that asks for the other direction first.

    OpenSSL does so when a peer changes keys in the middle of a connection, which no client of
    the standard library can be made to do.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.context = None
        self.refusals: list[tuple[str, type[ssl.SSLError]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _refuse(self, operation: str) -> None:
        if self.refusals and self.refusals[0][0] == operation:
            raise self.refusals.pop(0)[1]

    def read(self, size: int) -> bytes:
        self._refuse("read")
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None

    def write(self, data: memoryview) -> int:
        self._refuse("write")
        try:
            return self._sock.send(data)
        except BlockingIOError:
            raise ssl.SSLWantWriteError from None

    def do_handshake(self) -> None:
        self._refuse("do_handshake")

    def unwrap(self) -> None:
        self._refuse("unwrap")
        self._sock.send(b"goodbye")


@contextmanager
def scripted(*refusals: tuple[str, type[ssl.SSLError]]) -> Iterator[tuple[Any, socket.socket]]:
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.settimeout(PATIENCE)
        sock = Scripted(ours)
        sock.refusals.extend(refusals)
        yield sock, peer


WRITE, READ = ssl.SSLWantWriteError, ssl.SSLWantReadError


def test_a_handshake_waits_for_either_direction() -> None:
    async def use(sock: Any, peer: socket.socket) -> None:
        peer.send(b"hello")
        reader = asyncio.StreamReader(limit=100)
        writer = await open_tls_stream(sock, reader)
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        await writer.wait_closed()

    with scripted(("do_handshake", WRITE), ("do_handshake", READ)) as (sock, peer):
        asyncio.run(use(sock, peer))
        assert sock.refusals == []
        assert peer.recv(100) == b"goodbye"


def test_a_read_may_need_to_write_and_a_write_to_read_first() -> None:
    async def use(sock: Any, peer: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=100)
        writer = await open_tls_stream(sock, reader)
        peer.send(b"one")
        assert await reader.readexactly(3) == b"one"
        writer.write(b"two")  # refused: there is nothing to read yet
        assert writer.transport.get_write_buffer_size() == 3
        peer.send(b"three")
        assert await reader.readexactly(5) == b"three"
        assert peer.recv(100) == b"two"
        writer.close()
        await writer.wait_closed()

    with scripted(("read", WRITE), ("write", READ)) as (sock, peer):
        asyncio.run(use(sock, peer))
        assert sock.refusals == []
        assert peer.recv(100) == b"goodbye"


def test_a_goodbye_waits_for_room() -> None:
    async def use(sock: Any) -> None:
        writer = await open_tls_stream(sock, asyncio.StreamReader(limit=100))
        writer.close()
        await writer.wait_closed()

    with scripted(("unwrap", WRITE)) as (sock, peer):
        asyncio.run(use(sock))
        assert peer.recv(100) == b"goodbye"
        assert peer.recv(100) == b""


def test_a_protocol_that_wants_no_half_open_connection_has_its_way() -> None:
    class Plain(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost = asyncio.Event()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set()

    async def use(sock: Any, peer: socket.socket) -> None:
        sock.setblocking(False)
        protocol = Plain()
        TLSTransport(asyncio.get_running_loop(), sock, protocol)
        peer.shutdown(socket.SHUT_WR)
        await protocol.lost.wait()

    with scripted() as (sock, peer):
        asyncio.run(use(sock, peer))
        assert peer.recv(100) == b"goodbye"


def test_a_close_that_is_cancelled_gives_up() -> None:
    """For example at the end of a hub."""

    class Handler(AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"x" * (16 << 20))
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_later(SOON, task.cancel)

    with scripted() as (sock, peer):
        plain = socket.socket(fileno=os.dup(sock.fileno()))
        with pytest.raises(asyncio.CancelledError):
            Handler(plain, None, None)
        assert plain.fileno() < 0
        del peer
