"""Crowds on one green server: ten thousand clients at once, and a minute of clients of all kinds.

The server is in a process of its own, and /proc tells what that uses.
"""

from __future__ import annotations

import asyncio
import random
import resource
import selectors
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path

import pytest

from tests.support import PATIENCE, eventually, running_program

SERVER = """
import sys, threading
import portico

class LineEcho(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)

with portico.GreenTCPServer(("127.0.0.1", 0), LineEcho) as server:
    threading.Thread(target=server.serve_forever).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()  # until the test has seen enough
    server.shutdown()
"""

SOURCES = [f"127.0.0.{host}" for host in range(1, 51)]
"""Where clients come from: with several addresses, ports in TIME_WAIT never run out."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(),
        reason="only Linux tells, in /proc, what a process uses; elsewhere 127.0.0.2 is no address",
    ),
]


@pytest.fixture(params=["epoll", "portable"])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The poller of the server, each in turn."""
    monkeypatch.setenv("PORTICO_POLLER", "" if request.param == "epoll" else request.param)
    return str(request.param)


class ServerProcess:
    """A green server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.address = ("127.0.0.1", int(process.stdout.readline()))
        self._process = process

    def descriptors(self) -> int:
        """Return how many descriptors are open."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def connections(self) -> int:
        """Return how many connections the server has not closed: a closed one has no inode."""
        port = f":{self.address[1]:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(
            local.endswith(port) and state != "0A" and inode != "0"
            for _, local, _, state, _, _, _, _, _, inode, *_ in lines
        )

    def memory(self) -> int:
        """Return the process's own share of the memory that it uses, in bytes."""
        smaps = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return 1024 * next(
            int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Pss:")
        )

    def end(self) -> str:
        """Stop the server, wait for its handlers, and return what it has reported."""
        _, errors = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0
        return errors


@contextmanager
def serving() -> Iterator[ServerProcess]:
    with running_program(SERVER) as process:
        yield ServerProcess(process)


# --- ten thousand -----------------------------------------------------------------------

CROWD = 10_000
"""Clients at once."""

LINES = 10
"""Echoes for each of them."""

OTHER_DESCRIPTORS = 500
"""What the test and the server may need beside one descriptor for each client."""


@pytest.fixture
def crowd() -> Iterator[int]:
    """How many clients this process may have at once, with its limit raised as far as it may be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = before[1] if before[1] != resource.RLIM_INFINITY else CROWD + OTHER_DESCRIPTORS
    size = min(CROWD, limit - OTHER_DESCRIPTORS)
    if size < CROWD:
        print(f"{limit} descriptors are allowed: {size} clients instead of {CROWD}")
    # The server inherits it.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], size + OTHER_DESCRIPTORS), limit))
    yield size
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Conversation:
    """A client that waits for each answer before it says the next line."""

    def __init__(self, client: socket.socket, number: int) -> None:
        self._client = client
        self._number = number
        self._answer = b""
        self.answered = 0

    def ask(self) -> None:
        self._client.sendall(self._question())

    def hear(self) -> bool:
        """Receive what has come; say whether it completes the answer."""
        data = self._client.recv(64)
        assert data, "the server has ended the connection"
        self._answer += data
        assert self._question().startswith(self._answer)
        if self._answer != self._question():
            return False
        self._answer = b""
        self.answered += 1
        return True

    def _question(self) -> bytes:
        return b"line %d of client %d\n" % (self.answered, self._number)


def converse(clients: list[socket.socket], lines: int) -> int:
    """Let all clients talk at once; return how many answers came."""
    with selectors.DefaultSelector() as selector:
        conversations = [Conversation(client, number) for number, client in enumerate(clients)]
        for client, conversation in zip(clients, conversations, strict=True):
            selector.register(client, selectors.EVENT_READ, conversation)
        for conversation in conversations:
            conversation.ask()
        while selector.get_map():
            ready = selector.select(PATIENCE)
            assert ready, "the server does not answer"
            for key, _ in ready:
                conversation = key.data
                if conversation.hear():
                    if conversation.answered < lines:
                        conversation.ask()
                    else:
                        selector.unregister(key.fileobj)
    return sum(conversation.answered for conversation in conversations)


def test_ten_thousand_clients_at_once_are_all_answered(poller: str, crowd: int) -> None:
    """All are connected before the first says a word, and until the last has its last answer."""
    sources = cycle(SOURCES)
    with serving() as server, ExitStack() as stack:
        with socket.create_connection(server.address, PATIENCE) as first:
            converse([first], 1)  # whatever the server opens once, it has open now
            before = server.descriptors() - 1
        clients = [
            stack.enter_context(
                socket.create_connection(
                    server.address, PATIENCE, source_address=(next(sources), 0)
                )
            )
            for _ in range(crowd)
        ]
        began = time.perf_counter()
        assert converse(clients, LINES) == crowd * LINES
        taken = time.perf_counter() - began
        print(f"{poller}: {crowd} clients had {LINES} lines each echoed in {taken:.1f} s")
        assert server.descriptors() == before + crowd
        stack.close()
        eventually(lambda: server.descriptors() == before, "the server has closed all")
        assert server.end() == ""


# --- a minute of everything -------------------------------------------------------------

DURATION = 60.0
"""Seconds of mixed traffic."""

PARTS = 3
"""Pieces of that; after each, what the server uses at rest is measured.

