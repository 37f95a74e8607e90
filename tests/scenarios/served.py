"""A server in a process of its own, so that what it uses and how it ends can be measured.

Owns that process: which engine and settings it has, what its handlers do, and the commands by
which a scenario asks it.  One line in, one line of JSON out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import portico
from portico import StreamRequestHandler, TCPServer, events
from tests.support import PATIENCE, running_program

ENGINES: dict[str, tuple[type, ...]] = {
    "threads": (portico.ThreadingMixIn,),
    "pool": (portico.ThreadPoolMixIn,),
    "green": (portico.GreenMixIn,),
    "forks": (portico.ForkingMixIn,),
    "serial": (),
}

CONCURRENT = ("threads", "pool", "green")
"""The engines on which connections are served side by side, in one process."""

CHUNK = b"x" * 65536


# --- in the process of the server -------------------------------------------------------


class Census:
    """How many handlers run, in this process and in those that were forked from it."""

    def __init__(self) -> None:
        self._running = multiprocessing.Value("i", 0)
        self.peak = multiprocessing.Value("i", 0)
        self.peak_active = 0
        """Of the places that are taken, as the server itself counts them."""

    def enter(self, server: TCPServer) -> None:
        with self._running.get_lock():
            self._running.value += 1
            self.peak.value = max(self.peak.value, self._running.value)
        gate = server._guard.gate
        if gate is not None:
            self.peak_active = max(self.peak_active, gate.active)

    def leave(self) -> None:
        with self._running.get_lock():
            self._running.value -= 1


class Talker(StreamRequestHandler):
    """Do what each line asks for, until a drain begins.

    ``give N`` is answered with N bytes, ``take N`` with a word after N more bytes have come, and
    any other line with itself.  A client is greeted first if the server is told to.
    """

    census: ClassVar[Census | None] = None
    greeting: ClassVar[bytes] = b""
    send_buffer: ClassVar[int] = 0

    def setup(self) -> None:
        if self.census is not None:
            self.census.enter(self.server)
        if self.send_buffer:
            self.request.setsockopt(1, 7, self.send_buffer)  # SO_SNDBUF
        super().setup()

    def finish(self) -> None:
        if self.census is not None:
            self.census.leave()
        super().finish()

    def handle(self) -> None:
        if self.greeting:
            self.wfile.write(self.greeting)
            self.wfile.flush()
        for line in self.rfile:
            self.answer(line)
            if self.server.draining.is_set():
                return

    def answer(self, line: bytes) -> None:
        word, _, number = line.partition(b" ")
        if word == b"take":
            size = int(number)
            if len(self.rfile.read(size)) == size:
                self.wfile.write(b"taken\n")
        elif word == b"give":
            for _ in range(int(number) // len(CHUNK)):
                self.wfile.write(CHUNK)
        else:
            self.wfile.write(line)


class Commands:
    """What a scenario may ask a server."""

    def __init__(self, server: TCPServer, census: Census) -> None:
        self._server = server
        self._census = census
        self._seen: list[dict[str, Any]] = []
        events.subscribe(
            self._note,
            *(events.AcceptPaused, events.AcceptResumed),
            *(events.DeadlineExpired, events.ConnectionRefused),
        )

    def _note(self, event: events.Event) -> None:
        self._seen.append(
            {
                "kind": type(event).__name__,
                "deadline": str(getattr(event, "deadline", "")),
                "duration": getattr(event, "duration", 0.0),
                "reason": str(getattr(event, "reason", "")),
            }
        )

    def processor(self) -> float:
        """Say how many seconds of processor time the process has used."""
        return time.process_time()

    def seen(self) -> list[dict[str, Any]]:
        """Tell the events."""
        return list(self._seen)

    def census(self) -> dict[str, int]:
        """Say how many handlers, and places, there were at once."""
        gate = self._server._guard.gate
        return {
            "handlers": self._census.peak.value,
            "places": self._census.peak_active,
            "active": 0 if gate is None else gate.active,
        }

    def drain(self, timeout: str) -> dict[str, Any]:
        """Drain, and tell the report; when it begins, that is told first."""
        print(json.dumps({"began": time.monotonic()}), flush=True)
        report = self._server.drain(float(timeout))
        assert report is not None
        return asdict(report)


def main() -> None:
    """Serve as the command line says, until the standard input ends."""
    engine, settings = sys.argv[1], json.loads(sys.argv[2])
    census = Census()
    handler = type(
        "Handler",
        (Talker,),
        {
            "census": census,
            "greeting": settings.pop("greeting", "").encode(),
            "send_buffer": settings.pop("send_buffer", 0),
        },
    )
    if "farewell" in settings:
        settings["farewell"] = settings["farewell"].encode()
    server_class: Any = type("Server", (*ENGINES[engine], TCPServer), settings)
    with server_class(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        print(json.dumps(server.server_address[1]), flush=True)
        commands = Commands(server, census)
        for line in sys.stdin:
            name, *arguments = line.split()
            try:
                print(json.dumps(getattr(commands, name)(*arguments)), flush=True)
            except BaseException:  # handlers may be under way, for which closing would wait
                traceback.print_exc()
                os._exit(1)
        server.shutdown()
        serving.join()


# --- in the process of the test ---------------------------------------------------------


class Served:
    """A server in another process, as a scenario sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = ("127.0.0.1", self.hear())

    def memory(self) -> int:
        """Return the process's own share of the memory that it uses, in bytes."""
        smaps = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        pss = next(line for line in smaps.splitlines() if line.startswith("Pss:"))
        return 1024 * int(pss.split()[1])

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(self._process.communicate()[1])
        return json.loads(line)

    def ask(self, command: str) -> Any:
        self.say(command)
        return self.hear()

    def seen(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind, in the order in which they came."""
        return [event for event in self.ask("seen") if event["kind"] == kind]

    def end(self) -> str:
        """Stop the server, wait for its handlers, and return what it has reported."""
        _, errors = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, errors
        return errors


@contextmanager
def served(engine: str, before: str = "", **settings: object) -> Iterator[Served]:
    """Serve in a process of its own while a block runs.

    Args:
        engine: One of `ENGINES`.
        before: What the program does first.
        settings: Attributes of the server class, and those of the handler.
    """
    program = f"{before}\nfrom tests.scenarios.served import main\nmain()"
    with running_program(program, engine, json.dumps(settings)) as process:
        yield Served(process)
