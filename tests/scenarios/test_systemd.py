"""A service at home under systemd: its sockets, and what it tells.

The sockets come from systemd's own `systemd-socket-activate`.  What is told goes to a Unix datagram
socket of the test's, which stands in for systemd's: no systemd runs here.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from tests.support import PATIENCE
from tests.tls import Authority

SERVE = [sys.executable, "-m", "portico", "serve", "--log-level", "error"]

PROGRAM = """
import os
import subprocess
import sys
import portico

class Shout(portico.BaseRequestHandler):
    def handle(self):
        if isinstance(self.request, tuple):
            word, listener = self.request
            listener.sendto(word.upper(), self.client_address)
        else:
            self.request.sendall(self.request.recv(64).upper())

CHILD = '''
import os
print([name for name in os.environ if name.startswith(("LISTEN", "NOTIFY", "WATCHDOG"))])
print([number for number in range(3, 10) if os.path.exists(f"/proc/self/fd/{number}")
       and os.readlink(f"/proc/self/fd/{number}").startswith("socket")])
'''

class Inherited(portico.StreamRequestHandler):
    '''What another program that a handler runs has of systemd.'''
    def handle(self):
        self.wfile.write(subprocess.check_output([sys.executable, "-c", CHILD], close_fds=False))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "application.py").write_text(PROGRAM)
    return tmp_path


def launcher() -> str:
    found = shutil.which("systemd-socket-activate")
    assert found, "systemd-socket-activate is missing: it belongs to the Debian package systemd"
    return found


class Activated:
    """A launcher that becomes portico when the first client comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.log: IO[str] = process.stderr

    def next_line(self, begin: str) -> str:
        for line in self.log:
            if line.startswith(begin):
                return line.removeprefix(begin).rstrip()
        raise AssertionError(f"no line begins with {begin!r}")

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, said


@contextmanager
def activated(
    folder: Path, options: list[str], listeners: list[str], *arguments: str
) -> Iterator[Activated]:
    """Have the launcher listen, and serve with these arguments once a client comes."""
    listening = [part for each in listeners for part in ("--listen", each)]
    with subprocess.Popen(
        [launcher(), *options, *listening, *SERVE, *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            made = Activated(process)
            for each in listeners:
                made.next_line(f"Listening on {each} as")
            yield made
        finally:
            process.kill()


class Ports:
    """Gives ports for the launcher, which cannot let the system choose one.

    Each is held by a socket that only the launcher's may share an address with, because both say
    so and this one never listens: nobody else is given the port in the meantime.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def free(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
        made = self._held.enter_context(socket.socket(socket.AF_INET, kind))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])

    def release(self) -> None:
        """Leave all to the launcher: of two that hold a port, datagrams would go to either."""
        self._held.close()


@pytest.fixture
def ports() -> Iterator[Ports]:
    made = Ports()
    yield made
    made.release()


def shout(client: socket.socket, word: bytes = b"word") -> None:
    client.settimeout(PATIENCE)
    client.send(word)
    assert client.recv(64) == word.upper()


# --- sockets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks", "serial"])
def test_streams_of_one_name_are_served_and_left_to_systemd(
    folder: Path, ports: Ports, engine: str
) -> None:
    """A client that comes before the program is served by it, and one after it may wait."""
    port, path = ports.free(), folder / "a.sock"
    listeners = [f"127.0.0.1:{port}", str(path)]
    arguments = ["application.py:Shout", "systemd:web", "--engine", engine]
    with activated(folder, ["--fdname=web:web"], listeners, *arguments) as service:
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(str(path))
            assert service.next_line("portico: ready on ") == f"tcp://127.0.0.1:{port}"
            assert service.next_line("portico: ready on ") == f"unix:{path}"
            shout(early)
        with socket.create_connection(("127.0.0.1", port)) as client:
            shout(client)
        status, said = service.stop()
        assert status == 0, said
        assert f"portico: unix:{path}: 1 request served\n" in said
        assert "2 requests served\n" in said
    assert path.is_socket()  # systemd's, to be removed by systemd


