"""Give asyncio a TLS connection that exists already.

asyncio wraps plain sockets in TLS itself and cannot take over a session that somebody else has
begun, with its keys and its half-read records.  A `TLSTransport` drives such an `ssl.SSLSocket`,
green or not, through ``add_reader`` and ``add_writer`` of any event loop.

Owns when to read, write, shake hands and say goodbye, and the bytes that wait to be sent.  Leaves
TLS to the socket, and lines and back pressure on the handler to asyncio's streams.

Source: the documentation of `asyncio.Transport`; SSL_read(3) and SSL_write(3): each may need the
other direction first, and what OpenSSL holds already makes no event.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from portico.engines.green.sockets import GreenSocket

if TYPE_CHECKING:
    from collections.abc import Callable

HANDSHAKE_TIMEOUT: Final = 60.0
"""Seconds for a handshake on a socket without a timeout of its own.  asyncio chose the same."""

CLOSE_TIMEOUT: Final = 30.0
"""Seconds after `TLSTransport.close` for the peer to take what is left.  asyncio chose the same."""

RECORD_SIZE: Final = 16384
"""Bytes of the largest record of TLS: no call of OpenSSL moves more."""

BURST: Final = 16
"""Records that are moved before others on the loop have their turn."""

HIGH_WATER: Final = 65536
"""Bytes that wait to be sent before the writer is asked to pause.  asyncio chose the same."""


def is_tls(request: object) -> TypeGuard[ssl.SSLSocket]:
    """Say whether a request is a socket with a TLS session; one that was unwrapped has none."""
    return isinstance(request, ssl.SSLSocket) and getattr(request, "_sslobj", None) is not None


async def open_tls_stream(
    sock: ssl.SSLSocket, reader: asyncio.StreamReader
) -> asyncio.StreamWriter:
    """Return a writer to a TLS connection, after the handshake if it is still to come.

    The socket belongs to the streams from then on: closing the writer closes it.

    Args:
        sock: The connection.  Its timeout, if it has one, limits the handshake.
        reader: Gets what the peer sends.

    Raises:
        OSError: The handshake failed, or the peer is gone.
        TimeoutError: The handshake took too long.
    """
    loop = asyncio.get_running_loop()
    timeout = sock.gettimeout()
    green: object = sock  # to type checkers, no TLS socket is a green one
    if isinstance(green, GreenSocket):
        green.watch.drop(is_closing=False)  # the hub may know the descriptor from an earlier wait
    sock.setblocking(False)
    await _shake_hands(sock, HANDSHAKE_TIMEOUT if timeout is None else timeout)
    protocol = _HalfClosingProtocol(reader, loop=loop)
    transport = TLSTransport(loop, sock, protocol)
    return asyncio.StreamWriter(transport, protocol, reader, loop)


async def _shake_hands(sock: ssl.SSLSocket, seconds: float) -> None:
    """Finish the handshake; one that is finished already costs a call."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        while True:
            try:
                sock.do_handshake()
            except ssl.SSLWantReadError:
                watch, unwatch = loop.add_reader, loop.remove_reader
            except ssl.SSLWantWriteError:
                watch, unwatch = loop.add_writer, loop.remove_writer
            else:
                return
            ready = asyncio.Event()
            descriptor = sock.fileno()
            watch(descriptor, ready.set)
            try:
                await ready.wait()
            finally:
                unwatch(descriptor)


class _HalfClosingProtocol(asyncio.StreamReaderProtocol):
    """asyncio's own, for TLS that lets one side end first, as TLS 1.3 does and plain TCP."""

    def eof_received(self) -> bool:
        super().eof_received()
        return True


