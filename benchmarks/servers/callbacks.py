"""Serve with the protocols of asyncio: callbacks, no coroutine.

    python callbacks.py asyncio|uvloop echo|lines|datagrams

Prints the port that the kernel chose.
"""

import asyncio
import importlib
import sys
from typing import Any, cast


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class EchoLines(Echo):
    rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.transport.write(line + b"\n")


class EchoDatagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(data, address)


async def main(role: str) -> None:
    loop = asyncio.get_running_loop()
    here = ("127.0.0.1", 0)
    if role == "datagrams":
        transport, _ = await loop.create_datagram_endpoint(EchoDatagrams, here)
        print(transport.get_extra_info("sockname")[1], flush=True)
        await asyncio.Event().wait()
    else:
        server = await loop.create_server(
            {"echo": Echo, "lines": EchoLines}[role], *here, backlog=1024
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    loop_module, role = sys.argv[1:]
    with asyncio.Runner(loop_factory=importlib.import_module(loop_module).new_event_loop) as runner:
        runner.run(main(role))
