"""Handle one request: the classes that a user derives from.

A handler does all its work in its constructor: `setup`, `handle`, `finish`.
"""

from __future__ import annotations

import errno
import socket
from io import BufferedIOBase, BytesIO
from typing import TYPE_CHECKING, Any

from portico.connection import ClientAddress, Request

if TYPE_CHECKING:
    from typing_extensions import Buffer


class BaseRequestHandler:
    """One request, handled in the constructor: `setup`, then `handle`, then `finish`.

    `finish` runs also when `handle` raised; nothing runs after a `setup` that raised.

    Attributes:
        request: The socket of a connection; ``(bytes, socket)`` for a datagram.
        client_address: Who sent it.
        server: The server that received it.
    """

    def __init__(self, request: Request, client_address: ClientAddress, server: Any) -> None:
        """Handle the request; what `setup`, `handle` or `finish` raises is passed on."""
        self.request = request
        self.client_address = client_address
        self.server = server
        self.setup()
        try:
            self.handle()
        finally:
            self.finish()

    def setup(self) -> None:
        """Prepare what `handle` needs."""

    def handle(self) -> None:
        """Serve the request; for subclasses."""

    def finish(self) -> None:
        """Clean up after `handle`."""


class StreamRequestHandler(BaseRequestHandler):
    """A connection as two files: `rfile` to read from, `wfile` to write to.

    Attributes:
        connection: The socket; the same object as `request`.
        rfile: A buffered binary reader (`io.BufferedReader`).
        wfile: A binary writer; unbuffered by default.
    """

    rbufsize: int = -1
    """Bytes that `rfile` buffers; -1 for the default of `socket.makefile`, 0 for none."""

    wbufsize: int = 0
    """Bytes that `wfile` buffers until `finish`; 0 for none: each write is sent at once, whole."""

    timeout: float | None = None
    """Seconds that one operation of the socket may take before it raises `TimeoutError`; ``None``
    for no limit.  A reader that has timed out once raises `OSError` from then on."""

    disable_nagle_algorithm: bool = False
    """Whether small writes are sent at once (``TCP_NODELAY``).  Ignored where there is no Nagle."""

    connection: Any
    rfile: Any
    wfile: Any

    def setup(self) -> None:
        """Apply the settings to the socket, and make `rfile` and `wfile`."""
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm:
            self._disable_nagle_algorithm()
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        if self.wbufsize == 0:
            # An engine's socket may know a better way to send small writes.  Asked of the type,
            # because a mock has an answer to everything.
            connection: object = self.connection
            self.wfile = getattr(type(connection), "make_writer", _SocketWriter)(connection)
        else:
            self.wfile = self.connection.makefile("wb", self.wbufsize)

    def finish(self) -> None:
        """Send what `wfile` still holds, and close both files; the server closes the socket."""
        try:
            if not self.wfile.closed:
                try:
                    if isinstance(self.wfile, _SocketWriter):
                        self.wfile.flush_at_end()
                    else:
                        self.wfile.flush()
                except OSError:  # the peer is gone, and nobody is left to be told
                    pass
            self.wfile.close()
        finally:
            self.rfile.close()

    def _disable_nagle_algorithm(self) -> None:
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a Unix socket has no Nagle to disable
                raise


class _SocketWriter(BufferedIOBase):
    """An unbuffered file that sends each write whole, however large it is."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def writable(self) -> bool:
        """Return ``True``."""
        return True

    def write(self, b: Buffer) -> int:
        """Send all of `b`, a buffer of any kind, and return its size in bytes."""
        self._sock.sendall(b)
        with memoryview(b) as view:
            return view.nbytes

    def flush_at_end(self) -> None:
        """Flush for the last time; nobody is left to wait for what was given up."""
        self.flush()

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        descriptor: int = self._sock.fileno()
        return descriptor


class DatagramRequestHandler(BaseRequestHandler):
    """A datagram as two files; what was written is sent back as one datagram in `finish`.

    Attributes:
        packet: The datagram.
        socket: The listener.
        rfile: The datagram as a file.
        wfile: What becomes the reply; an empty one is sent, too.
    """

    packet: bytes
    socket: Any
    rfile: BytesIO
    wfile: BytesIO

    def setup(self) -> None:
        """Make `rfile` and `wfile`."""
        self.packet, self.socket = self.request
        self.rfile = BytesIO(self.packet)
        self.wfile = BytesIO()

    def finish(self) -> None:
        """Send the reply, unless the sender has no address to send it to."""
        if self.client_address is not None:
            self.socket.sendto(self.wfile.getvalue(), self.client_address)