class TLSTransport(asyncio.Transport):
    """An `asyncio.Transport` over an `ssl.SSLSocket` whose handshake is done.

    Everything runs in the thread of the loop.

    Args:
        loop: An event loop that has ``add_reader``.
        sock: The connection, in non-blocking mode.
        protocol: Told of what happens, as by any transport.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: ssl.SSLSocket, protocol: asyncio.Protocol
    ) -> None:
        super().__init__()
        self._loop = loop
        self._sock = sock
        self._session: Any = sock
        # For read() and write(), which need a session.  Where somebody takes that away, recv() and
        # send() go on in the clear; to type checkers those are the better ones all the same.
        self._fd = sock.fileno()
        self._protocol = protocol
        self._unsent = bytearray()
        self._low_water, self._high_water = HIGH_WATER // 4, HIGH_WATER
        self._is_writer_paused = False
        self._is_reader_paused = False
        self._has_ended = False
        # Whether the peer has said goodbye.
        self._is_closing = False
        self._is_lost = False
        self._read_needs_write = self._write_needs_read = False
        # What OpenSSL asked for when it could not go on: a handshake within the connection.
        self._watches_reading = self._watches_writing = False
        self._timer: asyncio.TimerHandle | None = None
        protocol.connection_made(self)
        loop.call_soon(self._receive)  # OpenSSL may hold what no event tells of

    # --- asyncio's interface ------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Tell ``peername``, ``sockname``, ``socket``, ``ssl_object`` and the like, or `default`.

        ``socket`` and ``ssl_object`` are the same object: to look at, not to read from.
        """
        try:
            find = EXTRA_INFO[name]
        except KeyError:
            return default
        try:
            return find(self._sock)
        except (OSError, ValueError):  # closed
            return default

    def is_closing(self) -> bool:
        return self._is_closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol), "a stream's protocol"
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol:
        return self._protocol

    def is_reading(self) -> bool:
        return not (self._is_reader_paused or self._has_ended or self._is_closing)

    def pause_reading(self) -> None:
        self._is_reader_paused = True
        self._attend()

    def resume_reading(self) -> None:
        if self._is_reader_paused:
            self._is_reader_paused = False
            self._loop.call_soon(self._receive)  # as in the beginning
            self._attend()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send the data when the peer takes it; what is written after `close` is lost."""
        if self._is_closing:
            return
        is_first = not self._unsent
        self._unsent += data
        if is_first:
            self._send()
        if len(self._unsent) > self._high_water and not self._is_writer_paused:
            self._is_writer_paused = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high={high!r}, low={low!r}: expected high >= low >= 0")
        self._low_water, self._high_water = low, high

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_water, self._high_water

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def can_write_eof(self) -> bool:
        """Return ``False``: the end of what we say is the end of the connection."""
        return False

    def write_eof(self) -> None:
        """Not possible; `close` says goodbye.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("TLS has no end of file apart from its goodbye: use close()")

    def close(self) -> None:
        """Read no more; send what is left, within `CLOSE_TIMEOUT`, say goodbye and close."""
        if self._is_closing:
            return
        self._is_closing = True
        self._timer = self._loop.call_later(CLOSE_TIMEOUT, self.abort)
        if not self._unsent:
            self._say_goodbye()
        self._attend()

    def abort(self) -> None:
        """Close without sending what is left."""
        self._lose(None)

    # --- inside -------------------------------------------------------------------------

    def _attend(self) -> None:
        """Watch the descriptor for what can be done next."""
        reads = writes = False
        if not self._is_lost:
            reads = self._write_needs_read or (self.is_reading() and not self._read_needs_write)
            has_words = bool(self._unsent) or self._is_closing
            writes = self._read_needs_write or (has_words and not self._write_needs_read)
        if reads != self._watches_reading:
            self._watches_reading = reads
            if reads:
                self._loop.add_reader(self._fd, self._on_readable)
            else:
                self._loop.remove_reader(self._fd)
        if writes != self._watches_writing:
            self._watches_writing = writes
            if writes:
                self._loop.add_writer(self._fd, self._on_writable)
            else:
                self._loop.remove_writer(self._fd)

    def _on_readable(self) -> None:
        if self._write_needs_read:
            self._send()
        self._receive()

    def _on_writable(self) -> None:
        if self._read_needs_write:
            self._receive()
        self._send()

    def _receive(self) -> None:
        """Pass on what has come, up to a burst."""
        self._read_needs_write = False
        for _ in range(BURST):
            if not self.is_reading():
                break
            try:
                data: bytes = self._session.read(RECORD_SIZE)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLWantWriteError:
                self._read_needs_write = True
                break
            except (OSError, ValueError) as error:
                self._lose(error)
                return
            if data:
                self._protocol.data_received(data)
            else:
                self._has_ended = True
                if not self._protocol.eof_received():
                    self.close()
        else:
            self._loop.call_soon(self._receive)
        self._attend()

    def _send(self) -> None:
        """Send what the peer takes, up to a burst; then say goodbye if that is what comes next."""
        self._write_needs_read = False
        for _ in range(BURST):
            if not self._unsent:
                break
            try:
                with memoryview(self._unsent) as unsent, unsent[:RECORD_SIZE] as record:
                    sent: int = self._session.write(record)
            except ssl.SSLWantWriteError:
                break
            except ssl.SSLWantReadError:
                self._write_needs_read = True
                break
            except (OSError, ValueError) as error:
                self._lose(error)
                return
            del self._unsent[:sent]
        if self._is_writer_paused and len(self._unsent) <= self._low_water:
            self._is_writer_paused = False
            self._protocol.resume_writing()
        if self._is_closing and not self._unsent:
            self._say_goodbye()
        self._attend()

    def _say_goodbye(self) -> None:
        """Tell the peer that no more is coming, and close without waiting for its goodbye."""
        if self._is_lost:
            return
        try:
            self._sock.unwrap()
        except ssl.SSLWantWriteError:  # no room for it; when there is, it goes out
            return
        except (OSError, ValueError):  # it is said, or there is nobody to say it to
            pass
        self._lose(None)

    def _lose(self, error: OSError | ValueError | None) -> None:
        """End everything, because of an error if there is one."""
        if self._is_lost:
            return
        if isinstance(error, ValueError):  # somebody has shut the socket down, or unwrapped it
            error = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
        self._is_lost = self._is_closing = True
        self._unsent.clear()
        self._attend()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.call_soon(self._finish, error)

    def _finish(self, error: OSError | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:  # the peer was faster
                pass
            self._sock.close()


EXTRA_INFO: Final[dict[str, Callable[[ssl.SSLSocket], object]]] = {
    "cipher": lambda sock: sock.cipher(),
    "compression": lambda sock: sock.compression(),
    "peercert": lambda sock: sock.getpeercert(),
    "peername": lambda sock: sock.getpeername(),
    "socket": lambda sock: sock,
    "sockname": lambda sock: sock.getsockname(),
    "ssl_object": lambda sock: sock,
    "sslcontext": lambda sock: sock.context,
}
"""What asyncio's transports tell of a TLS connection, and where it is found."""
