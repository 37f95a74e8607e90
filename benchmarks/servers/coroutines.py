"""Serve with the streams of asyncio: a coroutine for each connection.

    python coroutines.py asyncio|uvloop echo|lines

Prints the port that the kernel chose.
"""

import asyncio
import importlib
import sys
from asyncio import StreamReader, StreamWriter


async def echo(reader: StreamReader, writer: StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def echo_lines(reader: StreamReader, writer: StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


HANDLERS = {"echo": echo, "lines": echo_lines}


async def main(role: str) -> None:
    server = await asyncio.start_server(HANDLERS[role], "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    loop_module, role = sys.argv[1:]
    with asyncio.Runner(loop_factory=importlib.import_module(loop_module).new_event_loop) as runner:
        runner.run(main(role))
