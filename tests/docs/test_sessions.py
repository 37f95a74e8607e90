"""What the documentation shows of a terminal is what a reader sees there.

A file ``*.console`` holds commands after ``$`` and what they print.  In that of a server, a blank
line is where a second terminal does something, and ``^C`` is where the reader stops it; without
one, nothing is shown of its end.  A line ``...`` stands for any number of lines.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from .conftest import PORT, SNIPPETS, WAIT

SESSIONS = SNIPPETS / "sessions"

ANY_PORT = "0"
"""What stands for the port until the server has said which one it has."""

VARYING = {
    "2026-11-22 12:00:00,000": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}",
    "after 12.3 s": r"after \d+\.\d s",
    "drains: 0 open": r"drains: \d+ open",
    # A client that has just ended may still be open.
    "drained in 0.0 s: 0 finished, 0 idle": (r"drained in \d+\.\d s: \d+ finished, \d+ idle"),
    ", 0 forced": r", 0 forced(?:; the longest took \d+\.\d s)?",
    "12:00:00": r"\d\d:\d\d:\d\d",
    "50000": r"\d+",
}
"""What is different each time, as the files write it, and what may stand there."""


class Terminal:
    """Runs commands in the folder of the snippets, on ports that the system chooses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = ANY_PORT

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command; its two outputs come as one, as on a terminal."""
        programs = {"python": [sys.executable], "portico": [sys.executable, "-m", "portico"]}
        name, *arguments = shlex.split(self._here(command))
        return subprocess.Popen(
            [*programs[name], *arguments],
            cwd=SNIPPETS,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def expect(self, output: IO[str], lines: list[str]) -> None:
        """Read the next lines of an output, which are to be these; learns the port from them."""
        anything = False
        for line in lines:
            if line == "...":
                anything = True
                continue
            read = output.readline()
            while anything and read and not self._matches(line, read):
                read = output.readline()
            assert self._matches(line, read), f"expected {line!r}, read {read!r}"
            anything = False
        if anything:
            output.read()

    def run(self, command: str, lines: list[str]) -> None:
        """Run a command to its end; it prints these lines and nothing else."""
        process = self.start(command)
        with overseen(process) as output:
            self.expect(output, lines)
            assert output.read() == ""

    def _here(self, text: str) -> str:
        return text.replace(PORT, self.port).replace("/tmp/", f"{self.folder}/")

    def _matches(self, line: str, read: str) -> bool:
        pattern = re.escape(line.replace("/tmp/", f"{self.folder}/"))
        for shown, varying in VARYING.items():
            pattern = pattern.replace(re.escape(shown), varying)
        port = r"\d+" if self.port == ANY_PORT else self.port
        pattern = pattern.replace(PORT, f"({port})", 1).replace(PORT, port)
        match = re.fullmatch(pattern, read.rstrip("\n"))
        if match and match.groups():
            self.port = match[1]
        return match is not None


@contextmanager
def overseen(process: subprocess.Popen[str]) -> Iterator[IO[str]]:
    """Give the output of a process, which is killed if it is still there in the end."""
    assert process.stdout is not None
    try:
        with process.stdout as output:
            yield output
            process.wait(WAIT)
    finally:
        process.kill()
        process.wait()


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a session, each with the lines that follow it."""
    for part in (SESSIONS / name).read_text().split("$ ")[1:]:
        command, *lines = part.rstrip("\n").split("\n")
        yield command, lines


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ("serve.console", "ask.console"),
        ("greet.console", "greeted.console"),
        ("several.console", "ask.console"),
        ("run-module.console", None),
        ("run-program.console", "time.console"),
    ],
)
def test_a_server_and_its_client(terminal: Terminal, server: str, client: str | None) -> None:
    ((command, lines),) = commands(server)
    stopped = lines.index("^C") if "^C" in lines else len(lines)
    middle = lines.index("") if "" in lines else stopped
    process = terminal.start(command)
    with overseen(process) as output:
        terminal.expect(output, lines[:middle])
        for asking, answer in commands(client) if client else ():
            terminal.run(asking, answer)
        terminal.expect(output, lines[middle + 1 : stopped])
        if stopped == len(lines):
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
            terminal.expect(output, lines[stopped + 1 :])
            assert output.read() == ""


@pytest.mark.parametrize("session", ["refused.console", "check.console"])
def test_commands_that_end_by_themselves(terminal: Terminal, session: str) -> None:
    for command, lines in commands(session):
        terminal.run(command, lines)
