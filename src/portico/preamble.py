"""Pass what comes before the handler: the PROXY protocol header and the TLS handshake.

Owns the reading of a header and the handshake, in the worker and under one deadline for both, so
that a peer that says nothing costs one waiting worker, and nobody else.  Leaves the grammar of the
header to `portico.proxy`, and the certificates to `portico.certificates`.

Sources: "The PROXY protocol, Versions 1 & 2", section 2 (a receiver never guesses whether there is
a header); tcp(7), ``TCP_NODELAY``.
"""

from __future__ import annotations

import _socket
import socket
import ssl
import threading
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from portico import proxy
from portico.certificates import Certificates
from portico.deadlines import LONGEST_WAIT, check_limit
from portico.errors import PreambleError, ProxyHeaderError, SettingError
from portico.networks import Networks, ip_address_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    StrPath = str | os.PathLike[str]

    from portico.connection import ClientAddress

PROXY_HEADER: Final = "PROXY header"
"""The stage in which the header is read."""

TLS_HANDSHAKE: Final = "TLS handshake"
"""The stage in which hands are shaken."""

UNREAD: Final = 65_536
"""Bytes that are read and dropped of a peer whose handshake failed."""


class Preamble:
    """What the settings of a server ask of a peer before its handler is made.

    Args:
        tls: How to speak TLS; ``None`` for no TLS, unless the listener speaks it.
        proxies: Networks of trusted proxies; ``None`` for none.
        timeout: Seconds for all of it; ``None`` for no limit.
        listener: The listener.

    Raises:
        SettingError: A setting is outside its range.
        CertificateError: A certificate or key cannot be used.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | Certificates | tuple[StrPath, StrPath] | None,
        proxies: Iterable[Any] | None,
        timeout: float | None,
        listener: Any,
    ) -> None:
        check_limit("handshake_timeout", timeout)
        self.settings = tls, proxies, timeout, listener
        self._proxies = None if proxies is None else Networks.read("proxy_protocol", proxies)
        self._timeout = timeout
        self._tls = read_tls(tls)
        self._listener: Any = listener if isinstance(listener, ssl.SSLSocket) else None

    def pass_by(
        self, server: Any, request: socket.socket, client_address: ClientAddress
    ) -> tuple[Any, ClientAddress]:
        """Read the header and shake hands.

        Raises:
            PreambleError: The peer did not do its part, or not in time.
        """
        guard = server._guard
        connection = guard.connections.get(request)
        if connection is None:  # it came past the step of the loop
            connection = guard.track(request, client_address)
            connection.thread = threading.get_native_id()
        patience = connection.patience
        deadline = Deadline(self._timeout if patience is None else patience)
        before = request.gettimeout()
        if self._proxies is not None:
            header = read_header(request, client_address, self._proxies, deadline)
            if header is not None:
                connection.proxy_header = header
                if header.source is not None:
                    client_address = header.source
        context = self._context(server, may_look=not guard.is_in_child)
        if context is not None and not has_shaken_hands(request):
            listener = self._listener
            request = shake_hands(
                request,
                context,
                deadline,
                is_eager=listener is None or listener.do_handshake_on_connect,
                suppress_ragged_eofs=listener is None or listener.suppress_ragged_eofs,
                on_exchange=server._exchange_request,
            )
        request.settimeout(before)
        return request, client_address

    def over_tls(self, server: Any, request: socket.socket) -> socket.socket:
        """Have a connection speak TLS, if it is to; hands are shaken by the first who reads.

        Raises:
            OSError: The peer has gone; the connection is closed.
        """
        context = self._context(server)
        if context is None or isinstance(request, ssl.SSLSocket):
            return request
        listener = self._listener
        try:
            return wrap(request, context, listener is None or listener.suppress_ragged_eofs)
        except BaseException:
            request.close()
            raise

    def begins_with_peer(self, request: Any, client_address: ClientAddress) -> bool:
        """Say whether the first byte of a connection is its peer's, whatever its handler does."""
        if has_shaken_hands(request):
            return False
        if self._listener is not None or self._tls is not None:
            return True
        return self._proxies is not None and is_trusted(request, client_address, self._proxies)

    def refresh(self, server: Any) -> None:
        """Look at the files of the certificates now; for engines whose workers forget."""
        self._context(server)

    def _context(self, server: Any, *, may_look: bool = True) -> ssl.SSLContext | None:
        if self._listener is not None:
            context: ssl.SSLContext = self._listener.context
            return context
        if isinstance(self._tls, Certificates):
            return self._tls.refresh(server) if may_look else self._tls.context
        return self._tls


def read_tls(value: Any) -> ssl.SSLContext | Certificates | None:
    """Read the setting `ssl_context`.

    Raises:
        SettingError: It is nothing of the kind.
        CertificateError: A certificate or key cannot be used.
    """
    if value is None or isinstance(value, ssl.SSLContext | Certificates):
        return value
    pair: object = value
    if isinstance(pair, tuple) and len(value) == 2:
        return Certificates(value[0], value[1])
    expected = "an ssl.SSLContext, portico.Certificates, or the paths of certificate and key"
    # Of what kind it is, and not what: it may be a key itself, or the password of one beside it.
    kind = tuple(map(type, value)) if isinstance(pair, tuple) else type(pair)
    raise SettingError("ssl_context", kind, expected)


