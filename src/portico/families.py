"""Bind, accept from and close one kind of socket each.

A family owns the hooks that know the kind: `server_bind`, `server_activate`, `get_request`,
`fileno`, `shutdown_request`, `close_request`; `server_close` closes the listener through it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from portico.connection import (
    ClientAddress,
    Connection,
    Request,
    can_be_tracked,
    is_peer_gone,
    mark_peer_gone,
)
from portico.errors import PreambleError
from portico.events import DatagramCut, ListenerBound, emit
from portico.guard import TO_THE_WORKER, are_ours
from portico.lobby import Lobby
from portico.server import BaseServer

if TYPE_CHECKING:
    import os
    import ssl

    from portico.certificates import Certificates
    from portico.preamble import Preamble
    from portico.proxy import Header

    _StrPath = str | os.PathLike[str]

IP_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})
"""Where several sockets may share a port.

On other families Linux 6.12.9 and later refuse SO_REUSEPORT (EOPNOTSUPP); before, it did nothing.
"""

_Socket: Final = socket.socket  # also when a program's test puts something else in its place


def speaks_tls(server: Any, listener: object) -> bool:
    """Say whether a listener is a `ssl.SSLSocket` whose connections may be accepted bare.

    A program's own `get_request`, or its own kind of listener, may count on a connection with which
    hands have been shaken.
    """
    if type(listener) is _Socket:  # the common case: a miss of hasattr is slow
        return False
    if not isinstance(listener, _Socket) or not hasattr(listener, "context"):
        return False
    get_request = getattr(server.get_request, "__func__", None)
    accept: object = getattr(type(listener), "accept", None)
    return (
        getattr(get_request, "__module__", "").startswith("portico.")
        and getattr(accept, "__module__", "") == "ssl"
    )


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

    ssl_context: ssl.SSLContext | Certificates | tuple[_StrPath, _StrPath] | None = None
    """How to speak TLS: a context, `portico.Certificates`, or the paths of a certificate and its
    key, which are read again when they change; ``None`` for no TLS.

    The handshake is the worker's.  A listener that is a `ssl.SSLSocket` is treated likewise.
    """

    proxy_protocol: Iterable[Any] | None = None
    """Networks and addresses of the proxies whose word is taken for who their client is (PROXY
    protocol, version 1 or 2), such as ``["10.0.0.0/8"]``; ``None`` for none.

    Whoever connects from there has to begin with a header; a peer from elsewhere speaks for itself.
    `verify_request` is then called in the worker, after the header.
    """

    handshake_timeout: float | None = 10.0
    """Seconds for the PROXY header and the TLS handshake together; ``None`` for no limit."""

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
        self._preamble()
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

    def _preamble(self) -> Preamble | None:
        """Return what comes before the handler, as the settings and the listener ask for it.

        Raises:
            SettingError: A setting is outside its range.
            CertificateError: A certificate or key cannot be used.
        """
        listener = self.__dict__.get("socket")
        tls = self.ssl_context
        if tls is None and self.proxy_protocol is None and not speaks_tls(self, listener):
            return None
        settings = tls, self.proxy_protocol, self.handshake_timeout, listener
        known = self.__dict__.get("_known_preamble")
        if known is None or known.settings != settings:
            from portico.preamble import Preamble  # noqa: PLC0415  # it stands on ssl

            known = self.__dict__["_known_preamble"] = Preamble(*settings)
        return known

    def _make_lobby(self) -> Lobby | None:
        # On every engine, so that a wrong setting fails here and not at each connection.
        has_preamble = self._preamble() is not None
        return Lobby(self.handshake_timeout) if has_preamble and self._keeps_lobby else None

    def _begins_with_peer(self, request: Request, client_address: ClientAddress) -> bool:
        preamble = self._preamble()
        return preamble is not None and preamble.begins_with_peer(request, client_address)

    def _close_listener(self) -> None:
        self.socket.close()

    def fileno(self) -> int:
        """Return the listener's descriptor; negative once it is closed."""
        return self.socket.fileno()

    def get_request(self) -> tuple[Request, ClientAddress]:
        """Accept one connection.

        Returns:
            Its socket, and the address of the client.  From a TLS listener it is a bare socket, or
            one that has not shaken hands yet where a program's own hooks see it before
            `serve_request`: hands are shaken in the worker, where one silent client stops nobody
            else.

        Raises:
            OSError: As accept(2); the serving loop knows what each one asks for.
        """
        listener = self.socket
        if type(listener) is _Socket and self.ssl_context is None:  # the common case
            return listener.accept()
        is_tls = speaks_tls(self, listener)
        taken = socket.socket.accept(listener) if is_tls else listener.accept()
        return self._over_tls(taken[0]), taken[1]

    def _over_tls(self, request: Request) -> Request:
        """Have a connection speak TLS from its first read on, if it may miss `serve_request`.

        A program's own hooks may hand it to a handler without it, and the handler must not find
        plain text where TLS is due.  A PROXY header comes first, so that it is left to
        `finish_request` there.
        """
        if self.proxy_protocol is not None or are_ours(self, TO_THE_WORKER):
            return request
        preamble = self._preamble()
        return request if preamble is None else preamble.over_tls(self, request)

    def prepare_request(
        self, request: Request, client_address: ClientAddress
    ) -> tuple[Request, ClientAddress]:
        """Read the PROXY header and shake hands, as the settings and the listener ask for.

        Returns:
            The connection, over TLS if it speaks that, and the address of the client, as a trusted
            proxy tells it.

        Raises:
            PreambleError: The peer did not do its part, or not in time.
        """
        if (
            self.ssl_context is None
            and self.proxy_protocol is None
            and type(self.socket) is _Socket
        ):
            return request, client_address  # the common case, without further questions
        preamble = self._preamble()
        if preamble is None:
            return request, client_address
        return preamble.pass_by(self, request, client_address)

    def finish_request(self, request: Request, client_address: ClientAddress) -> None:
        """Make the handler, which does all its work in its constructor.

        Where a program's own hooks left out `serve_request`, what it does first is done here: the
        PROXY header, the TLS handshake, and `verify_request` if that had to wait for them.
        """
        # A program may ask for a handler without ever having a listener.
        if (
            self.ssl_context is None
            and self.proxy_protocol is None
            and type(self.__dict__.get("socket")) is _Socket
        ) or self._is_prepared(request, client_address):
            self.RequestHandlerClass(request, client_address, self)
        else:
            self._finish_unprepared(request, client_address)

    def _is_prepared(self, request: Request, client_address: ClientAddress) -> bool:
        """Say whether nothing comes before the handler, or that has been."""
        if self._preamble() is None:
            return True
        connection = self._guard.connections.get(request)
        if connection is None:
            # A `finish_request` of the program's has made something else of it, such as an object
            # that counts bytes.  A bare socket may as well be one that came past all hooks.
            if type(request) is not _Socket and are_ours(self, TO_THE_WORKER):
                return True
            connection = self._connection_below(request, client_address)
        return connection is not None and connection.thread is not None

    def _connection_below(
        self, request: Request, client_address: ClientAddress
    ) -> Connection | None:
        """Return the connection over which a program has put an object of its own.

        It has the same descriptor, or is what the caller serves; ``None`` if it is not found.
        """
        connections = self._guard.connections
        with suppress(AttributeError, OSError, ValueError):  # such an object may have none
            number = request.fileno()
            for connection in connections:
                held = connection.request
                if can_be_tracked(held) and _Socket.fileno(held) == number >= 0:
                    return connection
        served = connections.get(self._request_here())
        return None if served is None or served.speaker != client_address else served

    def _finish_unprepared(self, request: Request, client_address: ClientAddress) -> None:
        """Do the worker's part of a request; its end is left to who called `finish_request`.

        Raises:
            PreambleError: The handler would get an object of the program's past the preamble.
        """
        accepted = request if can_be_tracked(request) else self._below(request, client_address)
        try:
            prepared, peer = self._prepare(accepted, client_address)
        except PreambleError as error:
            connection = self._guard.connections.get(accepted)
            self._tell_preamble(client_address, connection, error)
            return
        try:
            if not self._guard.verifies_late or self._verify(prepared, peer):
                seen = prepared if accepted is request else request
                self.RequestHandlerClass(seen, peer, self)
        except OSError as error:
            if is_peer_gone(prepared, error):
                mark_peer_gone(request, error)
            raise
        finally:
            if prepared is not accepted:  # of which the caller has but the empty hull
                self._end(prepared)

    def _below(self, request: Request, client_address: ClientAddress) -> Request:
        """Return the socket below an object of a program's own, to be prepared in its place.

        Raises:
            PreambleError: It is not found, or TLS would leave it empty below that object.
        """
        connection = self._connection_below(request, client_address)
        accepted = None if connection is None else connection.request
        if accepted is None or not (self._speaks_plainly(accepted) or hasattr(accepted, "unwrap")):
            stage = "PROXY header" if self._speaks_plainly(request) else "TLS handshake"
            reason = "finish_request got an object of the program's own: call serve_request"
            raise PreambleError(stage, reason)
        return accepted

    @property
    def _verifies_late(self) -> bool:
        """Whether `verify_request` sees a request only when it is prepared, in the worker.

        Because a proxy tells the address; or because it may ask a `ssl.SSLSocket` for the
        certificate, as it could behind a listener that speaks TLS, if somebody is sure to call it
        then.
        """
        if self.proxy_protocol is not None:
            return True
        return (
            not are_ours(self, ("verify_request",))
            and (are_ours(self, TO_THE_WORKER) or are_ours(self, ("finish_request",)))
            and speaks_tls(self, self.__dict__.get("socket"))
        )

    def _speaks_plainly(self, request: Request) -> bool:
        is_tls = self.ssl_context is not None or speaks_tls(self, self.socket)
        return not is_tls and super()._speaks_plainly(request)

    def proxy_header(self, request: Any) -> Header | None:
        """Return what a proxy said of a connection; ``None`` if it said nothing.

        To be called while the connection is open, by its handler for example.
        """
        connection = self._guard.connections.get(request)
        return None if connection is None else connection.proxy_header

    def shutdown_request(self, request: Request) -> None:
        """Tell the peer that no more is coming, and close the connection."""
        if "_known_preamble" in self.__dict__ and hasattr(request, "unwrap"):
            from portico.preamble import say_goodbye  # noqa: PLC0415  # it stands on ssl

            say_goodbye(request)
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
        guard = self._guard
        connection = guard.note_closing(request)
        try:
            request.close()
        finally:
            # What `note_closed` does, without a call: every connection ends here.
            if connection is not None and connection.gate is not None:
                gate, connection.gate = connection.gate, None
                gate.left.append((connection.client_address, connection.peer))
                if gate.is_awaited:
                    gate.settle()


class UDPServer(TCPServer):
    """Serve datagrams; a request is ``(bytes, socket)``, the socket being the listener."""

    socket_type: int = socket.SOCK_DGRAM

    max_packet_size: int = 8192
    """Bytes of a datagram that are kept; of a longer one, the end is lost (`DatagramCut`)."""

    receive_flags: int = 0
    """Flags for recvfrom(2); an engine that takes all that is waiting sets ``MSG_DONTWAIT``."""

    @property
    def _replies_by_listener(self) -> bool:
        return True

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
        """Close nothing: the socket of the request is the listener."""
        counter = self._guard.counter
        if counter is not None:
            counter.note_datagram(len(request[0]))


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
