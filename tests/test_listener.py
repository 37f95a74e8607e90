from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from portico import address, diagnosis, exclusion, listener, socketfile
from portico.address import Scheme
from portico.errors import ListenerError, PorticoError
from portico.holders import Holder
from portico.place import Place
from portico.socketfile import SocketFile
from tests.support import PATIENCE

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM

NOBODYS = "203.0.113.1"
"""An address for documentation (RFC 5737), which no machine has."""


def place(text: str) -> Place:
    return listener.resolve(address.parse(text))


def bound(where: Place) -> tuple[socket.socket, SocketFile | None]:
    """A socket that was bound as a server would do it, and the file that this made."""
    made = socket.socket(where.family, where.address.scheme.socket_type)
    try:
        with diagnosis.explained(where):
            return made, listener.bind(made, where)
    except BaseException:
        made.close()
        raise


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@pytest.fixture(params=["unix", "unix-datagram"])
def unix(request: pytest.FixtureRequest, path: Path) -> Place:
    """The same path as an address for streams, and as one for datagrams."""
    return place(f"{request.param}:{path}")


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Run with a umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


# ------------------------------------------------------------------------------------- resolving


@pytest.mark.parametrize(
    ("text", "family", "name"),
    [
        ("tcp://127.0.0.1:9000", socket.AF_INET, ("127.0.0.1", 9000)),
        ("udp://[::1]:9000", socket.AF_INET6, ("::1", 9000, 0, 0)),
        ("tcp://[fe80::1%1]:9000", socket.AF_INET6, ("fe80::1", 9000, 0, 1)),
        ("unix:/run/a.sock", socket.AF_UNIX, "/run/a.sock"),
        ("unix-datagram:@a", socket.AF_UNIX, b"\0a"),
    ],
)
def test_an_address_has_a_place(text: str, family: socket.AddressFamily, name: object) -> None:
    found = place(text)
    assert (found.family, found.name, found.dual_stack) == (family, name, False)
    assert found.path == (Path(name) if isinstance(name, str) else None)
    assert found.address == address.parse(text)


@pytest.mark.parametrize(
    ("has_ipv6", "expected"),
    [
        (True, (socket.AF_INET6, ("::", 9000, 0, 0), True)),
        (False, (socket.AF_INET, ("0.0.0.0", 9000), False)),
    ],
)
def test_every_address_is_ipv6_and_ipv4_where_there_is_ipv6(
    monkeypatch: pytest.MonkeyPatch, has_ipv6: bool, expected: tuple[object, ...]
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: has_ipv6)
    found = place("tcp://:9000")
    assert (found.family, found.name, found.dual_stack) == expected


