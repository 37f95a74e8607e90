"""Workers that are reloaded, handed over and killed under a load: who is lost, and who is counted.

The load is constant: short connections, one question each, and long ones, of which an answer takes
longer than the time between two signals.  ``PORTICO_SECONDS=60 PORTICO_SUCCESSORS=10`` runs it at
the length that the promise names; by default it is shorter.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from portico.traffic import STILLNESS
from tests.supervised import Supervised, supervised
from tests.support import PATIENCE, Client, received

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

SECONDS = int(os.environ.get("PORTICO_SECONDS", "10"))
"""How long there is a signal every second."""

SUCCESSORS = int(os.environ.get("PORTICO_SUCCESSORS", "3"))
"""How often another supervisor takes over."""

SHORT_CLIENTS = 6
LONG_CLIENTS = 6

SOURCE = """
import os
import portico

class Echo(portico.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline()
        if line == b"loop\\n":
            while True:
                pass  # without end
        for number in range(15 if line == b"long\\n" else 1):
            if number:
                portico.sleep(0.1)
            self.wfile.write(line)
            self.wfile.flush()
"""

BROKEN = "nothing_of_this_name()\n"

LOST_SILENT = "lost, but silent for a while"
"""What becomes of one who is connected, but to whom this process does not come: idle, rightly."""

SHORT, LONG = b"short\n", b"long\n"
ANSWERS = {SHORT: SHORT, LONG: LONG * 15}


class Load:
    """Clients that connect, ask and connect again, until they are told to stop."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # guards the next four
        self.outcomes: Counter[str] = Counter()
        self.asked = self.sent = self.received = 0
        kinds = [SHORT] * SHORT_CLIENTS + [LONG] * LONG_CLIENTS
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def _run(self, question: bytes) -> None:
        while not self._is_over.wait(0.002):
            outcome = self._visit(question)
            with self._lock:
                self.outcomes[outcome] += 1

    def _visit(self, question: bytes) -> str:
        """Ask once, and say what became of it."""
        with Client(socket.AF_INET, socket.SOCK_STREAM) as client:
            try:
                # The question goes with the connection, in one call: a client that this process
                # does not come to says nothing, and after a while it is idle.
                client.setblocking(True)
                began = time.monotonic()
                client.sendto(question, socket.MSG_FASTOPEN, self._address)
                was_silent = time.monotonic() - began >= STILLNESS
                client.settimeout(PATIENCE)
            except OSError as error:
                return f"not connected: {type(error).__name__}"
            with self._lock:
                self.asked += 1
                self.sent += len(question)
            try:
                answer = received(client)
            except OSError as error:
                return LOST_SILENT if was_silent else f"lost: {type(error).__name__}"
        with self._lock:
            self.received += len(answer)
        if answer == ANSWERS[question]:
            return "answered"
        if was_silent and not answer:
            return LOST_SILENT
        return f"lost after {len(answer)} bytes"

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def wait_reloaded(program: Supervised) -> None:
    """Wait until no reload is under way, and none is to follow it.

    The answer to another signal tells that all earlier ones were seen: a reload that was asked for
    meanwhile begins in the same moment in which the one before it ends.
    """
    for times in itertools.count(1):
        program.send(signal.SIGUSR1)
        program.wait_for("has opened its log again", times)
        if len(program.find("^portico: reloads$")) == len(program.find("serves as reloaded")):
            return
        pause(0.1)


def counted(program: Supervised) -> dict[str, int]:
    """Return what the last supervisor has counted, by what it says at its end."""
    words = program.find("stopped after .* s: (.*)")[-1][1]
    return {name: int(number) for number, name in re.findall(r"(\d+) ([a-z]+)", words)}


def moved(program: Supervised) -> tuple[int, int]:
    """Return what came in and what was sent, in bytes, by the last words of the last supervisor."""
    found = program.find(r"^portico: tcp:.* (\d+) bytes received, (\d+) sent$")[-1]
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("engine", ["threads", "green", "pool"])
def test_reloads_and_successors_under_load_lose_nobody(tmp_path: Path, engine: str) -> None:
    """A signal every second, while answers take a second and a half."""
    with supervised(tmp_path, SOURCE, engine=engine) as program:
        program.wait_ready(2)
        load = Load(program.port)
        try:
            for number in range(SECONDS):
                program.send(signal.SIGHUP)
                pause(1)
                program.wait_for("serves as reloaded", max(1, number // 2))
            wait_reloaded(program)
            program.write(BROKEN)
            program.send(signal.SIGHUP)
            program.wait_for("cannot reload, and serves as before: .*NameError")
            program.write(SOURCE)
            for number in range(SUCCESSORS):
                program.send(signal.SIGUSR2)
                found = program.wait_for(r"leaves everything to process (\d+)", number + 1)
                program.pid = int(found[1])
                pause(0.5)
        finally:
            load.stop()
        program.stop()
        print(f"{engine}: {load.asked} clients, {dict(load.outcomes)}, counted {counted(program)}")
        # Nobody is refused, reset, or left without the whole of the answer, but for those to whom
        # this process did not come in time.
        idle = load.outcomes.pop(LOST_SILENT, 0)
        assert load.outcomes == {"answered": load.asked - idle}
        assert counted(program) == {"requests": load.asked}
        assert idle or moved(program) == (load.sent, load.received)
        assert len(program.find("serves as reloaded")) >= SECONDS // 2
        assert len(program.find("cannot reload")) == 1
        assert not program.find("is killed|is stuck")
        assert len(program.find("was killed|exited with")) <= 2  # what did not import


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_workers_that_are_killed_under_load_lose_what_they_had_and_nobody_in_the_queue(
    tmp_path: Path, engine: str
) -> None:
    """The counters tell what a worker had: it is as much as clients miss.

    A worker may be killed between accepting a client and counting it, and between the last byte of
    an answer and counting that: one for each kill, and for each client that it served.
    """
    chosen = random.Random(7)
    kills = 0
    with supervised(tmp_path, SOURCE, engine=engine) as program:
        program.wait_ready(2)
        load = Load(program.port)
        try:
            for _ in range(SECONDS):
                victims = program.workers()
                os.kill(chosen.choice(victims), signal.SIGKILL)
                kills += 1
                program.wait_for("was killed by SIGKILL", kills)
                program.wait_ready(2 + kills)
                pause(1)
        finally:
            load.stop()
        program.stop()
        told = counted(program)
        print(f"{engine}: {load.asked} clients, {dict(load.outcomes)}, counted {told}")
        lost = sum(count for how, count in load.outcomes.items() if how.startswith("lost"))
        assert not [how for how in load.outcomes if how.startswith("not connected")]
        assert abs(lost - told.get("lost", 0)) <= kills
        total = sum(told.get(name, 0) for name in ("requests", "lost", "cut", "refused"))
        assert 0 <= load.asked - total <= kills
        # What a worker has at once, and not what waits in the queue.
        assert lost <= kills * (SHORT_CLIENTS + LONG_CLIENTS)


def test_an_endless_loop_under_load_disturbs_nobody_but_its_neighbours(tmp_path: Path) -> None:
    """The connections of the same hub are lost with it; all others are served meanwhile."""
    with supervised(tmp_path, SOURCE, engine="green", worker_timeout=4.0) as program:
        program.wait_ready(2)
        load = Load(program.port)
        try:
            pause(1)
            with Client(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.connect(("127.0.0.1", program.port))
                client.sendall(b"loop\n")
                program.wait_for(r"worker \d \(process \d+\) is stuck; its threads are at:")
                answered = load.outcomes["answered"]
                program.wait_for("while True:|pass  # without end")
                program.wait_for("is killed: no sign of life for 4 s")
                program.wait_ready(3)
            pause(1)
        finally:
            load.stop()
        program.stop()
        print(f"{load.asked} clients, {dict(load.outcomes)}, counted {counted(program)}")
        lost = sum(count for how, count in load.outcomes.items() if how.startswith("lost"))
        assert lost <= SHORT_CLIENTS + LONG_CLIENTS
        assert answered > 0
        assert load.outcomes["answered"] > answered
        assert len(program.find("was killed")) == 1