@pytest.mark.parametrize("engine", ["threads", "green", "forks", "serial"])
def test_datagrams_are_served_from_the_first_on(folder: Path, ports: Ports, engine: str) -> None:
    port = ports.free(socket.SOCK_DGRAM)
    listeners = [f"127.0.0.1:{port}", f"[::1]:{port}"]
    arguments = ["application.py:Shout", "systemd:dns", "--engine", engine]
    with activated(folder, ["--datagram", "--fdname=dns:dns"], listeners, *arguments) as service:
        ports.release()
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.connect(("127.0.0.1", port))
            shout(client)
            shout(client, b"again")
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.connect(("::1", port))
            shout(client)
        assert service.next_line("portico: ready on ") == f"udp://127.0.0.1:{port}"
        assert service.next_line("portico: ready on ") == f"udp://[::1]:{port}"
        status, said = service.stop()
        assert status == 0, said
        assert "3 requests served\n" in said


def test_tls_is_spoken_over_a_passed_socket(
    folder: Path, ports: Ports, authority: Authority
) -> None:
    pair = authority.issue("127.0.0.1")
    port = ports.free()
    arguments = ["application.py:Shout", "systemd+tls:web", "--cert", str(pair.certificate)]
    arguments += ["--key", str(pair.key)]
    with activated(folder, ["--fdname=web"], [f"127.0.0.1:{port}"], *arguments) as service:
        context = authority.client()
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.settimeout(PATIENCE)
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                shout(client)
        assert service.next_line("portico: ready on ") == f"tls://127.0.0.1:{port}"
        assert service.stop()[0] == 0


def test_a_passed_socket_has_a_number_as_well(folder: Path, ports: Ports) -> None:
    port = ports.free()
    arguments = ["application.py:Shout", "fd://3"]
    with activated(folder, [], [f"127.0.0.1:{port}"], *arguments) as service:
        with socket.create_connection(("127.0.0.1", port)) as client:
            shout(client)
        assert service.stop()[0] == 0


def test_inetd_passes_one_as_standard_input(folder: Path, ports: Ports) -> None:
    port = ports.free()
    arguments = ["application.py:Shout", "fd://0"]
    with activated(folder, ["--inetd"], [f"127.0.0.1:{port}"], *arguments) as service:
        with socket.create_connection(("127.0.0.1", port)) as client:
            shout(client)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0


def test_a_name_that_was_not_passed_ends_with_those_that_were(folder: Path, ports: Ports) -> None:
    port = ports.free()
    options = ["--fdname=web:admin"]
    listeners = [f"127.0.0.1:{port}", str(folder / "admin")]
    with activated(folder, options, listeners, "application.py:Shout", "systemd:wbe") as service:
        with socket.create_connection(("127.0.0.1", port)):
            assert service.next_line("portico: error: ") == (
                "systemd:wbe: systemd passed no socket of this name; passed: web, admin"
            )
            assert service.process.wait(PATIENCE) == 2


def test_what_a_handler_runs_has_nothing_of_systemd(folder: Path, ports: Ports) -> None:
    port = ports.free()
    with activated(
        folder,
        ["--setenv=NOTIFY_SOCKET=@nobody listens", "--setenv=WATCHDOG_USEC=1000000"],
        [f"127.0.0.1:{port}"],
        "application.py:Inherited",
        "fd://3",
    ) as service:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(PATIENCE)
            with client.makefile() as told:
                assert told.read() == "[]\n[]\n"
        assert service.stop()[0] == 0


