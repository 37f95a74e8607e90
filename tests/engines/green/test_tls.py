from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from greenlet import getcurrent

from portico.engines.green import tls
from portico.engines.green.tls import GreenSSLSocket, Session
from tests.engines.green.conftest import Stage
from tests.engines.green.test_sockets import drain, reset, take
from tests.support import PATIENCE, Call

SOON = 0.01


@pytest.fixture(scope="module")
def contexts() -> Iterator[tuple[ssl.SSLContext, ssl.SSLContext]]:
    """A server's context and that of a client who trusts it."""
    before = ssl.SSLContext.sslsocket_class
    tls.install()
    tls.install()  # again: nothing more
    authority = trustme.CA()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(ours)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(theirs)
    yield ours, theirs
    ssl.SSLContext.sslsocket_class = before


class Ends:
    """Two ends of a TLS connection in the making: ours in a greenlet, a peer in a thread."""

    def __init__(self, stage: Stage, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
        self.stage = stage
        self.context, self.context_of_peer = contexts
        self.ours, self.plain_peer = stage.pair()

    def wrap(self, **settings: Any) -> ssl.SSLSocket:
        return self.context.wrap_socket(self.ours, server_side=True, **settings)

    def peer(self, talk: Callable[[ssl.SSLSocket], Any]) -> Call[Any]:
        """Shake hands in a thread, and talk there."""

        def run() -> Any:
            with self.context_of_peer.wrap_socket(
                self.plain_peer, server_hostname="localhost"
            ) as wrapped:
                return talk(wrapped)

        return Call(run)

    def talk(self, ours: Callable[[Any], Any], peer: Callable[[ssl.SSLSocket], Any]) -> list[Any]:
        """Run both sides of a conversation; return what each returned."""
        calling = self.peer(peer)

        def serve() -> Any:
            with self.wrap() as wrapped:
                return ours(wrapped)

        return [*self.stage.run(serve), calling.result()]


@pytest.fixture
def ends(stage: Stage, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Ends:
    return Ends(stage, contexts)


def test_a_green_socket_becomes_a_green_tls_socket(ends: Ends) -> None:
    def ours(wrapped: Any) -> Any:
        assert isinstance(wrapped, GreenSSLSocket)
        assert isinstance(wrapped, ssl.SSLSocket)
        assert wrapped.context is ends.context
        assert wrapped.cipher() is not None
        return wrapped.version()

    assert ends.talk(ours, lambda peer: peer.version()) == ["TLSv1.3", "TLSv1.3"]


def test_any_other_socket_becomes_what_it_always_did(ends: Ends) -> None:
    kinds = ends.talk(lambda _: None, type)
    assert kinds == [None, ssl.SSLSocket]


def test_a_client_may_be_green_as_well(ends: Ends) -> None:
    stage = ends.stage
    listener = stage.adopt(socket.create_server(("127.0.0.1", 0)))

    def serve() -> bytes:
        with ends.context.wrap_socket(listener.accept()[0], server_side=True) as wrapped:
            data: bytes = wrapped.recv(100)
            wrapped.sendall(data.upper())
            return data

    def ask() -> bytes:
        client = stage.adopt(socket.create_connection(listener.getsockname()))
        with ends.context_of_peer.wrap_socket(client, server_hostname="localhost") as wrapped:
            wrapped.sendall(b"hello")
            return wrapped.recv(100)

    assert stage.run(serve, ask) == [b"hello", b"HELLO"]


def test_a_green_client_connects_after_it_was_wrapped(ends: Ends) -> None:
    stage = ends.stage
    listener = stage.adopt(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        with ends.context.wrap_socket(listener.accept()[0], server_side=True) as wrapped:
            wrapped.sendall(b"hi")

    def ask() -> bytes:
        client = stage.adopt(socket.socket())
        with ends.context_of_peer.wrap_socket(client, server_hostname="localhost") as wrapped:
            wrapped.connect(listener.getsockname())
            return wrapped.recv(100)

    assert stage.run(serve, ask) == [None, b"hi"]


def test_a_silent_peer_holds_nobody_but_its_own_greenlet(ends: Ends) -> None:
    ends.ours.settimeout(5 * SOON)
    ticks = []

    def serve() -> None:
        with pytest.raises(TimeoutError):
            ends.wrap()

    def tick() -> None:
        for _ in range(3):
            ends.stage.hub.sleep(0)
            ticks.append(1)

    ends.stage.run(serve, tick)
    assert len(ticks) == 3


def test_large_messages_pass_in_both_directions_at_once(ends: Ends) -> None:
    size = 4 << 20

    def ours(wrapped: Any) -> bytes:
        done: list[bytes] = []
        reader = ends.stage.spawn(lambda: done.append(take(wrapped, size)))
        wrapped.sendall(b"o" * size)
        while not done:
            ends.stage.hub.sleep(0.001)
        assert reader.dead
        return done[0][:1]

    def peer(wrapped: ssl.SSLSocket) -> bytes:
        # In one thread: two may not use a TLS object of the standard library at once.
        wrapped.setblocking(False)
        unsent, received, first = memoryview(b"p" * size), 0, b""
        while unsent or received < size:
            with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                data = wrapped.recv(65536)
                assert data, "the stream ended too soon"
                first, received = first or data[:1], received + len(data)
            if unsent:
                with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    unsent = unsent[wrapped.send(unsent[:65536]) :]
            if not wrapped.pending():
                select.select([wrapped], [wrapped] if unsent else [], [], PATIENCE)
        wrapped.setblocking(True)
        return first

    assert ends.talk(ours, peer) == [b"p", b"o"]


def test_lines_are_read_and_small_writes_leave_together(ends: Ends) -> None:
    def ours(wrapped: Any) -> int:
        count = 0
        with wrapped.makefile("rb") as file, wrapped.make_writer() as writer:
            for line in file:
                writer.write(line.upper())
                count += 1
        return count

    def peer(wrapped: ssl.SSLSocket) -> list[int]:
        wrapped.sendall(b"one\ntwo\nthree\n")
        records: list[int] = []
        while sum(records) < 14:
            records.append(len(wrapped.recv(100)))
        return records

    assert ends.talk(ours, peer) == [3, [14]]


def test_a_slow_reader_of_collected_writes_is_waited_for(ends: Ends) -> None:
    size = 8 << 20

    def ours(wrapped: Any) -> None:
        with wrapped.make_writer() as writer:
            writer.write(b"x" * size)
            writer.write(b"y")

    assert ends.talk(ours, drain) == [None, size + 1]


def test_recv_into_and_a_read_with_data_pending_inside_openssl(ends: Ends) -> None:
    """What OpenSSL holds already makes no event: it must not be waited for."""

    def ours(wrapped: Any) -> bytes:
        buffer = bytearray(4)
        wrapped.recv_into(buffer)
        assert wrapped.pending() == 4
        rest: bytes = wrapped.recv(100)
        return bytes(buffer) + rest

    assert ends.talk(ours, lambda peer: peer.sendall(b"12345678")) == [b"12345678", None]


def test_unwrapping_waits_for_the_peer_and_gives_the_plain_socket_back(ends: Ends) -> None:
    def ours(wrapped: Any) -> bytes:
        plain = wrapped.unwrap()
        with plain:
            plain.sendall(b"plain")
            data: bytes = plain.recv(100)
        return data

    def peer(wrapped: ssl.SSLSocket) -> bytes:
        assert wrapped.recv(10) == b""
        plain = wrapped.unwrap()
        data = take(plain, 5)
        plain.sendall(data.upper())
        plain.close()
        return data

    assert ends.talk(ours, peer) == [b"PLAIN", b"plain"]


def test_a_file_is_sent(ends: Ends, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 300_000)

    def ours(wrapped: Any) -> Any:
        with path.open("rb") as file:
            return wrapped.sendfile(file, 100)

    assert ends.talk(ours, drain) == [299_900, 299_900]


def test_a_read_times_out(ends: Ends) -> None:
    def ours(wrapped: Any) -> bytes:
        wrapped.settimeout(SOON)
        with pytest.raises(TimeoutError):
            wrapped.recv(1)
        wrapped.settimeout(None)
        wrapped.sendall(b"go")
        data: bytes = wrapped.recv(10)
        return data

    def peer(wrapped: ssl.SSLSocket) -> None:
        take(wrapped, 2)
        wrapped.sendall(b"late")

    assert ends.talk(ours, peer) == [b"late", None]


def test_a_non_blocking_socket_asks_to_try_again(ends: Ends) -> None:
    def ours(wrapped: Any) -> None:
        wrapped.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            wrapped.recv(1)
        with pytest.raises(ssl.SSLWantWriteError):
            while True:
                wrapped.send(b"x" * 65536)
        wrapped.setblocking(True)

    assert ends.talk(ours, drain)[1] > 0


def test_a_peer_without_tls_is_an_error_of_ssl(ends: Ends) -> None:
    ends.plain_peer.sendall(b"GET / HTTP/1.0\r\n\r\n")

    def serve() -> None:
        with pytest.raises(ssl.SSLError):
            ends.wrap()

    ends.stage.run(serve)


def test_a_peer_that_resets_is_a_connection_error(ends: Ends) -> None:
    def serve() -> None:
        ends.stage.hub.call_later(SOON, reset, ends.plain_peer)
        with pytest.raises(ConnectionResetError):
            ends.wrap()

    ends.stage.run(serve)


def test_closing_wakes_who_waits(ends: Ends) -> None:
    def ours(wrapped: Any) -> None:
        ends.stage.hub.call_later(SOON, wrapped.close)
        with pytest.raises((OSError, ValueError)):
            wrapped.recv(1)

    ends.talk(ours, lambda peer: peer.recv(1))


def test_a_thread_may_use_the_connection(ends: Ends) -> None:
    def ours(wrapped: Any) -> bytes:
        data: bytes = ends.stage.hub.run_in_thread(lambda: wrapped.recv(10))
        wrapped.sendall(data)
        return data

    def peer(wrapped: ssl.SSLSocket) -> bytes:
        wrapped.sendall(b"x")
        return wrapped.recv(1)

    assert ends.talk(ours, peer) == [b"x", b"x"]


def test_a_context_is_chosen_by_name(
    stage: Stage, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """Server name indication: the callback sets the context of the connection."""
    ours, _ = contexts
    names: list[str | None] = []

    def choose(wrapped: Any, name: str | None, context: ssl.SSLContext) -> None:
        assert context is ours
        wrapped.context = ours
        names.append(name)

    ours.sni_callback = choose
    try:
        ends = Ends(stage, contexts)
        result = ends.talk(lambda wrapped: wrapped.session is not None, lambda peer: peer.version())
    finally:
        ours.sni_callback = None
    assert names == ["localhost"]
    assert result[1] == "TLSv1.3"


def test_an_interrupted_flush_of_a_writer_loses_nothing(ends: Ends) -> None:
    """It was in the midst of a record, perhaps; a timeout of a whole block ends so."""
    words = bytes(range(256)) * (4 << 14)  # more than the system ever has room for
    may_read = threading.Event()

    def write(wrapped: Any) -> None:
        writer = wrapped.make_writer()
        ends.stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            writer.write(words)
        assert wrapped.outbox.chunks
        may_read.set()
        writer.write(b"late")
        writer.flush()

    def read(peer: ssl.SSLSocket) -> bytes:
        assert may_read.wait(PATIENCE)
        return take(peer, len(words) + 4)

    assert ends.talk(write, read) == [None, words + b"late"]


def test_a_writer_that_waits_for_a_handshake_rests(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room to write all the time; it is the peer's bytes that are missing."""
    write_now, tries = Session.write_now, []

    def counted(session: Session, data: bytes) -> int:
        tries.append(data)
        return write_now(session, data)

    monkeypatch.setattr(Session, "write_now", counted)
    calling: list[Call[bytes]] = []

    def write() -> None:
        with ends.wrap(do_handshake_on_connect=False) as wrapped:
            writer = wrapped.make_writer()  # type: ignore[attr-defined]
            writer.write(b"hello")
            writer.flush()
            assert calling[0].result() == b"hello"

    def begin_late() -> None:
        for _ in range(100):
            ends.stage.hub.sleep(0)
        calling.append(ends.peer(lambda peer: take(peer, 5)))

    ends.stage.run(write, begin_late)
    assert len(tries) < 20
