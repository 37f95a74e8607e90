"""Services in a file, as a new user has them: the documentation's own, with real clients."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from portico.address import Address, InternetAddress
from tests.scenarios.test_command_line import PORTICO, Command, run, tool
from tests.support import ROOT
from tests.tls import Authority, Pair

SNIPPETS = ROOT / "docs" / "snippets"


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    """A folder with what the page shows, on ports that the system chooses."""
    for name in ("echo.py", "upper.py"):
        shutil.copy(SNIPPETS / name, tmp_path)
    text = (SNIPPETS / "portico.toml").read_text()
    (tmp_path / "portico.toml").write_text(text.replace(":9443", ":0").replace(":9000", ":0"))
    authority.issue().write_over(Pair(tmp_path / "cert.pem", tmp_path / "key.pem"))
    return tmp_path


@contextmanager
def serve(folder: Path, *arguments: str, addresses: int) -> Iterator[Command]:
    """Run `portico serve` with the file of a folder until the block ends."""
    with subprocess.Popen(
        [*PORTICO, "serve", *arguments], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Command(process, addresses)
        finally:
            process.kill()


def place(address: Address) -> str:
    assert isinstance(address, InternetAddress)
    return f"{address.host}:{address.port}"


def asked(command: Sequence[str], folder: Path, question: str) -> str:
    """What a client prints that is given a question and has no other."""
    return subprocess.run(
        command,
        cwd=folder,
        input=question,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def asked_by_openssl(where: str, authority: Authority, question: str) -> str:
    """The first line of the answer over TLS, from a server whose certificate is the right one."""
    command = [tool("openssl"), "s_client", "-connect", where, "-quiet", "-verify_return_error"]
    with subprocess.Popen(
        [*command, "-CAfile", str(authority.certificate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as client:
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(question)
            client.stdin.flush()
            return client.stdout.readline()
        finally:
            client.kill()


def without_origins(outline: str) -> list[str]:
    return [line.partition("  #")[0].rstrip() for line in outline.splitlines()]


def test_the_services_of_a_file_are_served_side_by_side(folder: Path, authority: Authority) -> None:
    """TLS, TCP, datagrams and a Unix socket, until a signal."""
    socat = [tool("socat"), "-t", "30", "-"]
    with serve(folder, addresses=4) as command:
        tls, tcp, udp, unix = command.addresses
        assert [each.scheme for each in command.addresses] == ["tls", "tcp", "udp", "unix"]
        assert asked_by_openssl(place(tls), authority, "by TLS\n") == "by TLS\n"
        assert asked([*socat, f"TCP:{place(tcp)}"], folder, "by TCP\n") == "by TCP\n"
        assert asked([*socat, f"UDP:{place(udp)},readbytes=6"], folder, "by UDP") == "BY UDP"
        assert str(unix) == "unix:echo.sock"
        assert asked([*socat, "UNIX-CONNECT:echo.sock"], folder, "by Unix\n") == "by Unix\n"
        status, said = command.stop()
    assert status == 0
    assert said.splitlines()[-1].startswith("portico: stopped after ")
    assert "4 requests served" in said.splitlines()[-1]
    assert not (folder / "echo.sock").exists()


def test_one_of_the_services_is_served_alone(folder: Path) -> None:
    """From another folder, too: what the file names is found from where the file is."""
    (folder / "elsewhere").mkdir()
    arguments = ["--config", "../portico.toml", "--service", "local"]
    with serve(folder / "elsewhere", *arguments, addresses=1) as command:
        client = [tool("socat"), "-t", "30", "-", "UNIX-CONNECT:echo.sock"]
        assert asked(client, folder, "by Unix\n") == "by Unix\n"
        assert command.stop()[0] == 0


def test_a_reload_that_fails_says_where_the_value_stands_that_a_worker_cannot_use(
    folder: Path,
) -> None:
    settings = folder / "portico.toml"
    settings.write_text('target = "echo:Echo"\naddresses = "tcp://127.0.0.1:0"\nworkers = 1\n')
    with serve(folder, addresses=1) as command:
        settings.write_text(settings.read_text().replace("echo:Echo", "echo:Nobody"))
        command.process.send_signal(signal.SIGHUP)
        reason = command.next_line("portico: cannot reload, and serves as before: ")
        assert reason.startswith("portico.toml: target: cannot serve 'echo:Nobody': ")
        status, _ = command.stop()
    assert status == 0


def test_a_check_says_what_would_run(folder: Path) -> None:
    """It is the file again, with where each value comes from."""
    ended = run("check", folder=folder, PORTICO_WORKERS="1")
    assert (ended.returncode, ended.stderr) == (0, "")
    first, workers, *_ = ended.stdout.splitlines()
    assert first == "# 1 worker under a supervisor serves."
    assert workers.split() == ["workers", "=", "1", "#", "PORTICO_WORKERS"]
    (folder / "again.toml").write_text(ended.stdout)
    again = run("check", "--config", "again.toml", folder=folder)
    assert without_origins(again.stdout) == without_origins(ended.stdout)
    assert "key.pem" in ended.stdout
    assert "PRIVATE" not in ended.stdout


def test_what_is_misspelt_is_told_in_one_line(folder: Path) -> None:
    with (folder / "portico.toml").open("a") as file:
        file.write("idel_timeout = 5\n")
    for command in ("serve", "check"):
        ended = run(command, folder=folder)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == (
            "portico: error: portico.toml: services.local.idel_timeout = 5: "
            'expected the name of a setting: "idle_timeout"\n'
        )
