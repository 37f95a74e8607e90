"""What a server must not do however long it runs: grow, wake for nothing, keep its stopper waiting.

What a server uses is read in a process of its own, from /proc.
"""

import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

import portico

pytestmark = pytest.mark.long

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(),
    reason="only Linux tells, in /proc, what a process uses and how often it woke",
)

SERVER = """
import importlib, json, os, sys, threading

module = importlib.import_module(sys.argv[1])

class EchoLine(module.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())

server = getattr(module, sys.argv[2])(("127.0.0.1", 0), EchoLine)
serving = threading.Thread(target=server.serve_forever, daemon=True)
serving.start()
print(server.server_address[1], flush=True)

for _ in sys.stdin:  # each line asks what is in use once the handlers have ended
    for thread in threading.enumerate():
        if thread not in (serving, threading.main_thread()):
            thread.join()
    with open("/proc/self/smaps_rollup") as smaps:
        memory = next(int(line.split()[1]) for line in smaps if line.startswith("Rss:"))
    # While a folder is listed, the listing itself has a descriptor; it does so every time.
    use = {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memory": memory * 1024,
    }
    print(json.dumps(use), flush=True)
"""
"""A program that serves `MODULE CLASS` and says on demand what it uses."""


@dataclass(frozen=True)
class Use:
    """What a server's process uses while no handler runs."""

    threads: int
    descriptors: int
    memory: int


class EchoProcess:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid
        self.address = ("127.0.0.1", int(self._read_line()))

    def ask_use(self) -> Use:
        """Return what the process uses once its handlers have ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("use\n")
        self._process.stdin.flush()
        return Use(**json.loads(self._read_line()))

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def serving(module: str, server: str = "ThreadingTCPServer") -> Iterator[EchoProcess]:
    command = [sys.executable, "-c", SERVER, module, server]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield EchoProcess(process)
        finally:
            process.terminate()


def exchange(server: EchoProcess, connections: int) -> None:
    """Have a line echoed on each of many connections, of which 20 are open at once."""
    # With several addresses, ports in TIME_WAIT never run out, however often this runs.
    sources = cycle((f"127.0.0.{host}", 0) for host in range(1, 51))
    for _ in range(0, connections, 20):
        with ExitStack() as batch:
            clients = [
                batch.enter_context(
                    socket.create_connection(server.address, source_address=next(sources))
                )
                for _ in range(20)
            ]
            for client in clients:
                client.sendall(b"are you there?\n")
            for client in clients:
                with client.makefile("rb") as reply:
                    assert reply.read() == b"are you there?\n"


@needs_proc
@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "TCPServer"])
def test_ten_thousand_connections_leave_nothing_behind(kind: str) -> None:
    """Threads and descriptors are what they were; memory settles within the first 2,000."""
    with serving("portico", kind) as server:
        exchange(server, 2_000)
        early = server.ask_use()
        exchange(server, 8_000)
        late = server.ask_use()
    assert (late.threads, late.descriptors) == (early.threads, early.descriptors)
    assert late.memory - early.memory <= 2 * 1024 * 1024


def activity(pid: int) -> dict[str, str]:
    """Return, for each thread of a process, what changes whenever it runs.

    A thread that returns from a system call uses the processor (the first figure of schedstat),
    and before it can wait in the next one it gives the processor up (a voluntary switch).
    """
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        switches = [line for line in (task / "status").read_text().splitlines() if "ctxt" in line]
        found[task.name] = " ".join([(task / "schedstat").read_text(), *switches])
    return found


def rests(server: EchoProcess, seconds: float) -> bool:
    """Say whether no thread of the server runs for a while."""
    before = activity(server.pid)
    time.sleep(seconds)
    return activity(server.pid) == before


@needs_proc
def test_an_idle_server_makes_no_system_call_for_ten_seconds() -> None:
    """Nothing in it polls.  The standard library's server, beside it, is seen to wake."""
    with serving("portico") as ours, serving("socketserver") as theirs:
        for server in (ours, theirs):
            exchange(server, 20)
            server.ask_use()
        assert not rests(theirs, seconds=2)
        # Again, should a thread have been on its way to its wait when the first began, or should
        # somebody have stopped the whole process for a moment.
        assert any(rests(ours, seconds=10) for _ in range(5))
        exchange(ours, 20)


class Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"here")


def time_shutdown(module: ModuleType) -> float:
    """Return the seconds that `shutdown` takes while the server waits for a connection."""
    with module.TCPServer(("127.0.0.1", 0), Answer) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        with socket.create_connection(server.server_address) as client:
            assert client.recv(4) == b"here"
            assert client.recv(1) == b""  # the server is on its way to the next wait
        began = time.perf_counter()
        server.shutdown()
        taken = time.perf_counter() - began
        serving.join()
    return taken


def test_shutdown_of_an_idle_server_takes_less_than_5_ms() -> None:
    """At the median; the standard library's takes up to its poll interval, half a second.

    A machine that has other things to do can delay a whole row of runs, so the best of several
    rows counts; what the server itself adds is in all of them.
    """
    theirs = median(time_shutdown(socketserver) for _ in range(3))
    rows: list[float] = []
    while not rows or (rows[-1] >= 0.005 and len(rows) < 20):
        rows.append(median(time_shutdown(portico) for _ in range(21)))
    ours = rows[-1]
    print(f"shutdown: {ours * 1e3:.3f} ms, the standard library's {theirs * 1e3:.0f} ms")
    assert ours < 0.005
    assert ours < theirs / 10
