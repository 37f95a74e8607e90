"""A program in a process of its own that serves what a test says, with workers or without.

The program is the test's to exchange while it runs: its handler is a file, and so are its settings.
What it says on the console comes line by line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from portico import program, signals
from portico.address import parse
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.errors import PorticoError
from portico.settings import Settings
from tests.support import PATIENCE, ROOT, Client, goodbye

ECHO = """
import os
import portico

class Echo(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"who\\n":
                line = b"%d\\n" % os.getpid()
            elif line == b"slow\\n":
                portico.sleep(0.7)
            elif line == b"loop\\n":
                while True:
                    pass  # without end
            self.wfile.write(VERSION + line)

VERSION = b""
"""
"""A handler that echoes lines, takes its time, says who it is, and loops without end if it is asked
to."""

Read = Mapping[str, Any]


# --- in the process of the program --------------------------------------------------------


def main() -> None:
    """Serve what the file says that the command line names."""
    path = Path(sys.argv[1])
    signals.SAME_WISH = json.loads(path.read_text())["same_wish"]  # type: ignore[misc]  # a test's

    def load() -> Configuration:
        told = json.loads(path.read_text())
        return Configuration(
            process=ProcessSettings(**told["process"]),
            services=tuple(
                ServiceSettings(
                    name="test",
                    target=each["target"],
                    addresses=tuple(map(parse, each["addresses"])),
                    settings=Settings(**each["settings"]),
                )
                for each in told["services"]
            ),
        )

    try:
        program.run(load)
    except PorticoError as error:
        sys.stderr.write(f"portico: error: {error}\n")
        sys.exit(2)


# --- in the process of the test ------------------------------------------------------------


class Supervised:
    """The program, as a test sees it."""

    def __init__(self, folder: Path, told: Read) -> None:
        self.folder = folder
        self.told = dict(told)
        self.write()
        self._lines: list[str] = []
        self._has_ended = False
        self._changed = threading.Condition()  # guards the two above
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "tests.supervised",
                str(folder / "settings.json"),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    # --- what it is told -------------------------------------------------------------------

    def write(self, source: str | None = None, **changes: Any) -> None:
        """Write its handler, or its settings, anew."""
        if source is not None:
            (self.folder / "app.py").write_text(source)
        self.told |= changes
        (self.folder / "settings.json").write_text(json.dumps(self.told))

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    # --- what it says ----------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        with self._changed:
            return list(self._lines)

    def find(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in self.lines if (found := re.search(pattern, line))]

    def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until a line has come so many times; return the last of them."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: len(self._find_here(pattern)) >= times or self._has_ended, PATIENCE
            )
            found = self._find_here(pattern)
            assert is_there, f"no {pattern!r} in:\n{self._told_here()}"
            assert len(found) >= times, f"no {pattern!r} in:\n{self._told_here()}"
            return found[times - 1]

    def _find_here(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in self._lines if (found := re.search(pattern, line))]

    def _told_here(self) -> str:
        return "\n".join(self._lines)

    def wait_ready(self, workers: int, times: int = 1) -> None:
        """Wait until it serves, and so many workers have begun."""
        self.wait_for(r"ready on", times)
        if workers:
            self.wait_for(r"worker \d+ \(process \d+\) is ready", workers)

    def workers(self) -> list[int]:
        """Return the processes that have said that they are ready and not that they ended."""
        began = [int(each[1]) for each in self.find(r"\(process (\d+)\) is ready")]
        ended = r"\(process (\d+)\) (?:has ended|exited|was killed)"
        gone = {int(each[1]) for each in self.find(ended)}
        return [each for each in began if each not in gone]

    # --- clients ---------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self.wait_for(r"ready on tcp://127.0.0.1:(\d+)")[1])

    def connect(self) -> socket.socket:
        client = Client(socket.AF_INET, socket.SOCK_STREAM)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, question: bytes = b"hello\n") -> bytes:
        """Return the answer, or what there is of it when the connection is closed.

        A worker that drains closes those that are silent, and so seems a client that is held up
        between connecting and asking.
        """
        with self.connect() as client:
            with suppress(OSError):  # it is closed already
                client.sendall(question)
                client.shutdown(socket.SHUT_WR)
            return goodbye(client)

    # --- its end ---------------------------------------------------------------------------

    def wait_ended(self) -> int:
        """Wait until its first process has ended, and return with which status."""
        return self._process.wait(PATIENCE)

    def wait_silent(self) -> None:
        """Wait until every process of it has ended, since all of them have the console."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._has_ended, PATIENCE), self._told_here()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop it, and wait until nothing is left of it."""
        self.send(number)
        self.wait_silent()

    def kill(self) -> None:
        """End whatever is left of it: its processes are a session of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def supervised(
    folder: Path,
    source: str = ECHO,
    *,
    workers: int | None = 2,
    engine: str = "threads",
    addresses: tuple[str, ...] = ("tcp://127.0.0.1:0",),
    settings: Read | None = None,
    same_wish: float = signals.SAME_WISH,
    **process: Any,
) -> Iterator[Supervised]:
    """Run the program while a block runs.

    Args:
        folder: Where its files are.
        source: Its handler, called ``Echo``.
        workers: How many; ``None`` to serve in the very process.
        engine: What runs the handlers.
        addresses: Where it serves.
        settings: More of them, for the service.
        same_wish: Seconds within which two signals are one.
        process: More of them, for the processes.
    """
    (folder / "app.py").write_text(source)
    service = {
        "target": f"{folder}/app.py:Echo",
        "addresses": addresses,
        "settings": {"engine": engine, **(settings or {})},
    }
    process = {"workers": workers, "log_level": "warning", **process}
    told = {"process": process, "services": [service], "same_wish": same_wish}
    running = Supervised(folder, told)
    try:
        yield running
    finally:
        running.kill()


if __name__ == "__main__":
    main()
