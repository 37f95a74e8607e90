"""A server that drains on SIGTERM, under load: nobody who was connected is lost.

Every round is a server in a process of its own, forked from this program, which is warm.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.scenarios.served import ENGINES
from tests.support import run_program

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ROUNDS = {"threads": 100, "pool": 30, "green": 30, "forks": 30, "serial": 30}

AT_ONCE = 10
"""Rounds that one program plays, which has to come to its end in time."""

PROGRAM = """
import json, os, random, select, signal, socket, sys, threading, time
import portico
from portico.traffic import STILLNESS
from tests.scenarios.served import ENGINES
from tests.support import PATIENCE

CLIENTS = 8
LINE = b"answer this\\n"
ANSWER = LINE * 2000  # more than one segment


class Handler(portico.StreamRequestHandler):
    def handle(self):
        for _ in self.rfile:
            self.wfile.write(ANSWER)
            return


def serve(engine, writer):
    bases = (*ENGINES[engine], portico.TCPServer)
    with type("Server", bases, {})(("127.0.0.1", 0), Handler) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.drain(PATIENCE))
        os.write(writer, b"%d\\n" % server.server_address[1])
        server.serve_forever()
        report = server.drain_report
        assert report is not None, "it did not drain"
        assert report.forced == 0, report


class Load:
    def __init__(self, port):
        self.address = ("127.0.0.1", port)
        self.visits = []  # when begun, connected and asked; what became of it
        self.is_over = threading.Event()
        self.begun = threading.Semaphore(0)
        self.threads = [threading.Thread(target=self.run) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.is_over.is_set():
            connected = asked = float("inf")
            began = time.monotonic()
            try:
                with socket.create_connection(self.address, PATIENCE) as client:
                    connected = time.monotonic()
                    client.sendall(LINE)
                    asked = time.monotonic()
                    answer = b"".join(iter(lambda: client.recv(1 << 20), b""))
                    outcome = "answered" if answer == ANSWER else f"{len(answer)} bytes"
            except OSError as error:
                outcome = type(error).__name__
            self.visits.append((began, connected, asked, outcome))
            self.begun.release()
            if outcome != "answered":
                break

    def join(self):
        self.is_over.set()
        for thread in self.threads:
            thread.join()


def play(engine, generator):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            signal.alarm(int(PATIENCE))
            serve(engine, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    port = int(os.read(reader, 16) or b"0")
    os.close(reader)
    load = Load(port)
    for _ in range(2 * CLIENTS):
        load.begun.acquire()
    time.sleep(generator.uniform(0, 0.02))  # so that the signal meets it anywhere
    signalled = time.monotonic()
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    load.join()
    if status:
        print(load.visits[-CLIENTS:], file=sys.stderr)
    assert status == 0, status
    # Who connects and then says nothing for a while is idle, however good its intentions.  The
    # client itself may hear late that it is connected.
    counted = [
        outcome
        for began, connected, asked, outcome in load.visits
        if connected < signalled and asked - began < STILLNESS
    ]
    late = sum(asked > signalled - 0.01 and connected < signalled
               for _, connected, asked, _ in load.visits)
    return counted, late


generator = random.Random(int(sys.argv[3]))
total = {"visits": 0, "late": 0, "lost": []}
for number in range(int(sys.argv[2])):
    counted, late = play(sys.argv[1], generator)
    total["visits"] += len(counted)
    total["late"] += late
    total["lost"] += [f"round {number}: {it}" for it in counted if it != "answered"]
print(json.dumps(total))
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sigterm_under_load_loses_nobody_who_was_connected(engine: str) -> None:
    """Eight clients connect again and again; the signal comes at any moment.

    Who is in the backlog then is served as well; whose connection came later may be refused.  That
    every answer brings the next client must not keep the drain from its end.
    """
    rounds = ROUNDS[engine]
    total: dict[str, Any] = {"visits": 0, "late": 0, "lost": []}
    for seed in range(0, rounds, AT_ONCE):
        done = run_program(PROGRAM, engine, str(AT_ONCE), str(seed))
        assert done.returncode == 0, done.stderr
        for name, more in json.loads(done.stdout).items():
            total[name] += more
    print(
        f"{engine}: {rounds} signals, {total['visits']} clients before them, "
        f"{total['late']} of them in the last 10 ms"
    )
    assert total["lost"] == []
    assert total["visits"] >= rounds
