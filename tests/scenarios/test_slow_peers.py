"""Peers that send drop by drop, or never read, end by their deadlines, and harm nobody else."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest

from tests.scenarios.served import CONCURRENT, Served, served
from tests.support import PATIENCE, Call, eventually, goodbye

DRIPS = 300
"""Clients that send a byte now and then, and never a whole line."""

READERS = 50
"""Clients that ask for much, and read nothing."""

DRIP_PAUSE = 0.5
"""Seconds between two bytes: shorter than any limit."""

REQUEST_TIMEOUT = 8.0
"""Seconds for a whole connection: what ends the drips, and not a reader whose handler begins late.
"""

IDLE_TIMEOUT = 3.0
"""Seconds without a byte: what ends those who do not read."""

LATE = 1.2
"""By how much of its time a connection may exceed it."""

GROWTH = 64 * 1024 * 1024
"""Bytes that the server's memory may grow by, with 350 handlers and what they send."""

WORKERS = 400
"""Of the pool: more than there are bad clients.

With fewer, they would take all workers and then the queue, and good clients would wait until the
deadlines have ended some: that is bounded as well, but it is not unharmed.
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells when bytes moved"
    ),
]


class Drips:
    """Clients that each send a byte now and then, until they are closed."""

    def __init__(self, clients: list[socket.socket]) -> None:
        self._clients = clients
        self._is_over = threading.Event()
        self._call = Call(self._drip)

    def stop(self) -> None:
        self._is_over.set()
        self._call.result()

    def _drip(self) -> None:
        while not self._is_over.wait(DRIP_PAUSE):
            for client in self._clients:
                try:
                    client.send(b".", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except OSError:  # it was closed, as it should be
                    pass


@contextmanager
def bad_clients(server: Served, drips: int, readers: int) -> Iterator[list[socket.socket]]:
    """Hold clients that drip, and clients that do not read; yield both."""
    with ExitStack() as stack:

        def connect() -> socket.socket:
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
            client.settimeout(PATIENCE)
            client.connect(server.address)
            return client

        slow = [connect() for _ in range(drips)]
        deaf = [connect() for _ in range(readers)]
        for client in deaf:
            client.sendall(b"give 100000000\n")
        dripping = Drips(slow)
        stack.callback(dripping.stop)
        yield slow + deaf


@pytest.mark.parametrize("engine", CONCURRENT)
def test_slow_peers_end_by_their_deadlines_and_harm_nobody(engine: str) -> None:
    """Good clients are answered throughout, each on a connection of its own.

    None of the bad is closed before its time.  How late it is, the server says itself, with the
    instant of its acceptance: of a client's own clock it is not known when that began.
    """
    settings: dict[str, Any] = {"max_workers": WORKERS} if engine == "pool" else {}
    settings |= {"idle_timeout": IDLE_TIMEOUT, "request_timeout": REQUEST_TIMEOUT}
    with served(engine, send_buffer=4096, request_queue_size=1024, **settings) as server:
        ask(server)
        before = server.memory()
        highest, answers = before, []
        with bad_clients(server, DRIPS, READERS) as bad:
            while len(expired := server.seen("DeadlineExpired")) < len(bad):
                began = time.monotonic()
                ask(server)
                answers.append(time.monotonic() - began)
                highest = max(highest, server.memory())
                time.sleep(0.05)  # the pace of the good clients
            for client in bad:
                goodbye(client)
        assert len(expired) == DRIPS + READERS, "no good client is among them"
        for deadline, limit, count in (
            ("idle", IDLE_TIMEOUT, READERS),
            ("request", REQUEST_TIMEOUT, DRIPS),
        ):
            durations = [
                event["duration"] for event in expired if deadline in event["deadline"].lower()
            ]
            print(f"{engine}: {deadline} {limit:g} s: {min(durations):.2f}-{max(durations):.2f} s")
            assert len(durations) == count
            assert min(durations) >= limit
            # Not the last tenth: on a machine with other work, some looks come late.
            assert quantiles(durations, n=10)[-1] <= LATE * limit
        print(
            f"{engine}: {len(answers)} good clients, the slowest in {max(answers):.3f} s; "
            f"{(highest - before) / 1024 / 1024:.1f} MiB more memory"
        )
        assert quantiles(answers, n=10)[-1] < IDLE_TIMEOUT / 2, "good clients wait for the bad"
        assert highest - before < GROWTH
        assert server.end() == ""


def ask(server: Served) -> None:
    with socket.create_connection(server.address, PATIENCE) as client:
        client.sendall(b"a good client\n")
        assert client.recv(64) == b"a good client\n"


def test_a_minimum_rate_ends_a_drip_and_nobody_else() -> None:
    """A drip may go on for the grace of 10 s and a window of 5 s, on all engines at once."""
    drips = 100
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                served(engine, minimum_rate=100, request_queue_size=1024, max_workers=WORKERS)
            )
            for engine in CONCURRENT
        ]
        for server in servers:
            stack.enter_context(bad_clients(server, drips, 0))
        quiet = []
        for server in servers:
            client = stack.enter_context(socket.create_connection(server.address, PATIENCE))
            client.sendall(b"one answer\n")
            assert client.recv(64) == b"one answer\n"
            quiet.append(client)
        for engine, server in zip(CONCURRENT, servers, strict=True):
            eventually(lambda: len(server.seen("DeadlineExpired")) == drips, "all have ended")  # noqa: B023
            durations = [event["duration"] for event in server.seen("DeadlineExpired")]
            print(f"{engine}: minimum rate: {min(durations):.2f}-{max(durations):.2f} s")
            assert min(durations) >= 15
            assert quantiles(durations, n=10)[-1] <= LATE * 15
        for client in quiet:  # it is not their turn: what they were asked for, they have said
            client.sendall(b"still here\n")
            assert client.recv(64) == b"still here\n"


def test_the_standard_library_is_held_by_a_drip_for_as_long_as_it_likes() -> None:
    """The one timeout that it has begins again with every byte."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = 3.0  # far more than a drip takes, on a busy machine as well

        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        serving = Call(server.serve_forever)
        with socket.create_connection(("127.0.0.1", server.server_address[1]), PATIENCE) as client:
            for _ in range(12):
                time.sleep(DRIP_PAUSE)
                client.sendall(b".")
            client.sendall(b"\n")
            assert client.recv(64) == b"." * 12 + b"\n"
        server.shutdown()
        serving.result()
