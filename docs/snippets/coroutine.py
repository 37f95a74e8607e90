import asyncio

import portico


class Countdown(portico.AsyncStreamRequestHandler):
    """Count down from the number that the client sends."""

    async def handle(self) -> None:
        for number in range(int(await self.reader.readline()), 0, -1):
            self.writer.write(b"%d\n" % number)
            await self.writer.drain()
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    with portico.GreenTCPServer(("127.0.0.1", 9000), Countdown) as server:
        server.serve_forever()