The first is the warm-up, in which the memory settles: greenlets are kept, and buffers.
"""

CLIENTS = 40
"""Clients at once."""

GROWTH = 2 * 1024 * 1024
"""Bytes that the server's memory may grow by in all parts but the first."""


class Traffic:
    """Clients of all kinds, well-behaved and not, one after another in `CLIENTS` lines.

    Args:
        address: Of the server.
        seed: For the order of the kinds and for what is said.
    """

    def __init__(self, address: tuple[str, int], seed: int) -> None:
        self.served: Counter[str] = Counter()
        """Clients that came and went, by kind."""
        self._address = address
        self._random = random.Random(seed)
        self._sources = cycle(SOURCES)
        self._numbers = count()

    async def run(self, seconds: float) -> None:
        """Send clients for a while, and wait until the last has gone.

        Raises:
            AssertionError: A client that behaved well was not answered as it should be.
        """
        deadline = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._send_clients(deadline))

    async def _send_clients(self, deadline: float) -> None:
        kinds = [
            self.have_lines_echoed,
            self.have_garbage_echoed,
            self.close_halfway,
            self.read_slowly,
            self.leave_unread,
            self.reset,
            self.say_nothing,
        ]
        while time.monotonic() < deadline:
            kind = self._random.choice(kinds)
            source = (next(self._sources), 0)
            reader, writer = await asyncio.open_connection(
                *self._address, local_addr=source, limit=32768
            )
            try:
                async with asyncio.timeout(PATIENCE):
                    await kind(reader, writer)
            finally:
                writer.close()
            self.served[kind.__name__] += 1
            await self._pause(0.02)

    async def _pause(self, longest: float) -> None:
        await asyncio.sleep(self._random.uniform(0, longest))

    def _lines(self, size: int) -> bytes:
        """Return lines that nobody else says."""
        line = b"%d: what is said here comes back\n" % next(self._numbers)
        return line * (size // len(line) + 1)

    async def have_lines_echoed(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Behave well: ten questions, ten answers."""
        for _ in range(10):
            question = self._lines(1)
            writer.write(question)
            assert await reader.readline() == question
            await self._pause(0.005)

    async def have_garbage_echoed(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Send bytes that mean nothing: lines of any length, or none."""
        question = self._random.randbytes(self._random.randrange(1, 20_000))
        writer.write(question)
        writer.write_eof()
        assert await reader.read(-1) == question

    async def close_halfway(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Say all and close that side, in the middle of a line; then listen."""
        question = self._lines(500) + b"and"
        writer.write(question)
        writer.write_eof()
        await self._pause(0.05)
        assert await reader.read(-1) == question

    async def read_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ask for more than the buffers hold, and take the answer in at leisure."""
        question = self._lines(6 << 20)
        writer.write(question)
        answer = bytearray()
        while len(answer) < len(question):
            await self._pause(0.005)
            data = await reader.read(65536)
            assert data, "the answer ends too early"
            answer += data
        assert answer == question

    async def leave_unread(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Ask for more than the buffers hold, take the beginning, and go."""
        question = self._lines(8 << 20)
        writer.write(question)
        assert question.startswith(await reader.readexactly(1000))
        await self._pause(0.1)
        writer.transport.abort()

    async def reset(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """End the connection with a reset, before the answer has come or after."""
        question = self._lines(100)
        writer.write(question)
        if self._random.random() < 0.5:
            assert await reader.readexactly(len(question)) == question
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def say_nothing(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect, and leave without a word."""
        del reader, writer
        await self._pause(0.2)


def test_a_minute_of_mixed_traffic_leaves_nothing_behind() -> None:
    """Descriptors are what they were, memory has settled, and every honest question was answered.

    Nothing is printed either: clients that go away are no fault of the program.
    """
    with serving() as server:
        traffic = Traffic(server.address, seed=3)
        asyncio.run(traffic.run(0.5))  # whatever the server opens once, it has open now
        eventually(lambda: server.connections() == 0, "it has closed the connections")
        before = server.descriptors()
        memory = []
        for _ in range(PARTS):
            asyncio.run(traffic.run(DURATION / PARTS))
            eventually(lambda: server.descriptors() <= before, "the server has closed all")
            assert server.descriptors() == before
            memory.append(server.memory())
        errors = server.end()
    print(f"{dict(traffic.served)}; memory in KiB: {[used >> 10 for used in memory]}")
    assert min(traffic.served.values()) > 10
    assert len(traffic.served) == 7
    assert max(memory) - memory[0] <= GROWTH
    assert errors == ""