def test_a_host_name_means_its_first_address_ipv4_before_ipv6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in socketserver, whose servers are IPv4 ones: a client finds either at the same place."""

    def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET6, STREAM, 6, "", ("::1", 9000, 0, 0)),
            (socket.AF_INET, STREAM, 6, "", ("127.0.0.1", 9000)),
            (socket.AF_INET, STREAM, 6, "", ("127.0.0.2", 9000)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = place("tcp://localhost:9000")
    assert (found.family, found.name) == (socket.AF_INET, ("127.0.0.1", 9000))


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("tcp://a.test:1", socket.EAI_NONAME, "the host name 'a.test' does not resolve; an addr"),
        ("tcp://a.test:1", socket.EAI_AGAIN, "the resolver has no answer for 'a.test' at the mom"),
        ("tcp://[fe80::1%no0]:1", socket.EAI_NONAME, "this machine has no interface 'no0'"),
    ],
)
def test_a_host_without_an_address_is_said_to_have_none(
    monkeypatch: pytest.MonkeyPatch, text: str, number: int, expected: str
) -> None:
    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(number, "as the resolver words it")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ListenerError) as caught:
        place(text)
    assert str(caught.value).startswith(f"cannot listen on {text}: {expected}")
    assert caught.value.errno == number


def test_an_interface_that_is_not_there_has_no_address() -> None:
    """The one name that the resolver knows nothing of on any machine, network or not."""
    with pytest.raises(ListenerError, match="no interface 'no-such-device'"):
        place("tcp://[fe80::1%no-such-device]:9000")


# --------------------------------------------------------------------------------------- binding


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:@{}"])
def test_a_bound_socket_has_its_real_address(text: str) -> None:
    where = place(text.format(f"portico {os.getpid()}"))
    made, file = bound(where)
    with made:
        found = where.address_of(made.getsockname())
        assert place(str(found)).name == made.getsockname()
        assert file is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("text", "serves_ipv4"), [("tcp://:0", True), ("tcp://[::]:0", False)])
def test_an_ipv6_socket_serves_ipv4_if_it_was_asked_to(text: str, serves_ipv4: bool) -> None:
    """Whatever the system does by default."""
    where = place(text)
    made, _ = bound(where)
    with made, socket.socket() as client:
        made.listen()
        assert str(where.address_of(made.getsockname())).startswith(text[:-1])
        refused = client.connect_ex(("127.0.0.1", made.getsockname()[1]))
        assert refused == (0 if serves_ipv4 else errno.ECONNREFUSED)


def test_the_file_of_a_unix_socket_is_for_its_owner_alone(unix: Place, no_umask: None) -> None:
    made, file = bound(unix)
    with made:
        assert file is not None
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_where_a_socket_has_no_mode_the_umask_takes_its_place(path: Path, no_umask: None) -> None:
    """As on the systems that do not pass the socket's mode on to the file."""
    with socket.socket(socket.AF_UNIX) as made:
        with socketfile.narrow_mode(made, by_socket=False):
            made.bind(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.umask(0) == 0


def test_the_file_of_a_dead_server_is_replaced(unix: Place, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, unix.address.scheme.socket_type) as dead:
        dead.bind(str(path))
    made, file = bound(unix)
    with made, socket.socket(socket.AF_UNIX, made.type) as client:
        assert file == SocketFile.at(path)
        client.connect(str(path))


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_the_file_of_a_living_server_is_left_alone(
    unix: Place, path: Path, kind: socket.SocketKind
) -> None:
    """Also that of a server of the other kind, and of one whose backlog is full."""
    with socket.socket(socket.AF_UNIX, kind) as living, socket.socket(socket.AF_UNIX, kind) as peer:
        living.bind(str(path))
        if kind == STREAM:
            living.listen(0)
        peer.connect(str(path))
        before = SocketFile.at(path)
        with pytest.raises(ListenerError, match="in use by this very process"):
            bound(unix)
        assert SocketFile.at(path) == before


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(unix: Place, path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    with pytest.raises(ListenerError, match="a file at this path that is not a socket"):
        bound(unix)
    assert path.lstat() == before


def test_a_stream_socket_listens_from_the_moment_that_its_file_is_there(path: Path) -> None:
    """Somebody else who finds the file would otherwise take it for a dead one."""
    made, _ = bound(place(f"unix:{path}"))
    with made, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with pytest.raises(ListenerError, match="in use"):
            bound(place(f"unix:{path}"))


def test_of_several_that_find_a_dead_server_one_takes_its_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are told; none takes the place of another that is alive."""
    # Whoever is held up with the lock is waited for.
    monkeypatch.setattr(exclusion, "LOCK_PATIENCE", PATIENCE)
    contenders, rounds = 4, 25
    start = threading.Barrier(contenders)
    where = place(f"unix:{path}")

    def contend() -> socket.socket | None:
        start.wait()
        try:
            return bound(where)[0]
        except ListenerError:
            return None

    with ThreadPoolExecutor(contenders) as pool:
        for _ in range(rounds):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
            results = [pool.submit(contend) for _ in range(contenders)]
            winners = [made for result in results if (made := result.result()) is not None]
            try:
                assert len(winners) == 1
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
                    winners[0].settimeout(PATIENCE)
                    winners[0].accept()[0].close()
            finally:
                for made in winners:
                    made.close()


@pytest.mark.parametrize("obstacle", ["held", "unreadable"])
def test_a_dead_server_is_replaced_although_its_directory_cannot_be_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    """A cleaner of temporary files may be kept away with the same lock, for ever."""
    monkeypatch.setattr(exclusion, "LOCK_PATIENCE", 0.02)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        if obstacle == "held":
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            monkeypatch.setattr(os, "open", _refuse)
        made, _ = bound(place(f"unix:{path}"))
        made.close()
    finally:
        os.close(descriptor)


def _refuse(*_: object) -> int:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# ---------------------------------------------------------------------------- the end of the file


def test_the_file_is_removed_by_who_made_it(
    unix: Place, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process has gone meanwhile; a second time does nothing."""
    monkeypatch.chdir(path.parent)
    made, file = bound(place(f"{unix.address.scheme}:{path.name}"))
    monkeypatch.chdir("/")
    with made:
        assert file is not None
        file.remove()
        assert not path.exists()
        file.remove()


def test_a_file_that_has_taken_its_place_stays(unix: Place, path: Path) -> None:
    made, file = bound(unix)
    with made:
        assert file is not None
        path.unlink()
        path.write_text("precious")
        file.remove()
        assert path.read_text() == "precious"


# -------------------------------------------------------------------------- the words for errors


def failure(text: str, number: int) -> ListenerError:
    """What an error of the system becomes at an address."""
    with pytest.raises(ListenerError) as caught, diagnosis.explained(place(text)):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert str(caught.value).startswith(f"cannot listen on {text}: ")
    return caught.value


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("tcp://127.0.0.1:80", errno.EACCES, "no permission for a port below 1024; choose one f"),
        ("udp://127.0.0.1:80", errno.EPERM, "run it with the capability CAP_NET_BIND_SERVICE"),
        ("tcp://127.0.0.1:1024", errno.EACCES, "the system does not permit it"),
        ("tcp://[::1]:80", errno.EAFNOSUPPORT, "this machine has no IPv6"),
        ("tcp://[fe80::1]:80", errno.EINVAL, "needs the interface it belongs to: tcp://[fe80::1%"),
        ("tcp://[fe80::1%1]:80", errno.EINVAL, "this machine has no interface '1'"),
        ("tcp://127.0.0.1:80", errno.EINVAL, os.strerror(errno.EINVAL)),
        ("tcp://127.0.0.1:80", errno.EMFILE, os.strerror(errno.EMFILE)),
        ("unix:/nowhere/a.sock", errno.ENOENT, "there is no directory /nowhere; make it first"),
        ("unix:/a.sock", errno.ENOENT, os.strerror(errno.ENOENT)),
        ("unix:/etc/passwd/a", errno.ENOTDIR, "/etc/passwd is not a directory"),
        ("unix:/run/a.sock", errno.EROFS, os.strerror(errno.EROFS)),
        ("unix:/run/a.sock", errno.EACCES, "no permission to make a socket in /run; choose a"),
    ],
)
def test_an_error_is_said_with_what_would_help(
    monkeypatch: pytest.MonkeyPatch, text: str, number: int, expected: str
) -> None:
    monkeypatch.setattr(diagnosis, "_first_unprivileged_port", lambda: 1024)
    assert expected in str(failure(text, number))


