"""The units, read by systemd's own `systemd-analyze`, and their command run on their sockets."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.places import APPLICATION, DEPLOY, LAST_WORDS, option, tool
from tests.support import PATIENCE

UNITS = DEPLOY / "systemd"


def settings(name: str) -> dict[str, list[str]]:
    """The settings of a unit; one may be given several times."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def setting(name: str, key: str) -> str:
    (value,) = settings(name)[key]
    return value


def command() -> list[str]:
    return shlex.split(setting("portico.service", "ExecStart"))


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a command that there is on this machine."""
    for name in ("portico.service", "portico.socket"):
        text = (UNITS / name).read_text().replace(command()[0], sys.executable)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_systemd_reads_the_units_without_a_word(units: Path) -> None:
    paths = [str(units / name) for name in ("portico.service", "portico.socket")]
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", *paths],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_misspelt_setting_would_be_found(units: Path) -> None:
    path = units / "portico.service"
    path.write_text(path.read_text().replace("KillMode=", "KilMode="))
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "KilMode" in done.stderr


def test_the_service_may_do_little() -> None:
    """The exposure, of 100, as systemd rates it: below 20, where a plain service has above 90."""
    subprocess.run(
        [
            *(tool("systemd-analyze"), "security", "--offline=yes", "--threshold=20"),
            str(UNITS / "portico.service"),
        ],
        check=True,
        capture_output=True,
    )


def test_systemd_waits_for_longer_than_a_drain() -> None:
    limit = float(setting("portico.service", "TimeoutStopSec"))
    assert limit > option(command(), "--drain-timeout") + LAST_WORDS


def test_the_signal_to_stop_does_not_go_to_children() -> None:
    assert setting("portico.service", "KillMode") == "mixed"


def test_the_command_serves_on_the_sockets(tmp_path: Path) -> None:
    """Its own, on the socket unit's name, handed over by systemd's own launcher."""
    (tmp_path / "application.py").write_text(APPLICATION)
    holder = socket.socket()  # of the port, until the launcher has it, too
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    name = setting("portico.socket", "FileDescriptorName")
    launched = [tool("systemd-socket-activate"), f"--fdname={name}", f"--listen=127.0.0.1:{port}"]
    with (
        holder,
        subprocess.Popen(
            [*launched, sys.executable, "-m", "portico", *command()[1:]],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("Listening on ")
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(PATIENCE)
                client.sendall(b"line\n")
                assert client.recv(64) == b"line\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
