"""What comes before the handler, on connections whose other end the test holds."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from math import inf
from typing import Any

import pytest

from portico import BaseRequestHandler, TCPServer
from portico.certificates import Certificates
from portico.deadlines import LONGEST_WAIT
from portico.errors import PreambleError, SettingError
from portico.networks import Networks
from portico.preamble import (
    PROXY_HEADER,
    TLS_HANDSHAKE,
    Deadline,
    Preamble,
    read_header,
    read_tls,
    say_goodbye,
    shake_hands,
    wrap,
)
from tests.support import PATIENCE, Call, Client, goodbye, received, reset
from tests.tls import Authority

LINE = b"PROXY TCP4 192.0.2.1 192.0.2.9 4000 80\r\n"
TRUSTED = Networks.read("proxy_protocol", ["127.0.0.0/8"])

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A request as the server has it, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = Client(socket.AF_INET, socket.SOCK_STREAM)
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    issued = authority.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    return context


def header_of(request: socket.socket, timeout: float | None = PATIENCE) -> Any:
    return read_header(request, request.getpeername(), TRUSTED, Deadline(timeout))


# --- the header -------------------------------------------------------------------------


def test_no_byte_of_the_handlers_is_taken(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(LINE + b"GET /")
    header = header_of(request)
    assert header.source == ("192.0.2.1", 4000)
    assert request.recv(100) == b"GET /"


def test_a_header_may_come_in_pieces(pair: Pair) -> None:
    request, peer = pair
    reading = Call(header_of, request)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in LINE:
        peer.sendall(bytes([byte]))
    assert reading.result().source == ("192.0.2.1", 4000)


def test_who_is_not_trusted_speaks_for_itself(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(LINE)
    nobody = Networks.read("proxy_protocol", [])
    assert read_header(request, request.getpeername(), nobody, Deadline(None)) is None
    assert request.recv(100) == LINE


def test_whoever_can_open_a_unix_socket_is_trusted() -> None:
    request, peer = socket.socketpair()
    with request, peer:
        peer.sendall(LINE)
        header = read_header(request, "", TRUSTED, Deadline(None))
        assert header is not None
        assert header.source == ("192.0.2.1", 4000)


def test_what_is_no_header_is_named_without_showing_it(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(b"GET /secret HTTP/1.1\r\n\r\n")
    with pytest.raises(PreambleError, match=r"PROXY header: .*expected") as failed:
        header_of(request)
    assert failed.value.stage == PROXY_HEADER
    assert not failed.value.is_late
    assert "secret" not in str(failed.value)


def test_a_peer_that_leaves_in_the_middle_of_a_header_is_told_as_such(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(LINE[:10])
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(PreambleError, match="left in the middle"):
        header_of(request)


def test_a_peer_that_resets_in_the_middle_of_a_header_is_no_proxy(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(LINE[:10])
    address = request.getpeername()
    reading = Call(read_header, request, address, TRUSTED, Deadline(PATIENCE))
    reset(peer)
    failure = reading.failure()
    assert isinstance(failure, PreambleError)
    assert failure.stage == PROXY_HEADER


@pytest.mark.parametrize("timeout", [0.02, 1e-9])
def test_a_header_that_does_not_come_is_late(pair: Pair, timeout: float) -> None:
    request, peer = pair
    peer.sendall(LINE[:10])
    with pytest.raises(PreambleError, match="in time") as failed:
        header_of(request, timeout)
    assert failed.value.is_late


# --- the handshake ----------------------------------------------------------------------


def test_both_are_under_one_deadline_and_the_request_keeps_its_timeout(
    pair: Pair, context: ssl.SSLContext, authority: Authority
) -> None:
    request, peer = pair
    request.settimeout(12.5)
    with TCPServer(("127.0.0.1", 0), BaseRequestHandler) as server:
        connection = server._guard.track(request, peer.getsockname())
        preamble = Preamble(context, ["127.0.0.0/8"], PATIENCE, None)
        peer.sendall(LINE)
        passing = Call(preamble.pass_by, server, request, peer.getsockname())
        with authority.client().wrap_socket(peer, server_hostname="localhost") as client:
            tls, address = passing.result()
            with tls:
                assert address == ("192.0.2.1", 4000)
                assert tls.gettimeout() == 12.5
                assert tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert server.proxy_header(tls) is connection.proxy_header
                assert connection.request is tls
                say_goodbye(tls)
                say_goodbye(tls)
                assert client.recv(1) == b""
                server._guard.note_closing(tls)


def test_a_header_without_an_address_leaves_the_peers(pair: Pair) -> None:
    request, peer = pair
    peer.sendall(b"PROXY UNKNOWN\r\n")
    with TCPServer(("127.0.0.1", 0), BaseRequestHandler) as server:
        preamble = Preamble(None, ["127.0.0.0/8"], None, None)
        assert preamble.pass_by(server, request, peer.getsockname()) == (
            request,
            peer.getsockname(),
        )
        header = server.proxy_header(request)  # although the request came past the loop
        assert header is not None
        assert header.source is None
        server._guard.note_closing(request)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff\x01", b""])
def test_what_is_not_tls_is_closed_and_told(
    pair: Pair, context: ssl.SSLContext, words: bytes
) -> None:
    request, peer = pair
    exchanged: list[tuple[Any, Any]] = []
    peer.sendall(words)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(PreambleError) as failed:
        shake_hands(
            request,
            context,
            Deadline(PATIENCE),
            on_exchange=lambda *sockets: exchanged.append(sockets),
        )
    assert failed.value.stage == TLS_HANDSHAKE
    goodbye(peer)
    (before, tls), (tls_again, after) = exchanged
    assert (before, after) == (request, request)
    assert tls is tls_again
    assert tls.fileno() == -1


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_the_alert_of_a_handshake_that_fails_is_not_lost_to_a_reset(
    pair: Pair, context: ssl.SSLContext, is_wrapped: bool
) -> None:
    """Although OpenSSL reads no further than to what is wrong."""
    request, peer = pair
    peer.sendall(b"\x16\x03\x01\x00\x04\x00\x00\x00\x00" + bytes(1000))  # no ClientHello
    ours = wrap(request, context, suppress_ragged_eofs=True) if is_wrapped else request
    with ours:
        with pytest.raises(PreambleError):
            shake_hands(ours, context, Deadline(PATIENCE))
    assert received(peer)[:2] == b"\x15\x03"


@pytest.mark.parametrize("timeout", [0.02, 1e-9])
def test_a_handshake_that_takes_too_long_is_late(
    pair: Pair, context: ssl.SSLContext, timeout: float
) -> None:
    with pytest.raises(PreambleError, match="too long") as failed:
        shake_hands(pair[0], context, Deadline(timeout))
    assert failed.value.is_late


def test_a_peer_that_resets_before_its_handshake_is_told(
    pair: Pair, context: ssl.SSLContext
) -> None:
    request, peer = pair
    reset(peer)
    with pytest.raises(PreambleError, match="TLS handshake: "):
        shake_hands(request, context, Deadline(None))


def test_what_is_no_error_of_the_peer_passes_through(
    pair: Pair, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: ssl.SSLSocket, block: bool = False) -> None:
        del block
        raise KeyboardInterrupt

    monkeypatch.setattr(ssl.SSLSocket, "do_handshake", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shake_hands(pair[0], context, Deadline(None))
    assert pair[1].recv(1) == b""


def test_a_deadline_may_be_further_away_than_a_wait_can_be(pair: Pair) -> None:
    Deadline(1e11).apply(pair[0])
    assert pair[0].gettimeout() == LONGEST_WAIT


# --- settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, inf, "5"])
def test_a_handshake_needs_time_and_comes_to_an_end(timeout: Any) -> None:
    with pytest.raises(SettingError, match="handshake_timeout"):
        Preamble(None, ["10.0.0.0/8"], timeout, None)


def test_tls_is_a_context_or_certificates_or_a_pair_of_paths(authority: Authority) -> None:
    issued = authority.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates = read_tls((issued.certificate, issued.key))
    assert isinstance(certificates, Certificates)
    assert read_tls(certificates) is certificates
    assert read_tls(context) is context
    assert read_tls(None) is None


@pytest.mark.parametrize("value", ["a secret", ("a.pem", "a.key", "a secret"), 5])
def test_anything_else_is_no_tls_and_is_not_shown(value: object) -> None:
    with pytest.raises(SettingError, match=r"ssl_context=.*<class .*: expected") as failed:
        read_tls(value)
    assert "secret" not in repr(failed.value) + str(failed.value)


def test_certificates_are_looked_at_before_workers_that_forget_do(authority: Authority) -> None:
    issued = authority.issue("localhost")
    preamble = Preamble((issued.certificate, issued.key), None, None, None)
    preamble.refresh(None)
    context = preamble._context(None)
    assert isinstance(context, ssl.SSLContext)
