"""Handlers written with ``async def``: the same servers, the same steps, asyncio inside.

A request is served by its worker as ever; the worker waits for a task on its hub (or, in other
engines, for an event loop of its own) in which `setup`, `handle` and `finish` run.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from io import BytesIO
from time import monotonic
from typing import TYPE_CHECKING, Any

from portico.connection import ClientAddress, Request
from portico.engines.green.bridge import await_
from portico.engines.green.watch import SLICE
from portico.handlers import BaseRequestHandler

if TYPE_CHECKING:
    from collections.abc import Callable


class AsyncRequestHandler(BaseRequestHandler):
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

    async def _run(self) -> None:
        await call(self.setup)
        try:
            await call(self.handle)
        finally:
            await call(self.finish)


class AsyncStreamRequestHandler(AsyncRequestHandler):
    """A connection as asyncio's streams.

    A subclass that has its own `setup` or `finish` awaits those of this class.

    Attributes:
        reader: An `asyncio.StreamReader` that lets others have their turn while it is full.
        writer: An `asyncio.StreamWriter`; it is closed after `finish`.
    """

    limit: int = 65536
    """Bytes that `reader` holds before the peer has to wait, and of the longest line."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def setup(self) -> None:  # type: ignore[override]  # awaited by _run
        """Make `reader` and `writer`."""
        loop = asyncio.get_running_loop()
        reader = FairReader(self.limit, loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_connection(lambda: protocol, sock=hand_over(self.request))
        self.reader = reader
        self.writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def finish(self) -> None:  # type: ignore[override]  # awaited by _run
        """Send what is left, and close the connection; a peer that is gone is no error."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass


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

    def setup(self) -> None:
        """Make `rfile` and `wfile`."""
        self.packet, self.socket = self.request
        self.rfile = BytesIO(self.packet)
        self.wfile = BytesIO()

    def finish(self) -> None:
        """Send the reply, unless the sender has no address to send it to."""
        if self.client_address is not None:
            self.socket.sendto(self.wfile.getvalue(), self.client_address)


async def call(step: Callable[[], Any]) -> None:
    """Call a step of a handler, and wait for it if it is a coroutine."""
    result = step()
    if inspect.isawaitable(result):
        await result


def hand_over(request: Request) -> socket.socket:
    """Return a plain socket for asyncio that takes the request's descriptor.

    The request stays as a closed socket, which `shutdown_request` leaves alone.
    """
    plain = socket.socket(request.family, request.type, request.proto, request.detach())
    plain.setblocking(False)
    return plain
