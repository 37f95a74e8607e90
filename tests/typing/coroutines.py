"""Handlers with ``async def``: each step may be a coroutine or plain, and needs no ignore."""

import asyncio
from typing import assert_type

import portico


class Countdown(portico.AsyncStreamRequestHandler):
    """Has coroutines for all its steps, and awaits those of its base."""

    limit = 1024

    async def setup(self) -> None:
        await super().setup()
        assert_type(self.reader, asyncio.StreamReader)
        assert_type(self.writer, asyncio.StreamWriter)

    async def handle(self) -> None:
        for number in range(int(await self.reader.readline()), 0, -1):
            self.writer.write(b"%d\n" % number)
            await self.writer.drain()

    async def finish(self) -> None:
        await super().finish()


class Hello(portico.AsyncStreamRequestHandler):
    """Has nothing to wait for."""

    def handle(self) -> None:
        self.writer.write(b"hello\n")


class Shout(portico.AsyncDatagramRequestHandler):
    """Answers a datagram."""

    async def handle(self) -> None:
        await asyncio.sleep(0)
        self.wfile.write(self.packet.upper())


class Log(portico.AsyncDatagramRequestHandler):
    """Prepares in a coroutine, handles without one, and does not reply."""

    async def setup(self) -> None:
        super().setup()
        await asyncio.sleep(0)

    def handle(self) -> None:
        print(self.rfile.readline())

    async def finish(self) -> None:
        await asyncio.sleep(0)


def run() -> None:
    for handler in (Countdown, Hello):
        with portico.GreenTCPServer(("127.0.0.1", 0), handler) as server:
            server.serve_forever()
    for handler_of_datagrams in (Shout, Log):
        with portico.ThreadingUDPServer(("127.0.0.1", 0), handler_of_datagrams) as datagrams:
            datagrams.serve_forever()