def test_an_address_of_another_machine_is_not_to_be_had() -> None:
    with pytest.raises(ListenerError, match=f"{NOBODYS} is not an address of this machine"):
        bound(place(f"tcp://{NOBODYS}:0"))


def test_an_error_is_one_that_programs_catch_already() -> None:
    error = failure("tcp://127.0.0.1:80", errno.EMFILE)
    assert isinstance(error, OSError)
    assert isinstance(error, PorticoError)
    assert isinstance(error.__cause__, OSError)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), diagnosis.explained(place("tcp://127.0.0.1:80")):
        raise ZeroDivisionError


def test_the_first_port_for_everybody_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    assert diagnosis._first_unprivileged_port() == int(here.read_text())
    monkeypatch.setattr(Path, "read_text", _refuse)
    assert diagnosis._first_unprivileged_port() == 1024


@pytest.mark.parametrize("scheme", [each for each in Scheme if not each.is_inherited])
def test_an_address_in_use_names_the_process(scheme: Scheme, path: Path) -> None:
    program = (
        "import socket, sys;"
        "unix, kind, name = sys.argv[1:];"
        "made = socket.socket(socket.AF_UNIX if int(unix) else socket.AF_INET, int(kind));"
        "made.bind(name if int(unix) else (name, 0));"
        "int(kind) == socket.SOCK_STREAM and made.listen();"
        "print(made.getsockname() if int(unix) else made.getsockname()[1], flush=True);"
        "sys.stdin.read()"
    )
    name = str(path) if scheme.is_unix else "127.0.0.1"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            program,
            str(int(scheme.is_unix)),
            str(int(scheme.socket_type)),
            name,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        told = other.stdout.readline().strip()
        text = f"{scheme}:{told}" if scheme.is_unix else f"{scheme}://127.0.0.1:{told}"
        command = Path(f"/proc/{other.pid}/comm").read_text().strip()
        with pytest.raises(ListenerError) as caught:
            bound(place(text))
    expected = f"cannot listen on {text}: in use by {command} (process {other.pid})"
    assert str(caught.value) == expected
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("holders", "expected"),
    [
        ((Holder(7, "nginx"), Holder(8, "nginx")), "in use by nginx (process 7) and 1 more"),
        ((Holder(7, "nginx"), Holder(os.getpid(), "x")), "in use by this very process; is the"),
        ((), "in use; `ss -ltnp`, run as root, names the process"),
    ],
)
def test_who_could_be_asked_is_named(
    monkeypatch: pytest.MonkeyPatch, holders: tuple[Holder, ...], expected: str
) -> None:
    monkeypatch.setattr(diagnosis, "find_holders", lambda *_, **__: holders)
    assert expected in str(failure("tcp://127.0.0.1:80", errno.EADDRINUSE))


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("tcp://127.0.0.1:80", "ss -ltnp"),
        ("udp://127.0.0.1:80", "ss -lunp"),
        ("unix:@a", "ss -lxp"),
        ("unix-datagram:@a", "ss -lxp"),
    ],
)
def test_where_nobody_can_be_named_the_command_is(
    monkeypatch: pytest.MonkeyPatch, text: str, command: str
) -> None:
    monkeypatch.setattr(diagnosis, "find_holders", lambda *_, **__: ())
    assert f"in use; `{command}`, run as root" in str(failure(text, errno.EADDRINUSE))
