"""Bind, accept from and close one kind of socket each.

A family owns the hooks that know the kind: `server_bind`, `server_activate`, `get_request`,
`fileno`, `shutdown_request`, `close_request`, `server_close`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from portico.connection import ClientAddress, Request
from portico.events import DatagramCut, ListenerBound, emit
from portico.server import BaseServer

IP_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})
"""Where several sockets may share a port.

On other families Linux 6.12.9 and later refuse SO_REUSEPORT (EOPNOTSUPP); before, it did nothing.
"""


class TCPServer(BaseServer):
    """Serve TCP connections, or those of any other stream socket.

    Attributes:
        socket: The listener.  A program may exchange it while the server does not serve.
        server_address: After `server_bind`, what ``getsockname()`` returns.
    """

    server_address: Any

    address_family: int = socket.AF_INET
    """The address family of the listener; ``socket.AF_INET6`` for IPv6."""

    socket_type: int = socket.SOCK_STREAM
    """The type of the listener."""

    request_queue_size: int = socket.SOMAXCONN
    """Connections that the kernel completes and holds until they are accepted (the backlog).

    The kernel cuts it to ``net.core.somaxconn``.  It is 5 in `socketserver` before Python 3.15.
    """

    allow_reuse_address: bool = False
    """Whether to bind although connections of an earlier listener linger in TIME_WAIT."""

    allow_reuse_port: bool = False
    """Whether several IP sockets may be bound to this port; other families ignore it."""

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[[Any, Any, Any], Any],
        bind_and_activate: bool = True,
    ) -> None:
        """Make the listener, and bind and activate it unless told not to.

        Args:
            server_address: Where to serve; its shape depends on `address_family`.
            RequestHandlerClass: As in `BaseServer`.
            bind_and_activate: Whether to call `server_bind` and `server_activate`.  If one
                raises, the server is closed and the error passed on.

        Raises:
            OSError: The address is in use, or not to be had.
        """
        super().__init__(server_address, RequestHandlerClass)
        self.socket: socket.socket = socket.socket(self.address_family, self.socket_type)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise

    def server_bind(self) -> None:
        """Give the listener its address, and `server_address` its real value."""
        if self.allow_reuse_address and hasattr(socket, "SO_REUSEADDR"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if (
            self.allow_reuse_port
            and hasattr(socket, "SO_REUSEPORT")
            and self.address_family in IP_FAMILIES
        ):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        if ListenerBound.subscribers:
            emit(ListenerBound(self, self.server_address))

    def server_activate(self) -> None:
        """Listen, with a backlog of `request_queue_size`."""
        self.socket.listen(self.request_queue_size)

    def server_close(self) -> None:
        """Close the listener; a serving loop ends.  Callable from any thread, and again."""
        self.socket.close()
        super().server_close()

    def fileno(self) -> int:
        """Return the listener's descriptor; negative once it is closed."""
        return self.socket.fileno()

    def get_request(self) -> tuple[Request, ClientAddress]:
        """Accept one connection.

        Returns:
            Its socket, and the address of the client.

        Raises:
            OSError: As accept(2); the serving loop knows what each one asks for.
        """
        return self.socket.accept()

    def shutdown_request(self, request: Request) -> None:
        """Tell the peer that no more is coming, and close the connection."""
        try:
            # Without it, bytes that the peer still sends would turn what it has not read of
            # our last ones into a reset; and a child process that shares the descriptor would
            # keep the connection open.
            request.shutdown(socket.SHUT_WR)
        except OSError:  # the peer was faster
            pass
        self.close_request(request)

    def close_request(self, request: Request) -> None:
        """Close this process's hold on the connection."""
        request.close()


class UDPServer(TCPServer):
    """Serve datagrams; a request is ``(bytes, socket)``, the socket being the listener."""

    socket_type: int = socket.SOCK_DGRAM

    max_packet_size: int = 8192
    """Bytes of a datagram that are kept; of a longer one, the end is lost (`DatagramCut`)."""

    receive_flags: int = 0
    """Flags for recvfrom(2); an engine that takes all that is waiting sets ``MSG_DONTWAIT``."""

    def server_activate(self) -> None:
        """Do nothing: a datagram socket has no backlog to open."""

    def get_request(self) -> tuple[Request, ClientAddress]:
        """Receive one datagram.

        Returns:
            ``(bytes, socket)``, and the address of the sender: ``None`` if it has none.
        """
        size = self.max_packet_size
        # One byte more than is kept tells a datagram that just fits from one that was cut.
        flags = (self.receive_flags,) if self.receive_flags else ()
        packet, client_address = self.socket.recvfrom(size + 1, *flags)
        if len(packet) > size:
            packet = self._cut(packet, client_address)
        return (packet, self.socket), client_address

    def _cut(self, packet: bytes, client_address: ClientAddress) -> bytes:
        """Return what is kept of a datagram that is too long."""
        if DatagramCut.subscribers:
            emit(DatagramCut(self, client_address, self.max_packet_size))
        return packet[: self.max_packet_size]

    def shutdown_request(self, request: Request) -> None:
        """Do nothing: a datagram has no connection to shut down."""
        self.close_request(request)

    def close_request(self, request: Request) -> None:
        """Do nothing: the socket of the request is the listener."""


class UnixStreamServer(TCPServer):
    """Serve the connections of a Unix socket; the address is a path or an abstract name.

    Closing the server leaves the path where it is.
    """

    address_family: int = socket.AF_UNIX


class UnixDatagramServer(UDPServer):
    """Serve the datagrams of a Unix socket; the address is a path or an abstract name.

    Closing the server leaves the path where it is.
    """

    address_family: int = socket.AF_UNIX
