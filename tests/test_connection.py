from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from portico.connection import PEER_GONE_ERRNOS, is_peer_gone
from tests.support import Client, reset

BROKEN_PIPE = BrokenPipeError(errno.EPIPE, "Broken pipe")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A request as the server has it, and its peer."""
    if request.param == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = Client(socket.AF_INET, socket.SOCK_STREAM)
            theirs.connect(listener.getsockname())
            ours, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def failure_of_writing(request: socket.socket) -> OSError:
    """Write until it fails, as it does at the latest when a reset came back."""
    with pytest.raises(OSError) as failed:  # noqa: PT011 - the caller looks at the number
        while True:
            request.sendall(b"x")
    return failed.value


def test_a_peer_that_closed_is_gone(pair: Pair) -> None:
    request, peer = pair
    peer.close()
    assert is_peer_gone(request, failure_of_writing(request))


def test_a_peer_that_reset_the_connection_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = Client(socket.AF_INET, socket.SOCK_STREAM)
        peer.connect(listener.getsockname())
        request, _ = listener.accept()
    with request:
        reset(peer)
        with pytest.raises(ConnectionResetError) as failed:
            request.recv(1)
        assert is_peer_gone(request, failed.value)


@pytest.mark.parametrize("number", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_only_some_errors_tell_of_a_peer(number: int) -> None:
    """What send(2) and recv(2) return when the other end is no longer there."""
    request, peer = socket.socketpair()
    with request:
        peer.close()
        told = is_peer_gone(request, OSError(number, os.strerror(number)))
    assert told == (
        errno.errorcode[number]
        in {
            "EPIPE",
            "ESHUTDOWN",
            "ECONNRESET",
            "ECONNABORTED",
            "ETIMEDOUT",
            "EHOSTUNREACH",
            "ENETUNREACH",
        }
    )


def test_a_peer_that_is_there_is_not_gone_whatever_the_error(pair: Pair) -> None:
    """A handler that lost a connection of its own, to a database, keeps its traceback."""
    request, _ = pair
    assert not any(
        is_peer_gone(request, OSError(number, os.strerror(number))) for number in PEER_GONE_ERRNOS
    )


def test_a_peer_that_only_ended_its_half_is_not_gone(pair: Pair) -> None:
    """It still reads what it is answered."""
    request, peer = pair
    peer.shutdown(socket.SHUT_WR)
    assert request.recv(1) == b""
    assert not is_peer_gone(request, BROKEN_PIPE)


def test_an_error_without_a_number_tells_nothing(pair: Pair) -> None:
    """A timeout of the handler's own is one."""
    request, peer = pair
    peer.close()
    failure_of_writing(request)
    assert not is_peer_gone(request, TimeoutError("timed out"))


def test_an_error_that_is_no_oserror_tells_nothing(pair: Pair) -> None:
    request, peer = pair
    peer.close()
    failure_of_writing(request)
    assert not is_peer_gone(request, ValueError(errno.EPIPE))


def test_nothing_is_known_of_a_request_that_the_handler_closed(pair: Pair) -> None:
    request, peer = pair
    peer.close()
    error = failure_of_writing(request)
    request.close()
    assert not is_peer_gone(request, error)


@pytest.mark.parametrize("request_", [(b"datagram", None), None, {"a": "request"}, -1])
def test_nothing_is_known_of_a_request_that_is_no_socket(request_: object) -> None:
    """A program's own `get_request` makes whatever it likes."""
    assert not is_peer_gone(request_, BROKEN_PIPE)
