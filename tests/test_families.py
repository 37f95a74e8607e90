from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from tests.support import RunningServer, connect, nothing_left_behind, received, reset

LOOPBACK = ("127.0.0.1", 0)


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


Address = Any


@pytest.fixture(
    params=[TCPServer, UDPServer, UnixStreamServer, UnixDatagramServer],
    ids=lambda family: family.__name__,
)
def family(request: pytest.FixtureRequest) -> type[TCPServer]:
    chosen: type[TCPServer] = request.param
    return chosen


@pytest.fixture
def address(family: type[TCPServer], tmp_path: Path) -> Address:
    """Where a server of this family can be bound."""
    return str(tmp_path / "socket") if family.address_family == socket.AF_UNIX else LOOPBACK


@pytest.fixture
def server(family: type[TCPServer], address: Address) -> Iterator[TCPServer]:
    with family(address, do_nothing) as made:
        yield made


# --- the listener -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (TCPServer, (socket.AF_INET, socket.SOCK_STREAM)),
        (UDPServer, (socket.AF_INET, socket.SOCK_DGRAM)),
        (UnixStreamServer, (socket.AF_UNIX, socket.SOCK_STREAM)),
        (UnixDatagramServer, (socket.AF_UNIX, socket.SOCK_DGRAM)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_family_makes_its_kind_of_socket(
    chosen: type[TCPServer], expected: tuple[int, int]
) -> None:
    with chosen(LOOPBACK, do_nothing, bind_and_activate=False) as server:
        assert (server.socket.family, server.socket.type) == expected


def test_a_server_is_bound_and_serves_from_the_start(server: TCPServer) -> None:
    with connect(server) as client:
        client.send(b"hello")
        server.handle_request()


def test_the_descriptor_is_that_of_the_listener(server: TCPServer) -> None:
    assert server.fileno() == server.socket.fileno()
    server.server_close()
    assert server.fileno() == -1


def test_an_address_in_use_is_the_callers_to_know(family: type[TCPServer], server: Any) -> None:
    """And the second server leaves nothing behind."""
    with nothing_left_behind(), pytest.raises(OSError) as failed:  # noqa: PT011 - looked at below
        family(server.server_address, do_nothing)
    assert failed.value.errno == errno.EADDRINUSE


def test_the_chosen_port_is_told() -> None:
    with TCPServer(LOOPBACK, do_nothing) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        assert port == server.socket.getsockname()[1] != 0


def test_the_empty_host_is_told_as_every_address() -> None:
    with TCPServer(("", 0), do_nothing) as server:
        assert server.server_address[0] == "0.0.0.0"


def test_an_ipv6_address_has_four_parts() -> None:
    class Server(TCPServer):
        address_family = socket.AF_INET6

    with Server(("::1", 0), do_nothing) as server, connect(server) as client:
        assert server.server_address == ("::1", client.getpeername()[1], 0, 0)


def test_an_abstract_name_is_told_as_bytes() -> None:
    """It begins with a zero byte and is in no folder."""
    name = f"\0portico-test-{os.getpid()}"
    with UnixStreamServer(name, do_nothing) as server, connect(server):
        assert server.server_address == name.encode()


def test_a_path_stays_when_the_server_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    UnixStreamServer(str(path), do_nothing).server_close()
    assert path.is_socket()
    with pytest.raises(OSError, match="in use"):
        UnixStreamServer(str(path), do_nothing)


def test_a_server_can_be_bound_and_activated_by_hand(
    family: type[TCPServer], address: Address
) -> None:
    with family(address, do_nothing, bind_and_activate=False) as server:
        assert server.server_address == address
        server.server_bind()
        server.server_activate()
        assert server.server_address == server.socket.getsockname()
        with connect(server) as client:
            client.send(b"hello")
            server.handle_request()


@pytest.mark.parametrize("hook", ["server_bind", "server_activate"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_constructor_that_fails_closes_the_server(
    family: type[TCPServer], address: Address, hook: str, error: type[BaseException]
) -> None:
    """Through `server_close`, so that an override lets go of its own things too."""
    closed: list[TCPServer] = []

    def fail(self: object) -> None:
        raise error

    class Failing(family):  # type: ignore[misc, valid-type]  # one of four
        def server_close(self) -> None:
            super().server_close()
            closed.append(self)

    setattr(Failing, hook, fail)
    with nothing_left_behind(), pytest.raises(error):
        Failing(address, do_nothing)
    assert [server.fileno() for server in closed] == [-1]


def test_a_socket_that_cannot_be_made_is_the_callers_to_know() -> None:
    class Server(TCPServer):
        address_family = 255

    with nothing_left_behind(), pytest.raises(OSError, match="not supported"):
        Server(LOOPBACK, do_nothing)


def test_a_server_can_be_closed_again(server: TCPServer) -> None:
    server.server_close()
    server.server_close()
    assert server.socket.fileno() == -1


def test_a_backlog_is_as_large_as_was_asked_for() -> None:
    """The size reaches listen(2) as it is; the system may cut it."""
    sizes: list[int] = []

    class Listener(socket.socket):
        def listen(self, size: int = -1) -> None:
            sizes.append(size)
            super().listen(size)

    class Server(TCPServer):
        request_queue_size = 7

    for server_class in (TCPServer, Server):
        with server_class(LOOPBACK, do_nothing, bind_and_activate=False) as server:
            server.socket.close()
            server.socket = Listener()
            server.server_activate()
    assert sizes == [socket.SOMAXCONN, 7]


# --- sharing an address -----------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_an_address_is_reused_when_asked_for(wanted: bool) -> None:
    class Server(TCPServer):
        allow_reuse_address = wanted

    with Server(LOOPBACK, do_nothing) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == wanted


def test_an_address_with_a_lingering_connection_can_be_reused() -> None:
    """Whoever closes first keeps the address for a while, unless both ends allow its reuse."""

    class Server(TCPServer):
        allow_reuse_address = True

    with Server(LOOPBACK, do_nothing) as server, connect(server) as client:
        server.handle_request()
        assert received(client) == b""
    Server(server.server_address, do_nothing).server_close()


@pytest.mark.parametrize("chosen", [TCPServer, UDPServer], ids=["tcp", "udp"])
@pytest.mark.parametrize(
    ("version", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_port_is_shared_when_asked_for(
    chosen: type[TCPServer], version: socket.AddressFamily, host: str
) -> None:
    server_class = type("Server", (chosen,), {"allow_reuse_port": True, "address_family": version})
    with server_class((host, 0), do_nothing) as one:
        with server_class(one.server_address, do_nothing) as other:
            assert other.server_address == one.server_address


def test_a_port_is_not_shared_unasked() -> None:
    with TCPServer(LOOPBACK, do_nothing) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


@pytest.mark.parametrize("chosen", [UnixStreamServer, UnixDatagramServer])
def test_a_path_is_no_port_to_share(chosen: type[TCPServer], tmp_path: Path) -> None:
    """Linux refuses it from 6.12.9 on; before, it did nothing."""
    server_class = type("Server", (chosen,), {"allow_reuse_port": True})
    with server_class(str(tmp_path / "socket"), do_nothing) as server:
        assert server.server_address == str(tmp_path / "socket")


def test_a_system_that_cannot_share_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(TCPServer):
        allow_reuse_address = True
        allow_reuse_port = True

    reuse_address, reuse_port = socket.SO_REUSEADDR, socket.SO_REUSEPORT
    monkeypatch.delattr(socket, "SO_REUSEADDR")
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with Server(LOOPBACK, do_nothing) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, reuse_address) == 0
        assert server.socket.getsockopt(socket.SOL_SOCKET, reuse_port) == 0


# --- connections ------------------------------------------------------------------------


@pytest.fixture(params=[TCPServer, UnixStreamServer], ids=["tcp", "unix-stream"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TCPServer]:
    is_unix = request.param is UnixStreamServer
    with request.param(str(tmp_path / "socket") if is_unix else LOOPBACK, do_nothing) as made:
        yield made


def test_a_request_is_the_connection_and_the_address_of_the_client(stream: TCPServer) -> None:
    with connect(stream) as client:
        request, client_address = stream.get_request()
        with request:
            assert client_address == client.getsockname()
            client.sendall(b"hello")
            assert request.recv(64) == b"hello"


def test_what_accepting_raises_reaches_whoever_asked(stream: TCPServer) -> None:
    stream.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        stream.get_request()


def test_shutting_a_request_down_ends_and_closes_it(stream: TCPServer) -> None:
    with connect(stream) as client:
        request, _ = stream.get_request()
        request.sendall(b"the end")
        stream.shutdown_request(request)
        assert request.fileno() == -1
        assert received(client) == b"the end"


def test_the_client_sees_the_end_though_another_process_holds_the_connection(
    stream: TCPServer,
) -> None:
    """A second descriptor stands for the other process here."""
    with connect(stream) as client:
        request, _ = stream.get_request()
        with request.dup():
            stream.shutdown_request(request)
            assert received(client) == b""


def test_closing_a_request_leaves_the_connection_to_another_process(stream: TCPServer) -> None:
    with connect(stream) as client:
        request, _ = stream.get_request()
        with request.dup() as other:
            stream.close_request(request)
            assert request.fileno() == -1
            other.sendall(b"still here")
            assert client.recv(64) == b"still here"


def test_a_request_whose_client_is_gone_is_closed_all_the_same(stream: TCPServer) -> None:
    client = connect(stream)
    request, _ = stream.get_request()
    reset(client)
    with pytest.raises(ConnectionError):
        while request.recv(64) or request.send(b"x"):
            pass
    stream.shutdown_request(request)
    assert request.fileno() == -1


def test_a_request_can_be_shut_down_again(stream: TCPServer) -> None:
    """A handler may have closed it already."""
    with connect(stream):
        request, _ = stream.get_request()
        request.close()
        stream.shutdown_request(request)
        assert request.fileno() == -1


# --- datagrams --------------------------------------------------------------------------


@pytest.fixture(params=[UDPServer, UnixDatagramServer], ids=["udp", "unix-datagram"])
def datagram(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UDPServer]:
    is_unix = request.param is UnixDatagramServer
    with request.param(str(tmp_path / "socket") if is_unix else LOOPBACK, do_nothing) as made:
        yield made


def test_a_request_is_the_datagram_the_listener_and_the_address_of_the_sender(
    datagram: UDPServer,
) -> None:
    with connect(datagram) as client:
        client.send(b"hello")
        assert datagram.get_request() == ((b"hello", datagram.socket), client.getsockname())


def test_each_datagram_is_a_request_of_its_own(datagram: UDPServer) -> None:
    with connect(datagram) as client:
        for packet in (b"one", b"", b"three"):
            client.send(packet)
        packets = [datagram.get_request()[0][0] for _ in range(3)]
    assert packets == [b"one", b"", b"three"]


@pytest.mark.parametrize("size", [0, 99, 100, 101, 8193])
def test_of_a_datagram_only_the_beginning_is_kept(datagram: UDPServer, size: int) -> None:
    datagram.max_packet_size = 100
    sent = os.urandom(size)
    with connect(datagram) as client:
        client.send(sent)
        (packet, _), _ = datagram.get_request()
    assert packet == sent[:100]


def test_a_datagram_of_the_default_size_is_whole(datagram: UDPServer) -> None:
    sent = os.urandom(8192)
    with connect(datagram) as client:
        client.send(sent)
        (packet, _), _ = datagram.get_request()
    assert packet == sent


@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
def test_the_end_of_a_datagram_is_not_the_end_of_the_listener(
    datagram: UDPServer, hook: str
) -> None:
    with connect(datagram) as client:
        client.send(b"first")
        request, _ = datagram.get_request()
        getattr(datagram, hook)(request)
        client.send(b"second")
        assert datagram.get_request()[0][0] == b"second"


def test_an_engine_may_receive_without_waiting(datagram: UDPServer) -> None:
    """It takes all that is there, and has to notice when there is no more."""
    datagram.receive_flags = socket.MSG_DONTWAIT
    with connect(datagram) as client:
        client.send(b"hello")
        assert datagram.get_request()[0][0] == b"hello"
        with pytest.raises(BlockingIOError):
            datagram.get_request()


def test_a_sender_without_a_name_has_no_address(tmp_path: Path) -> None:
    with UnixDatagramServer(str(tmp_path / "socket"), do_nothing) as server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", server.server_address)
        assert server.get_request() == ((b"hello", server.socket), None)


# --- while it serves --------------------------------------------------------------------


def test_a_server_that_is_closed_stops_serving(family: type[TCPServer], address: Address) -> None:
    with nothing_left_behind(), RunningServer(family(address, do_nothing)) as running:
        running.server.server_close()
        assert running.wait_ended() is None


def test_a_listener_that_is_only_shut_down_stops_the_loop() -> None:
    """accept(2) says that it does not listen any more, and will say so for ever."""
    with nothing_left_behind(), RunningServer(TCPServer(LOOPBACK, do_nothing)) as running:
        running.server.socket.shutdown(socket.SHUT_RDWR)
        assert running.wait_ended() is None


def test_a_server_whose_socket_was_closed_behind_its_back_can_be_shut_down() -> None:
    """Nobody tells the loop: while it waits, the kernel keeps the listener open."""
    with nothing_left_behind(), RunningServer(TCPServer(LOOPBACK, do_nothing)) as running:
        with running.connect() as client:
            assert received(client) == b""
        running.server.socket.close()
        running.shutdown()
        assert running.wait_ended() is None


def test_a_handler_can_be_asked_for_without_a_listener() -> None:
    """As programs do that test their handlers, on a server that was never bound."""
    served: list[object] = []

    class Unbound(TCPServer):
        def __init__(self) -> None:
            portico.BaseServer.__init__(self, ("127.0.0.1", 0), lambda *given: served.append(given))

    server = Unbound()
    server.finish_request("request", "somebody")
    assert served == [("request", "somebody", server)]
