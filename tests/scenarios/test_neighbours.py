"""What the clients of one green server may cost each other: a flood, and a handler that blocks.

A machine that has other things to do can delay anybody, so the best of several rounds counts; what
the server itself adds is in all of them.
"""

from __future__ import annotations

import math
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from portico import DatagramRequestHandler, GreenTCPServer, GreenUDPServer, StreamRequestHandler
from portico.events import HandlerStalled
from tests.support import PATIENCE, RunningServer, eventually, recorded, running_program

pytestmark = pytest.mark.long


@pytest.fixture(params=["epoll", "portable"])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The poller of the server, each in turn."""
    monkeypatch.setenv("PORTICO_POLLER", "" if request.param == "epoll" else request.param)
    return str(request.param)


def time_answer(client: socket.socket, question: bytes = b'"are you there?"\n') -> float:
    """Return the seconds that an echo takes."""
    began = time.perf_counter()
    client.sendall(question)
    answer = b""
    while len(answer) < len(question):
        data = client.recv(len(question))
        assert data, "the server has ended the connection"
        answer += data
    taken = time.perf_counter() - began
    assert answer == question
    return taken


# --- a client that never stops ----------------------------------------------------------

FLOODED = 0.020
"""Seconds that an answer may take while another client never stops sending."""

ROUNDS = 20
"""Rounds at most; the first that is within the limit is enough."""

QUESTIONS = 40
"""Questions in a round, of which the median counts."""

PAUSE = 0.01
"""Seconds before each question, so that it comes at any point of what the flood keeps busy."""

SERVER = """
import contextlib, json, sys, threading
import portico

class Echo(portico.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)

class LineEcho(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)