class Deadline:
    """The instant at which the whole preamble has to be over.

    Args:
        timeout: Seconds from now; ``None`` for no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self._instant = None if timeout is None else monotonic() + timeout

    def apply(self, sock: socket.socket) -> None:
        """Limit the next operation of a socket.

        Raises:
            TimeoutError: The deadline has passed.
        """
        if self._instant is not None:
            remaining = self._instant - monotonic()
            if remaining <= 0:
                raise TimeoutError("timed out")
            sock.settimeout(min(remaining, LONGEST_WAIT))


def read_header(
    sock: socket.socket, client_address: ClientAddress, trusted: Networks, deadline: Deadline
) -> proxy.Header | None:
    """Read the header of a trusted proxy; ``None`` if the peer is none, and speaks for itself.

    Takes no byte that belongs to the handler.

    Args:
        sock: The connection.
        client_address: Who connected.
        trusted: Whose word is taken.
        deadline: Of the preamble.

    Raises:
        PreambleError: There is no header, or it did not come in time.
    """
    if not is_trusted(sock, client_address, trusted):
        return None
    data = b""
    try:
        while (header := proxy.parse(data)) is None:
            deadline.apply(sock)
            part = sock.recv(proxy.needed(data))
            if not part:
                raise PreambleError(PROXY_HEADER, "the peer left in the middle of it")
            data += part
    except ProxyHeaderError as error:
        raise PreambleError(PROXY_HEADER, str(error)) from error
    except TimeoutError as error:
        raise PreambleError(PROXY_HEADER, "it did not come in time", is_late=True) from error
    except PreambleError:
        raise
    except OSError as error:
        raise PreambleError(PROXY_HEADER, str(error)) from error
    return header


def is_trusted(sock: socket.socket, client_address: ClientAddress, trusted: Networks) -> bool:
    """Say whether a peer is a proxy whose word is taken."""
    if sock.family == getattr(socket, "AF_UNIX", None):
        return True  # whoever can open a Unix socket passed the mode of its file
    address = ip_address_of(client_address)
    return address is not None and address in trusted


def shake_hands(
    sock: socket.socket,
    context: ssl.SSLContext,
    deadline: Deadline,
    *,
    is_eager: bool = True,
    suppress_ragged_eofs: bool = True,
    on_exchange: Callable[[socket.socket, socket.socket], object] | None = None,
) -> ssl.SSLSocket:
    """Speak TLS over a connection, which becomes the result's.

    Args:
        sock: The connection; one that speaks TLS already, and only has to shake hands, stays the
            same object and is left open if that fails.
        context: The server's.
        deadline: Of the preamble.
        is_eager: Whether to shake hands now; if not, the handler does.
        suppress_ragged_eofs: As for ``wrap_socket``.
        on_exchange: Called with the socket that had the connection and the one that has it now, so
            that a handshake can be interrupted; the other way round before a failed one is closed.

    Raises:
        PreambleError: The peer does not speak TLS, or not in time.  The connection is closed.
    """
    tls = sock if isinstance(sock, ssl.SSLSocket) else None
    try:
        deadline.apply(sock)
        if tls is None:
            tls = wrap(sock, context, suppress_ragged_eofs)
            if on_exchange is not None:
                on_exchange(sock, tls)
        if is_eager:
            tls.do_handshake()
    except BaseException as error:
        if tls is not None:
            leave_last_word(tls)
            if tls is not sock:
                if on_exchange is not None:
                    on_exchange(tls, sock)
                tls.close()
        if isinstance(error, TimeoutError):
            raise PreambleError(TLS_HANDSHAKE, "it took too long", is_late=True) from error
        if isinstance(error, OSError | ValueError):  # wrap_socket raises the latter, too
            raise PreambleError(TLS_HANDSHAKE, _reason(error)) from error
        raise
    return tls


def wrap(sock: socket.socket, context: ssl.SSLContext, suppress_ragged_eofs: bool) -> ssl.SSLSocket:
    """Make a TLS socket of a connection, without a byte in either direction.

    Sets ``TCP_NODELAY``: the session tickets of TLS 1.3 are on their way when the first reply is
    written, and Nagle's algorithm would hold that back until the peer acknowledges them, which it
    delays by 40 ms.

    Raises:
        OSError: The peer has gone; the connection is still the caller's.
    """
    disable_nagle(sock)
    # Of a connection that is down already, wrap_socket leaves an open socket to the collector.
    sock.getpeername()
    return context.wrap_socket(
        sock,
        server_side=True,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )


def has_shaken_hands(request: Any) -> bool:
    """Say whether TLS is spoken over a connection."""
    return isinstance(request, ssl.SSLSocket) and request.version() is not None


def disable_nagle(sock: socket.socket) -> None:
    """Have small writes leave at once, where there is anything that would hold them back."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def leave_last_word(tls: ssl.SSLSocket) -> None:
    """Have what OpenSSL said last, such as why it refuses a certificate, reach the peer.

    Closing a connection with unread bytes resets it: a client that writes before it reads learns
    nothing else then.  Never waits, so that what comes later is not read.
    """
    with suppress(OSError):
        tls.settimeout(0)
        # Below TLS, which has ended.
        _socket.socket.shutdown(tls, socket.SHUT_WR)
        _socket.socket.recv(tls, UNREAD)


def say_goodbye(tls: ssl.SSLSocket) -> None:
    """Tell the peer that TLS ends here, so that nobody else can pretend it; never waits.

    Source: RFC 8446, section 6.1: each side sends ``close_notify`` before it closes.
    """
    with suppress(OSError, ValueError):
        tls.settimeout(0)
        tls.unwrap()


def _reason(error: Exception) -> str:
    """Return why a handshake failed, in OpenSSL's words."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
