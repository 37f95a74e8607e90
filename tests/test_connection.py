from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from portico.connection import (
    PEER_GONE_ERRNOS,
    Connection,
    Connections,
    borrow,
    can_be_tracked,
    is_peer_gone,
)
from tests.support import Call, Client, descriptors, eventually, reset

BROKEN_PIPE = BrokenPipeError(errno.EPIPE, "Broken pipe")

Pair = tuple[socket.socket, socket.socket]


@contextmanager
def tcp_pair() -> Iterator[Pair]:
    """Yield a request as the server has it, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = Client(socket.AF_INET, socket.SOCK_STREAM)
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A request as the server has it, and its peer."""
    if request.param == "tcp":
        with tcp_pair() as pair:
            yield pair
    else:
        ours, theirs = socket.socketpair()
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


# --- the registry -----------------------------------------------------------------------


class Registry:
    """The connections of a server, and those that it lost."""

    def __init__(self) -> None:
        self.lost: list[Connection] = []
        self.connections = Connections(self.lost.append)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def test_a_connection_is_found_by_its_request_until_it_is_removed(
    registry: Registry, pair: Pair
) -> None:
    connections, (ours, theirs) = registry.connections, pair
    connection = connections.add(ours, "peer")
    assert connections.get(ours) is connection
    assert connections.get(theirs) is None
    assert list(connections) == [connection]
    assert len(connections) == 1
    assert connections.remove(ours) is connection
    assert connections.remove(ours) is None
    assert not len(connections)
    assert not registry.lost