class AnswerQuestions(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b'"are you there?"\\n':
                self.wfile.write(line)

class Parse(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(json.dumps(json.loads(line)).encode() + b"\\n")

class Coroutine(portico.AsyncStreamRequestHandler):
    async def handle(self):
        with contextlib.suppress(ConnectionError):  # the flood ends in the middle of it
            async for line in self.reader:
                self.writer.write(line)
                await self.writer.drain()

class DatagramEcho(portico.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet)

handler = globals()[sys.argv[1]]
kind = portico.GreenUDPServer if handler is DatagramEcho else portico.GreenTCPServer
with kind(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()  # until the test has seen enough
    server.shutdown()
"""

FLOOD = """
import itertools, selectors, socket, sys, time

address = "127.0.0.1", int(sys.argv[1])
block = sys.argv[2].encode().decode("unicode_escape").encode()
end = time.monotonic() + float(sys.argv[3])  # should nobody stop it
block *= 65536 // len(block)
sent = received = 0

with socket.create_connection(address) as peer, selectors.DefaultSelector() as selector:
    peer.setblocking(False)
    selector.register(peer, selectors.EVENT_READ | selectors.EVENT_WRITE)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while time.monotonic() < end:
        for key, events in selector.select():
            if key.fileobj is sys.stdin:  # a line asks how much has been sent, in bytes
                if not sys.stdin.readline():
                    sys.exit()
                print(sent, flush=True)
                continue
            if events & selectors.EVENT_READ:
                received += len(peer.recv(1 << 20))
            if events & selectors.EVENT_WRITE:
                sent += peer.send(block[sent % len(block):])
"""

DATAGRAM_FLOOD = """
import select, socket, sys, time

end = time.monotonic() + float(sys.argv[3])  # should nobody stop it
datagram = sys.argv[2].encode()
sent = 0

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.connect(("127.0.0.1", int(sys.argv[1])))
    while time.monotonic() < end:
        if select.select([sys.stdin], [], [], 0)[0]:  # a line asks how many have been sent
            if not sys.stdin.readline():
                sys.exit()
            print(sent, flush=True)
        for _ in range(1000):
            peer.send(datagram)
            sent += 1
"""


def told(process: subprocess.Popen[str], question: str = "") -> int:
    """Return the number that a program says, if need be because it is asked."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question)
    process.stdin.flush()
    return int(process.stdout.readline())


def answers_datagrams(port: int) -> bool:
    """Say whether a datagram is answered, unless the server's queue was full."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect(("127.0.0.1", port))
        client.send(b"last")
        try:
            return client.recv(64) == b"last"
        except TimeoutError:
            return False


@contextmanager
def flooded(handler: str, flood: str, block: str) -> Iterator[tuple[str, int]]:
    """Serve in one process, and flood from another, all the time; give the server's address."""
    with running_program(SERVER, handler) as server:
        port = told(server)
        with running_program(flood, str(port), block, str(PATIENCE)) as flooding:
            eventually(lambda: told(flooding, "?\n"), "the flood is under way")
            before = told(flooding, "?\n")
            yield "127.0.0.1", port
            eventually(lambda: told(flooding, "?\n") > before, "the flood goes on")
            flooding.kill()
            flooding.wait()
        if flood is DATAGRAM_FLOOD:  # what is queued before would find the server's socket closed
            eventually(lambda: answers_datagrams(port), "the queue is served")
        _, errors = server.communicate(timeout=PATIENCE)
        assert errors == ""
        assert server.returncode == 0


def converse(client: socket.socket) -> float:
    """Return the median of the seconds that an echo takes."""
    taken = []
    for _ in range(QUESTIONS):
        time.sleep(PAUSE)
        taken.append(time_answer(client))
    print(f"median {median(taken) * 1e3:.2f} ms, at most {max(taken) * 1e3:.2f} ms")
    return median(taken)


def best_of_rounds(measure: Callable[[], float], limit: float) -> float:
    """Measure again until it is within a limit; return the best."""
    best = math.inf
    for _ in range(ROUNDS):
        best = min(best, measure())
        if best <= limit:
            break
    return best


@pytest.mark.parametrize(
    ("handler", "block"),
    [
        pytest.param("Echo", "x", id="blocks"),
        pytest.param("LineEcho", r"small\n", id="lines"),
        pytest.param("LineEcho", r"\n", id="empty lines"),
        pytest.param("Parse", r"1\n", id="lines that take some work"),
        pytest.param("Coroutine", r"small\n", id="lines for a coroutine"),
        pytest.param("AnswerQuestions", r"no question\n", id="lines that nobody answers"),
    ],
)
def test_a_client_that_never_stops_sending_delays_no_other(
    poller: str, handler: str, block: str
) -> None:
    with flooded(handler, FLOOD, block) as address:
        with socket.create_connection(address, PATIENCE) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            best = best_of_rounds(lambda: converse(client), FLOODED)
    print(f"{poller}: an answer beside a flood takes {best * 1e3:.2f} ms")
    assert best <= FLOODED


def converse_by_datagrams(client: socket.socket) -> float:
    """Return the median of the seconds that an echo takes, if it comes.

    The kernel drops what finds the server's queue full, from this client as from the other, so a
    question may get no answer.  One that comes late is counted, too.
    """
    asked: list[float] = []
    taken: list[float] = []
    client.settimeout(FLOODED)
    deadline = time.monotonic() + PATIENCE
    while len(taken) < QUESTIONS:
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(PAUSE)
        client.send(b"%d" % len(asked))
        asked.append(time.perf_counter())
        try:
            number = int(client.recv(64))
        except TimeoutError:
            continue
        taken.append(time.perf_counter() - asked[number])
    print(f"median {median(taken) * 1e3:.2f} ms, at most {max(taken) * 1e3:.2f} ms")
    print(f"{len(asked)} questions had {len(taken)} answers")
    return median(taken)


def test_a_sender_of_datagrams_that_never_stops_delays_no_other(poller: str) -> None:
    """What the kernel lets through is answered at once."""
    with flooded("DatagramEcho", DATAGRAM_FLOOD, "x" * 64) as address:

        def measure() -> float:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect(address)
                return converse_by_datagrams(client)

        best = best_of_rounds(measure, FLOODED)
    print(f"{poller}: an answer beside a flood of datagrams takes {best * 1e3:.2f} ms")
    assert best <= FLOODED


# --- a handler that blocks --------------------------------------------------------------

SLEEP = 1.0
"""Seconds that a handler holds its hub."""

MEANWHILE = 0.050
"""Seconds that an answer to anybody else may take meanwhile."""


class Sleepy(StreamRequestHandler):
    """Send each line back; sleep before, at ``sleep``, in a way that holds the hub."""

    def handle(self) -> None:
        for line in self.rfile:
            self.server.sleep_at(line)
            self.wfile.write(line)


class SleepyDatagram(DatagramRequestHandler):
    """Send the datagram back; sleep as `Sleepy`."""

    def handle(self) -> None:
        self.server.sleep_at(self.packet)
        self.wfile.write(self.packet)


class SleepMixIn:
    """A server with four hubs, whose handlers sleep."""

    max_hubs = 4

    longest = SLEEP
    """Seconds that a handler sleeps, unless it is woken."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asleep = threading.Semaphore(0)
        """Released by each handler that is about to sleep."""
        self.alarm = threading.Lock()
        """Released to wake a handler up."""
        self.alarm.acquire()

    def sleep_at(self, line: bytes) -> None:
        if line == b"sleep\n":
            self.asleep.release()
            self.alarm.acquire(timeout=self.longest)  # this is the line that holds the hub


class SleepyTCPServer(SleepMixIn, GreenTCPServer):
    pass


class SleepyUDPServer(SleepMixIn, GreenUDPServer):
    pass


Echo = RunningServer[Any]


@contextmanager
def serving(kind: str = "tcp") -> Iterator[Echo]:
    server = SleepyTCPServer if kind == "tcp" else SleepyUDPServer
    handler = Sleepy if kind == "tcp" else SleepyDatagram
    with RunningServer(server(("127.0.0.1", 0), handler)) as running:
        yield running


class Sleeper:
    """A client whose handler sleeps."""

    def __init__(self, echo: Echo) -> None:
        self._client = echo.connect()
        self._asleep = echo.server.asleep

    def fall_asleep(self) -> None:
        """Have the handler hold its hub; returns when it is about to."""
        self._client.sendall(b"sleep\n")
        assert self._asleep.acquire(timeout=PATIENCE)

    def is_asleep(self) -> bool:
        """Say whether the answer, which follows the sleep, has not come."""
        return not select.select([self._client], [], [], 0)[0]

    def wake_up(self) -> None:
        """Wait for the end of the sleep."""
        assert self._client.recv(64) == b"sleep\n"

    def close(self) -> None:
        self._client.close()


def time_visit(echo: Echo) -> float:
    """Return the seconds from the connecting of a client to its answer."""
    began = time.perf_counter()
    with echo.connect() as client:
        time_answer(client)
    return time.perf_counter() - began


def slowest(sleepers: list[Sleeper], measure: Callable[[], float]) -> float:
    """Measure while all are asleep; return the longest time."""
    taken = [measure()]
    while all(sleeper.is_asleep() for sleeper in sleepers):
        taken.append(measure())
        time.sleep(PAUSE)
    print(f"meanwhile: median {median(taken) * 1e3:.2f} ms, at most {max(taken) * 1e3:.2f} ms")
    return max(taken)


def test_a_handler_that_sleeps_is_named_by_file_and_line() -> None:
    with recorded(HandlerStalled) as stalls, serving() as echo, closing(Sleeper(echo)) as sleeper:
        echo.server.longest = PATIENCE
        sleeper.fall_asleep()
        eventually(lambda: stalls, "the watchdog tells")
        assert sleeper.is_asleep()
        echo.server.alarm.release()
        sleeper.wake_up()
    path, _, number = stalls[0].place.rpartition(":")
    assert path == __file__
    assert "this is the line" in Path(path).read_text().splitlines()[int(number) - 1]
    assert stalls[0].handler == "Sleepy"


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_who_comes_while_a_handler_sleeps_is_answered(poller: str, kind: str) -> None:
    """At any moment of the sleep: before another hub is there, and after."""

    def measure() -> float:
        with serving(kind) as echo, closing(Sleeper(echo)) as sleeper:
            sleeper.fall_asleep()
            return slowest([sleeper], lambda: time_visit(echo))

    assert best_of_rounds(measure, MEANWHILE) <= MEANWHILE, poller


def test_who_is_connected_to_another_hub_is_answered_while_a_handler_sleeps() -> None:
    """The other hub has been there since an earlier sleep, in which it accepted the client."""

    def measure() -> float:
        with serving() as echo, closing(Sleeper(echo)) as sleeper:
            sleeper.fall_asleep()
            with echo.connect() as client:
                time_answer(client)
                sleeper.wake_up()
                sleeper.fall_asleep()
                return slowest([sleeper], lambda: time_answer(client))

    assert best_of_rounds(measure, MEANWHILE) <= MEANWHILE


def test_the_last_of_four_hubs_answers_while_three_are_held() -> None:
    def measure() -> float:
        with serving() as echo, ExitStack() as stack:
            sleepers = []
            for _ in range(3):
                # It connects while all others are held, so another hub accepts it.
                sleepers.append(stack.enter_context(closing(Sleeper(echo))))
                sleepers[-1].fall_asleep()
            return slowest(sleepers, lambda: time_visit(echo))

    assert best_of_rounds(measure, MEANWHILE) <= MEANWHILE