# --- notifications ------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
def test_a_service_that_cannot_start_tells_why(folder: Path, more: list[str]) -> None:
    """`systemctl status` shows it beside the unit."""
    path = f"{folder}/notify"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        manager.settimeout(PATIENCE)
        manager.bind(path)
        where = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [*SERVE, "application.py:Shout", where, *more],
            cwd=folder,
            env={**os.environ, "NOTIFY_SOCKET": path},
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 2
        assert manager.recv(4096).decode().startswith(f"STATUS=failed: cannot listen on {where}:")


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_service_tells_when_it_is_ready_alive_reloading_and_stopping(
    folder: Path, kind: str
) -> None:
    path = f"{folder}/notify"
    address = path if kind == "path" else f"@portico scenario {os.getpid()}"
    with ExitStack() as closing:
        manager = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.settimeout(PATIENCE)
        manager.bind(path if kind == "path" else f"\0{address[1:]}")
        process = closing.enter_context(
            subprocess.Popen(
                [*SERVE, "application.py:Shout", "tcp://127.0.0.1:0", "udp://127.0.0.1:0"],
                cwd=folder,
                env={**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        closing.callback(process.kill)
        seen = [manager.recv(4096).decode()]
        while not seen[-1].startswith("READY=1"):
            seen.append(manager.recv(4096).decode())
        first, second = seen[-1].removeprefix("READY=1\nSTATUS=ready on tcp:").split(", udp:")
        for kind_of, where in ((socket.SOCK_STREAM, first), (socket.SOCK_DGRAM, second)):
            with socket.socket(socket.AF_INET, kind_of) as client:
                client.connect(("127.0.0.1", int(where.rpartition(":")[2])))
                shout(client)
        while seen.count("WATCHDOG=1") < 3:
            seen.append(manager.recv(4096).decode())
        process.send_signal(signal.SIGHUP)  # as Type=notify-reload does, which waits for both
        while not seen[-1].startswith("RELOADING=1\nMONOTONIC_USEC="):
            seen.append(manager.recv(4096).decode())
        while not seen[-1].startswith("READY=1"):
            seen.append(manager.recv(4096).decode())
        process.send_signal(signal.SIGTERM)
        while not seen[-1].startswith("STOPPING=1"):
            seen.append(manager.recv(4096).decode())
        assert "EXTEND_TIMEOUT_USEC=" in seen[-1]
        assert process.wait(PATIENCE) == 0


def end(pid_file: Path) -> None:
    """End the process whose number is in a file, if there is one: nobody else knows it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


def test_workers_keep_the_passed_socket_through_a_reload_and_a_successor(
    folder: Path, ports: Ports
) -> None:
    """And systemd is told of each step; the successor is the main process from then on."""
    port = ports.free()
    address = f"@portico workers {os.getpid()}"
    options = ["--fdname=web", f"--setenv=NOTIFY_SOCKET={address}"]
    with ExitStack() as closing:
        manager = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.settimeout(PATIENCE)
        manager.bind(f"\0{address[1:]}")

        def told() -> str:
            return manager.recv(4096).decode()

        def ask() -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                shout(client)

        pid_file = folder / "portico.pid"
        closing.callback(end, pid_file)
        service = closing.enter_context(
            activated(
                folder,
                options,
                [f"127.0.0.1:{port}"],
                *("application.py:Shout", "systemd:web"),
                *("--workers", "2", "--pid-file", "portico.pid"),
            )
        )
        ready = f"READY=1\nSTATUS=ready on tcp://127.0.0.1:{port}"
        ask()
        assert told() == ready
        service.process.send_signal(signal.SIGHUP)
        assert told().startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert told() == ready
        ask()
        service.process.send_signal(signal.SIGUSR2)
        # From two processes, so in either order.
        first, second = sorted([told(), told()])
        assert second == ready
        successor = int(first.removeprefix("MAINPID="))
        ended = os.pidfd_open(successor)
        closing.callback(os.close, ended)
        service.process.wait(PATIENCE)  # what it says is read by nobody
        assert pid_file.read_text() == f"{successor}\n"
        ask()
        os.kill(successor, signal.SIGTERM)
        assert told().startswith("STOPPING=1\nEXTEND_TIMEOUT_USEC=")
        assert select.select([ended], [], [], PATIENCE)[0]
        assert not pid_file.exists()
