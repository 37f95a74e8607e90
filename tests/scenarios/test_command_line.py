"""The command as its user has it: a process, real clients, signals, exit statuses."""

from __future__ import annotations

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
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from portico.address import Address, InternetAddress, Scheme, UnixAddress, parse

PORTICO = [sys.executable, "-m", "portico"]

PROGRAM = """
import os
import socketserver
import portico

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

class Stubborn(portico.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"in")
        try:
            self.request.recv(1)
        except BaseException as error:
            self.request.sendall(type(error).__name__.encode())
            raise
"""


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
        _, said = self.process.communicate(timeout=30)
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
        client.settimeout(30)
        if where.scheme == Scheme.UNIX_DATAGRAM:
            client.bind("")  # the system names it, so that it can be answered
        client.connect(where.socket_address)
        return client
    host = {"": "127.0.0.1"}.get(where.host, where.host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = socket.socket(family, where.scheme.socket_type)
    client.settimeout(30)
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
        timeout=60,
        check=False,
    )


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
    """A client that stays is no reason to stay; the last line says what was done."""
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", engine]
    with serve(tmp_path, *arguments) as command:
        with connect(command.addresses[0]) as client:
            process = greeting(client)
            assert (process == command.process.pid) == (engine != "forks")
            client.sendall(b"word\n")
            assert client.recv(64) == b"word\n"
        with connect(command.addresses[0]) as idle:
            greeting(idle)
            status, said = command.stop(signum)
            assert idle.recv(64) == b""
    assert status == 0
    # The connection of the first client may have ended just before the signal, or just after.
    assert re.fullmatch(
        r"portico: stopped after \d+\.\d s: (1 request served, 1 cut off|"
        r"0 requests served, 2 cut off)\n",
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
    assert [line.rpartition(": ")[0] for line in lines] == [
        f"portico: {where}" for where in command.addresses
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
        assert subprocess.check_output(client, text=True, timeout=30) == "PONG\n"


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
        assert path.stat() == living
        assert command.stop()[0] == 0
    assert not path.exists()


# -------------------------------------------------------------------------------------- stopping


def test_a_handler_that_holds_the_serving_thread_is_interrupted(tmp_path: Path) -> None:
    """On the serial engine the handler runs where the signal arrives."""
    arguments = ["application:Stubborn", "tcp://127.0.0.1:0", "--engine", "serial"]
    with serve(tmp_path, *arguments) as command, connect(command.addresses[0]) as client:
        assert client.recv(2) == b"in"
        status, said = command.stop()
        assert client.recv(64) == b"KeyboardInterrupt"
    assert status == 0
    assert said.endswith("s: 0 requests served, 1 cut off\n")


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


def test_children_end_with_the_server(tmp_path: Path) -> None:
    arguments = ["application:Echo", "tcp://127.0.0.1:0", "--engine", "forks"]
    with serve(tmp_path, *arguments) as command, connect(command.addresses[0]) as client:
        child = os.pidfd_open(greeting(client))
        try:
            assert command.stop()[0] == 0
            assert select.select([child], [], [], 30)[0]
        finally:
            os.close(child)


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


def test_the_current_directory_is_left_out_where_python_leaves_it_out(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(PROGRAM)
    ended = run("serve", "application:Echo", "tcp://:0", folder=tmp_path, PYTHONSAFEPATH="1")
    assert ended.returncode == 2
    assert "there is no module 'application'" in ended.stderr


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
        timeout=60,
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
