"""What the tests of `deploy/` share: where it is, and a service that is run as it says."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from portico.service import STOP_PATIENCE
from tests.support import PATIENCE, ROOT

DEPLOY = ROOT / "deploy"

LAST_WORDS = STOP_PATIENCE
"""Seconds that a service takes after the time of its drain at the most."""

APPLICATION = """
import portico

class Echo(portico.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)

class Handler(Echo):
    pass
"""


def tool(name: str) -> str:
    """The path of a program.  Without it the test fails: it would show nothing."""
    beside = Path(sys.executable).parent
    path = shutil.which(name, path=str(beside)) or shutil.which(name)
    assert path is not None, f"{name} is not installed; CONTRIBUTING names what the tests need"
    return path


def option(arguments: Sequence[str], name: str) -> float:
    """The number that an option of a command line has."""
    return float(arguments[[*arguments].index(name) + 1])


def refuses(port: int) -> bool:
    """Whether a probe of a port fails, as Kubernetes' tcpSocket would."""
    with socket.socket() as probe:
        probe.settimeout(PATIENCE)
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Serving:
    """A service, and the port that it has in the place of 9000."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("portico: ready on "):
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError("it was never ready")

    @contextmanager
    def draining(self) -> Iterator[socket.socket]:
        """Drain, while one client is served; the block begins when draining has."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.settimeout(PATIENCE)
            client.sendall(b"half of ")  # so that it is busy, and the drain waits for it
            self.process.send_signal(signal.SIGTERM)
            yield client
            client.sendall(b"a line\n")
            assert client.recv(64) == b"half of a line\n"
        assert self.process.wait(PATIENCE) == 0


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[Serving]:
    """Serve with the arguments that a container is given, on another port."""
    (folder / "application.py").write_text(APPLICATION)
    ours = [each.replace(":9000", ":0") for each in arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "portico", "serve", *ours],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Serving(process)
        finally:
            process.kill()
