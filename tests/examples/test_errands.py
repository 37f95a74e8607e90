"""The server that runs errands, as a newcomer starts it, and its clients: socat and openssl."""

from __future__ import annotations

import re
import select
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from examples import errands
from tests.examples.conftest import started, tool
from tests.support import PATIENCE, ROOT

EXAMPLE = (sys.executable, "-W", "error", str(Path("examples", "errands.py")), "--port", "0")

ENGINES = list(errands.ENGINES)
CONCURRENT = ["green", "threads", "pool"]


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Start the example; the words of the command that it says to try."""
    with started(*EXAMPLE, *options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Try: "), line
        yield process, shlex.split(line.removeprefix("Try: "))


def address(command: list[str]) -> tuple[str, int]:
    """The address in a command that was said to be tried."""
    host, port = command[-1].removeprefix("TCP:").split(":")
    return host, int(port)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Made by the command that the example says, because there is none."""
    folder = tmp_path_factory.mktemp("certificate")
    options = ("--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem"))
    done = subprocess.run(
        [*EXAMPLE, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert "No such file" in first
    program, *words = shlex.split(second.removeprefix("To make them: "))
    subprocess.run([tool(program), *words], check=True, capture_output=True)
    return options[1], options[3]


class Conversation:
    """A client program, and what is said to it and by it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, question: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{question}\n".encode())
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], PATIENCE)[0], "no answer"
        return self._process.stdout.readline().decode().rstrip("\n")


@contextmanager
def talking(command: list[str]) -> Iterator[Conversation]:
    """Run a client as the example says."""
    program, *words = command
    with subprocess.Popen(
        [tool(program), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield Conversation(process)
        finally:
            process.kill()


def run_all_errands(client: Conversation) -> None:
    assert client.ask("hash secret") == client.ask("hash secret") != client.ask("hash other")
    assert "UTC" in client.ask("date")
    assert client.ask("wait 0.01") == "here I am"
    assert re.fullmatch(
        r"(127\.0\.0\.1|::1), 127\.0\.0\.1", client.ask("resolve localhost 127.0.0.1")
    )
    assert client.ask("help") == "hash TEXT, date, wait SECONDS, resolve NAME..., quit"


@pytest.mark.parametrize("engine", ENGINES)
def test_socat_has_its_errands_run(engine: str) -> None:
    with serving("--engine", engine) as (_, command), talking(command) as client:
        run_all_errands(client)


@pytest.mark.parametrize("engine", ENGINES)
def test_openssl_has_its_errands_run(engine: str, certificate: tuple[str, str]) -> None:
    """With the certificate verified."""
    cert, key = certificate
    with serving("--engine", engine, "--cert", cert, "--key", key) as (_, command):
        with talking([*command[:-2], "-verify_return_error", *command[-2:]]) as client:
            run_all_errands(client)


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_client_that_is_slow_to_begin_with_tls_holds_up_nobody(
    engine: str, certificate: tuple[str, str]
) -> None:
    cert, key = certificate
    with serving("--engine", engine, "--cert", cert, "--key", key) as (process, command):
        with socket.create_connection(address(command), PATIENCE) as silent:
            trusting = ssl.create_default_context(cafile=cert)
            with (
                socket.create_connection(address(command), PATIENCE) as plain,
                trusting.wrap_socket(plain, server_hostname="localhost") as client,
            ):
                client.sendall(b"help\n")
                assert client.recv(100).startswith(b"hash TEXT")
            silent.sendall(b"this is no TLS\n")
            with suppress(ConnectionResetError):
                while silent.recv(100):
                    pass
        assert process.stderr is not None
        assert process.stderr.readline() == "lost 127.0.0.1: SSLError\n"


@pytest.mark.parametrize("engine", CONCURRENT)
def test_clients_wait_beside_each_other(engine: str) -> None:
    """One whose errand takes long does not keep another from being served.

    How long is long depends on the machine: until the other is answered meanwhile.
    """
    waits = []
    with serving("--engine", engine) as (_, command):
        for seconds in (1, 2, 4):
            with socket.create_connection(address(command), PATIENCE) as slow:
                slow.sendall(b"wait %d\n" % seconds)
                with socket.create_connection(address(command), PATIENCE) as quick:
                    quick.sendall(b"resolve 127.0.0.1\ndate\nquit\n")
                    answers = quick.makefile().read().splitlines()
                assert answers[0] == "127.0.0.1"
                assert "UTC" in answers[1]
                waits.append(not select.select([slow], [], [], 0)[0])
                assert slow.recv(100) == b"here I am\n"
            if waits[-1]:
                break
    assert waits[-1], "each of them was answered first"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "hash TEXT, date, wait SECONDS, resolve NAME..., quit"),
        ("dance", "error: there is: hash, date, wait, resolve, help, quit"),
        ("wait", "error: wait takes a number of seconds"),
        ("wait long", "error: wait takes a number of seconds"),
        ("wait -1", "error: wait takes a number of seconds, 0 or more"),
        ("wait nan", "error: wait takes a number of seconds, 0 or more"),
        ("wait inf", "error: not done in 0.05 s"),
        ("resolve", "error: resolve takes 1 to 8 names"),
        ("resolve 1 2 3 4 5 6 7 8 9", "error: resolve takes 1 to 8 names"),
        ("resolve no.such.invalid", "unknown"),
        ("date today", "error: date takes no words"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words == "wait inf":
        monkeypatch.setattr(errands, "ERRAND_TIMEOUT", 0.05)
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.settimeout(PATIENCE)
        peer.sendall(f"{words}\nquit\n".encode())
        errands.ErrandHandler(ours, None, None)
        assert peer.recv(1000).decode() == f"{expected}\n"


@pytest.mark.parametrize("said", [b"x" * 2000 + b"\n", b"half a line", b""])
def test_what_is_no_line_ends_the_conversation(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long, cut short, or nothing at all for too long."""
    monkeypatch.setattr(errands.ErrandHandler, "timeout", 0.05)
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.sendall(said)
        errands.ErrandHandler(ours, None, None)
        ours.shutdown(socket.SHUT_WR)
        assert peer.recv(100) == b""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_whoever_is_connected(engine: str, signum: signal.Signals) -> None:
    with serving("--engine", engine) as (process, command):
        with socket.create_connection(address(command), PATIENCE) as client:
            client.sendall(b"help\n")
            assert client.recv(100)
            process.send_signal(signum)
            assert process.wait(PATIENCE) == 0
            _, errors = process.communicate(timeout=PATIENCE)
            assert errors == ""


@pytest.mark.parametrize(
    ("options", "status", "expected"),
    [
        (["--port", "70000"], 1, "cannot serve on port 70000: "),
        (["--cert", "cert.pem"], 2, "--cert and --key belong together"),
        (["--engine", "steam"], 2, "invalid choice: 'steam'"),
    ],
)
def test_wrong_options_are_explained(options: list[str], status: int, expected: str) -> None:
    done = subprocess.run(
        [*EXAMPLE, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert expected in done.stderr


def test_it_is_read_in_one_sitting() -> None:
    assert len((ROOT / "examples" / "errands.py").read_text().splitlines()) < 230
