"""Services in a file, as a new user has them: the documentation's own, with real clients."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from portico.address import Address, InternetAddress
from tests.scenarios.test_command_line import PORTICO, Command, connect, run, tool
from tests.support import PATIENCE, ROOT, eventually, received
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
def serve(folder: Path, *arguments: str, addresses: int) -> Generator[Command]:
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


RELEASE = """
import os
import portico

class Say(portico.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"VERSION")
"""


class Releases:
    """Releases of a program in directories of their own, of which one is the current."""

    def __init__(self, folder: Path, *, by_link: bool) -> None:
        self.current = folder / "current"
        self._by_link = by_link
        self._last = ""

    def deploy(self, version: str, *more: str) -> None:
        """Have another one be the current, and remove the one before."""
        made = self.current.parent / version
        made.mkdir()
        (made / "release.py").write_text(RELEASE.replace("VERSION", version) + "\n".join(more))
        (made / "portico.toml").write_text(
            f'target = "release:Say"\naddresses = "tcp://127.0.0.1:0"\nfarewell = "{version}"\n'
        )
        if self._by_link:
            following = self.current.parent / "following"
            following.symlink_to(version)
            following.replace(self.current)
        else:
            with suppress(FileNotFoundError):
                self.current.rename(self.current.parent / self._last)
            made.rename(self.current)
        if self._last:
            shutil.rmtree(self.current.parent / self._last)
        self._last = version

    @contextmanager
    def served(self, *arguments: str) -> Generator[Command]:
        """Serve the current one, as from a shell in it."""
        with subprocess.Popen(
            [*PORTICO, "serve", "--pid-file", "../pid", *arguments],
            cwd=self.current,
            env={**os.environ, "PWD": str(self.current)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield Command(process, 1)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def answer(command: Command) -> bytes:
    with connect(command.addresses[0]) as client:
        return received(client)


@pytest.mark.parametrize("by_link", [True, False])
def test_a_reload_serves_what_has_the_name_of_the_directory_by_now(
    tmp_path: Path, *, by_link: bool
) -> None:
    """And so does a worker that takes the place of another one, whatever was removed."""
    releases = Releases(tmp_path, by_link=by_link)
    releases.deploy("first")
    with releases.served("--workers", "1") as command:
        assert answer(command) == b"first"
        releases.deploy("second")
        command.process.send_signal(signal.SIGHUP)
        command.next_line("portico: serves as reloaded")
        eventually(lambda: answer(command) == b"second")  # the earlier worker drains meanwhile
        releases.deploy("third")
        command.process.send_signal(signal.SIGTTIN)
        command.next_line("portico: is to have 2 workers")
        said = command.next_line("portico: worker ")
        while "has ended" in said:  # that of the first generation
            said = command.next_line("portico: worker ")
        assert said.endswith(" is ready")
        assert command.stop()[0] == 0


@pytest.mark.parametrize("by_link", [True, False])
@pytest.mark.parametrize("more", [(), ("--workers", "1")])
def test_a_successor_starts_in_what_has_the_name_of_the_directory_by_now(
    tmp_path: Path, more: Sequence[str], *, by_link: bool
) -> None:
    releases = Releases(tmp_path, by_link=by_link)
    releases.deploy("first")
    with releases.served(*more) as command:
        for version in ("second", "third"):
            releases.deploy(version)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR2)
            command.next_line("portico: leaves everything to process ")
            command.process.wait(PATIENCE)
            eventually(lambda: answer(command) == version.encode())  # noqa: B023


def test_a_successor_starts_there_whatever_the_target_has_made_the_current_one(
    tmp_path: Path,
) -> None:
    releases = Releases(tmp_path, by_link=True)
    releases.deploy("first", "os.chdir('/')")
    with releases.served() as command:
        releases.deploy("second")
        command.process.send_signal(signal.SIGUSR2)
        command.next_line("portico: leaves everything to process ")
        command.process.wait(PATIENCE)
        eventually(lambda: answer(command) == b"second")


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGHUP, ("--workers", "1")),
        (signal.SIGUSR2, ("--workers", "1")),
        (signal.SIGUSR2, ()),
    ],
)
def test_a_directory_that_is_gone_is_said_and_what_serves_serves_on(
    tmp_path: Path, number: int, more: Sequence[str]
) -> None:
    releases = Releases(tmp_path, by_link=True)
    releases.deploy("first")
    with releases.served(*more) as command:
        releases.current.unlink()
        command.process.send_signal(number)
        said = command.next_line("portico: cannot ")
        assert said.endswith(f"cannot return to {releases.current}: No such file or directory")
        assert answer(command) == b"first"
        assert command.stop()[0] == 0


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