def test_a_connection_that_a_program_lets_go_of_is_lost_and_not_kept_alive(
    registry: Registry,
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = registry.connections.add(ours, "peer")
        ours.close()
        del ours
        assert registry.lost == [connection]
        assert connection.request is None
        assert not len(registry.connections)
        assert not registry.connections.interrupt(connection)


def test_a_request_that_is_exchanged_is_held_as_the_one_before(registry: Registry) -> None:
    """A program that ends its connections by itself may do so over TLS, too."""
    connections = registry.connections
    ours, theirs = socket.socketpair()
    with theirs:
        connection = connections.add(ours, "peer")
        other = socket.socket(fileno=ours.detach())
        connections.exchange(ours, other)
        assert connections.get(other) is connection
        assert connections.get(ours) is None
        assert connection.request is other
        del ours
        assert not registry.lost
        other.close()
        del other
        assert registry.lost == [connection]


def test_a_request_that_is_held_firmly_stays_so(registry: Registry, pair: Pair) -> None:
    connections, (ours, theirs) = registry.connections, pair
    connection = connections.by_request[id(ours)] = Connection(ours, "peer")
    connections.exchange(ours, theirs)
    assert connection.held is theirs


def test_what_is_no_socket_can_take_the_place_of_a_request(registry: Registry, pair: Pair) -> None:
    """A program's own `prepare_request` returns whatever it likes; nobody can interrupt that."""
    connections, (ours, _) = registry.connections, pair
    connection = connections.add(ours, "peer")
    request = (ours, "prepared")
    connections.exchange(ours, request)
    assert connections.get(request) is connection
    assert not connections.interrupt(connection)
    assert not connection.was_cut


def test_the_exchange_of_an_unknown_request_changes_nothing(registry: Registry, pair: Pair) -> None:
    registry.connections.exchange(*pair)
    assert not len(registry.connections)


def test_nobody_who_looks_misses_a_connection_while_it_is_exchanged(registry: Registry) -> None:
    connections = registry.connections
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = connections.add(ours, "peer")
        missed: list[object] = []

        def look() -> None:
            while not done.is_set():
                if connection not in list(connections):
                    missed.append(connection)

        done = threading.Event()
        looking = Call(look)
        for _ in range(2000):
            connections.exchange(ours, theirs)
            connections.exchange(theirs, ours)
        done.set()
        looking.result()
        assert not missed


def test_an_interrupted_connection_ends_for_both_sides(registry: Registry, pair: Pair) -> None:
    ours, theirs = pair
    connection = registry.connections.add(ours, "peer")
    assert registry.connections.interrupt(connection)
    assert connection.was_cut
    assert theirs.recv(1) == b""
    with pytest.raises(OSError, match="Broken pipe"):
        ours.sendall(b"x")


def test_a_peer_that_was_faster_is_no_reason_to_fail(registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours:
        reset(peer)
        connection = registry.connections.add(ours, "peer")
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
        assert registry.connections.interrupt(connection)


def test_end_of_file_is_no_cut(registry: Registry, pair: Pair) -> None:
    ours, theirs = pair
    connection = registry.connections.add(ours, "peer")
    assert registry.connections.interrupt(connection, socket.SHUT_RD)
    assert not connection.was_cut
    assert ours.recv(1) == b""
    ours.sendall(b"answer")
    assert theirs.recv(10) == b"answer"


def test_what_is_closed_or_changing_hands_cannot_be_interrupted(
    registry: Registry, pair: Pair
) -> None:
    connections, (ours, _) = registry.connections, pair
    connection = connections.add(ours, "peer")
    descriptor = ours.detach()
    try:
        assert not connections.interrupt(connection)
        assert not connection.was_cut
    finally:
        os.close(descriptor)
    connections.remove(ours)
    assert not connections.interrupt(connection)


def test_one_that_another_object_took_over_is_known_by_its_number_and_its_peer(
    registry: Registry,
) -> None:
    with tcp_pair() as (ours, theirs):
        connection = registry.connections.add(ours, theirs.getsockname())
        assert borrow(connection, lambda sock: sock) is ours
        connection.descriptor = ours.fileno()
        with socket.socket(fileno=ours.detach()) as other:
            theirs.sendall(b"x")
            lent: list[socket.socket] = []

            def read(sock: socket.socket) -> bytes:
                lent.append(sock)
                assert sock.fileno() not in {-1, other.fileno()}
                return sock.recv(1)

            assert borrow(connection, read) == b"x"
            assert lent[0].fileno() < 0
            assert registry.connections.interrupt(connection)
            assert connection.was_cut
            assert other.recv(1) == b""
            assert theirs.recv(1) == b""


@pytest.mark.parametrize("becomes", ["closed", "a file", "another's", "nobody's", "unknown"])
def test_a_number_that_became_anothers_is_left_alone(registry: Registry, becomes: str) -> None:
    with tcp_pair() as (ours, theirs), tcp_pair() as (stranger, _):
        connection = registry.connections.add(ours, theirs.getsockname())
        number = connection.descriptor = os.dup(ours.fileno())
        ours.close()
        match becomes:
            case "closed":
                os.close(number)
            case "a file":
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, number)
                os.close(null)
            case "another's":
                os.dup2(stranger.fileno(), number)
            case "nobody's":
                with socket.socket() as unconnected:
                    os.dup2(unconnected.fileno(), number)
            case _:  # a Unix socket, whose peers are all alike
                connection.client_address = ""
                one, other = socket.socketpair()
                with one, other:
                    os.dup2(one.fileno(), number)
        before = descriptors()
        assert not registry.connections.interrupt(connection)
        assert not connection.was_cut
        assert descriptors().keys() == before.keys()
        if becomes != "closed":
            os.close(number)


def test_a_descriptor_that_is_being_shut_down_is_not_closed_meanwhile(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be another connection's a moment later."""
    connections = registry.connections
    order: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = connections.add(ours, "peer")
        get = connections.get

        def slow_get(request: object) -> Connection | None:
            inside.set()
            assert go_on.wait(60)
            order.append("shut down")
            return get(request)

        def close() -> None:
            connections.remove(ours)
            order.append("closed")

        monkeypatch.setattr(connections, "get", slow_get)
        interrupting = Call(connections.interrupt, connection)
        assert inside.wait(60)
        closing = Call(close)
        eventually(lambda: id(ours) not in connections.by_request)
        assert not order
        go_on.set()
        interrupting.result()
        closing.result()
        assert order == ["shut down", "closed"]


def test_only_a_socket_is_tracked(pair: Pair) -> None:
    assert can_be_tracked(pair[0])
    assert not can_be_tracked((b"datagram", pair[0]))
