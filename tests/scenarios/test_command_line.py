"""The command as its user has it: a process, real clients, signals, exit statuses."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from portico.address import Address, InternetAddress, Scheme, UnixAddress, parse
from tests.support import PATIENCE, eventually, goodbye
from tests.tls import Authority

PORTICO = [sys.executable, "-m", "portico"]

PROGRAM = """
import os
import resource
import socketserver
import sys
import time
from contextlib import suppress
from pathlib import Path
import portico

def sleep(seconds):
    (portico.sleep if "green" in sys.argv else time.sleep)(seconds)

class Echo(portico.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"%d\\n" % os.getpid())
        for line in self.rfile:
            self.wfile.write(line)

class Upper(portico.BaseRequestHandler):
    '''Works for streams and for datagrams.'''
    def handle(self):
        if isinstance(self.request, tuple):
            packet, listener = self.request
            listener.sendto(packet.upper(), self.client_address)
        else:
            self.request.sendall(self.request.recv(1024).upper())

class Pong(portico.StreamRequestHandler):
    '''Answers every command of Redis's protocol, an array of strings, in the same way.'''
    def handle(self):
        for line in self.rfile:
            for _ in range(int(line[1:])):
                self.rfile.read(int(self.rfile.readline()[1:]) + 2)
            self.wfile.write(b"+PONG\\r\\n")

class Work(portico.BaseRequestHandler):
    '''Answers a word when there is a file of that name.'''
    def handle(self):
        if isinstance(self.request, tuple):
            word, listener = self.request
            self.wait(word)
            listener.sendto(word.upper(), self.client_address)
        else:
            word = self.request.recv(64)
            self.wait(word)
            self.request.sendall(word.upper())

    def wait(self, word):
        Path("at work").touch()
        while not Path(word.decode()).exists():
            if self.server.draining.is_set():
                Path("draining").touch()
            sleep(0.01)

class Stubborn(portico.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"in")
        try:
            self.server.draining.wait(600)
            with suppress(OSError):  # with no time, it is closed already
                self.request.sendall(b"draining")
            time.sleep(600)
        except BaseException as error:
            print("raised:", type(error).__name__, file=sys.stderr)
            raise

