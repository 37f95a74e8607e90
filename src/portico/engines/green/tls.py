"""TLS on a green socket: the handshake, reads, writes and the goodbye wait by switching.

After `install`, ``context.wrap_socket(sock)`` of any `ssl.SSLContext` returns a `GreenSSLSocket`
if `sock` is a `GreenSocket`, and what it always returned for any other.

Owns what to do when OpenSSL asks for more input or more room.  All else is `ssl.SSLSocket`'s.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import ssl
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

from portico.engines.green.sockets import GreenSocket
from portico.engines.green.watch import WRITING

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

T = TypeVar("T")


class GreenSSLSocket(ssl.SSLSocket, GreenSocket):  # type: ignore[misc]  # loose signatures in ssl
    """An `ssl.SSLSocket` that waits by switching to the hub.

    Made by ``SSLContext.wrap_socket``, never directly.
    """

    # SSLSocket calls OpenSSL through this attribute alone, so this is the place to wait.
    @property
    def _sslobj(self) -> Session | None:
        return self.__dict__.get("_session_with_waits")

    @_sslobj.setter
    def _sslobj(self, sslobj: Any) -> None:
        if sslobj is not None:
            # OpenSSL's calls have no MSG_DONTWAIT: the descriptor itself must not block.
            _socket.socket.setblocking(self, False)
            sslobj = Session(sslobj, self)
        self.__dict__["_session_with_waits"] = sslobj

    def unwrap(self) -> socket.socket:
        plain = super().unwrap()
        _socket.socket.setblocking(self, True)
        return plain

    def _make_raw(self, mode: str) -> socket.SocketIO:
        return socket.SocketIO(self, cast("Any", mode))

    def _get_send_now(self) -> Callable[[bytes, int], int]:
        return self._write_now

    def _write_now(self, data: bytes, flags: int) -> int:
        session = self._sslobj
        if session is None:  # TLS has ended, the connection has not
            return _socket.socket.send(self, data, flags)
        return session.write_now(data)

    def _wait_for_room(self, deadline: float) -> None:
        session = self._sslobj
        if session is not None and session.wants_read:  # in the middle of a handshake
            self.watch.may_read = False
            self.watch.wait_readable(deadline)
        else:
            super()._wait_for_room(deadline)

    def _send_rest(self, data: ReadableBuffer, sent: int, flags: int) -> None:
        session = self._sslobj
        if session is None:
            super()._send_rest(data, sent, flags)
            return
        with memoryview(data) as view, view.cast("B") as octets:
            while sent < octets.nbytes:
                sent += session.write(octets[sent:])


class Session:
    """OpenSSL's side of one connection, with waits in place of its requests to try again.

    The lock keeps the watchdog, which may send from its own thread, away from other calls:
    OpenSSL allows one at a time for each connection.
    """

    __slots__ = ("_lock", "_sock", "_sslobj", "wants_read")

    def __init__(self, sslobj: Any, sock: GreenSSLSocket) -> None:
        self.wants_read = False
        """Whether the last `write_now` did nothing for want of bytes of the peer."""
        self._sslobj = sslobj
        self._sock = sock
        self._lock = Lock()  # guards _sslobj

    def do_handshake(self) -> None:
        """Shake hands."""
        self._call(self._sslobj.do_handshake)

    def read(self, *size_and_buffer: Any) -> Any:
        """Read as ``SSLSocket.read`` does."""
        return self._call(self._sslobj.read, *size_and_buffer)

    def write(self, data: ReadableBuffer) -> int:
        """Write some of the data, at least one byte; return how much."""
        outbox = self._sock.outbox
        if outbox is not None:
            outbox.send()
        written: int = self._call(self._sslobj.write, data, more=WRITING)
        return written

    def write_now(self, data: bytes) -> int:
        """Write what the system takes at once; return how much that is."""
        with self._lock:
            try:
                written: int = self._sslobj.write(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                self.wants_read = isinstance(error, ssl.SSLWantReadError)
                return 0
        return written

    def shutdown(self) -> Any:
        """Say goodbye, and wait for the peer's."""
        if self._sock.outbox is not None:
            self._sock.outbox.send()
        return self._call(self._sslobj.shutdown)

    @property
    def context(self) -> ssl.SSLContext:
        """The context, which may be exchanged while the hands are shaken."""
        context: ssl.SSLContext = self._sslobj.context
        return context

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        self._sslobj.context = context

    @property
    def session(self) -> Any:
        """The session that may be resumed later."""
        return self._sslobj.session

    @session.setter
    def session(self, session: Any) -> None:
        self._sslobj.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sslobj, name)

    def _call(self, operation: Callable[..., T], *args: Any, more: float = 0.0) -> T:
        """Repeat a call until OpenSSL has what it needs."""
        watch = self._sock.watch
        watch.credit -= 1
        if watch.credit <= 0:
            watch.give_way(more)
        deadline = inf
        while True:
            try:
                with self._lock:
                    return operation(*args)
            except ssl.SSLWantReadError:
                if watch.timeout == 0:
                    raise
                wait = watch.wait_readable
                watch.may_read = False
            except ssl.SSLWantWriteError:
                if watch.timeout == 0:
                    raise
                wait = watch.wait_writable
            # Outside of the except clause: a waiting greenlet should not keep the error alive.
            if deadline == inf:
                deadline = watch.deadline()
            wait(deadline)
            if self._sock.watch.is_closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # OpenSSL says end of file


class _Choice(ssl.SSLSocket):
    """Stands in `SSLContext.sslsocket_class`: the kind of the result follows the argument."""

    @classmethod
    def _create(cls, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        kind: Any = GreenSSLSocket if isinstance(sock, GreenSocket) else ssl.SSLSocket
        wrapped: ssl.SSLSocket = kind._create(sock, *args, **kwargs)
        return wrapped


def install() -> None:
    """Make `SSLContext.wrap_socket` know green sockets; for any other nothing changes.

    A program that put a class of its own into ``SSLContext.sslsocket_class`` keeps it.
    """
    if ssl.SSLContext.sslsocket_class is ssl.SSLSocket:
        ssl.SSLContext.sslsocket_class = _Choice
