"""A server whose process has no descriptor left rests, says so once, and goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.scenarios.served import CONCURRENT, Served, served
from tests.support import PATIENCE, eventually, running_program

LIMIT = 64
"""Descriptors that the server may have."""

CLIENTS = 90
"""More than that, and fewer than the backlog holds beside."""

WATCHED = 2.0
"""Seconds in which the processor time is measured."""

SHARE = 0.1
"""Of a core that a server without descriptors may use."""

RESTRICT = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
"""

STANDARD = f"""
import socketserver, sys, threading, time
{RESTRICT}
class Hold(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(64):
            self.request.sendall(data)

class Server(socketserver.ThreadingTCPServer):
    request_queue_size = {CLIENTS}

with Server(("127.0.0.1", 0), Hold) as server:
    threading.Thread(target=server.serve_forever).start()
    print(server.server_address[1], flush=True)
    for _ in sys.stdin:
        print(time.process_time(), flush=True)
    server.shutdown()
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="the server's process asks /proc"
    ),
]


@contextmanager
def held(address: tuple[str, int]) -> Iterator[list[socket.socket]]:
    """Hold clients that have each said a line."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(CLIENTS)
        ]
        for number, client in enumerate(clients):
            client.sendall(b"%d\n" % number)
        yield clients


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_server_without_descriptors_rests_and_goes_on_when_clients_leave(engine: str) -> None:
    """Those who were accepted are served meanwhile, and those who wait are afterwards.

    The pool has a worker for each client: with fewer, it would not accept so many.
    """
    settings = {"max_workers": CLIENTS} if engine == "pool" else {}
    with served(engine, RESTRICT, request_queue_size=1024, **settings) as server:
        with held(server.address) as clients:
            assert clients[0].recv(64) == b"0\n"
            eventually(lambda: server.seen("AcceptPaused"), "it has noticed")
            before, began = server.ask("processor"), time.monotonic()
            while (elapsed := time.monotonic() - began) < WATCHED:
                clients[0].sendall(b"still here\n")
                assert clients[0].recv(64) == b"still here\n"
                time.sleep(0.25)  # an idle client; what is measured is the server
            used = server.ask("processor") - before
            print(f"{engine}: {used / elapsed:.1%} of a core")
            assert used < SHARE * elapsed
            assert len(server.seen("AcceptPaused")) == 1
            assert server.seen("AcceptResumed") == []
            for client in clients[:LIMIT]:
                client.close()
            for number in range(LIMIT, CLIENTS):
                assert clients[number].recv(64) == b"%d\n" % number
        # Perhaps more than once: the first that leave are not enough for all who wait.
        assert len(server.seen("AcceptPaused")) == len(server.seen("AcceptResumed")) >= 1
        assert_serves(server)
        assert server.end() == ""


def assert_serves(server: Served) -> None:
    with socket.create_connection(server.address, PATIENCE) as client:
        client.sendall(b"hello\n")
        assert client.recv(64) == b"hello\n"


def test_the_standard_library_takes_what_it_can_get_of_a_core() -> None:
    """Its listener stays readable, and its loop goes round without a rest."""
    with running_program(STANDARD) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))

        def processor() -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        with held(address) as clients:
            assert clients[0].recv(64) == b"0\n"
            eventually(lambda: _accepted(process.pid) >= LIMIT, "its descriptors are used up")
            before, began = processor(), time.monotonic()
            time.sleep(1)
            used, elapsed = processor() - before, time.monotonic() - began
            print(f"the standard library: {used / elapsed:.0%} of a core")
            assert used > SHARE * elapsed


def _accepted(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
