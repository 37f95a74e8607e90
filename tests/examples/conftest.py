"""The key-value server as a newcomer starts it, and Redis itself to compare it with."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.support import PATIENCE, ROOT, Client

LAST = b"*2\r\n$4\r\nECHO\r\n$13\r\nnothing more.\r\n"
"""A command that is sent after others, to see where their replies end."""

LAST_REPLY = b"$13\r\nnothing more.\r\n"


def tool(name: str) -> str:
    """The path of a real client or server.  Without it a test fails: it would show nothing."""
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed; CONTRIBUTING names what the tests need"
    return path


@dataclass(frozen=True)
class Answer:
    """What a server replied, and whether it then closed the connection."""

    replies: bytes
    closed: bool


@dataclass(frozen=True)
class Speaker:
    """A server that speaks Redis's protocol."""

    family: socket.AddressFamily
    address: tuple[str, int] | str

    @property
    def port(self) -> int:
        assert not isinstance(self.address, str)
        return self.address[1]

    def connect(self) -> socket.socket:
        client = Client(self.family, socket.SOCK_STREAM)
        client.connect(self.address)
        return client

    def answer(self, commands: bytes) -> Answer:
        """Send commands in one write, as a fresh client, and collect all replies."""
        with self.connect() as client:
            replies = b""
            try:
                client.sendall(commands + LAST)
                while not replies.endswith(LAST_REPLY) and (data := client.recv(65536)):
                    replies += data
            except (ConnectionResetError, BrokenPipeError):
                # It closed before it had read everything; its last words are there all the same.
                replies += last_words(client)
            return Answer(replies.removesuffix(LAST_REPLY), not replies.endswith(LAST_REPLY))

    def empty(self) -> None:
        assert self.answer(b"FLUSHALL\r\n") == Answer(b"+OK\r\n", closed=False)


def last_words(client: socket.socket) -> bytes:
    words = b""
    try:
        while data := client.recv(65536):
            words += data
    except ConnectionResetError:
        pass
    return words


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program beside the test; it is killed if it still runs at the end."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def start_keyvalue(port: int = 0) -> tuple[str, ...]:
    """The command that starts the example, with warnings as errors."""
    return (sys.executable, "-W", "error", str(Path("examples", "keyvalue.py")), str(port))


def ready_speaker(output: IO[str] | None) -> Speaker:
    """Read the line that the example prints when it is ready."""
    assert output is not None
    line = output.readline()
    found = re.search(r"redis-cli -p (\d+) ", line)
    assert found, f"it says {line!r}"
    return Speaker(socket.AF_INET, ("127.0.0.1", int(found[1])))


@pytest.fixture(scope="session")
def long_running() -> Iterator[Speaker]:
    """The example, which serves all tests and then ends without having said a word."""
    with started(*start_keyvalue()) as process:
        yield ready_speaker(process.stdout)
        process.terminate()
        output, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, output, errors) == (0, "", "")


@pytest.fixture
def keyvalue(long_running: Speaker) -> Speaker:
    """The example, with nothing in it."""
    long_running.empty()
    return long_running


@pytest.fixture(scope="session")
def long_running_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    """Redis itself, on a socket that nobody else finds, with the example's limit."""
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "socket"
    settings = {
        "port": "0",
        "unixsocket": str(path),
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "databases": "1",
        "proto-max-bulk-len": str(16 * 1024 * 1024),
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with started(tool("redis-server"), *options) as process:
        assert process.stdout is not None
        log = []
        for line in process.stdout:
            log.append(line)
            if "ready to accept connections" in line.lower():
                break
        else:
            pytest.fail(f"redis-server does not start: {''.join(log)}")
        yield Speaker(socket.AF_UNIX, str(path))
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def redis(long_running_redis: Speaker) -> Speaker:
    """Redis itself, with nothing in it."""
    long_running_redis.empty()
    return long_running_redis
