"""Handlers written with ``async def``: the same servers, the same steps, asyncio inside.

A request is served by its worker as ever; the worker waits for a task on its hub (or, in other
engines, for an event loop of its own) in which `setup`, `handle` and `finish` run.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from functools import partial
from io import BytesIO
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

from portico.connection import ClientAddress, Request, mark_peer_gone
from portico.engines.green.bridge import await_
from portico.engines.green.transports import is_tls, open_tls_stream
from portico.engines.green.watch import SLICE
from portico.handlers import BaseRequestHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    # A step of BaseRequestHandler returns None, and type checkers hold every override to that,
    # however many classes lie between.  So to them alone a handler of coroutines is none.
    _Base: TypeAlias = object
else:
    _Base = BaseRequestHandler


class AsyncRequestHandler(_Base):
    """One request, handled by coroutines: `setup`, then `handle`, then `finish`.

    Each may be ``async def`` or plain; `finish` runs also when `handle` raised.

    Attributes:
        request: As in `BaseRequestHandler`.
        client_address: As in `BaseRequestHandler`.
        server: As in `BaseRequestHandler`.
    """

    def __init__(self, request: Request, client_address: ClientAddress, server: Any) -> None:
        """Handle the request; what `setup`, `handle` or `finish` raises is passed on."""
        self.request = request
        self.client_address = client_address
        self.server = server
        await_(self._run())

    # Any, because what a step returns is awaited if it can be: overrides may be ``async def``.
    def setup(self) -> Any:
        """Prepare what `handle` needs."""

    def handle(self) -> Any:
        """Serve the request; for subclasses."""

    def finish(self) -> Any:
        """Clean up after `handle`."""

    async def _run(self) -> None:
        await call(self.setup)
        try:
            await call(self.handle)
        finally:
            await call(self.finish)


class AsyncStreamRequestHandler(AsyncRequestHandler):
    """A connection as asyncio's streams, with or without TLS.

    A request that is an `ssl.SSLSocket` is used as it is, after its handshake if that is still to
    come.  Where the peer may say goodbye first, ``writer`` still writes to it.

    A subclass that has its own `setup` or `finish` awaits those of this class.

    Attributes:
        reader: An `asyncio.StreamReader` that lets others have their turn while it is full.
        writer: An `asyncio.StreamWriter`; it is closed after `finish`.
    """

    limit: int = 65536
    """Bytes that `reader` holds before the peer has to wait, and of the longest line."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def setup(self) -> None:
        """Make `reader` and `writer`."""
        self.reader, self.writer = await open_streams(self.request, self.server, limit=self.limit)

    async def finish(self) -> None:
        """Send what is left, and close the connection; a peer that is gone is no error."""
        await close(self.writer)

    async def _run(self) -> None:
        try:
            await super()._run()
        except ConnectionError as error:
            # Of this connection, or of one that the handler has to somewhere else?
            reader = vars(self).get("reader")
            if reader is not None and isinstance(reader.exception(), ConnectionError):
                mark_peer_gone(self.request, error)
            raise
        finally:
            writer = vars(self).get("writer")
            if writer is not None:  # a finish of the program's own may not have closed it
                await close(writer)


class FairReader(asyncio.StreamReader):
    """A stream reader that gives way now and then, however much it holds.

    Asyncio's own hands out what it holds without a pause: of a peer that never stops sending,
    sixty thousand short lines in a row.
    """

    _slice_end = 0.0

    def feed_data(self, data: Any) -> None:
        """Take in what the peer has sent; so the loop has just been round."""
        self._slice_end = monotonic() + SLICE
        super().feed_data(data)

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        """Read as asyncio's, and `readline` with it."""
        if monotonic() >= self._slice_end:
            await self._give_way()
        return await super().readuntil(separator)

    async def readexactly(self, n: int) -> bytes:
        """Read as asyncio's."""
        if monotonic() >= self._slice_end:
            await self._give_way()
        return await super().readexactly(n)

    async def read(self, n: int = -1) -> bytes:
        """Read as asyncio's."""
        if monotonic() >= self._slice_end:
            await self._give_way()
        return await super().read(n)

    async def _give_way(self) -> None:
        await asyncio.sleep(0)
        self._slice_end = monotonic() + SLICE


class AsyncDatagramRequestHandler(AsyncRequestHandler):
    """A datagram as two files; what was written is sent back in `finish`.

    Attributes:
        packet: The datagram.
        socket: The listener.
        rfile: The datagram as a file.
        wfile: What becomes the reply.
    """

    packet: bytes
    socket: Any
    rfile: BytesIO
    wfile: BytesIO

    def setup(self) -> Any:
        """Make `rfile` and `wfile`."""
        self.packet, self.socket = self.request
        self.rfile = BytesIO(self.packet)
        self.wfile = BytesIO()

    def finish(self) -> Any:
        """Send the reply, unless the sender has no address to send it to."""
        if self.client_address is not None:
            self.socket.sendto(self.wfile.getvalue(), self.client_address)


async def call(step: Callable[[], Any]) -> None:
    """Call a step of a handler, and wait for it if it is a coroutine."""
    result = step()
    if inspect.isawaitable(result):
        await result


async def open_streams(
    request: Request, server: Any, *, limit: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return asyncio's streams on a connection, which belongs to them from then on.

    Raises:
        OSError: A handshake that was still to come failed, or took too long.
    """
    loop = asyncio.get_running_loop()
    reader = FairReader(limit, loop)
    if is_tls(request):
        return reader, await open_tls_stream(request, reader)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    plain = hand_over(request, server)
    transport, _ = await loop.create_connection(lambda: protocol, sock=plain)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def close(writer: asyncio.StreamWriter) -> None:
    """Send what is left, and close the connection; a peer that is gone is no error."""
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        pass
    except BaseException:  # nobody waits any longer for what is left
        writer.transport.abort()
        raise


class HandedOver(socket.socket):
    """A request's connection while it is asyncio's."""

    __slots__ = ("before_close",)

    before_close: Callable[[], object]
    """Called before the descriptor is closed."""

    def close(self) -> None:
        """Close it, as the connection that its server knows."""
        self.before_close()
        super().close()


def hand_over(request: Request, server: Any = None) -> socket.socket:
    """Return a plain socket for asyncio that takes the request's descriptor.

    The request stays as a closed socket, which `shutdown_request` leaves alone; until then, a
    server of ours finds the connection under the plain one.
    """
    guard = getattr(server, "_guard", None)
    exchange = _do_nothing if guard is None else guard.connections.exchange
    plain = HandedOver(request.family, request.type, request.proto, request.detach())
    plain.before_close = partial(exchange, plain, request)
    plain.setblocking(False)
    exchange(request, plain)
    return plain


def _do_nothing(before: Request, request: Request) -> None:
    """Stand for a server that does not know its connections."""