class Limits(portico.StreamRequestHandler):
    def handle(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.wfile.write(b"%d %d %d" % (soft, hard, self.server.max_connections))
"""


HASTY = """
import portico.signals
from application import *

portico.signals.SAME_WISH = 0
"""
"""The same, where every signal is a wish of its own, however soon it comes after another."""


class Command:
    """A `portico serve` that is ready."""

    def __init__(self, process: subprocess.Popen[str], number: int) -> None:
        self.process = process
        assert process.stderr is not None
        self.log: IO[str] = process.stderr
        self.addresses = [parse(self.next_line("portico: ready on ")) for _ in range(number)]

    def next_line(self, prefix: str) -> str:
        """The rest of the next line that begins with `prefix`."""
        seen = []
        for line in self.log:
            if line.startswith(prefix):
                return line.removeprefix(prefix).rstrip()
            seen.append(line)
        raise AssertionError(f"no line begins with {prefix!r}: {''.join(seen)}")

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the exit status, and what was said since the last line."""
        self.process.send_signal(signum)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@contextmanager
def serve(folder: Path, *arguments: str, addresses: int = 1) -> Iterator[Command]:
    """Run `portico serve` in a folder that has the program above."""
    (folder / "application.py").write_text(PROGRAM)
    with subprocess.Popen(
        [*PORTICO, "serve", "--log-level", "error", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Command(process, addresses)
        finally:
            process.kill()


def connect(where: Address) -> socket.socket:
    if isinstance(where, UnixAddress):
        client = socket.socket(socket.AF_UNIX, where.scheme.socket_type)
        client.settimeout(PATIENCE)
        if where.scheme == Scheme.UNIX_DATAGRAM:
            client.bind("")  # the system names it, so that it can be answered
        client.connect(where.socket_address)
        return client
    assert isinstance(where, InternetAddress)
    host = {"": "127.0.0.1"}.get(where.host, where.host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = socket.socket(family, where.scheme.socket_type)
    client.settimeout(PATIENCE)
    client.connect((host, where.port))
    return client


def greeting(client: socket.socket) -> int:
    """What `Echo` says first: the process that serves."""
    received = client.recv(64)
    assert received.endswith(b"\n")
    return int(received)


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*PORTICO, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def is_refused(where: Address) -> bool:
    """Say whether nobody listens there any more.

    The kernel is asked first: whoever connects before is one more to be served, and with a child
    for each of many, they would take the whole time of the drain.
    """
    assert isinstance(where, InternetAddress)
    host = int.from_bytes(socket.inet_aton(where.host), sys.byteorder)
    listening = f" {host:08X}:{where.port:04X} 00000000:0000 0A "
    if listening in Path("/proc/net/tcp").read_text():
        return False
    with socket.socket() as client:
        return client.connect_ex((where.host, where.port)) == errno.ECONNREFUSED


@contextmanager
def wait_ended(process: int) -> Iterator[None]:
    """Wait at the end of a block until a process has ended that is there at its beginning."""
    ended = os.pidfd_open(process)
    try:
        yield
        assert select.select([ended], [], [], PATIENCE)[0], "it does not end"
    finally:
        os.close(ended)


def tool(name: str) -> str:
    """The path of a real client.  Without it the test fails: it would show nothing."""
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed; CONTRIBUTING names what the tests need"
    return path


# -------------------------------------------------------------------------------- serving a handler


@pytest.mark.parametrize("engine", ["threads", "forks", "pool", "serial"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_is_served_until_a_signal(
    tmp_path: Path, engine: str, signum: signal.Signals
) -> None:
    """A client that stays is no reason to stay; the last lines say what was done.

    What a child's client does, only the child knows: it has the time of the drain.  So the child
    of the client that has left is waited for: it may take longer than that to end.
    """
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", engine]
    if engine == "forks":
        arguments += ["--drain-timeout", "0.2"]
    with serve(tmp_path, *arguments) as command:
        with ExitStack() as leaving, connect(command.addresses[0]) as client:
            process = greeting(client)
            assert (process == command.process.pid) == (engine != "forks")
            if engine == "forks":
                leaving.enter_context(wait_ended(process))
            client.sendall(b"word\n")
            assert client.recv(64) == b"word\n"
        with connect(command.addresses[0]) as idle:
            greeting(idle)
            status, said = command.stop(signum)
            assert idle.recv(64) == b""
    assert status == 0
    # The connection of the first client may have ended just before the signal, or just after.
    fate, done = (
        ("0 idle, 1 forced", "1 request served, 1 cut off")
        if engine == "forks"
        else ("1 idle, 0 forced", "2 requests served")
    )
    assert re.fullmatch(
        rf"portico: drained in \d+\.\d s: [01] finished, {fate}(; the longest took \d+\.\d s)?\n"
        rf"portico: stopped after \d+\.\d s: {done}\n",
        said,
    )


@pytest.mark.parametrize("engine", ["threads", "forks", "pool", "serial"])
def test_several_addresses_of_every_kind_are_served_at_once(tmp_path: Path, engine: str) -> None:
    asked = [
        "tcp://127.0.0.1:0",
        "tcp://localhost:0",
        "tcp://:0",
        "udp://127.0.0.1:0",
        f"unix:{tmp_path}/stream.sock",
        f"unix-datagram:{tmp_path}/datagram.sock",
        f"unix:@portico test {os.getpid()}",
    ]
    arguments = ["application.py:Upper", *asked, "--engine", engine]
    with serve(tmp_path, *arguments, addresses=len(asked)) as command:
        for where in command.addresses:
            with connect(where) as client:
                client.sendall(b"word")
                assert client.recv(64) == b"WORD"
        for text, where in zip(asked, command.addresses, strict=True):
            scheme = text.partition(":")[0]
            assert where.scheme == scheme
            assert not isinstance(where, InternetAddress) or where.port > 0
        status, said = command.stop()
    assert status == 0
    *lines, total = said.splitlines()
    assert [line.rpartition(": ")[0] for line in lines if " served" in line] == [
        f"portico: {where}" for where in command.addresses
    ]
    assert [line.partition(": drained in ")[0] for line in lines if " drained in " in line] == [
        f"portico: {where}" for where in command.addresses if not where.scheme.is_datagram
    ]
    assert total.startswith("portico: stopped after ")
    assert not list(tmp_path.glob("*.sock"))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_address_without_a_host_serves_ipv6_and_ipv4(tmp_path: Path) -> None:
    with serve(tmp_path, "application:Upper", "tcp://:0") as command:
        (where,) = command.addresses
        assert isinstance(where, InternetAddress)
        assert where.host == ""
        for host in ("127.0.0.1", "::1"):
            with connect(InternetAddress(Scheme.TCP, host, where.port)) as client:
                client.sendall(host.encode() + b"x")
                assert client.recv(64) == host.encode() + b"X"


def test_clients_that_come_before_the_loop_are_served(tmp_path: Path) -> None:
    """A ready line is a promise: whoever reads it can connect."""
    with serve(tmp_path, "application:Echo", "tcp://127.0.0.1:0") as command:
        clients = [connect(command.addresses[0]) for _ in range(20)]
        for client in clients:
            with client:
                assert greeting(client) == command.process.pid


def test_curl_talks_to_a_handler_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_text("hello, world\n")
    target = "http.server:SimpleHTTPRequestHandler"
    with serve(tmp_path, target, "tcp://127.0.0.1:0", f"unix:{tmp_path}/h.sock", addresses=2) as (
        command
    ):
        internet, _ = command.addresses
        assert isinstance(internet, InternetAddress)
        curl = [tool("curl"), "--silent", "--show-error", "--fail", "--max-time", "30"]
        url = f"http://127.0.0.1:{internet.port}/hello.txt"
        assert subprocess.check_output([*curl, url], text=True) == "hello, world\n"


@pytest.mark.parametrize("engine", ["threads", "forks", "pool", "serial"])
def test_redis_cli_talks_to_a_handler(tmp_path: Path, engine: str) -> None:
    arguments = ["application:Pong", "tcp://127.0.0.1:0", "--engine", engine]
    with serve(tmp_path, *arguments) as command:
        (where,) = command.addresses
        assert isinstance(where, InternetAddress)
        client = [tool("redis-cli"), "-h", where.host, "-p", str(where.port), "PING"]
        assert subprocess.check_output(client, text=True, timeout=PATIENCE) == "PONG\n"


@pytest.mark.parametrize("scheme", ["unix", "unix-datagram"])
def test_a_unix_socket_comes_and_goes_with_its_server(tmp_path: Path, scheme: str) -> None:
    """Only its owner may connect; a server that is killed is no obstacle to the next one."""
    path = tmp_path / "a.sock"
    arguments = ["application:Upper", f"{scheme}:{path}"]
    with serve(tmp_path, *arguments) as command:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        command.stop(signal.SIGKILL)
    assert path.is_socket()
    with serve(tmp_path, *arguments) as command:
        with connect(command.addresses[0]) as client:
            client.sendall(b"word")
            assert client.recv(64) == b"WORD"
        living = path.stat()
        second = run("serve", *arguments, folder=tmp_path)
        assert second.returncode == 2
        assert f"(process {command.process.pid})" in second.stderr
        # But for the last access, which is now if the second has knocked.
        assert path.stat()[: stat.ST_ATIME] == living[: stat.ST_ATIME]
        assert path.stat()[stat.ST_MTIME :] == living[stat.ST_MTIME :]
        assert command.stop()[0] == 0
    assert not path.exists()


# -------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("again", [True, False])
def test_a_handler_that_holds_the_serving_thread_is_interrupted(
    tmp_path: Path, again: bool
) -> None:
    """On the serial engine the handler runs where the signal arrives."""
    (tmp_path / "hasty.py").write_text(HASTY)
    arguments = ["hasty:Stubborn", "tcp://127.0.0.1:0", "--engine", "serial"]
    arguments += ["--drain-timeout", "600" if again else "0"]
    with serve(tmp_path, *arguments) as command, connect(command.addresses[0]) as client:
        assert client.recv(2) == b"in"
        if again:
            command.process.send_signal(signal.SIGTERM)
            assert client.recv(64) == b"draining"
        status, said = command.stop()
    assert status == 0
    assert "raised: KeyboardInterrupt\n" in said
    assert said.endswith("s: 0 requests served, 1 cut off\n")


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks", "serial"])
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_signal_lets_a_busy_client_be_answered(tmp_path: Path, engine: str, scheme: str) -> None:
    """Nobody new is served meanwhile; the report says what became of whom."""
    arguments = ["application:Work", f"{scheme}://127.0.0.1:0", "--engine", engine]
    with serve(tmp_path, *arguments) as command, connect(command.addresses[0]) as client:
        client.sendall(b"word")
        eventually((tmp_path / "at work").exists)
        command.process.send_signal(signal.SIGTERM)
        if engine != "forks":  # where no child knows
            eventually((tmp_path / "draining").exists)
        if scheme == "tcp" and engine != "serial":  # where the backlog is served in between
            eventually(lambda: is_refused(command.addresses[0]))
        (tmp_path / "word").touch()
        assert client.recv(64) == b"WORD"
        _, said = command.process.communicate(timeout=PATIENCE)
    assert command.process.returncode == 0
    assert re.search(r"portico: stopped after \d+\.\d s: [1-9]\d* requests? served\n$", said)
    if scheme == "tcp":
        assert re.match(r"portico: drained in \d+\.\d s: [1-9]\d* finished, ", said)


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_second_signal_ends_the_command_at_once(tmp_path: Path, engine: str, number: int) -> None:
    (tmp_path / "hasty.py").write_text(HASTY)
    addresses = ["tcp://127.0.0.1:0"] * number
    arguments = ["hasty:Work", *addresses, "--engine", engine, "--drain-timeout", "none"]
    with (
        serve(tmp_path, *arguments, addresses=number) as command,
        connect(command.addresses[0]) as client,
    ):
        client.sendall(b"word")
        eventually((tmp_path / "at work").exists)
        command.process.send_signal(signal.SIGTERM)
        eventually(lambda: is_refused(command.addresses[0]))
        status, said = command.stop()
    assert status == 0
    assert "drained" not in said.splitlines()[0]
    assert re.search(
        r"portico: stopped after \d+\.\d s: \d+ requests? served, [1-9]\d* cut off\n$", said
    )


def test_a_child_can_be_ended_without_the_server(tmp_path: Path) -> None:
    """It does not keep the signal handlers that it was forked with."""
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", "forks"]
    with serve(tmp_path, *arguments) as command:
        with connect(command.addresses[0]) as client:
            os.kill(greeting(client), signal.SIGTERM)
            assert client.recv(64) == b""
        with connect(command.addresses[0]) as client:
            assert greeting(client) != command.process.pid
        assert command.stop()[0] == 0


@pytest.mark.parametrize("workers", ["none", "1"])
def test_it_serves_though_nobody_reads_what_is_said(tmp_path: Path, workers: str) -> None:
    """The reader of standard error has stopped: neither a client, nor a signal, waits for it."""
    words = ["application:Echo", "tcp://127.0.0.1:0", "--log-level", "debug", "--workers", workers]
    with serve(tmp_path, *words) as command:
        with connect(command.addresses[0]) as client:
            process = greeting(client)
        stall(command.process)
        if workers == "1":
            os.kill(process, signal.SIGKILL)
        with connect(command.addresses[0]) as client:
            assert (greeting(client) == process) is (workers == "none")
        command.process.terminate()
        assert command.process.wait(30) == 0


def is_greeted(path: Path) -> bool:
    """Say whether somebody serves at the path of a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client, suppress(FileNotFoundError, ConnectionError):
        client.settimeout(30)
        client.connect(str(path))
        return greeting(client) > 0
    return False


def stall(process: subprocess.Popen[str]) -> None:
    """Have the pipe full into which a process says something."""
    error = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(error, b"." * select.PIPE_BUF)
    os.close(error)


@pytest.mark.parametrize("workers", ["none", "1"])
@pytest.mark.parametrize("before", ["", "sys.stdout = sys.stderr = None\n"])
def test_it_serves_without_a_terminal(tmp_path: Path, workers: str, before: str) -> None:
    """The shell has closed all three, or the program has taken off what Python has of them."""
    (tmp_path / "application.py").write_text(PROGRAM + before)
    closed = "" if before else "<&- >&- 2>&-"
    words = [*PORTICO, "serve", "application:Echo", "unix:here", "--workers", workers]
    with subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *words],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            eventually(lambda: is_greeted(tmp_path / "here") or process.poll() is not None)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_children_end_with_the_server(tmp_path: Path) -> None:
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", "forks"]
    arguments += ["--drain-timeout", "0"]
    with serve(tmp_path, *arguments) as command, connect(command.addresses[0]) as client:
        child = os.pidfd_open(greeting(client))
        try:
            assert command.stop()[0] == 0
            assert select.select([child], [], [], PATIENCE)[0]
        finally:
            os.close(child)


# ------------------------------------------------------------------------------ what protects it


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks", "serial"])
def test_real_clients_speak_tls(tmp_path: Path, engine: str, authority: Authority) -> None:
    pair = authority.issue("127.0.0.1")
    (tmp_path / "hello.txt").write_text("hello, world\n")
    arguments = ["http.server:SimpleHTTPRequestHandler", "tls://127.0.0.1:0", "--engine", engine]
    arguments += ["--cert", str(pair.certificate), "--key", str(pair.key)]
    with serve(tmp_path, *arguments) as command:
        (where,) = command.addresses
        assert isinstance(where, InternetAddress)
        assert where.scheme is Scheme.TLS
        curl = [tool("curl"), "--silent", "--show-error", "--fail", "--max-time", "30"]
        curl += ["--cacert", str(authority.certificate)]
        url = f"https://127.0.0.1:{where.port}/hello.txt"
        assert subprocess.check_output([*curl, url], text=True) == "hello, world\n"
        openssl = [tool("openssl"), "s_client", "-connect", f"127.0.0.1:{where.port}", "-quiet"]
        openssl += ["-CAfile", str(authority.certificate), "-verify_return_error", "-ign_eof"]
        answer = subprocess.run(
            openssl,
            input="GET /hello.txt HTTP/1.0\r\n\r\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert answer.stdout.endswith("\n\nhello, world\n")
        assert command.stop()[0] == 0


def test_a_client_without_a_certificate_gets_no_answer(
    tmp_path: Path, authority: Authority
) -> None:
    pair, own = authority.issue("127.0.0.1"), authority.issue("client")
    (tmp_path / "hello.txt").write_text("hello, world\n")
    arguments = ["http.server:SimpleHTTPRequestHandler", "tls://127.0.0.1:0"]
    arguments += ["--cert", str(pair.certificate), "--key", str(pair.key)]
    with serve(tmp_path, *arguments, "--client-ca", str(authority.certificate)) as command:
        (where,) = command.addresses
        assert isinstance(where, InternetAddress)
        curl = [tool("curl"), "--silent", "--show-error", "--fail", "--max-time", "30"]
        curl += [
            "--cacert",
            str(authority.certificate),
            f"https://127.0.0.1:{where.port}/hello.txt",
        ]
        stranger = subprocess.run(curl, capture_output=True, text=True, check=False)
        assert (stranger.returncode != 0, stranger.stdout) == (True, "")
        known = [*curl, "--cert", str(own.certificate), "--key", str(own.key)]
        assert subprocess.check_output(known, text=True) == "hello, world\n"
        status, said = command.stop()
    assert status == 0
    assert said.endswith("s: 1 request served, 1 refused\n")


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks", "serial"])
def test_networks_decide_who_may_come(tmp_path: Path, engine: str) -> None:
    arguments = ["application:Upper", "tcp://127.0.0.1:0", "--engine", engine]
    arguments += ["--allow", "127.0.0.0/30", "--deny", "127.0.0.2"]
    with serve(tmp_path, *arguments) as command:
        (where,) = command.addresses
        assert isinstance(where, InternetAddress)
        answers = {}
        for number in (1, 2, 3, 4):
            place = (where.host, where.port)
            source = (f"127.0.0.{number}", 0)
            with socket.create_connection(place, timeout=PATIENCE, source_address=source) as client:
                with suppress(ConnectionError):
                    client.sendall(b"word")
                    answers[number] = client.recv(64)
        status, said = command.stop()
    assert {number for number, answer in answers.items() if answer == b"WORD"} == {1, 3}
    assert status == 0
    assert said.endswith("s: 2 requests served, 2 refused\n")


def test_a_proxy_says_who_its_client_is(tmp_path: Path) -> None:
    """Only the one that is trusted; the networks are asked about the client, not the proxy."""
    arguments = ["application:Upper", "tcp://127.0.0.1:0", "--proxy-protocol", "127.0.0.1"]
    with serve(tmp_path, *arguments, "--deny", "192.0.2.7") as command:
        for source, answer in ((b"192.0.2.1", b"WORD"), (b"192.0.2.7", b"")):
            with connect(command.addresses[0]) as client:
                client.sendall(b"PROXY TCP4 %s 192.0.2.2 5000 80\r\nword" % source)
                with suppress(ConnectionResetError):
                    assert client.recv(64) == answer
        assert command.stop()[0] == 0


@pytest.mark.parametrize("engine", ["threads", "pool", "green"])
def test_a_silent_client_is_ended(tmp_path: Path, engine: str) -> None:
    """Nobody else would end it; that it is greeted before, its time may be too short for."""
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", engine]
    with serve(tmp_path, *arguments, "--idle-timeout", "0.2") as command:
        with connect(command.addresses[0]) as client:
            goodbye(client)
        assert command.stop()[0] == 0


def test_a_client_beyond_the_limit_waits_or_is_refused(tmp_path: Path) -> None:
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--max-connections", "2"]
    with serve(tmp_path, *arguments) as command:
        clients = [connect(command.addresses[0]) for _ in range(3)]
        first, second, third = clients
        greeting(first)
        greeting(second)
        assert not select.select([third], [], [], 0.2)[0]  # it waits
        first.close()
        greeting(third)
        for client in (second, third):
            client.close()
        assert command.stop()[0] == 0
    with serve(tmp_path, *arguments, "--when-full", "refuse") as command:
        with connect(command.addresses[0]) as one, connect(command.addresses[0]) as two:
            greeting(one)
            greeting(two)
            with connect(command.addresses[0]) as three:
                assert three.recv(64) == b""


def test_the_limit_of_connections_is_below_that_of_descriptors(tmp_path: Path) -> None:
    """The command takes as many descriptors as the system lets it have."""
    with serve(tmp_path, "application:Limits", "tcp://127.0.0.1:0") as command:
        with connect(command.addresses[0]) as client:
            soft, hard, connections = map(int, client.makefile("rb").read().split())
    assert soft == hard
    assert 0 < connections < soft


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such:Echo", "tcp://:0"], "cannot serve 'no_such:Echo': there is no module 'no_such'"),
        (["broken:Echo", "tcp://:0"], "cannot serve 'broken:Echo': importing broken failed with"),
        (["no_such.py:Echo", "tcp://:0"], "cannot serve 'no_such.py:Echo': there is no file"),
        (["application:Eco", "tcp://:0"], "cannot serve 'application:Eco': application has no"),
        (["application:os", "tcp://:0"], "cannot serve 'application:os': it is of type module"),
        (["portico:TCPServer", "tcp://:0"], "cannot serve 'portico:TCPServer': it is a server"),
        (["application:Echo", "udp://:0"], "cannot serve 'application:Echo': it handles streams"),
        (["application:Echo", "9000"], "address='9000': expected tcp://:9000 or udp://:9000"),
        (["application:Echo", "tcp://203.0.113.1:0"], "cannot listen on tcp://203.0.113.1:0: 203"),
        (["application:Echo", "unix:/no/such"], "cannot listen on unix:/no/such: there is no dir"),
        (["application:Echo", "unix:application.py"], "cannot listen on unix:application.py: ther"),
        (["application:Echo", "unix:a", "unix:a"], "cannot listen on unix:a: in use by this very"),
        (["application:Echo", "unix:a", "tls://:0"], "cert=None: expected a certificate (and key"),
        (["application:Echo", "unix:a", "--idle-timeout", "x"], "idle_timeout='x': expected a num"),
    ],
)
def test_wrong_input_gets_one_line_and_status_2(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "application.py").write_text(PROGRAM)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    ended = run("serve", *arguments, "--log-level", "error", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"portico: error: {expected}")
    assert ended.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["application.py"]


@pytest.mark.parametrize("more", [[], ["--workers", "1"]])
def test_a_descriptor_of_its_own_is_not_taken_for_an_inherited_one(
    tmp_path: Path, more: list[str]
) -> None:
    """The first that it opens would be the third."""
    (tmp_path / "application.py").write_text(PROGRAM)
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "fd://3", *more]
    ended = run("serve", *arguments, folder=tmp_path)
    reason = "cannot listen on fd://3: this process was started without a descriptor 3"
    assert (ended.returncode, ended.stderr) == (2, f"portico: error: {reason}\n")


def test_the_current_directory_is_left_out_where_python_leaves_it_out(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(PROGRAM)
    ended = run("serve", "application:Echo", "tcp://:0", folder=tmp_path, PYTHONSAFEPATH="1")
    assert ended.returncode == 2
    assert "there is no module 'application'" in ended.stderr


@pytest.mark.parametrize("command", ["serve", "check", "doctor"])
def test_a_current_directory_that_was_removed_gets_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "gone").mkdir()
    words = [*PORTICO, command, "portico:BaseRequestHandler", "tcp://127.0.0.1:0"]
    ended = subprocess.run(
        ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh", *words],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = "portico: error: the current directory was removed: expected to be started in one that"
    assert ended.stderr.startswith(said)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_port_in_use_names_the_process(tmp_path: Path, scheme: str) -> None:
    with serve(tmp_path, "application:Upper", f"{scheme}://127.0.0.1:0") as command:
        taken = str(command.addresses[0])
        name = Path(f"/proc/{command.process.pid}/comm").read_text().strip()
        ended = run("serve", "application:Upper", taken, folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"portico: error: cannot listen on {taken}: in use by {name}"
        f" (process {command.process.pid})\n"
    )


UNPRIVILEGED = """
import encodings.idna  # what the resolver imports, and another user may not be able to read
import os, sys
from portico.cli import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
main(["serve", "portico:BaseRequestHandler", *sys.argv[1:]])
"""


def serve_unprivileged(where: str) -> subprocess.CompletedProcess[str]:
    """Run the command as somebody who may not do everything."""
    # Nor write what a measurement of coverage in child processes writes.
    environment = {name: os.environ[name] for name in os.environ if "COVERAGE" not in name}
    return subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, where],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    ended = serve_unprivileged(f"unix:{tmp_path}/a.sock")
    assert ended.returncode == 2
    assert ended.stderr == (
        f"portico: error: cannot listen on unix:{tmp_path}/a.sock: no permission to make a socket"
        f" in {tmp_path}; choose a directory in which you may write\n"
    )


FIRST_PORT = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(FIRST_PORT <= 1, reason="every user may bind every port of this machine")
def test_a_port_for_the_privileged_says_what_would_help() -> None:
    text = f"tcp://127.0.0.1:{min(FIRST_PORT - 1, 1023)}"
    ended = serve_unprivileged(text)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"portico: error: cannot listen on {text}: no permission for a port below {FIRST_PORT};"
        f" choose one from {FIRST_PORT} on, or run it with the capability CAP_NET_BIND_SERVICE\n"
    )


# ------------------------------------------------------------------------------------ several hubs

HOLDER = """
import socketserver

class Hold(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"hold\\n":
                self.wfile.write(b"holding\\n")
                with open("pipe", "rb") as pipe:  # holds the thread until somebody writes to it
                    line = pipe.read()
            self.wfile.write(line)

if __name__ == "__main__":
    import sys
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hold) as server:
        print(f"portico: ready on tcp://127.0.0.1:{server.server_address[1]}", file=sys.stderr)
        server.serve_forever()
"""


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--engine", "green", "--hubs", "2", "holder.py:Hold", "tcp://127.0.0.1:0"),
        ("run", "--engine", "green", "--hubs", "2", "holder.py"),
    ],
    ids=["serve", "run"],
)
def test_a_handler_that_holds_a_hub_leaves_the_others_to_another(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "holder.py").write_text(HOLDER)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(
        [*PORTICO, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            where = Command(process, 1).addresses[0]
            with connect(where) as holding:
                holding.sendall(b"hold\n")
                assert holding.recv(64) == b"holding\n"
                with connect(where) as other:
                    other.sendall(b"meanwhile\n")
                    assert other.recv(64) == b"meanwhile\n"
                (tmp_path / "pipe").write_bytes(b"released\n")
                assert holding.recv(64) == b"released\n"
        finally:
            process.kill()


# ------------------------------------------------------------------------------ running a program


def test_a_program_runs_on_portico_unchanged(tmp_path: Path) -> None:
    """Its main part too, with its own arguments and its own folder on the path."""
    (tmp_path / "neighbour.py").write_text("WORD = 'neighbour'\n")
    (tmp_path / "program.py").write_text(
        textwrap.dedent(
            """
            import socketserver, sys
            from neighbour import WORD

            class Hello(socketserver.StreamRequestHandler):
                def handle(self):
                    self.wfile.write(self.rfile.readline().upper())

            if __name__ == "__main__":
                print(WORD, socketserver.TCPServer.__module__, *sys.argv)
                with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hello) as server:
                    print(server.server_address[1], flush=True)
                    server.serve_forever()
            """
        )
    )
    with subprocess.Popen(
        [*PORTICO, "run", "program.py", "--engine", "x", "-m", "--help"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline().split()
            assert first[0] == "neighbour"
            assert first[1].startswith("portico")
            assert first[2:] == ["program.py", "--engine", "x", "-m", "--help"]
            port = int(process.stdout.readline())
            with connect(InternetAddress(Scheme.TCP, "127.0.0.1", port)) as client:
                client.sendall(b"word\n")
                assert client.recv(64) == b"WORD\n"
        finally:
            process.kill()


@pytest.mark.parametrize("engine", ["threads", "forks", "pool", "serial"])
def test_a_module_of_the_standard_library_serves(tmp_path: Path, engine: str) -> None:
    (tmp_path / "hello.txt").write_text("hello, world\n")
    with subprocess.Popen(
        [*PORTICO, "run", "--engine", engine, "-m", "http.server", "--bind", "127.0.0.1", "0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told = re.search(r" port (\d+) ", process.stdout.readline())
            assert told is not None
            url = f"http://127.0.0.1:{told[1]}/hello.txt"
            curl = [tool("curl"), "--silent", "--show-error", "--fail", "--max-time", "30", url]
            assert subprocess.check_output(curl, text=True) == "hello, world\n"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('enough')", 1, "enough\n"),
        ("import os; os._exit(4)", 4, ""),
        ("import signal; signal.raise_signal(signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_a_program_ends_with_its_own_status(
    tmp_path: Path, program: str, status: int, said: str
) -> None:
    (tmp_path / "program.py").write_text(program)
    ended = run("run", "program.py", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (status, said)


@pytest.mark.parametrize("program", ["def f():\n    1 / 0\n\nf()\n", "def f(:\n"])
def test_a_program_that_fails_looks_as_it_does_on_python(tmp_path: Path, program: str) -> None:
    """The same status, and the same traceback."""
    (tmp_path / "program.py").write_text(program)
    ended = run("run", "program.py", folder=tmp_path)
    python = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (python.returncode, python.stderr)


def test_an_interrupted_program_ends_by_the_signal(tmp_path: Path) -> None:
    """As on python, so that a shell script that runs it ends as well."""
    (tmp_path / "program.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    ended = run("run", "program.py", folder=tmp_path)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such.py"], "cannot run 'no_such.py': No such file or directory"),
        (["-m", "no_such"], "cannot run 'no_such': no module named 'no_such'"),
        (["-m", "http"], "cannot run 'http': it is a package without a __main__ module"),
    ],
)
def test_a_program_that_cannot_be_run_gets_one_line_and_status_2(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    ended = run("run", *arguments, folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"portico: error: {expected}\n"


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "portico"
    installed = subprocess.check_output([script, "--version"], text=True)
    assert installed == run("--version", folder=tmp_path).stdout
